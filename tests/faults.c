/* A file system that lacks something, for the files below FAULTS_ROOT: LD_PRELOAD this, and name in FAULTS what fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static int below(const char *path) {
    const char *root = getenv("FAULTS_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fails(const char *name) {
    const char *found = getenv("FAULTS");
    return found && strstr(found, name) != NULL;
}

static int open_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static int is_folder(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE(number) do { errno = number; return -1; } while (0)

int flock(int descriptor, int operation) {
    if (open_below(descriptor)) {
        if (fails("flock")) REFUSE(ENOLCK);
        if (fails("folders") && is_folder(descriptor)) REFUSE(EBADF);
    }
    return NEXT(flock)(descriptor, operation);
}

static int control(int (*next)(int, int, ...), int descriptor, int command, void *argument) {
    int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
    if (locks && fails("bytes") && open_below(descriptor)) REFUSE(ENOLCK);
    return next(descriptor, command, argument);
}

int fcntl(int descriptor, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(NEXT(fcntl), descriptor, command, argument);
}

int fcntl64(int descriptor, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(NEXT(fcntl64), descriptor, command, argument);
}

static int has_no_memory(int flags, int descriptor) {
    return (flags & MAP_SHARED) && descriptor >= 0 && fails("memory") && open_below(descriptor);
}

void *mmap(void *start, size_t length, int protection, int flags, int descriptor, off_t offset) {
    if (has_no_memory(flags, descriptor)) return errno = ENODEV, MAP_FAILED;
    return NEXT(mmap)(start, length, protection, flags, descriptor, offset);
}

void *mmap64(void *start, size_t length, int protection, int flags, int descriptor, off64_t offset) {
    if (has_no_memory(flags, descriptor)) return errno = ENODEV, MAP_FAILED;
    return NEXT(mmap64)(start, length, protection, flags, descriptor, offset);
}

int symlink(const char *target, const char *path) {
    if (fails("links") && below(path)) REFUSE(EPERM);
    return NEXT(symlink)(target, path);
}

int fsync(int descriptor) {
    if (fails("fsync") && open_below(descriptor)) REFUSE(ENOSYS);
    return NEXT(fsync)(descriptor);
}

int rename(const char *from, const char *to) {
    if (fails("rename") && below(to)) REFUSE(EOPNOTSUPP);
    return NEXT(rename)(from, to);
}

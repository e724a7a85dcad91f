"""Makes a sandbox and runs a Python program in it. This file is a program of its own: it imports the standard library alone.

Four processes, each the parent of the next: this one, outside, which writes the map of users; the maker, in new namespaces
(user, mounts, processes, network, System V, host name), which builds the file system; the first process of the new process
namespace, with which all processes of the sandbox end; and the program. What is wrong before the program begins is said on
stderr, which the program does not have.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Any

NEW = (
    0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000
)  # user, mounts, pids, network, IPC, UTS
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC = 2, 4, 4096, 16384
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY, MS_PRIVATE = 442, -100, 0x8000, 1, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY = 65534
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
ROOT, SCRATCH = "/tmp", "/tmp"  # of the sandbox, seen from outside; its folder to work in, seen from inside
ADVICE = (
    "The sandbox needs user namespaces and Linux 5.14 (in a container: --security-opt seccomp=unconfined, or a profile that "
    "allows unshare and mount; on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0)"
)

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    os.umask(0o022)  # another user than this one may have to read the folders of the sandbox
    _die_with_parent(given["parent"])
    (ready, tell_ready), (go, tell_go) = os.pipe(), os.pipe()
    own = os.getpid()
    maker = os.fork()
    if not maker:
        _die_with_parent(own)
        _do(lambda: _make(given, ready=tell_ready, go=go))
    os.close(tell_ready)
    if os.read(ready, 1):
        _do(lambda: _map_users(maker))
        os.write(tell_go, b"g")
    os.close(tell_go)
    os._exit(_wait(maker))


def _do(step: Any) -> None:
    try:
        step()
    except OSError as error:
        print(f"{error.filename or 'the sandbox'}: {error.strerror}. {ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)


def _map_users(maker: int) -> None:
    """Root becomes nobody in the sandbox, because no limit of processes holds for root. Others stay who they are."""
    privileged = os.geteuid() == 0
    if not privileged:
        _write(f"/proc/{maker}/setgroups", "deny")
    for name, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        also = f"{NOBODY} {NOBODY} 1\n" if privileged else ""
        _write(f"/proc/{maker}/{name}_map", f"{own} {own} 1\n{also}")


def _make(given: dict[str, Any], *, ready: int, go: int) -> None:
    privileged = os.geteuid() == 0
    _checked("new namespaces", libc.unshare(NEW))
    os.write(ready, b"r")
    if not os.read(go, 1):
        os._exit(1)
    _build(given["python"], given["prefix"], given["files"])
    keep = {0, 1, 2, *given["fds"]}
    alive, end = os.pipe()
    first = os.fork()
    if not first:
        os.close(end)
        _die_with_parent(0)  # in its namespace it has no parent, so it cannot see that way whether the maker lives
        maker_lives = select.poll()
        maker_lives.register(alive, select.POLLIN)
        if maker_lives.poll(0):
            os._exit(1)
        program = os.fork()
        if not program:
            _do(lambda: _run(given, privileged, keep))
        os._exit(_wait(program))  # and with it the kernel ends all others
    os._exit(_wait(first))


def _build(python: str, prefix: str, size: int) -> None:
    """A file system of its own: the system's programs, Python, a few devices, and a scratch folder of `size` bytes."""
    attributes = struct.pack("QQQQ", READ_ONLY, 0, MS_PRIVATE, 0)
    _checked("a read-only file system", libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, 32))
    inside = [path for path in (*SYSTEM, *DEVICES) if os.path.exists(path)]
    if not prefix.startswith("/usr"):
        inside.append(prefix)
    # Opened before the new root hides them: the new root may be mounted above them.
    opened = {path: os.open(path, os.O_PATH) for path in inside if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in inside if os.path.islink(path)}
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID, f"size={size + (1 << 20)},mode=755")
    for path, to in links.items():
        os.symlink(to, ROOT + path)
    for path, handle in opened.items():
        target = ROOT + path
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(f"/proc/self/fd/{handle}", target, None, MS_BIND | MS_REC)
        os.close(handle)
    os.makedirs(ROOT + SCRATCH, exist_ok=True)
    _checked("a read-only root", libc.syscall(MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, 32))
    _mount("tmpfs", ROOT + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},nr_inodes=1024,mode=1777")
    os.chroot(ROOT)  # behind a chroot the kernel makes no further user namespaces
    os.chdir(SCRATCH)
    if not os.access(python, os.X_OK):
        raise OSError(0, "Python is not inside", python)


def _run(given: dict[str, Any], privileged: bool, keep: set[int]) -> None:
    for fd in range(3, 256):
        if fd not in keep:
            with contextlib.suppress(OSError):  # it was not open
                os.close(fd)
    if privileged:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for name, value in given["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    _checked("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execve(given["python"], [given["python"], "-s", "-S", "-P", "-c", *given["program"]], {"PYTHONHASHSEED": "0"})


def _wait(pid: int) -> int:
    """The exit code of a child. Others that end meanwhile are reaped."""
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _die_with_parent(parent: int) -> None:
    """Have the kernel end this process with its parent, also where the parent has ended before this call."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    raw: Sequence[bytes | None] = [source.encode(), target.encode(), kind.encode() if kind else None]
    _checked(f"mount {target}", libc.mount(*raw, ctypes.c_ulong(flags), data.encode()))


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _checked(what: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    main()

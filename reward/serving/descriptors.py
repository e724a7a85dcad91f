"""How many connections a server can have beside the files, pipes and sockets of its own work."""

import resource

MOST = 65_536  # descriptors that are asked for; where the limit is a billion, some programs walk through all of them
OWN = 512  # kept for pipes of children, the ledger, artifacts, and requests to others
BACKLOG = 1024  # connections that may wait to be accepted


def raise_limit() -> int:
    """Raise the soft limit of descriptors as far as the hard one lets it; returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY:
        return MOST
    if soft >= wanted:
        return min(soft, MOST)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def share(wanted: int, limit: int) -> tuple[int, int]:
    """How many of the `wanted` connections fit under a limit of descriptors, and how long the queue before them may be.

    All that wait in the queue may be accepted at once, and once more before those that have no place are closed.
    """
    connections = max(8, min(wanted, (limit - OWN) // 2))
    return connections, max(8, min(BACKLOG, (limit - OWN - connections) // 2))

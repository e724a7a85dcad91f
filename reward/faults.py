"""What can go wrong between a client and a server. Each class stands for another thing that can be done about it."""


class RewardUnavailable(Exception):
    """The reward server cannot be used now. No score was guessed, and it is safe to ask again later."""


class RewardRefused(Exception):
    """The server refuses this request. Asking again does not help until something is put right.

    `status` is the HTTP status of its answer, if there was one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TooLarge(Exception):
    """The request is too large for the server. It may take the same items in smaller requests."""


class Fault(Exception):
    """One attempt failed, and another one may succeed. `busy`: the server works and asks for `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0, *, busy: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.busy = busy


class HttpError(Exception):
    """A request got no whole answer. The message leaves the address out, because it may be a secret."""


class ConnectError(HttpError):
    """There is no connection. Nothing listens at the address, or it could not prove its identity."""


class LateAnswer(HttpError):
    """The time was over before the whole answer had come."""


class ProtocolError(HttpError):
    """What came is no answer by HTTP/1.1 to this request, or it is too long."""

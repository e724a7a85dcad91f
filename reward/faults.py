"""What can go wrong between a client and a server, by what may be done about it."""


class RewardUnavailable(Exception):
    """The reward server cannot be used now. Nothing was scored by guess; asking again later is safe."""


class RewardRefused(Exception):
    """The server answers, but not to this: asking again will not help until something is put right.

    `status`: of HTTP, where that is what it answers.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class TooLarge(Exception):
    """The server does not take this request; it may take its items in smaller ones."""


class Fault(Exception):
    """One attempt failed in a way that another may not. `busy`: the server is well and asks for `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float = 0.0, *, busy: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.busy = busy


class HttpError(Exception):
    """An exchange by HTTP came to no end. The address may be a secret, so it stands in no text."""


class ConnectError(HttpError):
    """No connection: nothing listens there, or it does not prove to be who it should be."""


class LateAnswer(HttpError):
    """The time was over before the whole answer was there."""


class ProtocolError(HttpError):
    """What came is no answer to this request by HTTP/1.1, or is longer than any answer may be."""

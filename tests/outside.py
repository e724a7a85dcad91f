"""What a run does not start itself: a reward server, and a network between the two that is not always there."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[str]:
    """A reward server that no run started, in a thread of this process; its URL. It has ended when the block ends."""
    import uvicorn  # here, since the quick tests that want the rest of this module should not wait for it

    from reward import server
    from reward.app import build_app
    from reward.openrlhf import Unrender

    listener = server.bind("127.0.0.1", port)
    options = server.parser().parse_args(["--model", str(folder), "--dtype", "float32"])
    app = build_app(
        server.load(options), max_body=options.max_body_mib * 2**20, max_items=options.max_items,
        max_waiting=options.max_waiting, unrender=Unrender(None),
    )  # fmt: skip
    serving = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=serving.run, args=([listener],))
    thread.start()
    try:
        until(lambda: serving.started, 60)
        yield server.url(listener)
    finally:
        serving.should_exit = serving.force_exit = True  # as a kill does, it answers nobody any more
        thread.join()
        listener.close()


class Relay:
    """Passes connections on to the server at `target`, a URL that may be changed.

    While it `flaps`, it cuts all connections from time to time and takes none for a while.
    """

    UP, DOWN = 0.4, 0.5  # seconds

    def __init__(self, target: str) -> None:
        self.target, self.flaps = target, False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cuts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._pass_on(self.target, time.monotonic() + self.UP)
            self._refuse(time.monotonic() + self.DOWN)

    def _pass_on(self, target: str, until: float) -> None:
        ends: dict[socket.socket, socket.socket] = {}
        port = int(target.rpartition(":")[2])
        while target == self.target and not self._stop.is_set() and not (self.flaps and time.monotonic() > until):
            for ready in select.select([self._listener, *ends], [], [], 0.02)[0]:
                if ready is self._listener:
                    near, far = self._listener.accept()[0], socket.create_connection(("127.0.0.1", port))
                    ends |= {near: far, far: near}
                elif ready in ends:
                    with contextlib.suppress(OSError):  # either side may have gone
                        if data := ready.recv(1 << 16):
                            ends[ready].sendall(data)
                            continue
                    for end in (ends.pop(ready), ready):
                        ends.pop(end, None)
                        end.close()
        self.cuts += bool(ends)
        for end in ends:
            end.close()

    def _refuse(self, until: float) -> None:
        while self.flaps and time.monotonic() < until:
            if select.select([self._listener], [], [], 0.02)[0]:
                self._listener.accept()[0].close()


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for what another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)

"""The service in a thread of the test's own process, on the miniature."""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path

from mini import TINY, overrides
from rich.console import Console

from selfplay import orders
from selfplay.daemon import Daemon
from selfplay.display import Display
from selfplay.store import Store


class Served:
    """A daemon in a thread of its own, and the ledger through which it is spoken to."""

    def __init__(self, world: Path, run_dir: Path, *more: str, config: Path = TINY) -> None:
        self.said = io.StringIO()
        self.run_dir, self._config, self._settings = run_dir, config, [*overrides(world), *more]
        self.start()
        self.until((run_dir / "ledger.sqlite").is_file, "a ledger")
        self.store = Store(run_dir)
        self.until(self.state, "the first word of the service")

    def start(self, *more: str) -> None:
        """Start; after `stop` too."""
        display = Display(Console(file=self.said, width=200))
        self.daemon = Daemon(self._config, [*self._settings, *more], self.run_dir, display)
        self.thread = threading.Thread(target=self.daemon.serve)
        self.thread.start()

    def until(self, condition: Callable[[], object], what: str, timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.thread.is_alive(), f"ended before {what}:\n{self.said.getvalue()}"
            assert time.monotonic() < deadline, f"{what} never happened:\n{self.said.getvalue()}"
            time.sleep(0.02)

    def state(self) -> str:
        return (self.store.state("service") or {}).get("state", "")

    def rounds(self) -> list[str]:
        return [row["state"] for row in self.store.rounds()]

    def order(self, kind: str, timeout: float = 120, **arguments: object) -> tuple[str, str]:
        """Give an order and wait for what comes of it."""
        number = orders.submit(self.store, kind, arguments, "test")

        def row():
            return next(r for r in self.store.orders() if r["id"] == number)

        self.until(lambda: row()["state"] != "pending", f"an answer to {kind}", timeout)
        return row()["state"], row()["result"]

    def reload(self, *settings: str) -> None:
        """Have the service take over these settings, instead of those of an earlier reload."""
        self.daemon._overrides = [*self._settings, *settings]
        assert self.order("reload")[0] == "done"

    def next_round(self) -> Path:
        """Order a round and wait until it has begun; its folder."""
        before = len(self.rounds())
        assert self.order("run")[0] == "done"
        self.until(lambda: len(self.rounds()) > before, "the next round")
        return self.run_dir / "rounds" / f"{before + 1:04d}"

    def stop(self) -> None:
        self.daemon.stop()
        self.thread.join(120)
        assert not self.thread.is_alive()

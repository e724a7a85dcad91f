"""The service in the test's own process: in a thread, on the miniature; or step by step, with rounds that only pretend."""

import contextlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mini import TINY, overrides
from rich.console import Console

from selfplay.reporting.terminal import Display
from selfplay.rounds.run import Run
from selfplay.service import daemon, orders
from selfplay.service.daemon import Daemon
from selfplay.storage.ledger import Store

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


def waiting(store: Store) -> list[dict[str, Any]]:
    """The orders that wait, oldest first, with their arguments."""
    return [store.order(row["id"]) for row in store.pending()]


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
            return self.store.order(number)

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


class Bare(Run):
    """A run of which nothing is open but its ledger, which is the service's."""

    def __enter__(self) -> Run:
        assert self._given_store is not None
        self.store = self._given_store
        return self

    def __exit__(self, *_: object) -> None:
        pass


class World:
    """A daemon over a bare run, a clock that is set by hand, and `turn` for one turn of its loop.

    Its rounds do what `work` does, and end as `outcome` says.
    """

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
        self.now, self.run_dir, self._settings = NOON, run_dir, more
        self.ran: list[int] = []
        self.work: Callable[[], object] = lambda: None
        self.outcome = "promoted"
        monkeypatch.setattr(daemon, "POLL_SECONDS", 0)
        monkeypatch.setattr(daemon, "Run", Bare)
        monkeypatch.setattr(daemon, "run_round", self._round)
        monkeypatch.setattr(daemon, "cancel_round", lambda run: self.close("cancelled"))
        monkeypatch.setattr(Display, "round_table", lambda display, report: None)
        run_dir.mkdir(exist_ok=True)
        self.store = Store(run_dir)
        self.made()

    def made(self) -> Daemon:
        """A daemon that has not had a turn yet; another one after a kill."""
        if (before := getattr(self, "daemon", None)) and before._lock:
            before._lock.__exit__()  # as a kill does
        said = Display(Console(file=(self.run_dir / "said").open("a")))
        self.daemon = Daemon(TINY, list(self._settings), self.run_dir, said, clock=lambda: self.now)
        return self.daemon

    def opened(self) -> "World":
        self.daemon._open_ledger()
        self.daemon._open_run()
        return self

    def _round(self, run: Run) -> SimpleNamespace:
        if self.store.unfinished() is None:
            self.open()
        self.ran.append(len(self.store.rounds()))
        self.work()
        return self.close(self.outcome)

    def open(self) -> None:
        self.store.open_round(len(self.store.rounds()) + 1, 0, (0, 0), "f", {})

    def close(self, state: str) -> SimpleNamespace:
        self.store.close_round(len(self.store.rounds()), state, 0, ["it is longer"] if state == "rejected" else [])
        return SimpleNamespace(outcome=state, reasons=[])

    def turn(self) -> str:
        self.daemon._turn()
        state: str = self.daemon.progress.get("state", "")
        return state

    def order(self, kind: str, **arguments: object) -> tuple[str, str]:
        number = orders.submit(self.store, kind, arguments, "test")
        self.daemon._between_rounds()
        row = self.store.order(number)
        return row["state"], row["result"]

    def events(self, kind: str) -> list[str]:
        return [event["text"] for event in self.store.events() if event["kind"] == kind]


@contextlib.contextmanager
def webhook(*statuses: int) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that takes alerts, with these statuses one after another and then 200; yields its URL and what it got."""
    got: list[tuple[str, Any]] = []
    left = list(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(left.pop(0) if left else 200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/secret", got
    finally:
        server.shutdown()
        server.server_close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

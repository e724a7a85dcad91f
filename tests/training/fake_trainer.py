"""The trainer's service over a child that only answers as told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini import TINY

from selfplay.config import load
from selfplay.training.service import Trainer


class FakeChild:
    """Stands in for the trainer process. `ends`: how it ends each order, a result, an exception, or what gives one."""

    ends: list[Any]
    log: list[str]
    """What the controller did with trainer and engine, in order."""
    argv: list[list[str]]
    env: list[dict[str, str]]

    def __init__(self, name: str, argv: list[str], *, env: dict[str, str], **settings: Any) -> None:
        self.alive, self._sent = False, {}
        self.argv.append(argv)
        self.env.append(env)

    def start(self) -> None:
        self.log.append("start")
        self.alive = True

    def stop(self, grace: float = 5.0) -> None:
        self.log.append("stop")
        self.alive = False

    def send(self, order: str, **fields: Any) -> int:
        self.log.append(f"send {order}")
        self._sent[len(self._sent)] = (order, fields)
        return len(self._sent) - 1

    def result(self, number: int, on_event: Callable[[dict[str, Any]], None]) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        order, fields = self._sent[number]
        return end(order, fields, on_event) if callable(end) else end

    def order(self, order: str, **fields: Any) -> Any:
        return self.result(self.send(order, **fields), lambda event: None)


class Engine:
    """Stands in for the engine beside the trainer."""

    loaded = True

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def sleep(self) -> None:
        self._log.append("engine sleeps")

    def wake(self) -> None:
        self._log.append("engine wakes")


class World:
    """A trainer over fake children that end their orders as told."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self.log, self.events = [], []  # type: list[str], list[tuple[str, str]]
        self.config = load(TINY, list(settings))
        self.engine = Engine(self.log)
        self.trainer = Trainer(self.config, folder, self.engine, lambda kind, text: self.events.append((kind, text)))

    def ends(self, *ends: Any) -> "World":
        FakeChild.ends, FakeChild.log, FakeChild.argv, FakeChild.env = list(ends), self.log, [], []
        self.log.clear()
        return self


COLOCATED = ("placement.colocated=true",)

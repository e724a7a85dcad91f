"""The service on the miniature: real rounds under orders, and its own decisions when rounds fail."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mini import TINY, nothing_left, overrides
from rich.console import Console

from selfplay import orders
from selfplay.daemon import Daemon
from selfplay.display import Display
from selfplay.errors import InputError, SelfplayError
from selfplay.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Served:
    """A daemon in a thread of its own, and the ledger through which it is spoken to."""

    def __init__(self, world: Path, run_dir: Path, *more: str, config: Path = TINY) -> None:
        self.said = io.StringIO()
        self.run_dir = run_dir
        display = Display(Console(file=self.said, width=200))
        self.daemon = Daemon(config, [*overrides(world), *more], run_dir, display)
        self.thread = threading.Thread(target=self.daemon.serve)
        self.thread.start()
        self.until(lambda: (run_dir / "ledger.sqlite").is_file(), "a ledger")
        self.store = Store(run_dir)
        self.until(self.state, "the first word of the service")

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

    def stop(self) -> None:
        self.daemon.stop()
        self.thread.join(120)
        assert not self.thread.is_alive()


@pytest.fixture
def served(mini_world, tmp_path) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*more: str, run_dir: Path = tmp_path / "run") -> Served:
        started.append(Served(mini_world, run_dir, *more))
        return started[-1]

    yield start
    for each in started:
        if each.thread.is_alive():
            each.stop()
        each.store.close()
    for each in started:
        assert nothing_left(each.run_dir)


def test_orders_before_between_and_within_rounds(served):
    service = served("schedule.end.rounds=1")
    assert service.order("pin", version=0) == ("done", "policy 0 is pinned")
    service.until(lambda: service.state() == "ended", "the end")
    assert service.rounds() == ["promoted"]
    assert os.readlink(service.run_dir / "current") == "policies/0001"

    state, result = service.order("rollback", version=0)
    assert state == "done" and "policy 0 is current instead of 1, shown to serve within" in result
    assert os.readlink(service.run_dir / "current") == "policies/0000"
    with pytest.raises(InputError, match="there is no policy 7"):
        orders.submit(service.store, "rollback", {"version": 7}, "test")
    assert service.order("cancel") == ("refused", "no round is open")

    rows = [{"prompt": "What is the capital of Utopia?"}, {"prompt": "What is the capital of Utopia?"}, {"nothing": 1}]
    state, result = service.order("add_prompts", rows=rows)
    assert state == "done" and "1 added" in result and "duplicate" in result

    # A round that is asked for starts although the schedule has ended; it stops after its stage, and goes on.
    assert service.order("run")[0] == "done"
    service.until(lambda: service.rounds() == ["promoted", "running"], "the second round")
    assert service.order("pause", after="stage")[0] == "done"
    service.until(lambda: service.state() == "paused", "the pause")
    done = set(service.store.seconds(2))
    assert "promote" not in done and service.rounds()[-1] == "running"
    service.order("resume")
    service.until(lambda: service.rounds() == ["promoted", "promoted"], "the end of the second round")
    assert done <= set(service.store.seconds(2))
    assert service.store.rounds()[1]["sampler"] == 0  # it was sampled by the policy that was rolled back to

    # A round that is given up leaves the current policy, and its number is not used again.
    service.order("run")
    service.until(lambda: "generate" in service.store.seconds(3), "the third round's candidates")
    assert service.order("cancel")[0] == "done"
    service.until(lambda: service.rounds()[-1] == "cancelled", "the end of the cancelled round")
    assert os.readlink(service.run_dir / "current") == "policies/0002"
    said = [(e["kind"], e["text"]) for e in service.store.events()]
    assert any(kind == "order_done" and "rollback version=0 (from test)" in text for kind, text in said)
    service.until(lambda: service.state() == "ended", "the end of its work")
    service.stop()
    assert service.state() == "stopped"


def test_a_stop_saves_the_trainer_and_the_next_start_goes_on(served, tmp_path):
    more = ("schedule.end.rounds=1", "train.epochs=40", "train.save_steps=1000", "train.learning_rate=1e-5")
    first = served(*more)
    work = first.run_dir / "rounds" / "0001" / "train.work"
    first.until(
        lambda: first.daemon.progress.get("stage") == "train" and (first.daemon.progress.get("done") or 0) >= 2,
        "a step",
    )
    first.stop()
    saves = [p.name for p in work.glob("checkpoint-*")]
    assert len(saves) == 1 and not (first.run_dir / "rounds" / "0001" / "train").exists()
    assert first.rounds() == ["running"]
    again = served(*more)
    again.until(lambda: again.rounds() == ["promoted"], "the end of the round")
    log = (again.run_dir / "logs" / "trainer.log").read_text()
    assert f"going on from {work / saves[0]}" in log


def test_a_round_that_fails_is_tried_again_and_then_the_service_pauses_itself(served, monkeypatch):
    service = served("train.agreement_mean=1e-15", "service.retries=1", "service.retry_seconds=0.1")
    service.until(lambda: service.state() == "paused", "the pause of its own")
    why = service.store.state("pause")["why"]
    assert "a round failed 2 times" in why and "what to do" in why
    kinds = [e["kind"] for e in service.store.events()]
    assert kinds.count("failed") == 2 and "alert" in kinds
    assert service.rounds() == ["running"]


def test_rejected_rounds_in_a_row_pause_the_service(served):
    service = served("evaluate.gate.max_kl=1e-9", "service.pause_after_rejected=2")
    service.until(lambda: service.state() == "paused", "the pause of its own")
    assert service.rounds() == ["rejected", "rejected"]
    assert "2 rounds in a row were rejected" in service.store.state("pause")["why"]


def test_a_configuration_is_taken_over_between_rounds_or_refused(mini_world, tmp_path):
    file = tmp_path / "mine.yaml"
    text = TINY.read_text() + "schedule: {end: {rounds: 1}}\n"
    file.write_text(text)
    service = Served(mini_world, tmp_path / "run", config=file)
    try:
        service.until(lambda: service.state() == "ended", "the end")
        file.write_text(text.replace("run: {name: tiny}", "run: {name: tiny, seed: 9}"))
        state, why = service.order("reload")
        assert state == "refused" and "run.seed cannot change within a run" in why
        file.write_text(text.replace("beta: 0.1", "bta: 0.1"))
        state, why = service.order("reload")
        assert state == "refused" and "did you mean train.beta" in why
        assert service.order("reload") == ("refused", why)
        file.write_text(text.replace("rounds: 1", "rounds: 2").replace("beta: 0.1", "beta: 0.2"))
        assert service.order("reload")[0] == "done"
        service.until(lambda: service.rounds() == ["promoted", "promoted"], "the second round")
        assert service.store.metrics(2)["train/beta_start"] == 0.2
    finally:
        service.stop()
        service.store.close()


def test_a_configuration_that_is_wrong_does_not_start(mini_world, tmp_path):
    with pytest.raises(SelfplayError, match="time_zone"):
        Daemon(TINY, [*overrides(mini_world), "schedule.time_zone=Utopia"], tmp_path / "run", Display())

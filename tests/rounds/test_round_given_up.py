"""A round that is given up after its promotion, killed at each moment of it, ends as given up."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from mini import TINY
from rich.console import Console
from storage_world import make

from selfplay.config import load
from selfplay.reporting.terminal import Display
from selfplay.rounds import round as rounds
from selfplay.rounds.run import Run
from selfplay.storage import agreement
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies


class Killed(BaseException):
    pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of which nothing is open but its ledger. Its round 3 was cut off after its promotion, before it was closed."""
    close = Store.close_round
    with monkeypatch.context() as patch:
        patch.setattr(
            Store, "close_round", lambda store, index, *told: close(store, index, *told) if index < 3 else None
        )
        run_dir = make(tmp_path / "run", rounds=3)
    store = Store(run_dir)
    (run_dir / "rounds" / "0003" / "closed.json").unlink()
    run = Run(load(TINY, ["track=none"]), run_dir, Display(Console(file=io.StringIO())))
    run.store = store
    run.prompts = None
    run.serving = SimpleNamespace(loaded=False)  # stands for the engines
    run.generator = SimpleNamespace(load=lambda policy: None)
    yield run
    store.close()


@pytest.mark.parametrize(
    "moment",
    [
        (rounds, "_show"),
        (agreement, "set_current"),
        (Policies, "set_current"),
        (rounds, "close"),
        (rounds.closed, "write"),
        (Store, "close_round"),
    ],
)
def test_a_promoted_round_that_is_given_up_ends_so_whatever_was_killed(run, monkeypatch, moment):
    def killed(*_: object, **__: object) -> None:
        raise Killed

    assert run.store.unfinished()["round"] == 3 and run.store.serving() == 3
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*moment, killed)
        rounds.cancel_round(run)
    agreement.require(run.store, run.dir, lambda kind, text: None)  # as the next start does
    report = rounds.run_round(run)
    assert (report.round, report.outcome, report.policy) == (3, "cancelled", 2)
    assert run.store.policy(3)["state"] == "cancelled"
    assert (run.store.serving(), Policies(run.dir).current) == (2, 2)
    assert Path(run.dir / "rounds" / "0003" / "closed.json").is_file()

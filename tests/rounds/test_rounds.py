"""The command's exit codes, over a run and rounds that only pretend."""

import contextlib
import errno
import json
import signal
import sqlite3

import pytest
from mini import TINY

from selfplay.errors import EngineError, InputError, StageFailed
from selfplay.reporting.terminal import Display
from selfplay.rounds import round as round_module
from selfplay.rounds import run as run_module
from selfplay.rounds.command import Interrupt, run_rounds
from selfplay.storage.ledger import LedgerError, Store
from selfplay.types import RoundReport


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(*outcomes, …)`: `run_rounds` on one folder, each round ending as its outcome says; an exception is raised."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    asked: list[object] = []

    class Pretended:
        def __init__(self, config, run_dir, display):
            self.config, self.dir, self.display, self.alert = config, run_dir, display, asked.append

        def __enter__(self):
            self.dir.mkdir(exist_ok=True)
            self.store = Store(self.dir)
            return self

        def __exit__(self, *_):
            self.store.close()

        def write_report(self):
            asked.append("report")

    def run_round(run):
        outcome = asked.pop(0)
        if run.store.unfinished() is None:
            run.store.open_round(len(run.store.rounds()) + 1, 0, (0, 0), "f", {})
        if not isinstance(outcome, str):
            raise outcome
        index = len(run.store.rounds())
        run.store.close_round(index, outcome, 0, [])
        return RoundReport(round=index, outcome=outcome, policy=0, metrics={}, seconds={}, reasons=[])

    monkeypatch.setattr(run_module, "Run", Pretended)
    monkeypatch.setattr(round_module, "run_round", run_round)
    monkeypatch.setattr(Display, "round_table", lambda self, report: None)

    def call(*outcomes, sets=(), **options):
        asked[:] = outcomes
        code = run_rounds(TINY, sets, tmp_path / "run", **options)
        return code, asked[:]

    return call


def states(tmp_path):
    store = Store(tmp_path / "run")
    found = [row["state"] for row in store.rounds()]
    store.close()
    return found


@pytest.mark.parametrize("outcome", ["promoted", "rejected", "skipped"])
def test_a_round_that_ends_is_no_failure_however_it_ends(command, tmp_path, outcome):
    assert command(outcome) == (0, [])
    assert states(tmp_path) == [outcome]


def test_an_interrupt_that_was_swallowed_is_raised_again_at_the_next_breath():
    interrupt = Interrupt()
    interrupt.again("stage")
    with contextlib.suppress(KeyboardInterrupt):
        interrupt(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt.again("shard")


def test_rounds_is_the_total_of_the_folder_and_one_more_by_default(command, tmp_path):
    assert command("promoted", "rejected", total=2) == (0, [])
    assert command("promoted") == (0, [])
    assert command("promoted", total=2, report=True) == (0, ["promoted", "report"])  # there already: only the report
    assert states(tmp_path) == ["promoted", "rejected", "promoted"]


def test_an_unfinished_round_comes_first_and_counts(command, tmp_path, capsys):
    failed = StageFailed("train", 1, EngineError("the GPU is gone", "look at it"), tmp_path / "trainer.log")
    assert command(failed, "promoted", total=2) == (3, ["promoted"])
    said = " ".join(capsys.readouterr().out.split())
    assert "round 1: stage train failed: the GPU is gone" in said
    assert "what to do: look at it" in said and "trainer.log" in said
    assert states(tmp_path) == ["running"]
    assert command("promoted") == (0, [])
    assert states(tmp_path) == ["promoted"]


def test_an_unfinished_round_is_completed_however_many_are_asked_for(command, tmp_path):
    failed = StageFailed("train", 2, EngineError("the GPU is gone"), None)
    assert command("promoted", failed)[0] == 0 and command(failed)[0] == 3
    assert states(tmp_path) == ["promoted", "running"]
    assert command("rejected", "not asked for", total=1) == (0, ["not asked for"])
    assert states(tmp_path) == ["promoted", "rejected"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on"),
        (InputError("no such file", "name one"), 2, "what to do: name one"),
        (StageFailed("prompts", 1, InputError("every prompt was drawn once"), None), 2, "drawn once"),
        (
            LedgerError("INSERT", {}, sqlite3.OperationalError("database is locked")),
            3,
            "cannot be used: database is locked",
        ),
        (OSError(errno.EROFS, "Read-only file system", "logs"), 3, "mounted read-only"),
        (PermissionError(errno.EPERM, "Operation not permitted", "policies/0001"), 3, "policies/0001: Operation not"),
        (OSError(errno.EIO, "Input/output error"), 3, "dmesg"),
        (OSError(errno.ENOLCK, "No locks available"), 3, "a folder on a local disk"),
        (json.JSONDecodeError("Expecting value", "", 0), 3, "selfplay doctor"),
        (MemoryError(), 3, "no memory left"),
        (ZeroDivisionError("x"), 3, "this is a bug"),
    ],
)
def test_exit_codes(command, tmp_path, capsys, error, code, words):
    assert command(error)[0] == code
    said = " ".join(capsys.readouterr().out.split())
    assert words in said and "Traceback" not in said
    assert ("this is a bug" in said) == isinstance(error, ZeroDivisionError)
    kept = isinstance(error, ZeroDivisionError | OSError | MemoryError | ValueError) and not hasattr(error, "hint")
    assert (tmp_path / "run" / "logs" / "round.log").is_file() == kept


def test_what_is_wrong_before_a_run_begins(command, tmp_path, capsys):
    assert command(total=0) == (2, []) and "at least 1" in capsys.readouterr().out
    assert command(sets=["train.bta=1"]) == (2, []) and "did you mean train.beta?" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()

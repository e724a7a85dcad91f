"""Hostile text of models, servers and files, pushed through everything that shows text to a person."""

import json
import logging
import os
import signal
import sys
import threading

import pytest
import served_world
from child_world import start
from daemon_world import until, webhook
from mini import TINY
from typer.testing import CliRunner

from selfplay import cli
from selfplay.checks.finding import Finding
from selfplay.config import load
from selfplay.errors import InputError
from selfplay.processes import logs
from selfplay.reporting import export, report
from selfplay.rounds.command import run_rounds
from selfplay.service import failures
from selfplay.service.alerts import Alerts
from selfplay.tracking import trackers
from selfplay.visible import filter_stderr, line, visible

HOSTILE = (
    "title \x1b]0;owned\x07 red \x1b[31m c1 \x9b31m rlo \u202egnp.exe isolate \u2066a\u2069 zero\u200bwidth\ufeff bell \x07 back \x08\x08"
    " return \rover nul \x00 tag \U000e0041 [bold]markup[/bold] [link=http://x]y[/link] שלום"
)  # fmt: skip
FORBIDDEN = set("\x00\x07\x08\r\x1b\x7f\x9b\u200b\u202e\u2066\u2069\ufeff\U000e0041")
ORDINARY = "مرحبا بالعالم‏! שלום עולם. می‌خواهم नमस्ते क्‍ष 👩‍👩‍👧 ❤️ Straße 日本語\n\tzwei Zeilen"


def assert_clean(text: str, mark: str = "gnp.exe") -> None:
    assert mark in text, "the text itself is shown"
    assert not FORBIDDEN & set(text)


def test_ordinary_text_of_all_scripts_stays_as_it_is():
    assert visible(ORDINARY) == ORDINARY
    assert visible("Windows\r\nlines") == "Windows\nlines"
    assert line("one\ntwo\r\nthree") == "one two three"
    assert visible("a\x1b[31mb\u202ec\ud800") == "a�[31mb�c�"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose prompts, answers, events, reasons and configuration are hostile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served_world, "HOSTILE", HOSTILE)
        folder = tmp_path_factory.mktemp("hostile") / "run"
        store = served_world.build(folder, rounds=1, pairs=6)
    config = load(TINY, []).model_dump(mode="json")
    store.change_config(1, "f", config | {"reward": config["reward"] | {"model": HOSTILE}})
    store.event("warning", f"an error body: {HOSTILE}\n2026-01-01 promoted: not an event", 1)
    store.answer(store.submit("pin", {"version": 1, "pinned": True}, HOSTILE), "refused", HOSTILE)
    store.set_state("webhook", HOSTILE)
    store.set_state("service", {"state": "stopped", "why": HOSTILE, "pid": 1, "since": "now"})
    store.close()
    return folder


@pytest.mark.parametrize("command", ["status", "show 1", "rounds", "answers"])
def test_commands_that_read_a_run(run_dir, command):
    done = CliRunner().invoke(cli.app, [*command.split(), "--run-dir", str(run_dir)], catch_exceptions=False)
    assert_clean(done.output, "1" if command == "rounds" else "gnp.exe")
    assert not any(said.startswith("2026-01-01 promoted") for said in done.output.splitlines())


def test_commands_that_read_files(tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": HOSTILE}) + "\n" + json.dumps({"prompt": "ordinary: " + ORDINARY}))
    shown = CliRunner().invoke(cli.app, ["prompts", str(file)], catch_exceptions=False).output
    assert_clean(shown)
    assert "שלום עולם. می‌خواهم" in shown and "[bold]markup[/bold]" in shown
    monkeypatch.setattr("selfplay.checks.command.check", lambda *_: [Finding.error(HOSTILE, HOSTILE)])
    monkeypatch.setattr("selfplay.checks.command.plan", lambda *_: [(HOSTILE, HOSTILE)])
    told = CliRunner().invoke(cli.app, ["check", "-c", str(TINY)], catch_exceptions=False).output
    assert_clean(told)
    assert "[bold]markup" in told and "[link=http://x]" in told


def test_errors_and_log_records(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise InputError(HOSTILE, HOSTILE)

    monkeypatch.setattr(cli, "app", lambda **_: fail())
    with pytest.raises(SystemExit):
        cli.main()
    assert_clean(capsys.readouterr().err)
    filter_stderr()
    logging.lastResort.handle(logging.makeLogRecord({"msg": HOSTILE, "levelno": logging.ERROR}))  # as for every logger
    sys.__excepthook__(InputError, InputError(HOSTILE), None)
    sys.stderr.writelines([HOSTILE, HOSTILE])
    said = capsys.readouterr().err
    assert_clean(said)
    assert said.count("gnp.exe") == 4


def test_reports_and_cards(run_dir, tmp_path):
    page = report.html(report.read(run_dir), [])
    assert_clean(page)
    assert "שלום" in page and "<link" not in page
    export.export_pairs(run_dir, tmp_path / "pairs")
    assert_clean((tmp_path / "pairs" / "README.md").read_text())


def test_alerts():
    with webhook() as (url, got):
        Alerts(lambda: url, threading.Event()).send({"run": "r", "text": HOSTILE})
        until(lambda: got)
    assert_clean(got[0][1]["text"])


def test_logs_of_the_service_and_of_a_round(tmp_path, monkeypatch, capsys):
    class Run:
        def __init__(self, *_: object) -> None:
            raise ValueError(HOSTILE)

    monkeypatch.setattr("selfplay.rounds.run.Run", Run)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    mask = os.umask(0o022)
    try:
        assert run_rounds(TINY, run_dir=tmp_path / "run") == 3
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(mask)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert_clean((tmp_path / "run" / "logs" / "round.log").read_text())
    assert_clean(capsys.readouterr().out)
    log = failures.write_traceback(ValueError(HOSTILE), tmp_path, failures.datetime.now())
    assert_clean(log.read_text())


WRITES = f"""
import sys, os
print({HOSTILE!r})
sys.stdout.flush()
os.write(2, {HOSTILE!r}.encode() + b" raw \\x9b31m bytes \\xff 10%\\r20%\\r\\n")
sys.stderr.write({ORDINARY!r} + "\\n")
"""


def test_the_log_of_a_child(tmp_path):
    child = start(tmp_path, [sys.executable, "-c", WRITES])
    assert child.wait() == 0
    said = (tmp_path / "echo.log").read_text()
    assert_clean(said)
    assert ORDINARY in said and "raw \\x9b31m bytes \\xff 10%\n20%\n" in said and said.count("gnp.exe") == 2
    assert "\tzwei Zeilen" in said.splitlines()  # what it writes to stdout may come before or after


def test_the_last_line_of_a_log(tmp_path):
    child = start(tmp_path, [sys.executable, "-c", f"import os; os.write(2, {HOSTILE!r}.encode())"])
    assert child.wait() == 0
    assert_clean(logs.last_line(tmp_path / "echo.log"), mark="markup")


def test_names_of_metrics(tmp_path):
    logged = []

    class Tracker:
        def log(self, axis, values, step):
            logged.extend(values)

    trackers.log_round(Tracker(), 1, {f"score/{HOSTILE}": 1.0}, [{f"train/{HOSTILE}": 1.0}], 1)
    assert len(logged) == 2
    for name in logged:
        assert_clean(name)

"""The command `selfplay check`: findings and the plan of a round, as a person reads them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from selfplay.checks.check import check
from selfplay.checks.deep import deep
from selfplay.checks.finding import Finding
from selfplay.checks.models import loads
from selfplay.checks.plan import plan
from selfplay.checks.webhook import takes
from selfplay.config import load
from selfplay.errors import SelfplayError
from selfplay.reporting.console import TextConsole
from selfplay.reporting.terminal import Display
from selfplay.rounds.command import Interrupt

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def run_check(config: Path, sets: Sequence[str], run_dir: Path | None, test_webhook: bool, try_round: bool) -> int:
    """Print what was found; returns the exit code: 2 where something is wrong, or the code of the round that was tried."""
    settings = load(config, sets)
    folder = run_dir or settings.run_dir
    console = TextConsole()
    findings = check(settings, folder)
    if not wrong(findings):  # it takes seconds
        findings += loads(settings)
    if test_webhook:
        findings.append(takes(settings))
    show(console, findings)
    console.print("\na round", style="bold")
    rows = Table(box=None, show_header=False, padding=(0, 1))
    for what, how_much in plan(settings, folder):
        rows.add_row(what, how_much)
    console.print(rows)
    if wrong(findings):
        return 2
    if not try_round:
        return 0
    console.print("\na round in the smallest size", style="bold")
    display = Display(console)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, Interrupt())
    try:
        show(console, deep(settings, folder, display))
        return 0
    except SelfplayError as error:
        display.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        display.note("interrupted; nothing is left of it")
        return 130


def wrong(findings: Iterable[Finding]) -> bool:
    """Whether a round would fail by these."""
    return any(finding.level == "error" for finding in findings)


def show(console: TextConsole, findings: Iterable[Finding]) -> None:
    """Print findings, a line each."""
    table = Table("level", "about", Column(overflow="fold"), box=None, show_header=False, padding=(0, 1))
    for finding in findings:
        table.add_row(Text(finding.level, STYLES[finding.level]), finding.about, Text(finding.text))
    console.print(table)

"""What a person sees in a terminal: a live line for each stage, a table after each round, one line a round for a run.

Where the output is no terminal (a log, a pipe) the same comes as plain lines. Text of models, paths and messages is
printed as it is, never read as markup, and without the control characters that a terminal would obey.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from selfplay import progress
from selfplay.errors import Interrupted
from selfplay.reporting import gold, word_diff
from selfplay.reporting.answers import Answers, about
from selfplay.reporting.console import TextConsole
from selfplay.reporting.round_summary import describe
from selfplay.reporting.words import change, join, number
from selfplay.storage import figures, paging
from selfplay.storage.ledger import Store
from selfplay.types import RoundReport
from selfplay.visible import visible

ANSWER_WIDTH = 28  # least characters of a column of answers
LONGEST_ANSWER = 600  # characters of an answer in the terminal
QUIET_SECONDS = 5.0  # least time between two plain lines of a stage
STAGES = ("prompts", "generate", "score", "guard", "pairs", "evolve", "depth", "train", "evaluate", "suite", "promote")
STYLES = {"promoted": "green", "rejected": "yellow", "skipped": "cyan", "cancelled": "cyan"}


class Line(progress.Line):
    """The progress of one stage. `Display.stage` yields it."""

    def __init__(self, display: Display, round_index: int | None, name: str, total: int | None, unit: str) -> None:
        self._display, self.unit = display, unit
        self.round_index, self.name = round_index, name
        self.total, self.done, self.text, self.was_kept = total, 0, "", False
        self.started = self.printed = time.monotonic()
        self.task: TaskID | None = None

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        """Say how far the stage is; what is not given stays as it was."""
        self.done = self.done if done is None else done
        self.text = self.text if text is None else text
        self.total = self.total if total is None else total
        self._display._changed(self)

    def kept(self) -> None:
        """The stage was finished before an interruption; nothing is done again."""
        self.was_kept = True

    @property
    def count(self) -> str:
        """«64/192 prompts»; empty before there is anything to count."""
        if self.total is None:
            return f"{self.done} {self.unit}".strip() if self.done else ""
        return f"{self.done}/{self.total} {self.unit}".strip()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


class _Output:
    """A stream whose troubles end nobody who prints: its disk may be full, or its reader gone."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


RUN_TABLE = (
    "evaluate/reward", "evaluate/reward_champion", "evaluate/win_rate", "evaluate/win_rate_low", "evaluate/win_rate_high",
)  # fmt: skip
"""Metrics that the table of the rounds shows, beside those of the gold rubric."""


class Display(progress.Display):
    """Prints for one run. Stages may be shown from several threads, several at a time."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or TextConsole(file=cast(IO[str], _Output(sys.stdout)))
        self._live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._progress: Progress | None = None
        self._open = 0
        self.on_line: Callable[[progress.Line], None] = lambda line: None
        """Told of every change of a stage's progress; must return at once."""
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def stage(self, round_index: int | None, name: str, total: int | None = None, unit: str = "") -> Iterator[Line]:
        """Show one stage while the block runs: a live line in a terminal, else plain lines, one every 5 s at most.

        At the end: how it ended (done, kept, failed, interrupted), seconds, count and the last text. What the block
        raises goes on.
        """
        line = Line(self, round_index, name, total, unit)
        self._begin(line)
        how = "failed"
        try:
            yield line
            how = "kept" if line.was_kept else "done"
        except (KeyboardInterrupt, SystemExit, Interrupted):
            how = "interrupted"
            raise
        finally:
            self._end(line, how)

    def kept(self, round_index: int | None, name: str) -> None:
        """A stage is reused from an interrupted run."""
        self._ended(round_index, name, "kept", [])

    def note(self, text: str) -> None:
        self._print((text, ""))

    def warn(self, text: str) -> None:
        self._print(("warning: ", "bold yellow"), (text, ""))

    def error(self, error: str | BaseException, hint: str = "", log: Path | None = None) -> None:
        """What went wrong, what to do, where the log is; hint and log come from the error where they are not given."""
        hint = hint or getattr(error, "hint", "")
        log = log or getattr(error, "log", None)
        self._print(("error: ", "bold red"), (str(error), ""))
        if hint:
            self._print(("what to do: ", "bold"), (hint, ""))
        if log is not None:
            self._print(("log: ", "bold"), (str(log), ""))

    def round_table(self, report: RoundReport) -> None:
        """What happened in one round, in at most 80 columns where nothing is longer."""
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in describe(report):
            style = STYLES[report.outcome] if name == "verdict" else ""
            table.add_row(self._plain(name), Text(self._plain(text), style))
        with self._lock:
            self.console.print(Text(f"\nRound {report.round}", "bold"))
            self.console.print(table)

    def run_table(self, store: Store, last: int = 20) -> None:
        """One line a round, for the last rounds of a run. Of the rubric's parts it has those that fit the width."""
        rows = paging.rounds(store, limit=last)[::-1]
        if not rows:
            self.note("no rounds yet")
            return
        parts = gold.recorded(store)
        names = [*RUN_TABLE, *(name for part in parts for name in gold.champion_and_candidate(part))]
        metrics = figures.metrics(store, names, rows[0]["round"], rows[-1]["round"])
        columns: dict[str, list[str]] = {name: [] for name in ("round", "verdict", "reward", "win rate")}
        for row in rows:
            m = metrics.get(row["round"], {})
            rate = number(m.get("evaluate/win_rate"), ".2f")
            if "evaluate/win_rate_low" in m:
                rate += f" [{m['evaluate/win_rate_low']:.2f},{m['evaluate/win_rate_high']:.2f}]"
            columns["round"].append(str(row["round"]))
            columns["verdict"].append("unfinished" if row["state"] == "running" else row["state"])
            columns["reward"].append(change(m, "evaluate/reward_champion", "evaluate/reward", ".2f", "→") or "–")
            columns["win rate"].append(rate)
        seconds = {"s": [f"{row['seconds']:.0f}" for row in rows]}
        for part in parts:
            of = gold.champion_and_candidate(part)
            cells = [change(metrics.get(row["round"], {}), *of, ".2f", "→") or "–" for row in rows]
            wider = columns | {"gold" if part == "total" else part: cells}
            if _width(wider | seconds) <= self.console.width:
                columns = wider
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        columns |= seconds
        for name in columns:
            table.add_column(self._plain(name), justify="left" if name == "verdict" else "right", no_wrap=True)
        for line in zip(*columns.values(), strict=True):
            table.add_row(*(Text(self._plain(cell), STYLES.get(cell, "")) for cell in line))
        self.console.print(table)
        self.note("reward and gold scores: held-out, champion → candidate; s: seconds of all stages")
        if (earlier := sum(store.count_rounds().values()) - len(rows)) > 0:
            self.note(f"{earlier} earlier rounds are not shown (--last N shows the last N)")

    @property
    def fitting_columns(self) -> int:
        """How many audited rounds fit beside a prompt and the initial policy's answer."""
        return max(1, self.console.width // ANSWER_WIDTH - 2)

    def answers(self, found: Answers) -> None:
        """Audit prompts down, policies across; what the column before lacks is green, or between {+ and +} without colours."""
        if not found.columns:
            self.note("no round has had an audit yet (evaluate.audit_every)")
            return
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_lines=True)
        table.add_column("prompt", overflow="fold", ratio=2)
        for column in found.columns:
            table.add_column(f"{column.title}\nmean {number(column.reward, '.3f')}", overflow="fold", ratio=3)
        for line in found.lines:
            asked = line.messages[-1]["content"] if line.messages else line.prompt_id
            parts = word_diff.along(_shortened(said.text) if said else None for said in line.said)
            cells = [self._marked(word_diff.reveal([("same", _shortened(asked))]))]
            for before, said, own in zip([None, *line.said], line.said, parts, strict=False):
                what = Text(f"{about(said, before)}\n" if said else "not asked", "dim")
                cells.append(Text.assemble(what, self._marked(own)))
            table.add_row(*cells)
        self.console.print(table)
        self.note(f"{len(found.lines)} of {found.prompts} audit prompts; scores are the judge's")

    def _marked(self, parts: Sequence[word_diff.Part]) -> Text:
        """Parts of a text, with marks that can be seen on this console."""
        text = Text()
        for kind, part in parts:
            said = self._plain(part)
            if kind == "other" and said.strip() and not self.console.color_system:
                said = f"{{+{said}+}}"
            text.append(said, {"other": "green", "unseen": "reverse"}.get(kind, ""))
        return text

    # the lines of stages

    def _begin(self, line: Line) -> None:
        self.on_line(line)
        if not self._live:
            count = f" ({line.total} {line.unit})".replace(" )", ")") if line.total is not None else ""
            self._plain_line(line.round_index, f"{line.name} started{count}")
            return
        with self._lock:
            if self._progress is None:
                # A stopped Progress keeps its finished tasks: each group of stages has its own.
                self._progress = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=18),
                    TextColumn("{task.fields[count]}", markup=False, style="progress.download"),
                    _Elapsed(),
                    TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                    console=self.console,
                    transient=True,
                    expand=True,
                )  # fmt: skip
                self._progress.start()
            self._open += 1
            line.task = self._progress.add_task(
                self._plain(_label(line.round_index, line.name)), total=line.total, count=line.count, text=""
            )

    def _changed(self, line: Line) -> None:
        self.on_line(line)
        with self._lock:
            if self._live:
                if self._progress is not None and line.task is not None:
                    self._progress.update(
                        line.task, total=line.total, completed=line.done, count=line.count, text=self._plain(line.text)
                    )
            elif time.monotonic() - line.printed >= QUIET_SECONDS:
                line.printed = time.monotonic()
                self._plain_line(line.round_index, join([line.name, line.count, line.text]))

    def _end(self, line: Line, how: str) -> None:
        with self._lock:
            if self._progress is not None and line.task is not None:
                self._progress.remove_task(line.task)
                line.task = None
                self._open -= 1
                if not self._open:
                    self._progress.stop()
                    self._progress = None
        details = [] if how == "kept" else [f"{line.seconds:.1f} s", line.count, line.text]
        self._ended(line.round_index, line.name, how, details)

    def _ended(self, round_index: int | None, name: str, how: str, details: list[str]) -> None:
        if not self._live:
            self._plain_line(round_index, join([f"{name} {_SAYS[how]}", *details]))
            return
        mark, style = _MARKS[how]
        said = [] if how == "done" else [_SAYS[how]]
        self._print((f"{mark} ", style), (f"{_label(round_index, name):<19} ", ""), (join([*said, *details]), "dim"))

    def _plain_line(self, round_index: int | None, text: str) -> None:
        where = "" if round_index is None else f"round {round_index}: "
        self._print((f"{time.strftime('%H:%M:%S')} {where}{text}", ""))

    def _print(self, *parts: tuple[str, str]) -> None:
        text = Text.assemble(*((self._plain(part), style) for part, style in parts))
        self.console.print(text, soft_wrap=True)

    def _plain(self, text: str) -> str:
        """Text without control characters, in what the console can encode."""
        encoding = self.console.encoding
        return visible(text).encode(encoding, "replace").decode(encoding)


_SAYS = {"done": "done", "kept": "«kept» from the interrupted run", "failed": "failed", "interrupted": "interrupted"}
_MARKS = {"done": ("✓", "green"), "kept": ("✓", "cyan"), "failed": ("✗", "bold red"), "interrupted": ("✗", "yellow")}


class _Elapsed(TextColumn):
    """Seconds since the stage began; rich's own column has no tenths and takes more room."""

    def __init__(self) -> None:
        super().__init__("", markup=False)

    def render(self, task: Any) -> Text:
        return Text(f"{task.elapsed or 0:.0f} s", "progress.elapsed")


def _shortened(text: str) -> str:
    more = len(text) - LONGEST_ANSWER
    return text if more <= 0 else f"{text[:LONGEST_ANSWER]} … ({more} more characters)"


def _width(columns: Mapping[str, Sequence[str]]) -> int:
    """Characters of a table with these columns: each is as wide as its widest cell, with two spaces around."""
    return sum(2 + max(map(len, (name, *cells))) for name, cells in columns.items())


def _label(round_index: int | None, name: str) -> str:
    return name if round_index is None else f"round {round_index} {name}"

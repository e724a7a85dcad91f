"""A run as its report shows it: read from the ledger and the artifacts alone.

A report of 10,000 rounds must stay small. So the tables show the last rounds only. Of a long run, a line of a chart shows the
lowest and the highest value of each stretch of rounds, so that every peak stays; what is stacked shows some whole rounds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfplay.errors import InputError
from selfplay.planning.gantt import Span
from selfplay.reporting import who_worked
from selfplay.reporting.answers import Answers
from selfplay.reporting.answers import read as read_answers
from selfplay.reporting.terminal import STAGES
from selfplay.storage import figures, paging, tables
from selfplay.storage.ledger import Store
from selfplay.types import Pair, Prompt

ANSWERED = 8  # audit prompts whose answers are shown
TABLE_ROUNDS = 200  # rounds, and policies, that the tables show


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of the ledger with its metrics and seconds."""

    index: int
    state: str  # running | promoted | rejected | skipped | cancelled
    policy: int | None
    reasons: list[str]
    metrics: dict[str, float]
    seconds: dict[str, float]
    gate: dict[str, float]  # the gate's limits in this round's configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that the report shows, as it is on disk."""

    name: str
    current: int | None  # the policy that serves
    stages: tuple[str, ...]  # names of the stages, in their order
    states: dict[int, str]  # of every round, oldest first
    rounds: list[Round]  # the last TABLE_ROUNDS, oldest first
    spread: list[Round]  # at most MOST_POINTS rounds, spread over the run, oldest first
    figures: dict[str, list[tuple[int, float]]]  # by metric: rounds and finite values, at most MOST_POINTS
    stretch: int  # rounds that share two of these points; 1 where each has its own
    first_judged: Round | None  # the first round with a reward on held-out prompts
    last_promoted: Round | None
    worked: list[Span]  # who worked when in the newest round that has ended
    worked_round: int | None
    policies: list[dict[str, Any]]  # the last TABLE_ROUNDS, oldest first
    events: list[dict[str, Any]]
    pairs_round: int | None  # the last round that has pairs; what follows is of this round
    pairs: list[Pair]  # its base pairs, kept and dropped
    added: list[Pair]  # pairs that depth added to them
    prompts: dict[str, Prompt]
    answers: Answers  # to some audit prompts, of the initial policy and those of the last audited rounds

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The rounds that have a metric, and its values."""
        points = self.figures.get(name, [])
        return [index for index, _ in points], [value for _, value in points]

    def has(self, *names: str) -> bool:
        return any(name in self.figures for name in names)

    @property
    def independent(self) -> bool:
        """Whether the judge was another reward than the one that trains, in every round."""
        return all(value == 1 for _, value in self.figures.get("evaluate/independent", []))

    @property
    def about_charts(self) -> str:
        """What the charts of a long run leave out; empty where they leave out nothing."""
        if self.stretch == 1:
            return ""
        return (
            f"The run has {len(self.states):,} rounds. A line shows the lowest and the highest value of each "
            f"{self.stretch} rounds; bars and areas show {len(self.spread)} rounds, spread over the run."
        )

    @property
    def about_tables(self) -> str:
        """What the tables of a long run leave out; empty where they leave out nothing."""
        if len(self.states) <= TABLE_ROUNDS:
            return ""
        return f"The tables show the last {TABLE_ROUNDS} of {len(self.states):,} rounds, and as many policies."


def read(run_dir: Path) -> Run:
    """Read a run folder. Raises InputError where there is none; missing artifacts only make the report shorter."""
    if not (run_dir / "ledger.sqlite").is_file():
        raise InputError(
            f"{run_dir} is not a run folder: it has no ledger", "give the folder of a run, such as runs/tiny"
        )
    store = Store(run_dir)
    try:
        rows = {row["round"]: row for row in store.rounds()}
        states = {index: row["state"] for index, row in rows.items()}

        @cache
        def whole(index: int) -> Round:
            row = rows[index]
            return Round(
                index=index, state=row["state"], policy=row["policy"], reasons=row["reasons"],
                metrics=store.metrics(index), seconds=store.seconds(index),
                gate=store.config(index).get("evaluate", {}).get("gate", {}),
            )  # fmt: skip

        every = list(rows)
        count = min(len(every), figures.MOST_POINTS)
        spread = [whole(every[i * len(every) // count]) for i in range(count)]
        rounds = [whole(index) for index in every[-TABLE_ROUNDS:]]
        drawn, stretch = _figures(store), figures.bucket(store)
        judged = _first(store, "evaluate/reward")
        promoted = next((index for index in reversed(every) if states[index] == "promoted"), None)
        name = (store.config(every[-1]) if every else {}).get("run", {}).get("name", run_dir.resolve().name)
        first_judged = None if judged is None else whole(judged)
        last_promoted = None if promoted is None else whole(promoted)
        ended = next((index for index in reversed(every) if states[index] != "running"), None)
        worked = [] if ended is None else who_worked.spans(paging.stages(store, ended), store.metrics(ended))
        policies, events = store.policies()[-TABLE_ROUNDS:], store.events()
        answers = read_answers(store, run_dir, prompts=ANSWERED)
        current = store.serving()
    finally:
        store.close()
    served = [row["policy"] for row in rows.values() if row["policy"] is not None]
    index = next((r.index for r in reversed(rounds) if r.metrics.get("pairs/base")), None)
    folder = run_dir / "rounds" / f"{index or 0:04d}"
    return Run(
        name=name,
        current=current if current is not None else served[-1] if served else None,
        stages=STAGES,
        states=states,
        rounds=rounds,
        spread=spread,
        figures=drawn,
        stretch=stretch,
        first_judged=first_judged,
        last_promoted=last_promoted,
        worked=worked,
        worked_round=ended,
        policies=policies,
        events=events,
        pairs_round=index,
        pairs=_rows(folder / "pairs" / "pairs.parquet", Pair),
        added=[p for p in _rows(folder / "depth" / "pairs.parquet", Pair) if p.kept_because == "depth"],
        prompts={p.prompt_id: p for p in _rows(folder / "prompts" / "prompts.parquet", Prompt)},
        answers=answers,
    )


def _figures(store: Store) -> dict[str, list[tuple[int, float]]]:
    """All metrics over the run, as charts draw them."""
    names = [row["name"] for row in store.query("SELECT DISTINCT name FROM metrics ORDER BY name")]
    found: dict[str, list[tuple[int, float]]] = {}
    for index, values in figures.trends(store, names).items():
        for name, value in values.items():
            if math.isfinite(value):
                found.setdefault(name, []).append((index, value))
    return found


def _first(store: Store, name: str) -> int | None:
    """The first round that has a metric."""
    (found,) = store.query("SELECT min(round) AS round FROM metrics WHERE name = :name", name=name)
    return None if found["round"] is None else int(found["round"])


def _rows(path: Path, row_type: Any) -> list[Any]:
    return tables.read_rows(path, row_type) if path.is_file() else []


def state(run: Run) -> str:
    """Where the run stands, in words."""
    closed = Counter(state for state in run.states.values() if state != "running")
    if not run.states:
        return "no rounds yet"
    parts = [f"{count} {name}" for name in ("promoted", "rejected", "skipped", "cancelled") if (count := closed[name])]
    done = sum(closed.values())
    text = f"{done} {'round' if done == 1 else 'rounds'} finished" + (f" ({', '.join(parts)})" if parts else "")
    running = [r for r in run.rounds if r.state == "running"]
    if running:
        at = next((s for s in run.stages if s not in running[0].seconds), run.stages[-1])
        text += f", round {running[0].index} unfinished (at {at})"
    return text

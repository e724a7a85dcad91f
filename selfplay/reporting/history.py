"""A run as its report shows it: read from the ledger and the artifacts alone."""

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.errors import InputError
from selfplay.reporting.terminal import STAGES
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.types import Pair, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One row of the ledger with its metrics and seconds."""

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
    current: int | None
    rounds: list[Round]  # oldest first
    policies: list[dict[str, Any]]
    events: list[dict[str, Any]]
    pairs_round: int | None  # the last round that has pairs; what follows is of this round
    pairs: list[Pair]  # its base pairs, kept and dropped
    added: list[Pair]  # pairs that depth added to them
    prompts: dict[str, Prompt]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Rounds that have the metric, and its values."""
        having = [r for r in self.rounds if math.isfinite(r.metrics.get(name, math.nan))]
        return [r.index for r in having], [r.metrics[name] for r in having]

    def has(self, *names: str) -> bool:
        return any(self.series(name)[0] for name in names)

    @property
    def independent(self) -> bool:
        return all(r.metrics.get("evaluate/independent", 1) == 1 for r in self.rounds)


def read(run_dir: Path) -> Run:
    """Read a run folder. Raises InputError where there is none; missing artifacts only make the report shorter."""
    if not (run_dir / "ledger.sqlite").is_file():
        raise InputError(
            f"{run_dir} is not a run folder: it has no ledger", "give the folder of a run, such as runs/tiny"
        )
    store = Store(run_dir)
    try:
        rounds, policies, events = _rounds(store), store.policies(), store.events()
        name = store.config(store.last_round()).get("run", {}).get("name", run_dir.resolve().name)
    finally:
        store.close()
    served = [r.policy for r in rounds if r.policy is not None]
    current = Policies(run_dir).current
    index = next((r.index for r in reversed(rounds) if r.metrics.get("pairs/base")), None)
    folder = run_dir / "rounds" / f"{index or 0:04d}"
    return Run(
        name=name,
        current=current if current is not None else served[-1] if served else None,
        rounds=rounds,
        policies=policies,
        events=events,
        pairs_round=index,
        pairs=_rows(folder / "pairs" / "pairs.parquet", Pair),
        added=[p for p in _rows(folder / "depth" / "pairs.parquet", Pair) if p.kept_because == "depth"],
        prompts={p.prompt_id: p for p in _rows(folder / "prompts" / "prompts.parquet", Prompt)},
    )


def _rounds(store: Store) -> list[Round]:
    """All rounds, in four queries however many there are."""
    metrics: dict[int, dict[str, float]] = {}
    for row in store.query("SELECT round, name, value FROM metrics ORDER BY round, name"):
        metrics.setdefault(row["round"], {})[row["name"]] = row["value"]
    seconds: dict[int, dict[str, float]] = {}
    for row in store.query("SELECT round, stage, seconds FROM stages ORDER BY rowid"):
        seconds.setdefault(row["round"], {})[row["stage"]] = row["seconds"]
    gates = {
        row["round"]: (json.loads(row["config"]) or {}).get("evaluate", {}).get("gate", {})
        for row in store.query("SELECT round, config FROM rounds")
    }
    return [
        Round(
            index=row["round"], state=row["state"], policy=row["policy"], reasons=row["reasons"],
            metrics=metrics.get(row["round"], {}), seconds=seconds.get(row["round"], {}), gate=gates[row["round"]],
        )
        for row in store.rounds()
    ]  # fmt: skip


def _rows(path: Path, row_type: Any) -> list[Any]:
    return tables.read_rows(path, row_type) if path.is_file() else []


def state(run: Run) -> str:
    """Where the run stands, in words."""
    closed = Counter(r.state for r in run.rounds if r.state != "running")
    if not run.rounds:
        return "no rounds yet"
    parts = [f"{count} {name}" for name in ("promoted", "rejected", "skipped", "cancelled") if (count := closed[name])]
    done = sum(closed.values())
    text = f"{done} {'round' if done == 1 else 'rounds'} finished" + (f" ({', '.join(parts)})" if parts else "")
    running = [r for r in run.rounds if r.state == "running"]
    if running:
        at = next((s for s in STAGES if s not in running[0].seconds), "promote")
        text += f", round {running[0].index} unfinished (at {at})"
    return text

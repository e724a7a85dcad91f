"""The stage `promote`: the policy that the gate decided for serves from here on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selfplay.generation.serving import Serving
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage
from selfplay.storage import folders
from selfplay.types import Policy

PROMOTE = Stage(
    name="promote", reads=("evaluate/verdict.json",), reads_if_done=("suite/verdict.json",), log="generator"
)


def decided(gate: Path, suites: Path) -> tuple[bool, list[str]]:
    """Whether the gate lets the candidate through and no suite vetoes; and why the gate does not, with all vetoes.

    `gate`, `suites`: the verdicts of the stages. A round without suites has none of the second kind.
    """
    verdict = folders.read_json(gate)
    vetoes: list[str] = folders.read_json(suites)["vetoes"] if suites.is_file() else []
    return bool(verdict["promoted"]) and not vetoes, verdict["reasons"] + vetoes


def promote(
    out: Path,
    line: Line,
    *,
    winner: Policy,
    promoted: bool,
    serving: Serving,
    set_current: Callable[[int], None],
) -> Metrics:
    """Swap the winner in, verified, and only then make it the current policy. `promoted`: whether it is the candidate."""
    report = serving.serve(winner, trial=False)
    set_current(winner.version)
    line.update(text=f"policy {winner.version} serves")
    metrics = {"promoted": float(promoted)}
    if report is not None:
        metrics |= {"swap_seconds": report.seconds, "first_token_seconds": report.seconds_to_first_token}
    if serving.generator.info is not None:  # what every swap would take without a warm engine
        metrics["engine_start_seconds"] = serving.generator.info.start_seconds
    return metrics

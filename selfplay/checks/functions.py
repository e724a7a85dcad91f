"""Looks at the user's own functions: the rubric of `evaluate.gold` and the rewriter of `evolve.rewriter`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.rounds.run import load_function


def rubric(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the rubric can be imported."""
    if (name := config.evaluate.gold) is not None:
        load_function("evaluate.gold", name)
        yield Finding.ok("evaluate.gold", f"{name} can be imported")


def rewriter(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether a rewriter that is no policy can be imported."""
    if (name := config.evolve.rewriter) != "policy":
        load_function("evolve.rewriter", name)
        yield Finding.ok("evolve.rewriter", f"{name} can be imported")

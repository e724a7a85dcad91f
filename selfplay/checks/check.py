"""The list of what `selfplay check` looks at: would these rounds run on this machine?

A look is a function of the configuration and the run folder, and stands in the module of its subject. None of them
starts anything heavy or changes anything on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from selfplay.checks import (
    cluster,
    functions,
    gpus,
    machine,
    models,
    permissions,
    prompts,
    publishing,
    reward,
    service,
    shown,
    suites,
    timeline,
    webhook,
)
from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.errors import SelfplayError
from selfplay.rounds.requirements import withhold_secrets

Look = Callable[[Config, Path], Iterator[Finding]]

LOOKS: tuple[tuple[str, Look], ...] = (
    ("models", models.folders),
    ("context", models.context),
    ("training", machine.batches),
    ("prompts", prompts.files),
    ("evaluate.gold", functions.rubric),
    ("evolve.rewriter", functions.rewriter),
    ("reward", reward.sources),
    ("evaluate.suites", suites.benchmarks),
    ("run folder", service.run_folder),
    ("answers", shown.answers),
    ("schedule", service.schedule),
    ("track", service.tracker),
    ("token", service.token),
    ("permissions", permissions.owners_alone),
    ("port", service.port),
    ("publish", publishing.targets),
    ("webhook", webhook.answers),
    ("disk", machine.disk),
    ("memory", machine.memory),
    ("precision", machine.precision),
    ("gpu", gpus.gpus),
    ("utilisation", timeline.idle),
    ("cluster", cluster.nodes),
)


def check(config: Config, run_dir: Path, looks: Sequence[tuple[str, Look]] = LOOKS) -> list[Finding]:
    """Everything that can be known before a round without loading a model. A look that fails is a finding too."""
    withhold_secrets(config)
    found: list[Finding] = []
    for name, look in looks:
        try:
            found += look(config, run_dir)
        except (SelfplayError, OSError, ValueError) as error:
            hint = getattr(error, "hint", "")
            found.append(Finding.error(name, f"{error}{'; ' if hint else ''}{hint}"))
        except Exception as error:  # one look that fails must not hide the others
            found.append(Finding.error(name, f"{type(error).__name__}: {error}"))
    return found

"""`evaluate.suites`: benchmarks that candidate and champion answer between rounds, and that can veto."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from selfplay.config.base import Positive, Section
from selfplay.config.reward import JudgeConfig

OF_FILES = ("reward", "temperature", "top_p", "top_k")
OF_TASKS = ("include_path", "chat", "trust_remote_code")


class SuiteGate(Section):
    max_drop: Annotated[float, Field(ge=0)]
    """The candidate is rejected when its mean score has fallen by more than this with confidence: when the upper bound of
    the interval of (candidate − champion), at `evaluate.gate.confidence`, is below −max_drop."""


class SuiteConfig(Section):
    """One suite. It is answered by candidate and champion, and it can veto where it has a `gate`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Its name in metrics, as `suite/NAME/score`."""
    file: Path | None = None
    """JSONL or Parquet file. Rows with `choices` are multiple choice; the answers to all others are scored by `reward`
    (docs/suites.md)."""
    task: str | None = None
    """A task or a group of lm-evaluation-harness, instead of `file`; it needs the extra `eval`."""
    include_path: Path | None = None
    """Folder with YAML files of your own tasks."""
    chat: bool = True
    """Whether the requests of a task go through the policy's chat template."""
    trust_remote_code: bool = False
    """Let a task take metrics from the library `evaluate`, which fetches them from the Hub as Python code and runs it."""
    reward: JudgeConfig | None = None
    """What scores the answers to the rows of a file, as `evaluate.judge`. Multiple choice needs none."""
    metric: str | None = None
    """The metric that counts where there are several: of a task by default its first, of multiple choice `acc` (by the
    summed log-probability) or `acc_norm` (divided by the length of the choice)."""
    every: Positive = 1
    """Rounds between two comparisons."""
    prompts: Positive | None = None
    """Rows that are used. By default all are. Of a file they are a fixed random part, and of a task its first
    documents."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature. 0 takes the likeliest token each time. A task says for itself how it is sampled."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the share of the probability that is sampled from. 1 keeps every token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """How many of the likeliest tokens are sampled from. 0 keeps every token."""
    max_tokens: Positive | None = None
    """Longest answer (tokens), by default generate.max_tokens. The context of the engine grows with it."""
    gate: SuiteGate | None = None
    """When the suite vetoes. Without this section it is only reported."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.task is None):
            raise ValueError("give exactly one of `file` and `task`")
        owner, others = ("file", OF_TASKS) if self.file is not None else ("task", OF_FILES)
        fields = type(self).model_fields
        if wrong := [name for name in others if getattr(self, name) != fields[name].default]:
            raise ValueError(f"`{wrong[0]}` has no meaning for a suite with a `{owner}`")
        return self

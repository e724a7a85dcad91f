"""The section `evaluate`: the comparison of a candidate with the current policy, its judge and the gate."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field, field_validator

from selfplay.config.base import Positive, Section, Share
from selfplay.config.reward import JudgeConfig
from selfplay.config.suites import SuiteConfig


class GateConfig(Section):
    win_rate_lower: Share = 0.47
    """The lower bound of the win rate of a candidate has to be above this. It then counts as not inferior. 0 asks
    nothing."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Two-sided confidence of the bootstrap interval."""
    reward_up: bool = True
    """Whether the mean reward has to be higher than the champion's on the same prompts."""
    max_kl: Annotated[float, Field(gt=0)] = 30.0
    """Limit of KL(candidate ‖ current), in nats an answer. It is estimated from sampled answers, so it needs
    temperature 1."""
    max_length_ratio: Annotated[float, Field(gt=1)] = 1.5
    """How many times as long as the champion's the answers may be on average. The inverse is the lower limit."""
    max_cut_off: Share = 0.1
    """Limit of the share of answers that hit the token limit, unless the champion's share is as high."""


class EvaluateConfig(Section):
    prompts: Positive = 128
    """Held-out prompts answered by candidate and champion, drawn anew each round."""
    judge: JudgeConfig | None = None
    """Another reward than the one that trains. Without one the gate is not independent, and says so."""
    gold: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """A rubric `module:function`. It is given (messages, response, meta) and returns scores, one of which is `total`.
    They are reported and never decide. It is called for every held-out prompt, with {} for `meta` where the prompt has none."""
    audit_every: Annotated[int, Field(ge=0)] = 4
    """Rounds between two comparisons with the initial policy on the audit set. 0: never."""
    audit_prompts: Positive = 256
    """Prompts of the audit set that are used."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap samples."""
    gate: GateConfig = GateConfig()
    """When a candidate becomes the current policy."""
    suites: list[SuiteConfig] = []
    """Benchmarks between rounds: what is asked, how it is scored, and by how much a score may fall (docs/suites.md)."""

    @field_validator("suites")
    @classmethod
    def _own_names(cls, suites: list[SuiteConfig]) -> list[SuiteConfig]:
        counts = Counter(suite.name for suite in suites)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(f"two suites are called {twice[0]!r}")
        return suites

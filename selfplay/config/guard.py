"""The section `guard`: from which values on the reward, or what is to be trained on, is taken to go wrong."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from selfplay.config.base import Positive, Section


class Limits(Section):
    warn: Annotated[float, Field(ge=0)] | None = None
    """A value above this is a warning. null: there is no warning."""
    stop: Annotated[float, Field(ge=0)] | None = None
    """A value above this stops the round before it trains. null: it never does."""


class GuardConfig(Section):
    """When the reward, or what is to be trained on, is taken to go wrong. The values are metrics of every round, `guard/…`."""

    ties: Limits = Limits(warn=0.5)
    """Share of the pairs of a prompt's different answers whose rewards differ by no more than reward.noise."""
    saturation: Limits = Limits(warn=0.25)
    """Share of the rewards at the highest or at the lowest value of the round."""
    length_correlation: Limits = Limits(warn=0.6)
    """Correlation of reward and length among the answers to a prompt, without its sign."""
    shift: Limits = Limits(warn=0.3)
    """Kolmogorov-Smirnov distance of the round's rewards from those of the last `history` rounds."""
    disagreement: Limits = Limits(warn=0.5)
    """Mean over the candidates of the standard deviation over an ensemble's members (normalised scores)."""
    gold_drop: Limits = Limits(warn=0.05)
    """How far the gold score has fallen from its best of earlier rounds while the reward rose, if evaluate.gold is set.
    It has no `stop`, because gold is reported and decides nothing."""
    cut_off: Limits = Limits(warn=0.3)
    """Share of the answers that hit generate.max_tokens."""
    length_gap: Limits = Limits(warn=0.5)
    """Share by which chosen answers are shorter than rejected ones, or the other way round (mean tokens of the base pairs)."""
    decided_by_length: Limits = Limits(warn=0.9)
    """Share of the base pairs in which the longer answer wins, or the shorter one, whichever is more. It is 0.5 if
    length says nothing."""
    duplicates: Limits = Limits(warn=0.5)
    """Share of the answers whose tokens are those of another answer to the same prompt."""
    repetition: Limits = Limits(warn=0.3)
    """Share of an answer's 4-grams of tokens that the answer has said before, as the mean over some thousand
    answers."""
    probe_change: Limits = Limits(warn=0.01, stop=0.1)
    """Change of the score of a text that did not change, in standard deviations of the probes' first scores."""
    probe_missing: Limits = Limits(warn=0.1, stop=0.25)
    """Share of the texts that did not change which lost their score, or got one."""
    probes: Annotated[int, Field(ge=0)] = 16
    """Texts of the first round that are scored again before and after the answers of every round, without the cache. 0:
    none."""
    history: Positive = 3
    """Earlier rounds that a round is compared with."""

    @model_validator(mode="after")
    def _gold_decides_nothing(self) -> GuardConfig:
        if self.gold_drop.stop is not None:
            raise ValueError("gold_drop may warn and has no `stop`: gold is reported and never decides what is trained")
        return self

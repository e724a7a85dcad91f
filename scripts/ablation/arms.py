"""The arms of the ablation: their settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALL = "potential+epsilon+breadth+gradient"
ARMS = ["plain", "potential", "epsilon", "breadth+uniform", "breadth+gradient", ALL]
CONTROLS = ["deep", "uniform", "gradient", "others", "lower-beta", "ahead"]
NEIGHBOURS = ["easiest", "two-sigma", "fused", "replay", "ema"]
POOLS = ("redundant", "learnable")
REDUNDANT = [
    "plain", "deep", "uniform", "breadth+deep", "breadth-last+deep", "breadth-last+uniform", "breadth-last+gradient"
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What each arm samples in a round."""

    prompts: int
    candidates: int
    """To each of them."""
    shard_prompts: int

    @property
    def deep(self) -> dict[str, Any]:
        """That of arms with depth: half the prompts with twice the candidates, so the same tokens, and two pairs of each kept
        prompt, so the same number of pairs."""
        return {
            "prompts.per_round": self.prompts // 2,
            "generate.candidates": self.candidates * 2,
            "generate.shard_prompts": self.shard_prompts // 2,
        }


BREADTH = {"breadth.method": "clusters", "breadth.oversample": 4}
COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"pairs.selection": name} for name in ("potential", "explicit", "implicit")},
    "signed": {"pairs.selection": "potential", "pairs.signed": True},
    # The papers' .01 over 470 steps moves β far; a round here has 12 steps, in which .01 would move it by 9 %.
    "epsilon": {"train.epsilon": 0.05},
    **{name: {"depth.method": name, "depth.pairs_per_prompt": 2} for name in ("uniform", "gradient")},
    "breadth": BREADTH,
    # The tiny policy has learned answers, not prompts: in world 0 the mean of its states does not tell questions apart.
    "breadth-last": BREADTH | {"breadth.pooling": "last"},
    "deep": {"pairs.keep": 1.0},
    "others": {"depth.method": "gradient", "depth.pairs_per_prompt": 2, "depth.closeness": "others"},
    "lower-beta": {"train.beta": 0.08},
    "ahead": {"schedule.ahead": 1},
    # Methods next to ours. `easiest` ranks what is left by chance and keeps as many pairs as the others: all of the easier half.
    "easiest": {"pairs.easiest": 0.5, "pairs.keep": 1.0},
    "two-sigma": {"pairs.rejected": "two_sigma"},
    "fused": {"pairs.selection": "fused", "pairs.signed": True},
    # As many pairs as the others in every round but the first, which has nothing to replay.
    "replay": {"train.replay": 0.25, "pairs.keep": 0.4},
    "ema": {"train.reference": {"ema": 0.6}},
}
DEEP = ("uniform", "gradient", "deep", "others")
"""Components that sample as arms with depth do."""
BASE = {
    "pairs.selection": "random",
    "pairs.keep": 0.5,
    "train.epsilon": 0,
    "evaluate.prompts": 1,
    "evaluate.audit_every": 0,
    "evaluate.gate.win_rate_lower": 0,
    "evaluate.gate.reward_up": False,
    "evaluate.gate.max_length_ratio": 1000,
    "evaluate.gate.max_cut_off": 1,
    "evaluate.gate.max_kl": 1000000,
    "retention.last": 1,
}
SHARED_STAGES = ("prompts", "generate", "score")


def overrides(arm: str, budget: Budget) -> dict[str, Any]:
    """The settings of an arm. Ends the program with the known names where a component is unknown."""
    settings = dict(BASE)
    for name in arm.split("+"):
        if name not in COMPONENTS:
            sys.exit(f"arm {arm!r}: unknown component {name!r}; known: {', '.join(COMPONENTS)}")
        settings |= COMPONENTS[name] | (budget.deep if name in DEEP else {})
    return settings


def sampling(arm: str, budget: Budget) -> dict[str, Any]:
    """The settings of an arm that its first round's candidates depend on."""
    return {
        key: value
        for key, value in overrides(arm, budget).items()
        if key.split(".")[0] in ("prompts", "generate", "breadth")
    }


def assignments(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

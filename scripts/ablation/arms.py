"""The arms of the ablation: their settings, and what was expected of them before the runs."""

from __future__ import annotations

import json
import sys
from typing import Any

ALL = "potential+epsilon+breadth+gradient"
ARMS = ["plain", "potential", "epsilon", "breadth+uniform", "breadth+gradient", ALL]
CONTROLS = ["deep", "uniform", "gradient", "others", "lower-beta", "ahead"]
NEIGHBOURS = ["easiest", "two-sigma", "fused", "replay", "ema"]
POOLS = ("redundant", "learnable")
REDUNDANT = [
    "plain", "deep", "uniform", "breadth+deep", "breadth-last+deep", "breadth-last+uniform", "breadth-last+gradient"
]  # fmt: skip

# What is expected of which difference. It was fixed before the runs: (arm, against, metric, least lower bound of the interval).
COMPARISONS = [
    ("potential", "plain", "reward", 0.0),
    *((arm, "plain", "gold", -0.02) for arm in ARMS[1:]),
    ("epsilon", "plain", "gold_per_nat", 0.0),
    ("breadth+gradient", "breadth+uniform", "gold", 0.0),
    ("breadth+gradient", "breadth+uniform", "reward", 0.0),
    ("breadth+gradient", "plain", "gold", 0.0),
    (ALL, "plain", "gold", 0.0),
    (ALL, "plain", "reward", 0.0),
]
# The same where prompts are redundant. Breadth is expected to help with depth and without it, and both to beat one pair a
# prompt.
REDUNDANT_COMPARISONS = [
    *(("breadth-last+deep", "deep", metric, 0.0) for metric in ("gold", "reward")),
    *(("breadth-last+uniform", "uniform", metric, 0.0) for metric in ("gold", "reward")),
    *((arm, "plain", metric, 0.0) for arm in REDUNDANT[4:] for metric in ("gold", "reward")),
    *(("breadth-last+gradient", "breadth-last+uniform", metric, 0.0) for metric in ("gold", "reward")),
]

METRICS = {
    "reward": "held-out reward",
    "gold": "gold total",
    "content": "gold content",
    "win": "gold win rate against the initial policy",
    "kl": "KL to the initial policy (nats an answer)",
    "gold_per_nat": "gold gained per nat of KL",
    "length": "tokens an answer",
}

# Depth has half the prompts with twice the candidates, so the same tokens, and two pairs of each kept prompt, so the same
# number of pairs.
DEEP = {"prompts.per_round": 96, "generate.candidates": 16, "generate.shard_prompts": 32}
BREADTH = {"breadth.method": "clusters", "breadth.oversample": 4}
COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"pairs.selection": name} for name in ("potential", "explicit", "implicit")},
    "signed": {"pairs.selection": "potential", "pairs.signed": True},
    # The papers' .01 over 470 steps moves β far; a round here has 12 steps, in which .01 would move it by 9 %.
    "epsilon": {"train.epsilon": 0.05},
    **{name: {"depth.method": name, "depth.pairs_per_prompt": 2} | DEEP for name in ("uniform", "gradient")},
    "breadth": BREADTH,
    # The tiny policy has learned answers, not prompts: in world 0 the mean of its states does not tell questions apart.
    "breadth-last": BREADTH | {"breadth.pooling": "last"},
    "deep": DEEP | {"pairs.keep": 1.0},
    "others": {"depth.method": "gradient", "depth.pairs_per_prompt": 2, "depth.closeness": "others"} | DEEP,
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
LAST = {"evaluate.prompts": 100_000, "evaluate.audit_every": 1, "evaluate.audit_prompts": 100_000}
SHARED_STAGES = ("prompts", "generate", "score")


def overrides(arm: str) -> dict[str, Any]:
    """The settings of an arm. Ends the program with the known names where a component is unknown."""
    settings = dict(BASE)
    for name in arm.split("+"):
        if name not in COMPONENTS:
            sys.exit(f"arm {arm!r}: unknown component {name!r}; known: {', '.join(COMPONENTS)}")
        settings |= COMPONENTS[name]
    return settings


def sampling(arm: str) -> dict[str, Any]:
    """The settings of an arm that its first round's candidates depend on."""
    return {
        key: value for key, value in overrides(arm).items() if key.split(".")[0] in ("prompts", "generate", "breadth")
    }


def assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

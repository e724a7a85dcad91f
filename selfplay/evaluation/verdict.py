"""The gate: how a candidate policy does beside the champion, and whether it becomes the current policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from selfplay.config import GateConfig
from selfplay.methods import gate
from selfplay.models import thinking
from selfplay.types import Candidate, Verdict


def compare(
    candidate: Sequence[Candidate],
    champion: Sequence[Candidate],
    scores: ArrayLike,
    champion_scores: ArrayLike,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, float]:
    """Metrics of the candidate's answers beside the champion's, prompt by prompt; scores (N,) by the judge.

    Prompts where either answer has no score (NaN) are left out and counted.
    """
    a, b = np.asarray(scores, np.float64), np.asarray(champion_scores, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise ValueError("no prompt has a score for both answers")
    won = gate.wins(a[both], b[both])
    length = np.array([c.n_tokens for c in candidate], np.float64)
    champion_length = np.array([c.n_tokens for c in champion], np.float64)
    low, high = gate.bootstrap(won, samples, confidence, seed)
    return {
        "prompts": float(both.sum()),
        "unscored": float((~both).sum()),
        "reward": float(a[both].mean()),
        "reward_champion": float(b[both].mean()),
        "win_rate": float(won.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "win_rate_length_controlled": gate.length_controlled(won, length[both], champion_length[both]),
        "length": float(length.mean()),
        "length_ratio": float(length.mean() / max(champion_length.mean(), 1e-9)),
        "distinct_2": gate.distinct_n([c.token_ids for c in candidate]),
        "cut_off": float(np.mean([c.finish_reason != "stop" for c in candidate])),
        "cut_off_champion": float(np.mean([c.finish_reason != "stop" for c in champion])),
        "empty": float(np.mean([not c.text.strip() for c in candidate])),
        **thinking.metrics([c.thinking for c in candidate]),
    }


def verdict(metrics: dict[str, float], rule: GateConfig, independent: bool) -> Verdict:
    """Promoted unless a limit is broken; every broken one is a reason."""
    m = metrics
    reasons = []
    if rule.win_rate_lower > 0 and not m["win_rate_low"] > rule.win_rate_lower:
        reasons.append(
            f"win rate {m['win_rate']:.3f} with lower bound {m['win_rate_low']:.3f}, not above {rule.win_rate_lower:g}"
        )
    if rule.reward_up and not m["reward"] > m["reward_champion"]:
        reasons.append(f"mean reward {m['reward']:.3f}, not above the champion's {m['reward_champion']:.3f}")
    if not m["kl_current"] <= rule.max_kl:
        reasons.append(f"KL to the current policy {m['kl_current']:.2f} nats an answer, above {rule.max_kl:g}")
    if not 1 / rule.max_length_ratio <= m["length_ratio"] <= rule.max_length_ratio:
        reasons.append(
            f"length ratio {m['length_ratio']:.2f}, outside 1/{rule.max_length_ratio:g} … {rule.max_length_ratio:g}"
        )
    if m["cut_off"] > max(rule.max_cut_off, m["cut_off_champion"]):
        reasons.append(f"{m['cut_off']:.1%} of the answers are cut off, above {rule.max_cut_off:.1%}")
    return Verdict(promoted=not reasons, reasons=reasons, independent=independent)

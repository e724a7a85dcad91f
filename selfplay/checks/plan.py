"""The plan that `selfplay check` prints: what a round will do, in numbers, before it does it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

from selfplay.checks import sizes, timeline
from selfplay.checks.machine import policy_bytes
from selfplay.checks.shown import shown, words
from selfplay.config import Config
from selfplay.errors import SelfplayError
from selfplay.methods import gate
from selfplay.planning.memory import GIB

TOKEN_BYTES = 16  # that a sampled token takes in the artifacts, with its text


def plan(config: Config, run_dir: Path | None = None) -> list[tuple[str, str]]:
    """Rows (what, how much) about a round. They are upper bounds where the length of the answers decides.

    Where the run has answers already, the plan says what they showed, and counts with their length.
    """
    seen = None if run_dir is None else shown(run_dir)
    prompts, k, evaluate = config.prompts.per_round, config.generate.candidates, config.evaluate
    kept = max(1, int(config.pairs.keep * config.pairs.easiest * prompts))
    trained = timeline.trained_pairs(config)
    steps = math.ceil(trained / config.train.batch_pairs) * config.train.epochs
    answers = 2 * evaluate.prompts
    audited = evaluate.audit_prompts if evaluate.audit_every else 0
    rewrites = int(config.evolve.top * prompts) if config.evolve.every and config.evolve.rewriter == "policy" else 0
    longest = config.generate.max_tokens
    sampled = (prompts * k + answers + audited + rewrites) * longest
    drawn = f"{prompts}, {k} candidates each: {prompts * k:,}"
    if config.breadth.method != "none":
        drawn += f"; {math.ceil(prompts * config.breadth.oversample):,} are drawn, to choose from"
    evaluation = f"{answers} answers to {evaluate.prompts} held-out prompts"
    if audited:
        often = "every round" if evaluate.audit_every == 1 else f"every {evaluate.audit_every} rounds"
        evaluation += f"; {often} {audited} more to the audit set (the first time twice as many)"
    rows = [
        ("prompts", drawn),
        ("tokens", f"up to {prompts * k * longest:,} for candidates ({longest} a response), {sampled:,} with all else"),
        (
            "pairs",
            f"up to {prompts} base pairs, {kept} kept, {trained} trained on in {steps} steps of {config.train.batch_pairs}",
        ),
        ("evaluation", evaluation),
    ]
    if seen is not None:
        usual = prompts * k * min(seen.length, longest)
        rows.insert(2, ("answers", f"about {usual:,.0f} tokens for candidates, if they are as in {words(seen)}"))
    if rewrites:
        rows.insert(-1, ("rewrites", f"{rewrites} prompts, every {config.evolve.every} rounds"))
    try:
        count = sizes.parameters(config.policy.model, config.policy.revision)
    except SelfplayError:  # the look at the models says what is wrong with the folder
        count = None
    if count is not None:
        size = (sampled * TOKEN_BYTES + policy_bytes(config, count)) / GIB
        rows.append(("disk", f"up to {size:.2f} GiB a round, retention aside"))
    least, confidence = evaluate.gate.win_rate_lower, evaluate.gate.confidence
    chances = " · ".join(
        f"{p:.2f} → {gate.power(evaluate.prompts, p, least, confidence):.0%}" for p in (0.47, 0.5, 0.53, 0.56, 0.6)
    )
    rows.append(("gate", f"chance to pass by true win rate, at {evaluate.prompts} prompts: {chances}"))
    with contextlib.suppress(SelfplayError, ValueError):  # as above, and for processes and GPUs
        rows += timeline.rows(config, seen)
    return rows

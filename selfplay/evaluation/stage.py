"""The stage `evaluate`: candidate and champion answer held-out prompts, a judge scores them, the gate decides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from selfplay.config import EvaluateConfig
from selfplay.evaluation.judge import Judge, gold_means, require_scores, rewards
from selfplay.evaluation.verdict import compare, verdict
from selfplay.methods import gate
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Policy, Prompt, Scored

EVALUATE = Stage(
    name="evaluate",
    reads=("train/history.json",),
    writes=("candidate.parquet", "champion.parquet", "judge.json", "verdict.json"),
    unit="answers",
    log="generator",
    space=samples,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Prompts that a policy answers once each."""

    name: str
    """Under one name they are sampled once a round, and then read."""
    prompts: Sequence[Prompt]
    policy: Policy


class Engine(Protocol):
    """The engines, as far as evaluation asks them. Several policies answer side by side where there are several engines."""

    def side_by_side(self, asked: Sequence[Asked], on_progress: Callable[[int], None]) -> list[list[Candidate]]:
        """The answers to each of what is asked. `on_progress` gets how many are there, of all together."""

    def logps(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Candidate],
        policies: Sequence[Policy],
        on_progress: Callable[[int], None],
    ) -> list[list[float]]:
        """Log-probability of each answer (nats, summed), under each of the policies. `on_progress` gets how many are there, of
        all policies together."""


def evaluate(
    out: Path,
    line: Line,
    *,
    champion: Policy,
    candidate: Policy,
    initial: Policy,
    held_out: Sequence[Prompt],
    audit: Sequence[Prompt],
    engine: Engine,
    initial_answers: Callable[[Callable[[int], None]], list[Candidate]],
    judge: Callable[[], Judge],
    settings: EvaluateConfig,
    seed: int,
    breathe: Callable[[str], None],
) -> Metrics:
    """Answer, score, compare, decide; write the answers, judge.json and verdict.json. Leaves any policy in the engine.

    held_out: prompts of the gate. audit: prompts that the candidate and the initial policy answer, which never gates; none
    in most rounds. initial_answers: the initial policy's answers to these; it tells its argument how many are there.
    judge: gives the judge. It is called when all answers are there: where roles take turns on the GPUs, the engine has done
    all it has to do, and the judge loads once.
    """
    others = [champion] if initial.version == champion.version else [champion, initial]
    answers = 2 * len(held_out) + len(audit)
    line.update(text="candidate and champion answer", total=answers + len(others) * len(held_out))
    champion_rows, rows, audit_rows = engine.side_by_side(
        [
            Asked(name="champion", prompts=held_out, policy=champion),
            Asked(name="candidate", prompts=held_out, policy=candidate),
            Asked(name="audit", prompts=audit, policy=candidate),
        ],
        lambda done: line.update(done=done),
    )
    line.update(text="KL to the current and the initial policy")
    logps = engine.logps(held_out, rows, others, lambda done: line.update(done=answers + done))
    kl_current, kl_initial = _kl(rows, logps[0]), _kl(rows, logps[-1])

    def of_the_initial(done: int) -> None:
        line.update(text=f"{done} of {len(audit)} audit answers of the initial policy")

    initial_rows = initial_answers(of_the_initial) if audit else []

    line.update(text="scoring")
    judging = judge()
    folders.write_json(out / "judge.json", judging.described)
    judged, champion_judged = judging.both(held_out, rows, champion_rows, breathe)
    scores, champion_scores = rewards(judged), rewards(champion_judged)
    require_scores(judging.scorer.role, scores, champion_scores)
    metrics = compare(
        rows, champion_rows, scores, champion_scores,
        samples=settings.bootstrap, confidence=settings.gate.confidence, seed=seed,
    )  # fmt: skip
    metrics |= {"kl_current": kl_current, "kl_initial": kl_initial}
    metrics["tokens"] = sum(c.n_tokens for c in [*rows, *champion_rows, *audit_rows])
    metrics |= gold_means("gold", judged) | gold_means("gold", champion_judged, "_champion")
    tables.write_rows(out / "candidate.parquet", judged, Scored)
    tables.write_rows(out / "champion.parquet", champion_judged, Scored)
    if audit:
        audited, audited_initial = judging.both(audit, audit_rows, initial_rows, breathe)
        metrics |= audit_metrics(audited, audited_initial)
        tables.write_rows(out / "audit.parquet", audited, Scored)
        tables.write_rows(out / "audit_initial.parquet", audited_initial, Scored)
        tables.write_rows(out / "audit_prompts.parquet", audit, Prompt)  # to be read beside the answers
    found = verdict(metrics, settings.gate, independent=judging.dependent is None)
    folders.write_json(out / "verdict.json", dataclasses.asdict(found))
    low, high = metrics["win_rate_low"], metrics["win_rate_high"]
    line.update(text=f"win rate {metrics['win_rate']:.3f} [{low:.3f}, {high:.3f}]")
    return metrics | {"independent": float(found.independent)}


def _kl(answers: Sequence[Candidate], other: Sequence[float]) -> float:
    """KL(candidate ‖ other), nats an answer; `other` are the other policy's log-probabilities of the answers."""
    return gate.kl_estimate([answer.logp for answer in answers], other)


def audit_metrics(answers: Sequence[Scored], initial: Sequence[Scored]) -> Metrics:
    """The policy against the initial one on the audit set: reported, never gates."""
    scores, other = rewards(answers), rewards(initial)
    both = [i for i, (a, b) in enumerate(zip(scores, other, strict=True)) if math.isfinite(a) and math.isfinite(b)]
    if not both:
        return {}
    metrics = {
        "audit_win_rate": float(gate.wins([scores[i] for i in both], [other[i] for i in both]).mean()),
        "audit_reward": sum(scores[i] for i in both) / len(both),
        "audit_reward_initial": sum(other[i] for i in both) / len(both),
        **gold_means("audit_gold", answers),
        **gold_means("audit_gold", initial, "_initial"),
    }
    if "audit_gold_total" in metrics:
        totals = [
            (a.reward_parts["total"], b.reward_parts["total"])
            for a, b in zip(answers, initial, strict=True)
            if a.reward_parts
        ]
        metrics["audit_gold_win_rate"] = float(gate.wins([a for a, _ in totals], [b for _, b in totals]).mean())
    return metrics

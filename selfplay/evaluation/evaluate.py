"""The stage `evaluate`: candidate and champion answer held-out prompts, a judge scores them, the gate decides."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfplay.errors import InputError, RewardError
from selfplay.methods import gate
from selfplay.prompts import draw as prompts
from selfplay.reporting.terminal import Line
from selfplay.rewards import score
from selfplay.rewards.scorer import Scorer
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Policy, Prompt, Scored

if TYPE_CHECKING:
    from selfplay.rounds.round import Round


def evaluate(r: Round, folder: Path, line: Line) -> Mapping[str, float]:
    """Answer, score, compare, decide; writes the answers and verdict.json. Leaves any of the policies in the engine."""
    settings = r.config.evaluate
    champion, candidate, initial = r.run.policy(r.sampler), r.run.policy(r.index), r.run.policy(0)
    held_out, audit = gate_prompts(r), audit_prompts(r)
    line.update(text="the champion answers")
    champion_rows = champion_answers(r)
    line.update(text="the candidate answers", total=len(held_out) + len(audit))
    r.serve(candidate)
    rows = r.sample("candidate", held_out, 1, candidate.version, lambda n: line.update(done=n))
    audit_rows = r.sample("audit", audit, 1, candidate.version, lambda n: line.update(done=len(held_out) + n))
    line.update(text="KL to the current and the initial policy")
    kl_current = _kl(r, held_out, rows, champion)
    kl_initial = kl_current if initial.version == champion.version else _kl(r, held_out, rows, initial)
    initial_rows = _initial_answers(r, audit)

    line.update(text="scoring")
    judge = r.run.judge.identities
    names = r.run.judge.described(judge)
    folders.write_json(folder / "judge.json", {"members": r.run.judge.members, "identities": judge, "names": names})
    _notice_another_judge(r, names)
    judged, champion_judged = _judged(r, held_out, rows, champion_rows, judge)
    scores, champion_scores = _rewards(judged), _rewards(champion_judged)
    if not np.isfinite(np.add(scores, champion_scores)).any():
        raise RewardError(
            f"the {r.run.judge.role} scored no prompt of the gate for both policies: they cannot be compared",
            "see why it gives no score, then run the same command again",
        )
    metrics = gate.compare(
        rows,
        champion_rows,
        scores,
        champion_scores,
        samples=settings.bootstrap,
        confidence=settings.gate.confidence,
        seed=r.seed("bootstrap"),
    )
    metrics |= {"kl_current": kl_current, "kl_initial": kl_initial}
    metrics["tokens"] = sum(c.n_tokens for c in [*rows, *champion_rows, *audit_rows])
    metrics |= _gold("gold", judged) | _gold("gold", champion_judged, "_champion")
    tables.write_rows(folder / "candidate.parquet", judged, Scored)
    tables.write_rows(folder / "champion.parquet", champion_judged, Scored)
    if audit:
        audited, audited_initial = _judged(r, audit, audit_rows, initial_rows, judge)
        metrics |= _audit(audited, audited_initial)
        tables.write_rows(folder / "audit.parquet", audited, Scored)
        tables.write_rows(folder / "audit_initial.parquet", audited_initial, Scored)
    verdict = gate.verdict(metrics, settings.gate, independent=independent(r, judge))
    folders.write_json(folder / "verdict.json", dataclasses.asdict(verdict))
    line.update(
        text=f"win rate {metrics['win_rate']:.3f} [{metrics['win_rate_low']:.3f}, {metrics['win_rate_high']:.3f}]"
    )
    return metrics | {"independent": float(verdict.independent)}


def gate_prompts(r: Round) -> list[Prompt]:
    """A fresh seeded subset of the held-out prompts."""
    ids = prompts.subset(r.run.ids("heldout"), r.config.evaluate.prompts, r.seed("gate"))
    return r.run.prompts.read(ids)


def audit_prompts(r: Round) -> list[Prompt]:
    """The audit set, always the same; empty in rounds that have no audit."""
    every = r.config.evaluate.audit_every
    if not every or r.index % every:
        return []
    ids = prompts.subset(r.run.ids("audit"), r.config.evaluate.audit_prompts, r.config.run.seed, "audit")
    return r.run.prompts.read(ids)


def champion_answers(r: Round) -> list[Candidate]:
    """The champion's answers to this round's gate prompts; sampled once, kept as shards."""
    r.serve(r.run.policy(r.sampler))
    return r.sample("champion", gate_prompts(r), 1, r.sampler, lambda n: None)


def _kl(r: Round, rows: Sequence[Prompt], answers: Sequence[Candidate], other: Policy) -> float:
    """KL(candidate ‖ other), nats an answer; leaves `other` in the engine."""
    r.serve(other)
    sequences = [(p.prompt_ids + c.token_ids, len(p.prompt_ids)) for p, c in zip(rows, answers, strict=True)]
    return gate.kl_estimate(
        [c.logp for c in answers], r.run.generator.logps(sequences, lambda n: r.run.breathe("shard"))
    )


def _initial_answers(r: Round, audit: Sequence[Prompt]) -> list[Candidate]:
    """The initial policy's answers to the audit set: always the same, so sampled once for the run."""
    if not audit:
        return []
    sampling = r.config.generate.model_dump(mode="json", exclude={"engine", "shard_prompts", "candidates"})
    key = json.dumps([sampling, [p.prompt_id for p in audit]], sort_keys=True)
    path = r.run.dir / "audit" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
    if not path.is_file():
        r.serve(r.run.policy(0))
        path.parent.mkdir(exist_ok=True)
        tables.write_rows(path, r.sample("initial", audit, 1, 0, lambda n: None), Candidate)
    return tables.read_rows(path, Candidate)


def independent(r: Round, judge: Sequence[str]) -> bool:
    """Whether another reward judges than the one that scored the round; `judge`: identities of what judges.

    The configuration names two; a server may still have the same weights under both names.
    """
    if r.config.evaluate.judge is None:
        text = "gate not independent: the reward that trains judges (evaluate.judge names no other)"
        r.run.store.event("evaluate", text, r.index)
        r.run.display.note(text)
        return False
    path = r.dir / "score" / "reward.json"
    trains = folders.read_json(path)["identities"] if path.is_file() else []
    both = {i.partition("/")[0][:12] for i in trains} & {i.partition("/")[0][:12] for i in judge} - {""}
    # other heads of one model are other weights by name
    both |= {s.model for s in r.run.reward.sources if s.model} & {s.model for s in r.run.judge.sources if s.model}
    if both:
        text = f"gate not independent: evaluate.judge has the weights {min(both)} of the reward that trains"
        r.run.store.event("guard", text, r.index)
        r.run.display.warn(text)
    return not both


def _notice_another_judge(r: Round, names: list[str]) -> None:
    """Say so where another judge decides than at the last gate; `names`: what this one's scores are known by."""
    for index in range(r.index - 1, 0, -1):
        path = r.run.dir / "rounds" / f"{index:04d}" / "evaluate" / "judge.json"
        if not path.is_file():
            continue
        before = folders.read_json(path).get("names", names)
        if before != names:
            text = f"another judge decides at this gate than in round {index}: {', '.join(names)} instead of {', '.join(before)}"
            r.run.store.event("guard", text, r.index)
            r.run.display.warn(text)
        return


def _judged(
    r: Round,
    rows: Sequence[Prompt],
    answers: Sequence[Candidate],
    others: Sequence[Candidate],
    identities: tuple[str, ...],
) -> tuple[list[Scored], list[Scored]]:
    """Two policies' answers with the judge's score, and the rubric's parts where the prompt has gold answers.

    Both answers to a prompt are asked for together: a pairwise judge compares them. Raises GuardError when others than
    `identities` judge.
    """
    judge: Scorer = r.run.judge
    items = [(p.messages, c.text) for p, *both in zip(rows, answers, others, strict=True) for c in both]
    values, reasons = judge.score(items, lambda n: r.run.breathe("shard"), identities)
    found = []
    for side, said in enumerate((answers, others)):
        score.require(values[side::2], r.config.reward.max_missing, reasons, judge.logs)
        found.append(
            [
                Scored(
                    **{f.name: getattr(c, f.name) for f in dataclasses.fields(c)},
                    reward=value,
                    reward_parts=_grade(r, p, c.text),
                )
                for p, c, value in zip(rows, said, values[side::2], strict=True)
            ]
        )
    return found[0], found[1]


def _grade(r: Round, prompt: Prompt, text: str) -> dict[str, float]:
    if r.run.gold is None or not prompt.meta:
        return {}
    try:
        parts = {name: float(value) for name, value in r.run.gold(prompt.messages, text, prompt.meta).items()}
        parts["total"]
        return parts
    except Exception as error:  # the rubric is the user's own code
        raise InputError(
            f"evaluate.gold ({r.config.evaluate.gold}) failed on prompt {prompt.prompt_id}: {error!r}",
            "mend the rubric, then run the same command again",
        ) from error


def _gold(prefix: str, answers: Sequence[Scored], suffix: str = "") -> dict[str, float]:
    """Means of the rubric's parts over the answers that have them."""
    graded = [a.reward_parts for a in answers if a.reward_parts]
    if not graded:
        return {}
    everywhere = [name for name in graded[0] if all(name in parts for parts in graded)]  # a rubric may differ by prompt
    return {f"{prefix}_{name}{suffix}": sum(g[name] for g in graded) / len(graded) for name in everywhere}


def _audit(answers: Sequence[Scored], initial: Sequence[Scored]) -> dict[str, float]:
    """The policy against the initial one on the audit set: reported, never gates."""
    scores, other = _rewards(answers), _rewards(initial)
    both = [i for i, (a, b) in enumerate(zip(scores, other, strict=True)) if math.isfinite(a) and math.isfinite(b)]
    if not both:
        return {}
    metrics = {
        "audit_win_rate": float(gate.wins([scores[i] for i in both], [other[i] for i in both]).mean()),
        "audit_reward": sum(scores[i] for i in both) / len(both),
        "audit_reward_initial": sum(other[i] for i in both) / len(both),
        **_gold("audit_gold", answers),
        **_gold("audit_gold", initial, "_initial"),
    }
    if "audit_gold_total" in metrics:
        totals = [
            (a.reward_parts["total"], b.reward_parts["total"])
            for a, b in zip(answers, initial, strict=True)
            if a.reward_parts
        ]
        metrics["audit_gold_win_rate"] = float(gate.wins([a for a, _ in totals], [b for _, b in totals]).mean())
    return metrics


def _rewards(rows: Sequence[Scored]) -> list[float]:
    return [math.nan if r.reward is None else r.reward for r in rows]

"""Answers to held-out prompts with the judge's scores, and with the parts of the gold rubric where there is one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from selfplay.errors import InputError, RewardError
from selfplay.evaluation.rubric import Rubric, grade
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.scoring import require
from selfplay.rewards.texts import Item
from selfplay.storage import folders
from selfplay.types import Candidate, Prompt, Scored


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What scores answers at the gate, and reports on them."""

    scorer: Scorer
    identities: tuple[str, ...]
    """The models that have to score all answers of a round."""
    max_missing: float
    """Share of the answers that may have no score (`reward.max_missing`)."""
    gold: Rubric | None
    """The rubric, which is reported and never decides."""
    gold_name: str
    """Its name in the configuration (`evaluate.gold`)."""
    described: Mapping[str, object]
    """Who judges, for judge.json."""
    dependent: str | None
    """Why it is no other reward than the one that trains; None where it is another one."""

    def both(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Candidate],
        others: Sequence[Candidate],
        breathe: Callable[[str], None],
    ) -> tuple[list[Scored], list[Scored]]:
        """Two policies' answers to the same prompts, with scores and parts of the rubric.

        Both answers to a prompt are asked for together, since a pairwise judge compares them. Raises GuardError when others
        than `identities` judge.
        """
        items = [
            Item(p.messages, c.text, p.reference) for p, *two in zip(prompts, answers, others, strict=True) for c in two
        ]
        values, reasons = self.scorer.score(items, lambda n: breathe("shard"), self.identities)
        found = []
        for side, said in enumerate((answers, others)):
            own = values[side::2]
            require(np.array([value is None for value in own]), self.max_missing, reasons, self.scorer.logs)
            found.append([self._scored(p, c, value) for p, c, value in zip(prompts, said, own, strict=True)])
        return found[0], found[1]

    def _scored(self, prompt: Prompt, answer: Candidate, reward: float | None) -> Scored:
        fields = {f.name: getattr(answer, f.name) for f in dataclasses.fields(Scored) if hasattr(answer, f.name)}
        return Scored(**fields, reward=reward, reward_parts=self._grade(prompt, answer.text))

    def _grade(self, prompt: Prompt, text: str) -> dict[str, float]:
        if self.gold is None:
            return {}
        try:
            return grade(self.gold, prompt.messages, text, prompt.meta)
        except Exception as error:  # the rubric is the user's own code
            raise InputError(
                f"evaluate.gold ({self.gold_name}) failed on prompt {prompt.prompt_id}: {error!r}",
                "it is called for every held-out prompt, with an empty meta where the prompt has none: mend the rubric, then "
                "run the same command again",
            ) from error


def rewards(rows: Sequence[Scored]) -> list[float]:
    """Rewards, NaN where there is none."""
    return [math.nan if row.reward is None else row.reward for row in rows]


def gold_means(prefix: str, answers: Sequence[Scored], suffix: str = "") -> dict[str, float]:
    """Means of the rubric's parts over the answers. A rubric may differ by prompt: those parts count that all have."""
    graded = [answer.reward_parts for answer in answers if answer.reward_parts]
    if not graded:
        return {}
    everywhere = [name for name in graded[0] if all(name in parts for parts in graded)]
    return {f"{prefix}_{name}{suffix}": sum(parts[name] for parts in graded) / len(graded) for name in everywhere}


def require_scores(role: str, scores: Sequence[float], others: Sequence[float]) -> None:
    """Raise RewardError unless one prompt at least has a score for both policies."""
    if not np.isfinite(np.add(scores, others)).any():
        raise RewardError(
            f"the {role} scored no prompt of the gate for both policies: they cannot be compared",
            "see why it gives no score, then run the same command again",
        )


def dependence(trains_with: Path, trained_by: Scorer, judge: Scorer, identities: Sequence[str]) -> str | None:
    """Why the judge is no other reward than the one that trains; None where it is another one.

    trains_with: reward.json of the stage `score`. The configuration names two rewards; a server may still have the same
    weights under both names.
    """
    if judge is trained_by:
        return "gate not independent: the reward that trains judges (evaluate.judge names no other)"
    trains = folders.read_json(trains_with)["identities"] if trains_with.is_file() else []
    both = {i.partition("/")[0][:12] for i in trains} & {i.partition("/")[0][:12] for i in identities} - {""}
    # Other heads of one model are other weights by name.
    both |= {s.model for s in trained_by.sources if s.model} & {s.model for s in judge.sources if s.model}
    return (
        f"gate not independent: evaluate.judge has the weights {min(both)} of the reward that trains" if both else None
    )

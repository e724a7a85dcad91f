"""Probes: texts of the first round whose scores are asked for again, to see whether the reward is still the same one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfplay.config import GuardConfig
from selfplay.errors import GuardError
from selfplay.methods import signs
from selfplay.rewards.alarms import Alarm, alarms
from selfplay.rewards.scorer import Scorer, name
from selfplay.rewards.texts import Item, Texts
from selfplay.storage import folders
from selfplay.storage.candidates import read_candidates

PROBED = ("probe_change", "probe_missing")
ALIKE = 0.01  # standard deviations: what a model makes of the same text on another machine

Say = Callable[[str], None]


class Probes:
    """The probe texts of a run and their first scores, in one file."""

    def __init__(self, path: Path, settings: GuardConfig) -> None:
        self.path, self._settings = path, settings

    def ask(
        self,
        scorer: Scorer,
        round_index: int,
        texts: Callable[[int], list[Item]],
        *,
        scored_before: Callable[[], bool],
        record: Say,
        warn: Say,
    ) -> dict[str, float]:
        """Score the probe texts past the cache; how far they are from their first scores, by the names in the configuration.

        The first time, `texts(count)` chooses them and their scores are kept; so again for a member where the configuration
        names another reward. Empty without probes. scored_before: whether an earlier round was scored, which means that the
        file was deleted on purpose. record: for the ledger alone; warn: for a person too. Raises GuardError when a change is
        above its `stop`.
        """
        settings = self._settings
        if not settings.probes:
            return {}
        sources = [source.which() for source in scorer.sources]
        first = folders.read_json(self.path) if self.path.is_file() else None
        items = texts(settings.probes) if first is None else [(i["messages"], i["response"]) for i in first["items"]]
        answer = scorer.ask(items, fresh=True)
        now = [[v if math.isfinite(v) else None for v in scores] for scores in answer.scores.tolist()]
        if first is None:
            if scored_before():
                scorer.begin_anew(answer.identities)
                record("the reward is taken as it is: probes, scale and cache begin anew")
            self._keep(round_index, sources, answer.identities, items, now)
            return dict.fromkeys(PROBED, 0.0)
        places = [_place(member, sources, first["sources"]) for member in range(len(sources))]
        changes = [
            (math.inf, 1.0)
            if place is None
            else (signs.probe_change(first["scores"][place], own), signs.probe_missing(first["scores"][place], own))
            for place, own in zip(places, now, strict=True)
        ]
        alike = [change <= ALIKE and not missing for change, missing in changes]
        moved = [place is None or first["sources"][place] != s for place, s in zip(places, sources, strict=True)]
        # Another place in the configuration with the same scores is another address of the same reward.
        new = [is_moved and not is_alike for is_moved, is_alike in zip(moved, alike, strict=True)]
        kept = [change for change, is_new in zip(changes, new, strict=True) if not is_new]
        found = {sign: max((c[i] for c in kept), default=0.0) for i, sign in enumerate(PROBED)}
        told = alarms(found, {sign: getattr(settings, sign) for sign in found})
        if stops := [alarm for alarm in told if alarm.level == "stop"]:
            raise GuardError(*self._another(stops, first, answer.identities))
        for alarm in told:
            warn(f"guard: {alarm}")
        if any(new):
            record("the configuration names another reward: the probes begin anew")
        before = [None if new[m] else place for m, place in enumerate(places)]
        others = [m for m, p in enumerate(before) if p is not None and first["identities"][p] != answer.identities[m]]
        if others:
            warn(
                f"the reward server names other weights ({_short([answer.identities[m] for m in others])} instead of "
                f"{_short([first['identities'][before[m]] for m in others])}); the probes' scores changed by "
                f"{max(changes[m][0] for m in others):.3g} standard deviations"
            )
        if others or any(moved):
            names = scorer.names(answer.identities)
            known = [
                name(first["identities"][p], first["sources"][p]) if p is not None and alike[m] else names[m]
                for m, p in enumerate(before)
            ]
            scorer.rename(known, names)
            scores = [now[m] if p is None else first["scores"][p] for m, p in enumerate(before)]
            self._keep(round_index if all(new) else first["round"], sources, answer.identities, items, scores)
        return found

    def _another(self, stops: Sequence[Alarm], first: Mapping[str, Any], now: Sequence[str]) -> tuple[str, str]:
        """What is wrong, and what to do about it."""
        return (
            f"the reward is not the one this run began with: {'; '.join(map(str, stops))}; weights "
            f"{_short(first['identities'])} in round {first['round']}, {_short(now)} now",
            "nothing was trained or promoted on it. Serve the earlier reward model again, then run the same command again; if "
            f"the change is meant, delete {self.path}, and the next round takes the reward as it is",
        )

    def _keep(
        self,
        round_index: int,
        sources: list[dict[str, Any]],
        identities: Sequence[str],
        items: Sequence[Item],
        scores: list[list[float | None]],
    ) -> None:
        self.path.parent.mkdir(exist_ok=True)
        folders.write_json(
            self.path,
            {
                "round": round_index,
                "sources": sources,
                "identities": list(identities),
                "items": [{"messages": messages, "response": response} for messages, response in items],
                "scores": scores,
            },
        )


def choose_texts(prompts: Path, candidates: Path, count: int) -> list[Item]:
    """`count` responses of a round, spread evenly over its prompts; two at least of each, for a judge that compares."""
    starts = read_candidates(candidates).starts.tolist()
    groups = len(starts) - 1
    each = max(2, math.ceil(count / groups))
    places = sorted({int(i) for i in np.linspace(0, groups - 1, max(1, min(count // each, groups)))})
    rows = [row for p in places for row in range(starts[p], min(starts[p] + each, starts[p + 1]))]
    with Texts(prompts, candidates) as texts:
        return texts.read(rows[:count])


def _place(member: int, sources: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> int | None:
    """Which of the sources `before` a member is compared with: the same one, or the one that had its place and is gone."""
    if sources[member] in before:
        return before.index(sources[member])
    return member if member < len(before) and before[member] not in sources else None


def _short(identities: Sequence[str]) -> str:
    """The beginning of the weights' hash, and the precision."""
    parts = [identity.split("/") for identity in identities]
    return ", ".join(" ".join([p[0][:12], *p[2:]]) if p[0] else "unnamed" for p in parts)

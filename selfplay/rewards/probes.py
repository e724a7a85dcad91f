"""Probes: texts of the first round whose scores are asked for again, to see whether the reward is still the same one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfplay.config import GuardConfig
from selfplay.errors import DamagedError, GuardError
from selfplay.methods import signs
from selfplay.rewards.alarms import Alarm, alarms
from selfplay.rewards.scorer import Scorer, name
from selfplay.rewards.texts import Item, Texts
from selfplay.storage import seals
from selfplay.storage.candidates import read_candidates

PROBED = ("probe_change", "probe_missing")
ALIKE = 0.01  # standard deviations: what a model makes of the same text on another machine

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The probe texts and their scores, by what source."""

    sources: list[dict[str, Any]]
    identities: Sequence[str]
    items: Sequence[Item]
    scores: list[list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A reward against the one that is known. A member of an ensemble has its place in each list."""

    before: list[int | None]
    """Which of the known sources it is; None where it is a new one."""
    changes: list[tuple[float, float]]
    alike: list[bool]
    new: list[bool]
    others: list[int]
    """Members whose server names other weights."""
    same: bool
    """Every member has the place, and the weights, that are known."""
    signs: dict[str, float]
    alarms: list[Alarm]

    @property
    def stops(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.level == "stop"]


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
        if not self._settings.probes:
            return {}
        first = self._first()
        now = self._asked(scorer, first, texts)
        if first is None:
            if scored_before():
                scorer.begin_anew(now.identities)
                record("the reward is taken as it is: probes, scale and cache begin anew")
            self._keep(round_index, now)
            return dict.fromkeys(PROBED, 0.0)
        found = self._compared(first, now)
        if found.stops:
            raise GuardError(*self._another(found.stops, first, now.identities))
        for alarm in found.alarms:
            warn(f"guard: {alarm}")
        if any(found.new):
            record("the configuration names another reward: the probes begin anew")
        if found.others:
            warn(
                "the reward server names other weights "
                f"({_short([now.identities[m] for m in found.others])} instead of "
                f"{_short([first['identities'][found.before[m]] for m in found.others])}); the probes' scores changed by "
                f"{max(found.changes[m][0] for m in found.others):.3g} standard deviations"
            )
        if not found.same:
            names = scorer.names(now.identities)
            known = [
                name(first["identities"][p], first["sources"][p]) if p is not None and found.alike[m] else names[m]
                for m, p in enumerate(found.before)
            ]
            scorer.rename(known, names)
            scores = [now.scores[m] if p is None else first["scores"][p] for m, p in enumerate(found.before)]
            self._keep(round_index if all(found.new) else first["round"], replace(now, scores=scores))
        return found.signs

    def is_same(
        self, scorer: Scorer, round_index: int, texts: Callable[[int], list[Item]], scored_before: bool
    ) -> bool:
        """Whether the reward is the one that this run knows: `ask` would find nothing to change and nothing to stop for.

        The first time, texts are chosen and kept as in `ask`. Any thread may call it, since it asks the ledger nothing and
        tells nobody anything.
        """
        if not self._settings.probes:
            return True
        first = self._first()
        if first is None and scored_before:
            return False
        now = self._asked(scorer, first, texts)
        if first is None:
            self._keep(round_index, now)
            return True
        found = self._compared(first, now)
        return found.same and not found.stops

    def _first(self) -> Mapping[str, Any] | None:
        """What the file says; None where there is none."""
        if not self.path.is_file():
            return None
        try:
            return seals.read_json(self.path, ("round", "sources", "identities", "items", "scores"))
        except DamagedError as error:
            raise DamagedError(
                self.path,
                f"{error.what}; nothing shows any more that the reward is the one that this run began with",
                "put it back from a copy. If the reward is the same as ever, delete it, and the next round takes the reward as "
                "it is",
            ) from error

    def _asked(self, scorer: Scorer, first: Mapping[str, Any] | None, texts: Callable[[int], list[Item]]) -> _Asked:
        """What the reward gives the probe texts now."""
        if first is None:
            items = texts(self._settings.probes)
        else:
            items = [Item(i["messages"], i["response"], i.get("reference")) for i in first["items"]]
        answer = scorer.ask(items, fresh=True)
        return _Asked(
            sources=[source.which() for source in scorer.sources],
            identities=answer.identities,
            items=items,
            scores=[[v if math.isfinite(v) else None for v in scores] for scores in answer.scores.tolist()],
        )

    def _compared(self, first: Mapping[str, Any], now: _Asked) -> _Compared:
        """How the reward differs from the one that the file knows."""
        sources, settings = now.sources, self._settings
        places = [_place(member, sources, first["sources"]) for member in range(len(sources))]
        changes = [
            (math.inf, 1.0)
            if place is None
            else (signs.probe_change(first["scores"][place], own), signs.probe_missing(first["scores"][place], own))
            for place, own in zip(places, now.scores, strict=True)
        ]
        alike = [change <= ALIKE and not missing for change, missing in changes]
        moved = [place is None or first["sources"][place] != s for place, s in zip(places, sources, strict=True)]
        # Another place in the configuration with the same scores is another address of the same reward.
        new = [is_moved and not is_alike for is_moved, is_alike in zip(moved, alike, strict=True)]
        kept = [change for change, is_new in zip(changes, new, strict=True) if not is_new]
        found = {sign: max((c[i] for c in kept), default=0.0) for i, sign in enumerate(PROBED)}
        before = [None if new[m] else place for m, place in enumerate(places)]
        others = [m for m, p in enumerate(before) if p is not None and first["identities"][p] != now.identities[m]]
        return _Compared(
            before=before,
            changes=changes,
            alike=alike,
            new=new,
            others=others,
            same=not others and not any(moved),
            signs=found,
            alarms=alarms(found, {sign: getattr(settings, sign) for sign in found}),
        )

    def _another(self, stops: Sequence[Alarm], first: Mapping[str, Any], now: Sequence[str]) -> tuple[str, str]:
        """What is wrong, and what to do about it."""
        return (
            f"the reward is not the one this run began with: {'; '.join(map(str, stops))}; weights "
            f"{_short(first['identities'])} in round {first['round']}, {_short(now)} now",
            "nothing was trained or promoted on it. Serve the earlier reward model again, then run the same command again; if "
            f"the change is meant, delete {self.path}, and the next round takes the reward as it is",
        )

    def _keep(self, round_index: int, now: _Asked) -> None:
        self.path.parent.mkdir(exist_ok=True)
        seals.write_json(
            self.path,
            {
                "round": round_index,
                "sources": now.sources,
                "identities": list(now.identities),
                "items": [item._asdict() for item in now.items],
                "scores": now.scores,
            },
        )


def choose_texts(prompts: Path, candidates: Path, count: int, *, among: int) -> list[Item]:
    """`count` responses of a round, spread evenly over its first `among` prompts; two at least of each, for a judge that
    compares.

    They are chosen from the first shard alone, because that is all there is when the first scores are wanted.
    """
    starts = read_candidates(candidates).starts.tolist()[: among + 1]
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

"""The reward of a run, or its judge: one source of scores or an ensemble, behind a cache, on a scale that is kept."""

from __future__ import annotations

import itertools
import json
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward.dialects import Scored as Given
from selfplay.config import EnsembleConfig, RewardSource
from selfplay.errors import GuardError, Interrupted, RewardError
from selfplay.methods import ensemble
from selfplay.processes.places import HERE, Places
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.cache import keys as cache_keys
from selfplay.rewards.service import RewardService
from selfplay.rewards.texts import Item
from selfplay.storage import seals

LATEST = 1.0  # seconds


def name(identity: str, which: Mapping[str, Any]) -> str:
    """What scores are known by: what gave them, or what the configuration says if the server does not tell."""
    return identity or json.dumps(which, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The scores of the members, before any scale."""

    identities: tuple[str, ...]  # of the members; «» for a server that does not say which weights it has
    scores: NDArray[np.float64]  # (M, N); NaN for a member without a score
    reasons: Counter[str] = field(default_factory=Counter)  # why there is none, among the items that were asked for now


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    rewards: NDArray[np.float64]  # (N,); NaN if any member has no score
    disagreement: NDArray[np.float64] | None  # (N,) in standard deviations; None without an ensemble


class Scorer:
    """Scores items with all members at the same time. `role` is «reward» or «judge» in logs, files and messages."""

    def __init__(
        self,
        role: str,
        sources: Sequence[RewardSource],
        settings: EnsembleConfig | None,
        run_dir: Path,
        *,
        cache: ScoreCache | None,
        gpus: Sequence[int] | None,
        shared: bool = False,
        turn: Callable[[str], None] = lambda role: None,
        on_event: Callable[[str, str], None],
        places: Places = HERE,
    ) -> None:
        """`shared`: servers of ours use all GPUs, by turns with other roles; `turn` waits for the turn of a role.
        `places`: where these servers run."""
        self.role, self.sources, self._ensemble, self._cache, self._on_event = role, sources, settings, cache, on_event
        self._cache_fails = False
        self.members = [] if settings is None else settings.names
        ours = itertools.count()
        self._services = [
            RewardService(
                source,
                run_dir,
                name=name,
                gpus=gpus,
                shared=shared,
                on_event=on_event,
                place=HERE if source.url else places.of(role, next(ours)),
            )
            for source, name in zip(sources, [f"{role}-{m}" for m in self.members] or [role], strict=True)
        ]
        self._shared, self._turn = shared, turn
        self._scale_file = run_dir / "reward" / f"{role}-scale.json"

    @property
    def logs(self) -> list[Path]:
        """The logs of the servers that are ours."""
        return [service.log for service in self._services if service.log.is_file()]

    def start(self) -> None:
        """Start the servers that are ours, without those that have to wait for their turn. It returns at once."""
        for service in self._services:
            if not (self._shared and service.takes_turns):
                service.start()

    def make_room(self) -> None:
        """Give the memory of shared GPUs back until the next call."""
        for service in self._services:
            service.make_room()

    def _take_turn(self) -> None:
        if self._shared and any(service.takes_turns for service in self._services):
            self._turn(self.role)

    def stop(self) -> None:
        for service in self._services:
            service.stop()

    def interrupt(self) -> None:
        """Have whoever waits for scores now, in another thread, raise Interrupted instead."""
        for service in self._services:
            service.interrupt()

    @property
    def identities(self) -> tuple[str, ...]:
        """What scores, for each member: hashes of weights and template, as its server says, or «» if it does not say."""
        self._take_turn()
        return tuple(service.identity for service in self._services)

    def names(self, identities: Sequence[str]) -> list[str]:
        """What the scores of each member are known by."""
        return [name(identity, s.which()) for identity, s in zip(identities, self.sources, strict=True)]

    def who(self, identities: Sequence[str]) -> list[tuple[str, str]]:
        """Each member and what its scores are known by: scores by others are not used in their place."""
        return list(zip(self.members or [self.role], self.names(identities), strict=True))

    def described(self, identities: Sequence[str]) -> list[str]:
        """What its rewards depend on: what the scores of the members are known by, and how they are combined."""
        how = [] if self._ensemble is None else [f"{self._ensemble.combine} {self._ensemble.std_weight:g}"]
        return self.names(identities) + how

    def score(
        self,
        items: Sequence[Item],
        on_progress: Callable[[int], None] = lambda done: None,
        identities: tuple[str, ...] | None = None,
    ) -> tuple[list[float | None], Counter[str]]:
        """One finite number for each item, or None if a member cannot score it, and the reasons. Raises as `ask`, and
        GuardError when others than `identities` answer."""
        answer = self.ask(items, on_progress)
        if identities is not None and answer.identities != identities:
            raise GuardError(
                f"the model behind the {self.role} changed during the stage: {answer.identities} instead of {identities}",
                "see that one and the same model serves, then run the same command again",
            )
        rewards = self.combine(answer.identities, answer.scores).rewards
        return [v if np.isfinite(v) else None for v in rewards.tolist()], answer.reasons

    def ask(
        self, items: Sequence[Item], on_progress: Callable[[int], None] = lambda done: None, fresh: bool = False
    ) -> Answer:
        """The scores of every member. With `fresh` the servers are asked for all items, whatever the cache holds.

        Raises RewardError when a server stays down, InputError when it refuses, and GuardError when its model changed
        meanwhile.
        """
        self._take_turn()
        if len(self._services) == 1:
            answers = [self._ask(self._services[0], items, on_progress, fresh)]
        else:
            answers = self._ask_all(items, on_progress, fresh)
        shape = (len(answers), len(items))
        scores = np.array([scores for _, scores in answers], np.float64).reshape(shape)
        reasons = sum((service.reasons for service in self._services), Counter[str]())
        return Answer(identities=tuple(identity for identity, _ in answers), scores=scores, reasons=reasons)

    def _ask_all(
        self, items: Sequence[Item], on_progress: Callable[[int], None], fresh: bool
    ) -> list[tuple[str, list[float]]]:
        """`_ask` of all members at the same time. `on_progress` is called in this thread, and what it raises ends them all."""
        told: queue.SimpleQueue[tuple[int, int | tuple[str, list[float]] | Exception]] = queue.SimpleQueue()
        unwanted = threading.Event()

        def work(member: int) -> None:
            def progress(count: int) -> None:
                if unwanted.is_set():
                    raise Interrupted("another member has failed")
                told.put((member, count))

            try:
                told.put((member, self._ask(self._services[member], items, progress, fresh)))
            except Exception as error:  # it is raised again below, in the caller's thread
                told.put((member, error))

        everyone = range(len(self._services))
        for member in everyone:
            threading.Thread(target=work, args=(member,), name=f"{self.role}-{member}", daemon=True).start()
        done = [0 for _ in everyone]
        answers: dict[int, tuple[str, list[float]]] = {}
        failure: Exception | None = None
        ended = 0
        while ended < len(everyone):  # wait for all, because a service is for one thread at a time
            member, what = told.get()
            ended += not isinstance(what, int)
            try:
                if isinstance(what, Exception):
                    raise what
                if isinstance(what, tuple):
                    answers[member] = what
                elif failure is None:
                    done[member] = what
                    on_progress(min(done))
            except Exception as error:
                failure = failure or error
                unwanted.set()
        if failure is not None:
            raise failure
        return [answers[member] for member in everyone]

    def _ask(
        self, service: RewardService, items: Sequence[Item], on_progress: Callable[[int], None], fresh: bool
    ) -> tuple[str, list[float]]:
        """Who scored, and a score for each item (NaN where it has none).

        Equal items are asked once and those in the cache not at all, unless a score may depend on what else is in the
        request: then all are asked.
        """
        identity = service.identity
        keys = cache_keys(identity, items)
        # A source that does not name its weights may have others by now, so its old scores say nothing.
        cache = self._cache if identity and not fresh and not self._cache_fails else None
        known = self._known(cache, list(dict.fromkeys(keys)))
        unique = list(range(len(keys)))
        if not fresh and (identity or not service.compares):
            first = {key: i for i, key in reversed(list(enumerate(keys)))}
            unique = sorted(first.values())
        have = frozenset(place for place, i in enumerate(unique) if keys[i] in known)
        weights = identity.partition("/")[0]
        writer = _Writer(lambda scores: self._keep(cache, scores))

        def keep(given: Sequence[Given]) -> None:
            writer.put(
                {keys[unique[g.place]]: g.score for g in given if g.score is not None and (g.weights or "") == weights}
            )

        left = len(unique) - len(have)
        try:
            values = service.score(
                [items[i] for i in unique], lambda n: on_progress(len(items) - left + n), keep if cache else None, have
            )
        finally:
            writer.flush()
        now = service.identity
        if now != identity or (weights and service.weights - {weights}):
            if cache:
                cache.remove(list(writer.written))
            raise GuardError(
                f"the model behind the {service.name} changed while it scored: {identity or '?'} before, {now or '?'} after"
                + (f", scores by {', '.join(sorted(service.weights))}" if now == identity else ""),
                "see that one and the same model serves, then run the same command again: these scores are not kept",
            )
        asked = {i: v for place, (i, v) in enumerate(zip(unique, values, strict=True)) if place not in have}
        # What `keep` left out: scores of servers that name their weights only when they are asked for them.
        self._keep(cache, {keys[i]: v for i, v in asked.items() if v is not None and keys[i] not in writer.written})
        given = {i: math.nan if v is None else v for i, v in asked.items()}
        if len(given) == len(items):  # equal items may have different scores where they are compared
            return identity, list(given.values())
        known |= {keys[i]: v for i, v in given.items()}
        on_progress(len(items))
        return identity, [known[key] for key in keys]

    def _known(self, cache: ScoreCache | None, keys: Sequence[bytes]) -> dict[bytes, float]:
        try:
            return cache.get(keys) if cache else {}
        except RewardError as error:
            self._do_without_cache(error)
            return {}

    def _keep(self, cache: ScoreCache | None, scores: Mapping[bytes, float]) -> None:
        try:
            if cache and scores and not self._cache_fails:
                cache.put(scores)
        except RewardError as error:
            self._do_without_cache(error)

    def _do_without_cache(self, error: RewardError) -> None:
        """Go on without the cache, which only saves time. Scores that must go are still removed from it, or another process
        would find them."""
        self._cache_fails = True
        self._on_event("warning", f"{error}; scores are asked for again and not kept. {error.hint}")

    def combine(self, identities: tuple[str, ...], scores: NDArray[np.float64]) -> Combined:
        """One reward for each item, from the scores (M, N) of the members.

        The scale of a member is that of the first items that were combined in this run folder.
        Raises RewardError when a member without a scale scored nothing.
        """
        if self._ensemble is None:
            return Combined(rewards=scores[0], disagreement=None)
        scale = self._scale(identities, scores)
        z = np.array([ensemble.normalise(own, by) for own, by in zip(scores, scale, strict=True)])
        rewards = ensemble.combine(z, self._ensemble.combine, self._ensemble.std_weight)
        return Combined(rewards=rewards, disagreement=ensemble.disagreement(z))

    def forget(self, identities: Sequence[str], items: Sequence[Item]) -> None:
        """Remove the scores of these items by these models from the cache."""
        if self._cache is not None:
            named = [identity for identity in identities if identity]
            self._cache.remove([key for identity in named for key in cache_keys(identity, items)])

    def forget_all(self) -> None:
        """Empty the cache."""
        if self._cache is not None:
            self._cache.clear()

    def begin_anew(self, identities: Sequence[str]) -> None:
        """Forget scales and scores, because other models may have the names of earlier ones now."""
        self.forget_all()
        names = set(self.names(identities))
        known = {
            member: {n: scale for n, scale in scales.items() if n not in names}
            for member, scales in self._known_scales().items()
        }
        if known:
            seals.write_json(self._scale_file, known)

    def rename(self, before: Sequence[str], now: Sequence[str]) -> None:
        """The same models have other `names` now, and keep their scales."""
        known = self._known_scales()
        for member, old, new in zip(self.members, before, now, strict=bool(self.members)):
            if (scale := _scale_of(known, member, old)) is not None:
                known.setdefault(member, {}).setdefault(new, scale)
        if known:
            seals.write_json(self._scale_file, known)

    def _known_scales(self) -> dict[str, dict[str, dict[str, float]]]:
        """Mean and standard deviation, by member and by what scores."""
        found: dict[str, dict[str, dict[str, float]]] = (
            seals.read_json(self._scale_file, None) if self._scale_file.is_file() else {}
        )
        return found

    def _scale(self, identities: tuple[str, ...], scores: NDArray[np.float64]) -> list[ensemble.Moments]:
        """The moments of each member. They are kept by what scores, so a model that comes back finds its own scale again."""
        known, names = self._known_scales(), self.names(identities)
        new: list[str] = []
        for member, known_as, own in zip(self.members, names, scores, strict=True):
            if (scale := _scale_of(known, member, known_as)) is not None:
                known.setdefault(member, {})[known_as] = scale
                continue
            try:
                found = ensemble.moments(own)
            except ValueError:
                raise RewardError(
                    f"member {member} of the {self.role} ensemble gave no score at all, so it has no scale",
                    f"see the log of {self.role}-{member}; nothing was trained on",
                ) from None
            known.setdefault(member, {})[known_as] = {"mean": found.mean, "std": found.std}
            new.append(f"{member} (mean {found.mean:.4g}, standard deviation {found.std:.4g})")
            if not found.std:
                self._on_event(
                    "warning",
                    f"member {member} of the {self.role} ensemble gave every item {found.mean:.4g} in the first round that it "
                    f"scored: it has no part in the {self.role}. Delete {self._scale_file} to have all scales fixed anew",
                )
        if new:
            self._scale_file.parent.mkdir(exist_ok=True)
            seals.write_json(self._scale_file, known)
            self._on_event("scale", f"the scale of the {self.role} ensemble is fixed: {', '.join(new)}")
        return [ensemble.Moments(**known[m][n]) for m, n in zip(self.members, names, strict=True)]


class _Writer:
    """Writes scores into the cache while others are still asked for, so that a round that is killed asks for few again.

    Scores are written at most LATEST seconds after they came. A reward that is slower than that is written request by
    request, and a fast one does not wait for the disk each time.
    """

    def __init__(self, write: Callable[[Mapping[bytes, float]], None]) -> None:
        self.written: set[bytes] = set()
        self._write, self._waiting, self._at = write, dict[bytes, float](), time.monotonic()

    def put(self, scores: Mapping[bytes, float]) -> None:
        self._waiting |= scores
        if time.monotonic() - self._at >= LATEST:
            self.flush()

    def flush(self) -> None:
        self._write(self._waiting)
        self.written |= self._waiting.keys()
        self._waiting, self._at = {}, time.monotonic()


def _scale_of(known: Mapping[str, Mapping[str, dict[str, float]]], member: str, name: str) -> dict[str, float] | None:
    """The scale with this name: that of the member itself, or else that of another one, because members may change places."""
    return next((of[name] for of in (known.get(member, {}), *known.values()) if name in of), None)

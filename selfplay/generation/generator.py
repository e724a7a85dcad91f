"""The generator: a pool of vLLM engines, one object for those who ask.

Seeds make the answers of all engines the same, and of an engine that was started again; on a CPU they are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfplay.generation.dealing import Deal, Piece
from selfplay.generation.engines import Engines
from selfplay.storage import seals
from selfplay.types import Policy

SCORED = 256  # answers in a piece of work that scores: few enough for several engines, many enough to fill one


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Prompts that are answered together, into one file."""

    start: int
    """Number of the first one among all prompts."""
    seeds: Sequence[int]
    """One for each of its prompts; candidate i of a prompt uses its seed + i."""
    file: Path
    """Where the answers go, as `Candidate` rows, prompt by prompt. The file appears whole, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen, where that is not as the section `generate` says."""

    temperature: float
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Shards of a file of `Prompt` rows that a policy is to answer."""

    prompts: Path
    shards: Sequence[Shard]
    policy: Policy | None = None
    """None for the one that serves."""
    candidates: int | None = None
    """Answers to each prompt; by default `generate.candidates`."""
    max_tokens: int | None = None
    """The longest of them; by default `generate.max_tokens`."""
    sampling: Sampling | None = None
    """By default as in the section `generate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Answers that are scored together."""

    start: int
    count: int
    done: Callable[[list[Any]], None]
    """Takes their log-probabilities, or with `greedy` a pair [log-probability, whether each token was the likeliest] of each."""
    greedy: bool = False
    policy: Policy | None = None
    """None for the one that serves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What became of one shard."""

    rows: int  # answers in its file
    tokens: int  # sampled for them
    seconds: float  # from the order to the last of them


class Generator(Engines):
    """The engines of a run, and what they are asked."""

    def sample(
        self,
        asks: Sequence[Ask],
        *,
        on_progress: Callable[[int], None] = lambda done: None,
        before_shard: Callable[[], None] = lambda: None,
        on_shard: Callable[[Shard, Sampled], None] = lambda shard, sampled: None,
    ) -> None:
        """Have the engines answer; where several policies are asked, some engines serve one and some another.

        All three functions are called in the caller's thread: `before_shard` before a shard is handed out, `on_shard` once its
        file is whole, `on_progress` with the number of prompts done. Where `before_shard` raises Interrupted, the shards in
        flight are finished first, unless it is to stop `now`. Raises InputError for a prompt that does not fit, DiskError,
        EngineError, and as `swap` does.
        """
        if self.info is None:
            self.serve()
        count = _Count(on_progress)

        def done(shard: Shard, found: dict[str, Any]) -> None:
            seals.finish(_partial(shard), shard.file)
            count.done(shard, len(shard.seeds))
            on_shard(shard, Sampled(**found))

        pieces = [
            self._sampling(ask, shard, functools.partial(done, shard), functools.partial(count.done, shard))
            for ask in asks
            for shard in ask.shards
        ]
        try:
            self._deal(pieces, before_shard)
        finally:
            for ask in asks:
                for shard in ask.shards:
                    _partial(shard).unlink(missing_ok=True)

    def _sampling(self, ask: Ask, shard: Shard, done: Callable[[Any], None], progress: Callable[[int], None]) -> Piece:
        settings, policy = self._config.generate, ask.policy or self.policy
        how = ask.sampling or Sampling(temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
        assert self.info is not None and policy is not None, "load a policy first"
        candidates = ask.candidates or settings.candidates
        stops = settings.stop_token_ids if settings.stop_token_ids is not None else self.info.eos_ids
        return Piece(
            order="generate",
            fields={
                "prompts": str(ask.prompts),
                "start": shard.start,
                "count": len(shard.seeds),
                "seeds": list(shard.seeds),
                "policy": policy.version,
                "out": str(_partial(shard)),
                "sampling": {
                    "n": candidates,
                    "temperature": how.temperature,
                    "top_p": how.top_p,
                    "top_k": how.top_k,
                    "stop": list(how.stop),
                    "max_tokens": ask.max_tokens or settings.max_tokens,
                    "stop_token_ids": stops,
                },
                "thinking": self._config.policy.thinking and self._config.policy.thinking.model_dump(),
            },
            policy=policy,
            sequences=candidates * len(shard.seeds),
            done=done,
            progress=progress,
        )

    def answer_logps(
        self,
        prompts: Path,
        answers: Path,
        start: int,
        count: int,
        per_prompt: int,
        on_progress: Callable[[int], None] = lambda done: None,
        before_piece: Callable[[], None] = lambda: None,
        policies: Sequence[Policy | None] = (None,),
    ) -> NDArray[np.float64]:
        """Summed log-probabilities (nats, temperature 1) of the answers start … start + count − 1 of a file, under each of the
        policies, by default the one that serves: (len(policies), count).

        `answers` is a file of `Candidate` rows, whose first `per_prompt` rows are answers to the first row of `prompts`, and so
        on. `on_progress` gets the number of answers done. `before_piece` is called before some of them are handed to an engine;
        what it raises ends the call. Raises InputError where the two files do not agree, EngineError.
        """
        logps = np.full((len(policies), count), np.nan)

        def done(row: int, first: int, found: list[float]) -> None:
            logps[row, first : first + len(found)] = found

        ranges = [
            Range(
                start=start + first,
                count=min(SCORED, count - first),
                done=functools.partial(done, row, first),
                policy=policy,
            )
            for row, policy in enumerate(policies)
            for first in range(0, count, SCORED)
        ]
        self.score(prompts, answers, ranges, per_prompt, on_progress, before_piece)
        assert np.isfinite(logps).all()
        return logps

    def score(
        self,
        prompts: Path,
        answers: Path,
        ranges: Sequence[Range],
        per_prompt: int,
        on_progress: Callable[[int], None] = lambda done: None,
        before_piece: Callable[[], None] = lambda: None,
    ) -> None:
        """The same for several ranges of answers and under several policies. What they find comes in any order."""
        progress = _Count(on_progress)

        def done(piece: Range, found: list[Any]) -> None:
            piece.done(found)
            progress.done(piece, len(found))

        pieces = []
        for each in ranges:
            policy = each.policy or self.policy
            assert policy is not None, "load a policy first"
            fields = {"start": each.start, "count": each.count, "per_prompt": per_prompt, "greedy": each.greedy}
            pieces.append(
                Piece(
                    order="answer_logps",
                    fields={"prompts": str(prompts), "answers": str(answers), **fields},
                    policy=policy,
                    sequences=each.count,
                    done=functools.partial(done, each),
                    progress=functools.partial(progress.done, each),
                )
            )
        self._deal(pieces, before_piece)

    def _deal(self, pieces: Sequence[Piece], before: Callable[[], None]) -> None:
        left = list(pieces)
        while left:
            policies = list(dict.fromkeys(piece.policy for piece in left))
            if policies == [self.policy]:
                self.serve()
            else:
                self.divide(policies)
            with self.ended_by_hand():
                left = Deal(self.engines, left, self, before).run()
        self.tell()


def _partial(shard: Shard) -> Path:
    """Where the engine writes the answers of a shard."""
    return shard.file.with_name(f".{shard.file.name}.partial")


class _Count:
    """How many are done of all pieces together; never fewer than were told before."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._told = tell, 0
        self._done: dict[int, int] = {}  # by the piece

    def done(self, piece: object, count: int) -> None:
        self._done[id(piece)] = count
        self._told = max(self._told, sum(self._done.values()))
        self._tell(self._told)

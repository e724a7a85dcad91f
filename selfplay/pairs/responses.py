"""The responses of each prompt as pairs are made from them: numbers alone, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfplay.errors import CheckpointError
from selfplay.methods.difficulty import mean_rewards
from selfplay.storage import tables
from selfplay.storage.candidates import CandidateColumns, read_candidates, read_rewards
from selfplay.types import DISAGREEMENT

CutOff = Literal["drop", "reject"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One candidate."""

    index: int  # 0 … K−1 within its prompt
    reward: float  # NaN where it has none
    logp: float  # nats, summed, under the policy that sampled it
    n_tokens: int
    whole: bool = True  # it ended by itself, not at the token limit
    digest: int  # equal for equal token ids
    disagreement: float = 0.0  # standard deviation over the members of an ensemble
    reference_logp: float = math.nan  # nats, summed, under the reference, where implicit rewards need it


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """All responses of a round, which can be gone through again and again."""

    candidates: CandidateColumns
    _columns: tuple[Sequence[float], ...]

    @classmethod
    def read(cls, candidates: Path, scored: Path, reference: Path | None = None) -> Responses:
        """From the artifacts of `generate` and `score`; `reference`: their log-probabilities under the reference."""
        found = read_candidates(candidates)
        rewards = read_rewards(scored, found)
        n = len(found.index)
        nothing, agreement = [math.nan] * n, [0.0] * n
        apart = rewards.parts.get(DISAGREEMENT)
        logps: Sequence[float] = nothing
        if reference is not None:
            logps = tables.read_array(reference, "logp").tolist()
            if len(logps) != n:
                raise CheckpointError(f"{reference} has {len(logps)} rows for {n} candidates")
        return cls(
            candidates=found,
            _columns=(
                found.index.tolist(),
                rewards.reward.tolist(),
                found.logp.tolist(),
                found.n_tokens.tolist(),
                found.whole.tolist(),
                found.digest.tolist(),
                agreement if apart is None else [0.0 if math.isnan(v) else v for v in apart.tolist()],
                logps,
            ),
        )

    def __iter__(self) -> Iterator[tuple[str, list[Response]]]:
        """prompt_id and responses, prompt by prompt."""
        starts = self.candidates.starts.tolist()
        for place, prompt_id in enumerate(self.candidates.prompt_ids):
            yield prompt_id, self.of(starts[place], starts[place + 1])

    def mean_rewards(self) -> dict[str, float]:
        """The mean reward of each prompt's responses, by prompt_id; NaN where none has one."""
        means = mean_rewards(self._columns[1], self.candidates.starts)
        return dict(zip(self.candidates.prompt_ids, means.tolist(), strict=True))

    def of(self, start: int, end: int) -> list[Response]:
        """The responses in the rows start … end − 1."""
        return [
            Response(
                index=int(index), reward=reward, logp=logp, n_tokens=int(n_tokens), whole=bool(whole),
                digest=int(digest), disagreement=disagreement, reference_logp=reference_logp,
            )
            for index, reward, logp, n_tokens, whole, digest, disagreement, reference_logp in zip(
                *(column[start:end] for column in self._columns), strict=True
            )
        ]  # fmt: skip


def usable(responses: Sequence[Response], cut_off: CutOff = "drop") -> list[Response]:
    """The responses of one prompt that can be in a pair.

    They have a reward and tokens, and each text of tokens comes once; with «drop» they ended by themselves.
    """
    seen: set[int] = set()
    found = []
    for response in responses:
        if not (response.whole or cut_off == "reject") or not math.isfinite(response.reward):
            continue
        if not response.n_tokens or response.digest in seen:
            continue
        seen.add(response.digest)
        found.append(response)
    return found

"""Suites from files: answers that a reward scores, and multiple choice by the engine's own log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from selfplay.config import SuiteConfig
from selfplay.errors import ConfigError, InputError
from selfplay.generation.generator import Sampling
from selfplay.progress import Line
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.scoring import require
from selfplay.rewards.texts import Item
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Policy, Prompt, SuiteAnswer

ACC, ACC_NORM = "acc", "acc_norm"


class Engine(Protocol):
    """The engines, as far as suites ask them: requests and answers are files. Under one key they are asked once, and then read."""

    def folder(self, *key: object) -> Path:
        """Where requests are written; it is gone when the round ends."""

    def room(self) -> int:
        """The most tokens of a prompt and its answer."""

    def sample(
        self, asked: Path, policies: Sequence[Policy], sampling: Sampling, max_tokens: int, line: Line
    ) -> list[list[Path]]:
        """One answer of each policy to each of the `Prompt` rows: for each policy files of `Candidate` rows, in order."""

    def logps(self, asked: Path, said: Path, policies: Sequence[Policy], line: Line) -> list[list[Path]]:
        """Scores of the `Candidate` rows, one behind each of the `Prompt` rows: for each policy files with the columns `logp`
        (nats, summed) and `greedy` (whether each token was the likeliest), in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a file as the policy reads them."""

    prompts: Sequence[Prompt]
    """With token ids."""
    choices: Sequence[Sequence[list[int]]]
    """Token ids of the choices of each row; empty for a file that is no multiple choice."""
    digest: str
    """Of the file and of all that decides on these rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Answers to prompts, which a reward scores."""

    settings: SuiteConfig
    rows: Rows
    engine: Engine
    scorer: Scorer
    """The suite's own reward."""
    max_tokens: int
    max_missing: float
    breathe: Callable[[str], None]

    @property
    def size(self) -> int:
        return len(self.rows.prompts)

    def identity(self) -> str | None:
        identities = self.scorer.identities
        if not all(identities):  # a server that does not say what it has, or one that compares answers
            return None
        return f"{self.rows.digest} {' '.join(self.scorer.described(identities))} {self._sampling} {self.max_tokens}"

    def play(self, policies: Sequence[Policy], line: Line) -> list[list[SuiteAnswer]]:
        """Raises RewardError where more than a share `max_missing` has no score, and InputError where no prompt fits."""
        room = self.engine.room() - self.max_tokens
        prompts = _that_fit(
            self.settings.name, self.rows.prompts, [len(p.prompt_ids) <= room for p in self.rows.prompts]
        )
        folder = self.engine.folder(self.settings.name, self.rows.digest)
        asked = folder / "asked.parquet"
        tables.write_rows(asked, prompts, Prompt)
        line.update(total=len(prompts) * len(policies))
        files = self.engine.sample(asked, policies, self._sampling, self.max_tokens, line)
        said = [[row for file in of_policy for row in tables.each_row(file, Candidate)] for of_policy in files]
        items = [
            Item(prompt.messages, answer.text, prompt.reference)
            for prompt, *each in zip(prompts, *said, strict=True)
            for answer in each
        ]
        values, reasons = self.scorer.score(items, lambda n: self.breathe("shard"), self.scorer.identities)
        found = []
        for side, of_policy in enumerate(said):
            own = values[side :: len(said)]
            require(np.array([value is None for value in own]), self.max_missing, reasons, self.scorer.logs)
            found.append(
                [
                    SuiteAnswer(
                        prompt_id=a.prompt_id, text=a.text, n_tokens=a.n_tokens, finish_reason=a.finish_reason,
                        policy=a.policy, reward=value,
                    )
                    for a, value in zip(of_policy, own, strict=True)
                ]
            )  # fmt: skip
        return found

    @property
    def _sampling(self) -> Sampling:
        s = self.settings
        return Sampling(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Multiple choice: which of the choices the policy finds likeliest behind the question."""

    settings: SuiteConfig
    rows: Rows
    engine: Engine

    @property
    def size(self) -> int:
        return len(self.rows.prompts)

    def identity(self) -> str | None:
        return f"{self.rows.digest} {self.settings.metric}"

    def play(self, policies: Sequence[Policy], line: Line) -> list[list[SuiteAnswer]]:
        """Raises InputError where no question fits into the engine's context with its choices."""
        room, choices = self.engine.room() - 1, self.rows.choices
        fits = [
            len(p.prompt_ids) + max(map(len, ids)) <= room for p, ids in zip(self.rows.prompts, choices, strict=True)
        ]
        prompts = _that_fit(self.settings.name, self.rows.prompts, fits)
        kept = [ids for ids, there in zip(choices, fits, strict=True) if there]
        folder = self.engine.folder(self.settings.name, self.rows.digest)
        asked, said = folder / "asked.parquet", folder / "said.parquet"
        each = [(prompt, ids) for prompt, of_prompt in zip(prompts, kept, strict=True) for ids in of_prompt]
        tables.write_rows(asked, [dataclasses.replace(prompt, meta={}) for prompt, _ in each], Prompt)
        tables.write_rows(said, [answers.continuation(prompt.prompt_id, ids) for prompt, ids in each], Candidate)
        line.update(total=len(each) * len(policies))
        found = []
        for policy, files in zip(policies, self.engine.logps(asked, said, policies, line), strict=True):
            logps = np.concatenate([tables.read_array(file, "logp") for file in files])
            ends = np.cumsum([len(ids) for ids in kept])
            found.append(
                [
                    self._answer(prompt, own, policy)
                    for prompt, own in zip(prompts, np.split(logps, ends[:-1]), strict=True)
                ]
            )
        return found

    def _answer(self, prompt: Prompt, logps: NDArray[np.float64], policy: Policy) -> SuiteAnswer:
        texts, right = prompt.meta["choices"], prompt.meta["gold"]
        chosen = {
            ACC: int(np.argmax(logps)),
            ACC_NORM: int(np.argmax(logps / np.array([len(text) for text in texts]))),
        }
        parts = {metric: float(place == right) for metric, place in chosen.items()}
        metric = self.settings.metric or ACC
        return SuiteAnswer(
            prompt_id=prompt.prompt_id, text=texts[chosen[metric]], n_tokens=None, finish_reason=None,
            policy=policy.version, reward=parts[metric], reward_parts=parts,
        )  # fmt: skip


def require_kind(settings: SuiteConfig, rows: Sequence[Prompt]) -> bool:
    """Whether a suite's file is multiple choice. Raises ConfigError where the settings are those of the other kind."""
    where, choices = f"evaluate.suites {settings.name}", "choices" in rows[0].meta
    if choices and settings.reward is not None:
        raise ConfigError(f"{where}: {settings.file} is multiple choice, which needs no reward", "take `reward` out")
    if not choices and settings.reward is None:
        raise ConfigError(
            f"{where}: the answers to {settings.file} need a `reward`",
            "give one, as for evaluate.judge, or rows with `choices`",
        )
    if choices and settings.metric not in (None, ACC, ACC_NORM):
        raise ConfigError(f"{where}: multiple choice has no metric {settings.metric!r}", f"it has {ACC} and {ACC_NORM}")
    if not choices and settings.metric is not None:
        raise ConfigError(f"{where}: answers that a reward scores have no `metric` beside it", "take `metric` out")
    return choices


def _that_fit(name: str, prompts: Sequence[Prompt], fits: Sequence[bool]) -> list[Prompt]:
    kept = [prompt for prompt, there in zip(prompts, fits, strict=True) if there]
    if not kept:
        raise InputError(
            f"suite {name}: none of its {len(prompts)} prompts has room in the engine's context with its answer",
            "raise generate.engine.max_model_len, or lower the max_tokens of the suite",
        )
    return kept

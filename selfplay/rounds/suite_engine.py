"""The engines of a round as suites ask them: requests and answers are files, and what was answered is not asked again."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from selfplay import seeds
from selfplay.generation.generator import SCORED, Ask, Range, Sampling
from selfplay.generation.sampling import cut
from selfplay.generation.serving import Serving
from selfplay.progress import Line
from selfplay.rounds.frame import Frame
from selfplay.storage import folders, seals, tables
from selfplay.types import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteEngine:
    """The engines of a run in one round (`evaluation.suite_files.Engine`)."""

    frame: Frame
    serving: Serving

    def folder(self, *key: object) -> Path:
        """Where requests are written; it is gone when the round ends."""
        folder = self.frame.shards("suite", *key)
        folders.make(folder)
        return folder

    def room(self) -> int:
        """The most tokens of a prompt and its answer."""
        info = self.serving.engine().info
        assert info is not None, "a loaded engine says what it is"
        return info.max_model_len

    def sample(
        self, asked: Path, policies: Sequence[Policy], sampling: Sampling, max_tokens: int, line: Line
    ) -> list[list[Path]]:
        """One answer of each policy to each of the `Prompt` rows: for each policy files of `Candidate` rows, in order.

        Seeds are those of the run, and not of the round: the same policy gives the same answers in every round.
        """
        names, size = tables.read_column(asked, "prompt_id"), self.frame.config.generate.shard_prompts
        own = [seeds.derive(self.frame.config.run.seed, "suite", name) for name in names]
        asks: list[Ask] = []
        files: dict[Policy, list[Path]] = {}
        there = 0
        for policy in self._served_first(policies):
            every, missing = cut(self.folder(_digest(asked), str(sampling), max_tokens, policy.version), own, size)
            files[policy] = [shard.file for shard in every]
            there += len(names) - sum(len(shard.seeds) for shard in missing)
            if missing:
                asks.append(
                    Ask(
                        prompts=asked,
                        shards=missing,
                        policy=policy,
                        candidates=1,
                        max_tokens=max_tokens,
                        sampling=sampling,
                    )
                )
        line.update(done=there)
        if asks:
            self.serving.engine().sample(
                asks,
                on_progress=lambda done: line.update(done=there + done),
                before_shard=lambda: self.frame.breathe("shard"),
            )
        return [files[policy] for policy in policies]

    def logps(self, asked: Path, said: Path, policies: Sequence[Policy], line: Line) -> list[list[Path]]:
        """Scores of the `Candidate` rows, one behind each of the `Prompt` rows: for each policy files with the columns `logp`
        (nats, summed) and `greedy` (whether each token was the likeliest), in order."""
        count, there = tables.count_rows(said), 0
        files: dict[Policy, list[Path]] = {}
        ranges: list[Range] = []
        for policy in self._served_first(policies):
            folder = self.folder(_digest(asked), _digest(said), policy.version)
            files[policy] = []
            for start in range(0, count, SCORED):
                file, size = folder / f"{start:08d}.parquet", min(SCORED, count - start)
                files[policy].append(file)
                if seals.is_whole(file):
                    there += size
                    continue
                ranges.append(
                    Range(start=start, count=size, done=functools.partial(_keep, file), policy=policy, greedy=True)
                )
        line.update(done=there)
        if ranges:
            self.serving.engine().score(
                asked,
                said,
                ranges,
                per_prompt=1,
                on_progress=lambda done: line.update(done=there + done),
                before_piece=lambda: self.frame.breathe("shard"),
            )
        return [files[policy] for policy in policies]

    def _served_first(self, policies: Sequence[Policy]) -> list[Policy]:
        """The policies, first the one that is in the engines: it is asked before another one is swapped in."""
        return sorted(policies, key=lambda policy: policy != self.serving.generator.policy)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _keep(file: Path, found: list[Any]) -> None:
    logps, greedy = zip(*found, strict=True)
    tables.write_table(file, pa.table({"logp": pa.array(logps, pa.float64()), "greedy": pa.array(greedy, pa.bool_())}))

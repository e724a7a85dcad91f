"""The candidates of the next round, sampled while this one trains (`schedule.ahead`).

They lie in shards where the stage `generate` of that round looks for its own, under the policy that samples them. Which
policy that is, is in the ledger before the first shard, so however far the engine came and whoever was killed, the round has
the same candidates. Where its prompts, the settings or the policies have become others by then, they are dropped.
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.errors import InputError
from selfplay.generation.sampling import sample
from selfplay.progress import Line
from selfplay.prompts.draw import drawn_ahead
from selfplay.prompts.draws import Draws
from selfplay.rounds.answers import Answers
from selfplay.stage import Metrics, samples
from selfplay.storage import folders
from selfplay.storage.policies import Policies, read

STATE = "ahead"  # in the ledger: {round, policy, shards}, the last round that was sampled ahead


class Ahead:
    """Round `answers.frame.index` as far as it is sampled before it opens."""

    def __init__(self, answers: Answers, draws: Draws, policies: Policies) -> None:
        self.answers, self.frame, self.draws, self.policies = answers, answers.frame, draws, policies

    def sample(self, version: int, line: Line, meanwhile: Callable[[], None]) -> Metrics:
        """Sample the round by a policy; what was sampled before a kill is there still.

        `meanwhile` is called again and again. Nothing is sampled where the round will not be, or the disk is too full for it.
        """
        settings, index, end = self.frame.config.generate, self.frame.index, self.frame.config.schedule.end.rounds
        try:
            prompt_ids = drawn_ahead(self.draws, index, self.frame.config.prompts)
        except InputError:  # no prompts are left: the round that wants some says so
            return {}
        needed = samples(self.frame.config, 0)
        if (end is not None and index > end) or shutil.disk_usage(self.answers.run_dir).free < 2 * needed:
            return {}
        shards = self.answers.shards("generate", version, prompt_ids)
        begun = {"round": index, "policy": version, "shards": shards.name}
        if self.frame.store.state(STATE) != begun:
            self.frame.store.set_state(STATE, begun)
            text = f"policy {version} samples round {index}, while round {index - 1} trains"
            self.frame.store.event(STATE, text, index - 1)
        folders.make(shards)
        asked = shards / "asked.parquet"
        self.answers.prompts.write(prompt_ids, asked)
        began = time.monotonic()

        def told(done: int) -> None:
            meanwhile()
            line.update(text=f"round {index} is sampled: {done} of {len(prompt_ids)} prompts")

        sample(
            self.answers.serving.engine(),
            asked,
            candidates=settings.candidates,
            seed=functools.partial(self.frame.seed, "generate"),
            shards=shards,
            shard_prompts=settings.shard_prompts,
            on_progress=told,
            before_shard=lambda: self.frame.breathe("shard"),
            policy=self.policies.get(version),
        )
        return {"ahead_prompts": float(len(prompt_ids)), "ahead_seconds": time.monotonic() - began}

    def sampler(self, champion: int, prompt_ids: list[str]) -> int:
        """Which policy samples the round, now that it is open and has these prompts: the one that began to, or its champion.

        Candidates that do not fit are dropped, and an event says why.
        """
        begun: dict[str, Any] | None = self.frame.store.state(STATE)
        if begun is None or begun["round"] != self.frame.index:
            return champion
        version = int(begun["policy"])
        shards = self.frame.dir / begun["shards"]
        if (why := self._unfit(version, shards, champion, prompt_ids)) is None:
            return version
        self.frame.store.event(STATE, f"what policy {version} sampled ahead is dropped: {why}", self.frame.index)
        self.frame.store.set_state(STATE, None)
        shutil.rmtree(shards, ignore_errors=True)
        return champion

    def _unfit(self, version: int, shards: Path, champion: int, prompt_ids: list[str]) -> str | None:
        """Why the candidates are not those of this round; None where they are."""
        if self.answers.shards("generate", version, prompt_ids) != shards:
            return "prompts or settings have changed since"
        if version == champion:
            return None  # they are what it would sample
        if not self.frame.config.schedule.ahead:
            return "schedule.ahead is off"
        if read(self.policies.folder(champion)).parent != version:
            return f"policy {champion}, which serves now, was not made from it"
        return None

"""Answers of policies to held-out prompts, and to whatever else is asked once a round: sampled once, then read."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfplay.evaluation.stage import Asked
from selfplay.generation.sampling import Request, ask
from selfplay.generation.serving import Serving
from selfplay.prompts import draw
from selfplay.prompts.pool import Pool
from selfplay.rounds.frame import Frame
from selfplay.storage import folders, seals, tables
from selfplay.types import Candidate, Policy, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The engine of a round, as far as evaluation and rewrites ask it (`evaluation.stage.Engine`)."""

    frame: Frame
    prompts: Pool
    serving: Serving
    run_dir: Path
    champion: Callable[[], Policy]
    """The policy that serves when the round opens."""

    def gate_prompts(self) -> list[Prompt]:
        """A fresh seeded subset of the held-out prompts."""
        count = self.frame.config.evaluate.prompts
        return self.prompts.read(draw.subset(self.prompts.ids("heldout"), count, self.frame.seed("gate")))

    def audit_prompts(self) -> list[Prompt]:
        """The audit set, always the same; empty in rounds that have no audit."""
        settings, seed = self.frame.config.evaluate, self.frame.config.run.seed
        if not settings.audit_every or self.frame.index % settings.audit_every:
            return []
        return self.prompts.read(draw.subset(self.prompts.ids("audit"), settings.audit_prompts, seed, "audit"))

    def of_the_champion(self) -> None:
        """Have the champion answer this round's gate prompts, ahead of the evaluation."""
        self.answers("champion", self.gate_prompts(), self.champion())

    def of_the_initial(
        self, audit: Sequence[Prompt], initial: Policy, on_progress: Callable[[int], None]
    ) -> list[Candidate]:
        """The initial policy's answers to the audit set: always the same, so sampled once for the run."""
        settings = self.frame.config.generate
        sampling = settings.model_dump(mode="json", exclude={"engine", "shard_prompts", "candidates"})
        key = json.dumps([sampling | self._thinking, [prompt.prompt_id for prompt in audit]], sort_keys=True)
        path = self.run_dir / "audit" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.parquet"
        if not seals.is_whole(path):
            path.parent.mkdir(exist_ok=True)
            tables.write_rows(path, self.answers("initial", audit, initial, on_progress), Candidate)
            seals.seal(path)
        return tables.read_rows(path, Candidate)

    def answers(
        self,
        name: str,
        prompts: Sequence[Prompt],
        policy: Policy,
        on_progress: Callable[[int], None] = lambda done: None,
        max_tokens: int | None = None,
    ) -> list[Candidate]:
        """One answer of a policy to each prompt. Under one name they are sampled once, and then read."""
        return self._ask([Asked(name=name, prompts=prompts, policy=policy)], on_progress, max_tokens)[0]

    def side_by_side(self, asked: Sequence[Asked], on_progress: Callable[[int], None]) -> list[list[Candidate]]:
        """The same of several policies, side by side where there are several engines."""
        return self._ask(asked, on_progress)

    def _ask(
        self, asked: Sequence[Asked], on_progress: Callable[[int], None], max_tokens: int | None = None
    ) -> list[list[Candidate]]:
        return ask(
            self.serving.engine,
            [
                Request(
                    rows=each.prompts,
                    policy=each.policy,
                    seed=functools.partial(self.frame.seed, each.name),
                    shards=self.shards(each.name, each.policy.version, [prompt.prompt_id for prompt in each.prompts]),
                    max_tokens=max_tokens,
                )
                for each in asked
            ],
            shard_prompts=self.frame.config.generate.shard_prompts,
            on_progress=on_progress,
            before_shard=lambda: self.frame.breathe("shard"),
        )

    def logps(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Candidate],
        policies: Sequence[Policy],
        on_progress: Callable[[int], None],
    ) -> list[list[float]]:
        """Log-probability of each answer (nats, summed), under each of the policies. `on_progress` gets how many are there, of
        all policies together."""
        folder = self.frame.shards("logps")
        folders.make(folder)
        asked, said = folder / "asked.parquet", folder / "answers.parquet"
        tables.write_rows(asked, prompts, Prompt)
        tables.write_rows(said, answers, Candidate)
        found = self.serving.engine().answer_logps(
            asked,
            said,
            0,
            len(answers),
            per_prompt=1,
            policies=policies,
            on_progress=on_progress,
            before_piece=lambda: self.frame.breathe("shard"),
        )
        return [logps.tolist() for logps in found]

    def shards(self, name: str, version: int, prompt_ids: Sequence[str]) -> Path:
        """Where finished answers of a policy to these prompts are kept."""
        settings = self.frame.config.generate.model_dump(mode="json", exclude={"engine"})
        return self.frame.shards(name, version, list(prompt_ids), settings | self._thinking)

    @property
    def _thinking(self) -> dict[str, object]:
        """What decides on the texts of answers beside how they are sampled."""
        settings = self.frame.config.policy.thinking
        return {} if settings is None else {"thinking": settings.model_dump(mode="json")}

"""What a round asks of the reward: while it samples, in the stages `score` and `guard`, and where the reward judges too."""

from __future__ import annotations

import functools
from pathlib import Path

from selfplay.errors import GuardError
from selfplay.evaluation.judge import Judge, dependence
from selfplay.evaluation.rubric import Rubric
from selfplay.progress import Line
from selfplay.rewards.early import EarlyScoring
from selfplay.rewards.guard import guard
from selfplay.rewards.probes import Probes, choose_texts
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.scoring import score
from selfplay.rewards.texts import Item
from selfplay.rounds.frame import Frame
from selfplay.rounds.history import History
from selfplay.rounds.stages import SCORE
from selfplay.stage import Metrics
from selfplay.storage.manifests import require_whole


class Rewarding:
    """The reward and the judge of a run, in one round."""

    def __init__(
        self, frame: Frame, history: History, *, reward: Scorer, judge: Scorer, gold: Rubric | None, run_dir: Path
    ) -> None:
        """`gold`: the rubric of `evaluate.gold`."""
        self.frame, self.history, self.config = frame, history, frame.config
        self._reward, self._judge, self._gold, self._run_dir = reward, judge, gold, run_dir
        self._shards = functools.partial(frame.shards, "score")

    def begin_early(self, before: EarlyScoring | None) -> EarlyScoring | None:
        """Begin to score what is handed to the answer, beside other work.

        None where `before`, the last one of the run, has not ended yet, and where engine and reward take turns on the GPUs.
        Elsewhere it takes no more of a GPU's memory than the stage `score` does, in which the engine is awake too.
        """
        if self.config.placement.shared or (before is not None and before.alive):
            return None
        probes, scored_before = self._probes(), self._scored_before()
        return EarlyScoring(
            self._reward,
            prompts=self._prompts,
            shards=self._shards,
            begins=lambda shard: probes.is_same(
                self._reward, self.frame.index, self._texts(shard), scored_before=scored_before
            ),
        )

    def score(self, out: Path, line: Line, early: EarlyScoring | None) -> Metrics:
        """`early`: the last of the run, which may still be at its last shard."""
        settings = self.config.generate
        if early is not None:
            line.update(done=early.scored, text="waits for what was asked while it sampled")
            early.finish(self.frame.breathe)
        line.update(text="waits for the reward")
        return score(
            out,
            line,
            prompts=self._prompts,
            candidates=self._candidates,
            scorer=self._reward,
            settings=self.config.reward,
            shards=self._shards,
            shard_items=settings.shard_prompts * settings.candidates,
            probe=self.probe,
            breathe=self.frame.breathe,
            record_event=lambda kind, text: self.frame.store.event(kind, text, self.frame.index),
        )

    def guard(self, out: Path, line: Line) -> Metrics:
        settings = self.config.guard
        alike = self.history.scored_alike()
        recent = [i for i in alike if i >= self.frame.index - settings.history]
        files = [self.history.artifact(i, "score/scored.parquet") for i in recent]
        return guard(
            out,
            line,
            candidates=self._candidates,
            scored=self.frame.path("score/scored.parquet"),
            earlier=[require_whole(path) for path in files if path.is_file()],
            past=self.history.rewards_and_gold(alike),
            probed=self.frame.metrics(SCORE),
            settings=settings,
            noise=self.config.reward.noise,
            cut_off=self.config.pairs.cut_off,
            warn=self.warn,
            stopped=self._stopped,
        )

    def probe(self) -> Metrics:
        """How far the reward is from the one this run began with."""
        return self._probes().ask(
            self._reward,
            self.frame.index,
            self._texts(self._candidates),
            scored_before=self._scored_before,
            record=lambda text: self.frame.store.event("guard", text, self.frame.index),
            warn=self.warn,
        )

    def probe_or_forget(self) -> None:
        """Probe a reward that judges; what another one may have scored meanwhile is forgotten."""
        try:
            self.probe()
        except GuardError:
            self._reward.forget_all()
            raise

    def judge(self) -> Judge:
        """Who judges at the gate. A person is told what is to be known of it, before it decides.

        A reward that also trains is probed first, because no replaced reward decides at the gate.
        """
        scorer = self._judge
        if scorer is self._reward:
            self.probe_or_forget()
        identities = scorer.identities
        names = scorer.described(identities)
        before = self.history.judge_before()
        if before is not None and before[1] != names:
            self.warn(
                f"another judge decides at this gate than in round {before[0]}: {', '.join(names)} instead of "
                f"{', '.join(before[1])}",
            )
        dependent = dependence(self.frame.path("score/reward.json"), self._reward, scorer, identities)
        if dependent is not None and scorer is self._reward:
            self.frame.store.event("evaluate", dependent, self.frame.index)
            self.frame.display.note(dependent)
        elif dependent is not None:
            self.warn(dependent)
        return Judge(
            scorer=scorer,
            identities=identities,
            max_missing=self.config.reward.max_missing,
            gold=self._gold,
            gold_name=self.config.evaluate.gold or "",
            described={"members": scorer.members, "identities": identities, "names": names},
            dependent=dependent,
        )

    def warn(self, text: str) -> None:
        """Tell a person of the reward, and the ledger."""
        self.frame.store.event("guard", text, self.frame.index)
        self.frame.display.warn(f"round {self.frame.index}: {text}")

    @property
    def _prompts(self) -> Path:
        return self.frame.path("prompts/prompts.parquet")

    @property
    def _candidates(self) -> Path:
        return self.frame.path("generate/candidates.parquet")

    def _probes(self) -> Probes:
        return Probes(self._run_dir / "reward" / "probes.json", self.config.guard)

    def _texts(self, candidates: Path) -> functools.partial[list[Item]]:
        """What the probe texts are chosen from, where there are none yet."""
        return functools.partial(choose_texts, self._prompts, candidates, among=self.config.generate.shard_prompts)

    def _scored_before(self) -> bool:
        """Whether an earlier round was scored, and probed."""
        return bool(self.frame.store.metrics_by_round(["score/probe_change"]))

    def _stopped(self, known: Metrics) -> None:
        """Keep what a stage that stops would have said of the reward."""
        self.frame.store.record_metrics(self.frame.index, "guard", known)
        signs = ", ".join(f"{name} {value:.3g}" for name, value in known.items())
        self.frame.store.event("guard", f"stopped before training; all signs: {signs}", self.frame.index)

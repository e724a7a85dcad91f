"""What each stage of a round is given: paths of artifacts, settings, and the services of the run that it uses.

This is the only place that knows all of them. The stages themselves lie in their packages and know what they are handed.
"""

from __future__ import annotations

import functools
from pathlib import Path

from selfplay.evaluation.stage import evaluate
from selfplay.evaluation.suites import suites
from selfplay.generation.reference import reference_logps, score_anew
from selfplay.generation.sampling import generate
from selfplay.pairs.deepening import depth
from selfplay.pairs.stage import pairs
from selfplay.progress import Line, waiting
from selfplay.prompts import sealing
from selfplay.prompts.draw import Embed, prompts
from selfplay.prompts.evolve import Rewriting, by_function, by_policy, evolve, join
from selfplay.rounds import reference
from selfplay.rounds import suites as benchmarks
from selfplay.rounds.ahead import Ahead
from selfplay.rounds.answers import Answers
from selfplay.rounds.frame import Frame
from selfplay.rounds.history import History
from selfplay.rounds.promotion import decided, promote
from selfplay.rounds.requirements import packages, size
from selfplay.rounds.rewarding import Rewarding
from selfplay.rounds.run import Run
from selfplay.rounds.stages import EVOLVE, PROMOTE, STAGES, SUITE, TRAIN
from selfplay.stage import Metrics
from selfplay.storage import agreement, tables
from selfplay.storage.references import References
from selfplay.training.embedding import representatives
from selfplay.training.gradients import gradients
from selfplay.training.stage import train
from selfplay.types import Policy, Reference


class Steps:
    """The stages of round `index` of a run, in which policy `champion` is trained and meets the one that comes of it."""

    def __init__(self, run: Run, index: int, champion: int) -> None:
        self.run, self.index, self.champion, self.config = run, index, champion, run.config
        self.frame = Frame(
            dir=run.dir / "rounds" / f"{index:04d}",
            index=index,
            stages=STAGES,
            config=run.config,
            store=run.store,
            display=run.display,
            breathe=lambda where: run.breathe(where),  # it may be another one later
            logs=run.dir / "logs",
            weights=functools.cache(lambda: size(Path(run.policy(0).path))),
            adopted=lambda: run.policies.folder(index).is_dir(),
        )
        self.history = History(run.store, run.dir / "rounds", index)
        self.answers = Answers(
            frame=self.frame,
            prompts=run.prompts,
            serving=run.serving,
            run_dir=run.dir,
            champion=lambda: run.policy(champion),
        )

    @functools.cached_property
    def rewarding(self) -> Rewarding:
        """What the round asks of reward and judge."""
        run = self.run
        return Rewarding(self.frame, self.history, reward=run.reward, judge=run.judge, gold=run.gold, run_dir=run.dir)

    @property
    def adopted(self) -> bool:
        """Whether the policy that this round trained has its place among the run's."""
        return self.frame.adopted()

    @property
    def evolves(self) -> bool:
        """Whether this round rewrites prompts: by the configuration, or because it did before that was changed."""
        every = self.config.evolve.every
        return self.frame.done(EVOLVE) or (every > 0 and self.index % every == 0)

    @property
    def drawn(self) -> int:
        """How many prompts the round has."""
        return tables.count_rows(self.frame.path("prompts/prompts.parquet"))

    # the stages, in the order of the round

    def prompts(self, out: Path, line: Line) -> Metrics:
        sealing.require_whole(self.run.dir / "pool", anew=False)  # the run may have been open for weeks
        return prompts(
            out,
            line,
            pool=self.run.prompts,
            draws=self.run.draws,
            index=self.index,
            settings=self.config.prompts,
            breadth=self.config.breadth,
            embed=self._embed() if self.config.breadth.method == "clusters" else None,
        )

    def generate(self, out: Path, line: Line) -> Metrics:
        prompts = self.frame.path("prompts/prompts.parquet")
        prompt_ids = tables.read_column(prompts, "prompt_id")
        sampler = Ahead(self.answers, self.run.draws, self.run.policies).sampler(self.champion, prompt_ids)
        self.run.store.set_sampler(self.index, sampler)
        shards = self.answers.shards("generate", sampler, prompt_ids)
        with waiting(line, "the engine"):
            engine = self.run.serving.engine()
        if (early := self.rewarding.begin_early(self.run.early)) is not None:
            self.run.early = early

        def on_shard(start: int, file: Path) -> None:
            if early is not None:
                early.add(start, file)
                line.update(text=f"{early.scored} candidates scored" if early.scored else "")

        metrics = generate(
            out,
            line,
            prompts=prompts,
            generator=engine,
            settings=self.config.generate,
            seed=functools.partial(self.frame.seed, "generate"),
            shards=shards,
            breathe=self.run.breathe,
            on_shard=on_shard,
            policy=self.run.policy(sampler),
        )
        if early is not None:
            metrics |= {"scored": float(early.scored), "overlap_seconds": early.seconds}
        if sampler != self.champion:
            del metrics["tokens_per_second"]  # most were sampled while the round before trained
            self.run.serving.serve(self.run.policy(self.champion))
            score_anew(
                out / "candidates.parquet",
                line,
                generator=self.run.generator,
                prompts=prompts,
                shards=self.frame.shards("anew", self.champion, shards.name),
                shard_prompts=self.config.generate.shard_prompts,
                breathe=self.run.breathe,
            )
        if self.config.placement.shared:  # the engine sleeps from here to the end of training
            self.answers.of_the_champion()
        return metrics

    def score(self, out: Path, line: Line) -> Metrics:
        return self.rewarding.score(out, line, self.run.early)

    def guard(self, out: Path, line: Line) -> Metrics:
        return self.rewarding.guard(out, line)

    def pairs(self, out: Path, line: Line) -> Metrics:
        return pairs(
            out,
            line,
            prompts=self.frame.path("prompts/prompts.parquet"),
            candidates=self.frame.path("generate/candidates.parquet"),
            scored=self.frame.path("score/scored.parquet"),
            recent=self.history.pairs(self.config.pairs.history),
            score_by_reference=lambda path: self._score_by_reference(path, line),
            settings=self.config.pairs,
            noise=self.config.reward.noise,
            beta=self.config.train.beta,
            seed=self.frame.seed("pairs"),
        )

    def evolve(self, out: Path, line: Line) -> Metrics:
        return evolve(
            out,
            line,
            pairs=self.frame.path("pairs/pairs.parquet"),
            pool=self.run.prompts,
            settings=self.config.evolve,
            rewriting=self._rewriting(),
            admit=lambda rows: self.run.admit(rows, "evolve"),
        )

    def depth(self, out: Path, line: Line) -> Metrics:
        pairs_file = self.frame.path("pairs/pairs.parquet")
        return depth(
            out,
            line,
            prompts=self.frame.path("prompts/prompts.parquet"),
            candidates=self.frame.path("generate/candidates.parquet"),
            scored=self.frame.path("score/scored.parquet"),
            pairs=pairs_file,
            gradients=lambda path, kept: gradients(
                path,
                kept,
                line,
                trainer=self.run.trainer,
                pairs=pairs_file,
                policy=self._verified(self.champion),
                reference=self._reference(),
                beta=self._first_beta(),
                config=self.config,
                seed=self.frame.seed("depth"),
                # Where it shares a GPU, the engine sleeps from here to the end of training.
                meanwhile=self._champion_answers if self.config.placement.colocated else lambda: None,
                breathe=self.run.breathe,
            ),
            settings=self.config.depth,
            ranking=self.config.pairs,
            noise=self.config.reward.noise,
            beta=self.config.train.beta,
        )

    def train(self, out: Path, line: Line) -> Metrics:
        against, sampled_ahead = self._reference(), dict[str, float]()
        settings = self.config.train

        def meanwhile() -> None:
            with waiting(line, "the champion's answers to the held-out prompts"):
                self._champion_answers()
            if self.config.schedule.ahead:
                following = Steps(self.run, self.index + 1, self.champion).answers
                ahead = Ahead(following, self.run.draws, self.run.policies)
                sampled_ahead.update(ahead.sample(self.champion, line, self.run.trainer.hear))

        metrics = train(
            out,
            line,
            trainer=self.run.trainer,
            pairs=self.frame.path("depth/pairs.parquet"),
            earlier=self.history.trained_on(settings.replay_rounds) if settings.replay else [],
            work=self.frame.path("train.work"),
            policy=self._verified(self.champion),
            reference=against,
            initial=self.run.policies.tokenizing(0),
            version=self.index,
            beta=self._first_beta(),
            canary_ids=self.run.canary_ids,
            packages=packages(),
            config=self.config,
            seed=self.frame.seed("train"),
            meanwhile=meanwhile,
            breathe=self.run.breathe,
            warn=lambda text: self.run.event("warning", f"round {self.index}, {text}"),
        )
        return metrics | sampled_ahead

    def evaluate(self, out: Path, line: Line) -> Metrics:
        judge = functools.cache(self.rewarding.judge)
        if not self.config.placement.shared:  # what is wrong with it is told before anything is sampled
            judge()
        audit = self.answers.audit_prompts()
        metrics = evaluate(
            out,
            line,
            champion=self.run.policy(self.champion),
            candidate=self.run.policy(self.index),
            initial=self.run.policy(0),
            held_out=self.answers.gate_prompts(),
            audit=audit,
            engine=self.answers,
            initial_answers=lambda told: self.answers.of_the_initial(audit, self.run.policy(0), told),
            judge=judge,
            settings=self.config.evaluate,
            seed=self.frame.seed("bootstrap"),
            breathe=self.run.breathe,
        )
        if self.run.judge is self.run.reward:
            self.rewarding.probe_or_forget()
        return metrics

    @property
    def does_suites(self) -> bool:
        """Whether this round has suites: those that are due now, or were when they were asked. What is promoted stays so."""
        due = benchmarks.due(self.config, self.index) and not self.frame.done(PROMOTE)
        return self.frame.done(SUITE) or bool(due)

    def suites(self, out: Path, line: Line) -> Metrics:
        services = benchmarks.Services(
            frame=self.frame,
            serving=self.run.serving,
            run_dir=self.run.dir,
            tokenizer=self.run.tokenizer,
            render=self.run.render,
            encode=self.run.encode,
            scorer=self.run.suite_scorer,
        )
        with benchmarks.opened(benchmarks.due(self.config, self.index), services) as due:
            return suites(
                out,
                line,
                due=due,
                candidate=self.run.policy(self.index),
                champion=self.run.policy(self.champion),
                known=benchmarks.known(self.history.artifact, self.index, self.champion),
                settings=self.config.evaluate,
                seed=functools.partial(self.frame.seed, "suite"),
            )

    def promote(self, out: Path, line: Line) -> Metrics:
        promoted, _ = self.decided
        return promote(
            out,
            line,
            winner=self.run.policy(self.index if promoted else self.champion),
            promoted=promoted,
            serving=self.run.serving,
            set_current=functools.partial(agreement.set_current, self.run.store, self.run.policies),
        )

    @property
    def decided(self) -> tuple[bool, list[str]]:
        """Whether the candidate is promoted, and why it is not."""
        return decided(gate=self.frame.path("evaluate/verdict.json"), suites=self.frame.path("suite/verdict.json"))

    # what they use

    def expect_training(self) -> None:
        """Have a trainer ready, where the round has still to be trained."""
        if not self.frame.done(TRAIN):
            self.run.trainer.start()

    def join_rewrites(self) -> None:
        """Let the rewrites of the round join the pool."""
        join(self.frame.path(EVOLVE.name), pool=self.run.prompts, ledger=self.run.store, index=self.index)

    def _rewriting(self) -> Rewriting:
        """Who rewrites prompts: the policy that samples the round, or the user's function."""
        rewriter = self.run.rewriter
        if rewriter is not None:
            return by_function(
                self.config.evolve.rewriter,
                rewriter,
                functools.partial(self.frame.seed, "evolve"),
                lambda: self.run.breathe("shard"),
            )
        policy = self.run.policy(self.champion)
        self.run.serving.serve(policy)
        assert self.run.generator.info is not None, "the engine serves"
        return by_policy(
            self.champion,
            self.run.generator.info.max_model_len,
            # A rewrite that is longer than a prompt may be is of no use: the rest is left to the instruction.
            min(self.config.prompts.max_tokens, self.config.generate.max_tokens),
            self.run.render,
            lambda rows, most, progress: self.answers.answers("evolve", rows, policy, progress, max_tokens=most),
        )

    def _champion_answers(self) -> None:
        """Work for the engine before the trainer works, or beside it. Where all share the GPUs it was done in `generate`."""
        if not self.config.placement.shared:
            self.answers.of_the_champion()

    def _embed(self) -> Embed:
        """How the prompts are found that stand for all."""
        return functools.partial(
            representatives,
            trainer=self.run.trainer,
            policy=self._verified(self.champion),
            config=self.config,
            seed=self.frame.seed("breadth"),
            breathe=self.run.breathe,
        )

    def _verified(self, version: int) -> Policy:
        """A policy whose files were checked."""
        return self.run.policies.verified(version)[0]

    def _reference(self) -> Reference:
        """This round's reference, whose files were checked."""
        # Where they share a GPU the engine sleeps from the first order of these on.
        colocated = self.config.placement.colocated
        return reference.of_round(
            self.index,
            config=self.config,
            store=self.run.store,
            policies=self.run.policies,
            references=References(self.run.dir),
            trainer=self.run.trainer,
            meanwhile=self._champion_answers if colocated else lambda: None,
        )

    def _first_beta(self) -> float:
        return reference.first_beta(self.config.train, self.index, self.run.policy(self.champion))

    def _score_by_reference(self, path: Path, line: Line) -> None:
        against = reference.policy(self.config.train, self.index, self.run.store, self.run.policies)
        if against.version != self.champion:
            line.update(text=f"policy {against.version} scores the candidates")
            self.run.serving.serve(against)
        reference_logps(
            path,
            line,
            generator=None if against.version == self.champion else self.run.generator,
            prompts=self.frame.path("prompts/prompts.parquet"),
            candidates=self.frame.path("generate/candidates.parquet"),
            shards=self.frame.shards("pairs", against.version, self.config.generate.shard_prompts),
            shard_prompts=self.config.generate.shard_prompts,
            breathe=self.run.breathe,
        )

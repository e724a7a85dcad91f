"""Two engines behind one generator: the same answers as from one, whoever dies. One story, since each start takes seconds."""

import os
import signal
import threading

import numpy as np
import pytest
from engine_world import config, prompts, seed, write_policy

from selfplay.errors import EngineError, Interrupted, SwapError
from selfplay.generation import installing, sampling
from selfplay.generation.generator import Generator
from selfplay.processes import reaping
from selfplay.storage import tables
from selfplay.storage.answers import join
from selfplay.types import Candidate, Prompt

pytestmark = pytest.mark.service

COUNT, SHARD = 64, 8


def pool(run_dir, events, **generate):
    found = config(run_dir)
    settings = found.generate.model_copy(update={"engines": 2, **generate})
    return Generator(
        found.model_copy(update={"generate": settings}), run_dir, run_dir / "engine.log",
        on_event=lambda kind, text: events.append((kind, text)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "test"


@pytest.fixture(scope="module")
def policies(run_dir):
    return {version: write_policy(run_dir / "policies", version, seed=version) for version in (1, 2)}


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def two(run_dir, policies, events):
    found = pool(run_dir, events)
    found.start()
    found.load(policies[1])
    yield found
    found.stop()
    assert reaping.marked(run_dir) == []


@pytest.fixture(scope="module")
def asked(run_dir, policies):
    tables.write_rows(run_dir / "asked.parquet", prompts(COUNT), Prompt)
    return run_dir / "asked.parquet"


def kill(engine):
    """SIGKILL to the process with the engine in it, under its guard."""
    (pid,) = reaping.descendants(engine.warm.child.pid)
    os.kill(pid, signal.SIGKILL)


def sample(generator, asked, folder, **settings):
    """The bytes of each shard."""
    files = sampling.sample(
        generator, asked, candidates=4, seed=seed, shards=folder, shard_prompts=SHARD, **settings
    )  # fmt: skip
    assert sorted(folder.glob("*.parquet")) == list(files)
    return [path.read_bytes() for path in files]


def settle(generator):
    """Wait for engines that are being started again."""
    for engine in generator.engines:
        while engine.job is not None:
            engine.job.exception()
            generator.look_after()


@pytest.fixture(scope="module")
def golden(two, asked, tmp_path_factory):
    """What both engines answer."""
    return sample(two, asked, tmp_path_factory.mktemp("golden") / "shards")


def of_one(two, number):
    """The pool with one engine of its two."""
    found = pool(two._run_dir, [])
    found.engines, found._checkpoints = [two.engines[number]], two._checkpoints
    found.policy, found.verified = two.policy, two.verified
    return found


def test_each_engine_alone_answers_the_same_bytes(two, asked, golden, tmp_path):
    shards, told = [], []
    for number in (0, 1):
        assert sample(of_one(two, number), asked, tmp_path / str(number)) == golden
    again = sample(
        two, asked, tmp_path / "both", on_progress=told.append, on_shard=lambda start, file: shards.append((start, file.exists()))
    )  # fmt: skip
    assert again == golden
    assert sorted(shards) == [(start, True) for start in range(0, COUNT, SHARD)]
    assert told == sorted(told) and told[-1] == COUNT
    assert {row.policy for row in tables.read_rows(tmp_path / "both" / "00000000.parquet", Candidate)} == {1}


def test_log_probabilities_are_the_same_to_the_bit(two, asked, golden, tmp_path):
    answers = tmp_path / "answers.parquet"
    sample(two, asked, tmp_path / "shards")
    join(sorted((tmp_path / "shards").glob("*.parquet")), answers)
    done = []
    (both,) = two.answer_logps(asked, answers, 0, 4 * COUNT, 4, done.append)
    (alone,) = of_one(two, 1).answer_logps(asked, answers, 0, 4 * COUNT, 4)
    assert np.array_equal(both, alone) and done[-1] == 4 * COUNT
    sampled = [row.logp for row in tables.read_rows(answers, Candidate)]
    assert both == pytest.approx(sampled, abs=1e-4)


def test_an_engine_killed_in_mid_stage_is_replaced_by_the_other(two, asked, golden, events, tmp_path):
    handed_out = []

    def before_shard():
        handed_out.append(1)
        if len(handed_out) == 6:  # some of them are in the second engine
            kill(two.engines[1])

    assert sample(two, asked, tmp_path / "shards", before_shard=before_shard) == golden
    settle(two)
    ((kind, text),) = events
    assert kind == "engine_restart" and "the generator 2 process was killed by SIGKILL" in text
    assert all(engine.ready for engine in two.engines) and len(handed_out) > COUNT // SHARD
    events.clear()


def test_a_stop_finishes_what_is_in_flight_and_one_for_good_drops_it(two, asked, golden, tmp_path):
    for now in (False, True):
        left = [6]

        def before(left=left, now=now):
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted("the service stops", now=now)

        folder = tmp_path / str(now)
        with pytest.raises(Interrupted):
            sampling.sample(
                two, asked, candidates=4, seed=seed, shards=folder, shard_prompts=SHARD, before_shard=before
            )  # fmt: skip
        whole = list(folder.glob("*.parquet"))
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        assert len(whole) == 6 if not now else len(whole) < 6
        assert sample(two, asked, folder) == golden


def test_all_engines_are_swapped_before_any_answers(two, asked, golden, policies, tmp_path):
    report = two.swap(policies[2], keep_verified=True)
    assert report.method == "canaries" and [engine.warm.policy for engine in two.engines] == [policies[2]] * 2
    assert sample(two, asked, tmp_path / "other") != golden
    two.swap(policies[1])
    assert sample(two, asked, tmp_path / "back") == golden


def test_two_policies_answer_side_by_side_each_from_an_engine_of_its_own(two, policies, events, tmp_path):
    def answers(generator, folder, shard_prompts):
        requests = [
            sampling.Request(rows=prompts(24), policy=policies[i], seed=seed, shards=folder / str(i), candidates=4)
            for i in (1, 2)
        ]
        return sampling.ask(lambda: generator, requests, shard_prompts=shard_prompts)

    found = answers(two, tmp_path / "two", 4)
    assert two.divided and [engine.warm.policy for engine in two.engines] == [policies[1], policies[2]]
    assert [{row.policy for row in rows} for rows in found] == [{1}, {2}]
    alone = of_one(two, 0)
    assert answers(alone, tmp_path / "one", 24) == found  # one engine serves them one after another
    assert alone.policy == policies[2] and alone.verified == policies[1]
    assert two.swap(policies[1]).method == "canaries"
    assert not two.divided and all(engine.ready for engine in two.engines) and events == []


def test_an_engine_killed_in_mid_swap_joins_again_with_the_new_weights(
    two, asked, golden, policies, events, tmp_path, monkeypatch
):
    order, load, swapped = installing.WarmEngine.order, installing.WarmEngine.load, threading.Event()

    def killed(self, name, /, *args, **fields):
        if name == "reload" and self is two.engines[1].warm:
            monkeypatch.undo()
            monkeypatch.setattr(installing.WarmEngine, "load", late)
            kill(two.engines[1])
        return order(self, name, *args, **fields)

    def late(self, *args):
        if self is two.engines[1].warm:
            assert swapped.wait(60), "the swap does not wait for this one"
        return load(self, *args)

    monkeypatch.setattr(installing.WarmEngine, "order", killed)
    report = two.swap(policies[2])
    assert report.method == "canaries" and not report.restarted  # of the engine that was not killed
    assert two.engines[0].ready and not two.engines[1].ready
    swapped.set()
    answered = sample(two, asked, tmp_path / "two")
    settle(two)
    assert [kind for kind, _ in events] == ["swap_restart"] and two.engines[1].warm.policy == policies[2]
    assert sample(of_one(two, 1), asked, tmp_path / "second") == answered
    events.clear()
    two.swap(policies[1])


def test_weights_that_one_engine_does_not_take_set_it_aside(two, asked, policies, events, tmp_path, monkeypatch):
    """Its canaries are other ones, in a new process too. The last test with the second engine, which stays away."""
    load, install = installing.WarmEngine.load, installing.WarmEngine.install

    def refused(way):
        def work(self, policy, *args):
            if self is two.engines[1].warm:
                self.stop()
                raise installing.NotShown("other weights")
            return way(self, policy, *args)

        return work

    monkeypatch.setattr(installing.WarmEngine, "load", refused(load))
    monkeypatch.setattr(installing.WarmEngine, "install", refused(install))
    assert two.swap(policies[2]).policy == 2
    settle(two)
    assert isinstance(two.engines[1].failed, SwapError) and two.engines[0].ready
    assert [kind for kind, _ in events] == ["swap_restart", "warning"]
    assert "the generator 2 process is set aside, the others go on" in events[1][1]
    assert len(sample(two, asked, tmp_path / "one")) == COUNT // SHARD
    two.swap(policies[1])
    settle(two)
    events.clear()


def test_an_engine_that_cannot_start_is_set_aside_unless_too_few_are_left(two, asked, golden, tmp_path, monkeypatch):
    events = []
    found = pool(two._run_dir, events, engine=two._config.generate.engine.model_copy(update={"restarts": 1}))
    monkeypatch.setattr(installing, "ENGINE", ("-c", "raise SystemExit(1)"))
    found.engines[0] = two.engines[0]
    found.policy, found.verified = two.policy, two.verified
    found._checkpoints.loaded(two.policy)
    assert sample(found, asked, tmp_path / "shards") == golden
    settle(found)
    assert isinstance(found.engines[1].failed, EngineError)
    assert [kind for kind, _ in events] == ["engine_restart", "warning"]
    found._config = found._config.model_copy(
        update={"generate": found._config.generate.model_copy(update={"min_engines": 2})}
    )
    with pytest.raises(EngineError, match="the generator 2 process ended with exit code 1"):
        found.wake()

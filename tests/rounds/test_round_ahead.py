"""Candidates that are sampled while the round before trains: who samples them, whose log-probabilities they have, and when they
are dropped. The engine only pretends."""

import dataclasses
import os
import signal

import pytest
from mini import Command, nothing_left, sets
from steps_world import LINE, Opened

from selfplay.errors import Interrupted
from selfplay.generation.generator import Sampled
from selfplay.prompts import formats, pool, sealing
from selfplay.prompts.draws import Draws
from selfplay.prompts.orders import Orders
from selfplay.rounds.ahead import Ahead
from selfplay.rounds.steps import Steps
from selfplay.storage import folders, tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest
from selfplay.types import Candidate, Prompt


def prompt(name, joined=None):
    messages = [{"role": "user", "content": name}]
    return Prompt(
        prompt_id=formats.prompt_id(messages), messages=messages, prompt_ids=[1, 2], split="train", joined=joined
    )


class Engine:
    """Serves a policy. Its answers follow from policy and seed, its log-probabilities from policy and answer."""

    def __init__(self):
        self.policy, self.swaps, self.sampled, self.scored = None, [], [], 0

    def serve(self, policy):
        if policy.version != self.policy:
            self.policy = policy.version
            self.swaps.append(policy.version)

    def logp(self, token_ids):
        return -float(self.policy + 1) - token_ids[0] / 1000

    def engine(self):
        return self

    def sample(self, asks, *, on_progress, before_shard, on_shard):
        (asked,), done = asks, 0
        for shard in asked.shards:
            before_shard()
            self.serve(asked.policy)
            self.sampled.append((self.policy, shard.start))
            rows = tables.read_slice(asked.prompts, Prompt, shard.start, len(shard.seeds))
            answers = [
                (row, k, [5 + (seed + k + 7 * self.policy) % 90, 2])
                for row, seed in zip(rows, shard.seeds, strict=True)
                for k in range(asked.candidates)
            ]
            said = [
                Candidate(
                    prompt_id=row.prompt_id, index=k, text=str(ids[0]), token_ids=ids, logp=self.logp(ids), n_tokens=2,
                    finish_reason="stop", policy=self.policy,
                )
                for row, k, ids in answers
            ]  # fmt: skip
            tables.write_rows(shard.file, said, Candidate)
            on_progress(done := done + len(rows))
            on_shard(shard, Sampled(rows=len(said), tokens=2 * len(said), seconds=1.0))

    def score(self, prompts, answers, ranges, per_prompt, on_progress, before_piece):
        asked = tables.read_column(prompts, "prompt_id")
        for each in ranges:
            before_piece()
            rows = tables.read_slice(answers, Candidate, each.start, each.count)
            assert [row.prompt_id for row in rows] == [asked[(each.start + i) // per_prompt] for i in range(each.count)]
            self.scored += each.count
            each.done([self.logp(row.token_ids) for row in rows])


class World(Opened):
    """Thirty prompts of which a round draws six, two to a shard, and policies 0 ← 1 ← 2."""

    def __init__(self, folder, *settings):
        sizes = ("generate.shard_prompts=2", "generate.candidates=2", "prompts.per_round=6")
        super().__init__(folder, "schedule.ahead=1", *sizes, *settings)
        (folder / "pool").mkdir()
        tables.write_rows(folder / "pool" / pool.OLD, [prompt(f"p{i}") for i in range(30)], Prompt)
        sealing.seal(folder / "pool")
        self.prompts = pool.Pool(folder / "pool")
        self.draws = Draws(self.prompts, self.store, folder / "rounds", Orders(7, None))
        self.serving = self.generator = Engine()
        for version in range(3):
            manifest = Manifest(
                version=version, parent=version - 1 if version else None, round=version, beta=None, reference=None,
                reference_sha256=None, fingerprint="", packages={}, update={}, files={}, canaries={},
            )  # fmt: skip
            folders.make(self.policies.folder(version))
            folders.write_json(self.policies.folder(version) / folders.MANIFEST, dataclasses.asdict(manifest))

    def configure(self, **sections):
        changed = {name: getattr(self.config, name).model_copy(update=new) for name, new in sections.items()}
        self.config = self.config.model_copy(update=changed)

    def open(self, index, champion):
        """A round with its prompts."""
        if self.store.unfinished() is not None:
            self.store.close_round(index - 1, "promoted", champion, [])
        self.store.open_round(index, champion, self.draws.cursor(index), "f", {})
        steps = Steps(self, index, champion)
        folders.make(steps.frame.path("prompts"))
        steps.prompts(steps.frame.path("prompts"), LINE)
        self.draws.record(index)
        return steps

    def ahead(self, steps):
        self.generator.serve(self.policy(steps.champion))
        following = Steps(self, steps.index + 1, steps.champion).answers
        return Ahead(following, self.draws, self.policies).sample(steps.champion, LINE, lambda: None)

    def generate(self, steps):
        """The stage; what it says, and its file."""
        steps = Steps(self, steps.index, steps.champion)  # another process perhaps
        steps.rewarding.begin_early = lambda before: None
        out = steps.frame.path("generate")
        folders.make(out)
        return steps.generate(out, LINE), (out / "candidates.parquet").read_bytes()

    def candidates(self, steps):
        return tables.read_rows(steps.frame.path("generate/candidates.parquet"), Candidate)

    def second(self, champion):
        """The second round without anything that was sampled ahead: its file."""
        self.open(1, 0)
        return self.generate(self.open(2, champion))[1]


@pytest.mark.slow
def test_where_the_candidate_is_rejected_the_answers_are_those_of_the_policy_that_serves(tmp_path):
    expected = World(tmp_path / "plain").second(0)
    world = World(tmp_path / "ahead")
    assert world.ahead(world.open(1, 0))["ahead_prompts"] == 6
    assert [event["text"] for event in world.store.events(1)] == ["policy 0 samples round 2, while round 1 trains"]
    world.generator.sampled.clear()
    metrics, found = world.generate(world.open(2, 0))
    assert found == expected
    assert world.generator.sampled == [] and world.generator.scored == 0 and world.generator.swaps == [0]
    assert metrics["candidates"] == 12 and world.events(2) == []


@pytest.mark.slow
def test_after_a_promotion_they_are_scored_anew_under_the_new_policy(tmp_path):
    """The answers are those of policy 0, the log-probabilities those of policy 1; the ledger says so."""
    plain = World(tmp_path / "plain")
    plain.second(0)
    world = World(tmp_path / "ahead")
    world.ahead(world.open(1, 0))
    steps = world.open(2, 1)
    world.generator.sampled.clear()
    metrics, _ = world.generate(steps)
    assert world.generator.sampled == [] and world.generator.scored == 12 and world.generator.swaps == [0, 1]
    sampled = plain.candidates(Steps(plain, 2, 0))
    assert world.candidates(steps) == [
        dataclasses.replace(c, logp=world.generator.logp(c.token_ids)) for c in sampled
    ]  # fmt: skip
    assert world.candidates(steps) != sampled
    row = world.store.round(2)
    assert (row["sampler"], row["champion"]) == (0, 1)
    assert "tokens_per_second" not in metrics and metrics["tokens"] == 24


def test_however_far_it_came_the_round_has_the_same_candidates(tmp_path):
    """Ended after a shard of sampling, the round is sampled to its end by the same policy; ended again after a shard of scoring,
    nothing is done twice."""
    calm = World(tmp_path / "calm")
    calm.ahead(calm.open(1, 0))
    _, expected = calm.generate(calm.open(2, 1))
    world = World(tmp_path / "storm")
    steps = world.open(1, 0)

    def stop_after(shards):
        left = iter(range(shards))

        def breathe(where):
            if where == "shard" and next(left, None) is None:
                raise Interrupted("the service stops")

        world.breathe = breathe

    stop_after(1)
    with pytest.raises(Interrupted):
        world.ahead(steps)
    steps = world.open(2, 1)
    stop_after(3)
    with pytest.raises(Interrupted):
        world.generate(steps)
    world.breathe = lambda where: None
    assert world.generate(steps)[1] == expected
    assert world.generator.sampled == [(0, 0), (0, 2), (0, 4)] and world.generator.scored == 12
    assert [event["kind"] for index in (1, 2) for event in world.store.events(index)] == ["ahead"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("champion", "change", "why"),
    [
        (1, lambda world: world.prompts.join([prompt(f"q{i}", 2) for i in range(40)]), "prompts or settings have changed"),
        (0, lambda world: world.prompts.join([prompt(f"q{i}", 2) for i in range(40)]), "prompts or settings have changed"),
        (1, lambda world: world.configure(generate={"temperature": 0.5}), "prompts or settings have changed"),
        (1, lambda world: world.configure(schedule={"ahead": 0}), "schedule.ahead is off"),
        (2, lambda world: None, "policy 2, which serves now, was not made from it"),
    ],
    ids=["prompts", "prompts-rejected", "settings", "off", "rolled back"],
)  # fmt: skip
def test_samples_that_no_longer_fit_are_dropped_and_the_round_is_sampled_as_usual(tmp_path, champion, change, why):
    worlds = World(tmp_path / "plain"), World(tmp_path / "ahead")
    files = []
    for world in worlds:
        steps = world.open(1, 0)
        if world is worlds[1]:
            world.ahead(steps)
        change(world)
        files.append(world.generate(world.open(2, champion))[1])
    assert files[0] == files[1]
    told = [event["text"] for event in world.store.events(2)]
    assert len(told) == 1 and told[0].startswith(f"what policy 0 sampled ahead is dropped: {why}")
    assert world.store.round(2)["sampler"] == champion
    assert len(list(steps.frame.dir.parent.glob("0002/generate-*.shards"))) == 1
    world.generate(Steps(world, 2, champion))  # told once
    assert len(world.store.events(2)) == 1


def test_a_round_that_will_not_be_is_not_sampled(tmp_path):
    world = World(tmp_path / "end", "schedule.end.rounds=1")
    assert world.ahead(world.open(1, 0)) == {}
    world = World(tmp_path / "prompts", "prompts.at_end=stop", "prompts.per_round=30")
    assert world.ahead(world.open(1, 0)) == {}
    assert world.generator.sampled == [] and world.store.events(1) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_run_is_killed_while_it_samples_ahead(calm, mini_world):
    """Rounds 3 and 4 of the calm run. Policy 2 samples round 4 while policy 3 is trained. The trainer of round 4 compares the
    candidates' log-probabilities with those that it computes itself under policy 3, which is its reference."""
    run_dir, _ = calm
    settings = sets("schedule.ahead=1", "schedule.end.rounds=4")
    run = Command(mini_world, run_dir, "--rounds", "4", *settings)
    fourth = run_dir / "rounds" / "0004"
    run.until(lambda: list(fourth.glob("generate-*.shards/00000000.parquet")), "the first shard of round 4")
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert not (run_dir / "rounds" / "0003" / "train").exists() and nothing_left(run_dir)
    code, out = Command(mini_world, run_dir, "--rounds", "4", *settings).finish()
    assert code == 0, out
    store = Store(run_dir)
    rounds = [(row["sampler"], row["champion"], row["policy"]) for row in store.rounds()[2:]]
    assert rounds == [(2, 2, 3), (2, 3, 4)]
    assert [event["kind"] for index in (3, 4) for event in store.events(index)].count("ahead") == 1
    metrics = store.metrics(4)
    assert metrics["train/agreement_mean"] < 1e-4 and store.metrics(3)["train/ahead_prompts"] == 32
    store.close()
    assert {c.policy for c in tables.read_rows(fourth / "generate/candidates.parquet", Candidate)} == {2}
    assert not (run_dir / "rounds" / "0005").exists()

"""A reference that follows the policies from round to round (`train.reference: {ema: …}`), over a trainer that only averages."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from steps_world import Opened

from selfplay.config import Ema, TrainConfig
from selfplay.errors import CheckpointError, ConfigError
from selfplay.rounds import reference
from selfplay.storage import folders, hashes
from selfplay.storage.policies import Manifest, Policies
from selfplay.storage.references import References
from selfplay.training.jobs import BlendJob


class World(Opened):
    """Policies 0 … 4 of one weight each: 0, 10, 20, 30, 40; round n is sampled by policy n − 1."""

    def __init__(self, folder, *settings):
        super().__init__(folder, "train.reference={ema: 0.5}", *settings)
        self.orders = []
        self.trainer = SimpleNamespace(order=self.order)
        self.policies = Policies(folder)
        for version in range(5):
            path = self.policies.folder(version)
            folders.make(path)
            save_file({"w": np.array([10.0 * version], np.float32)}, path / "model.safetensors")
            manifest = Manifest(
                version=version, parent=version - 1 if version else None, round=version, beta=None, reference=None,
                reference_sha256=None, fingerprint="", packages={}, update={}, files=hashes.hash_files(path), canaries={},
            )  # fmt: skip
            folders.write_json(path / folders.MANIFEST, dataclasses.asdict(manifest))

    def order(self, name, job, meanwhile, last):
        """What the trainer does with an order, on NumPy arrays."""
        assert name == "blend" and isinstance(job, BlendJob) and not last
        meanwhile()
        before, after = (load_file(folder / "model.safetensors")["w"] for folder in (job.before, job.policy))
        with folders.folder(job.out) as part:
            save_file({"w": (1 - job.share) * before + job.share * after}, part / "model.safetensors")
        self.orders.append((float(before[0]), float(after[0])))
        return {"distance": 0.25}

    def round(self, index, champion):
        self.store.open_round(index, champion, (0, 0), "f", {})
        return self.reference(index)

    def reference(self, index):
        return reference.of_round(
            index,
            config=self.config,
            store=self.store,
            policies=self.policies,
            references=References(self.dir),
            trainer=self.trainer,
        )

    def end(self, index, outcome="promoted"):
        reference.forget(References(self.dir), self.config.train, index, given_up=outcome == "cancelled")
        self.store.close_round(index, outcome, index, [])


def weight(found):
    return float(load_file(f"{found.path}/model.safetensors")["w"][0])


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def test_the_reference_of_a_round_is_that_of_the_round_before_moved_towards_the_policy_that_samples_it(world):
    """Half of the way each time: 0, then 5 (0 → 10), 12.5 (5 → 20), 21.25 (12.5 → 30)."""
    first = world.round(1, 0)
    assert (first.version, weight(first), world.orders) == (
        0,
        0.0,
        [],
    )  # the initial policy itself, checked like any other
    world.end(1)
    for index, expected in ((2, 5.0), (3, 12.5), (4, 21.25)):
        found = world.round(index, index - 1)
        assert (found.version, weight(found)) == (None, expected)
        assert found == world.reference(index)  # it is there now: nothing is averaged once more
        manifest = folders.read_json(References(world.dir).folder(index) / folders.MANIFEST)
        assert (manifest["policy"], manifest["share"], manifest["round"]) == (index - 1, 0.5, index)
        (event,) = [e["text"] for e in world.store.events(index) if e["kind"] == "reference"]
        was = "policy 0" if index == 2 else f"the reference of round {index - 1}"
        assert f"0.5 of policy {index - 1} and 0.5 of {was}: {found.sha256[:12]}, 2.50e-01 of its norm" in event
        world.end(index)
    assert len(world.orders) == 3
    there = [path.name for path in sorted(References(world.dir).root.iterdir()) if (path / "model").is_dir()]
    assert there == ["0004"]  # the next round moves on from it alone; the manifests of all stay
    assert References(world.dir).folder(2).is_dir()


def test_a_round_that_is_given_up_leaves_no_reference(world):
    for index in (1, 2):
        world.round(index, index - 1)
        world.end(index)
    assert weight(world.round(3, 2)) == 12.5
    world.end(3, "cancelled")
    assert weight(world.round(4, 2)) == 12.5  # from the reference of round 2 again
    world.end(4)
    assert (
        weight(world.round(5, 2)) == 16.25
    )  # a rejected round has the same policy again: the reference goes on towards it


def test_a_reference_that_is_damaged_is_told_and_made_again(world):
    world.round(1, 0)
    world.end(1)
    made = world.round(2, 1)
    (References(world.dir).folder(2) / "model" / "model.safetensors").write_bytes(b"other")
    hashes.forget()
    with pytest.raises(CheckpointError) as error:
        world.reference(2)
    assert "made again from the one before" in error.value.hint
    References(world.dir).delete(2)
    assert world.reference(2).sha256 == made.sha256


def test_without_an_average_nothing_of_it_stays(world):
    world.round(1, 0)
    world.end(1)
    world.round(2, 1)
    world.config = world.config.model_copy(update={"train": TrainConfig()})
    assert world.reference(2).version == 1
    world.end(2)
    assert References(world.dir).before(9) is None


def test_beta_begins_anew_in_each_round_and_implicit_rewards_have_no_such_reference(tmp_path):
    assert reference.began(TrainConfig(reference=Ema(ema=0.6)), 7) == 7
    with pytest.raises(ConfigError, match="a moving average is never in the engine"):
        World(tmp_path, "pairs.implicit=dpo")

import dataclasses
import errno
import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from selfplay.config import load
from selfplay.errors import CheckpointError, DiskError, SwapError
from selfplay.reporting.terminal import Display
from selfplay.rounds.round import cancel_round, roll_back
from selfplay.rounds.stages import PROMPTS
from selfplay.rounds.steps import Steps
from selfplay.storage import agreement, checkpoints, folders, hashes, policies
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest, Policies

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def checkpoint(folder: Path, value: float = 0.0) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {"a": torch.full((2, 3), float(value)), "b": torch.zeros(4, dtype=torch.bfloat16)}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text("{}")
    return folder


def export(folder: Path, version: int) -> Path:
    manifest = Manifest(
        version=version, parent=version - 1, round=version, beta=0.1, reference=0, reference_sha256="x", fingerprint="f",
        packages={}, update={}, files=hashes.hash_files(checkpoint(folder, version)), canaries={},
    )  # fmt: skip
    folders.write_json(folder / "manifest.json", dataclasses.asdict(manifest))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run folder with the initial policy and policies 1 to 5."""
    found = Policies(tmp_path)
    found.import_initial(checkpoint(tmp_path / "source"), {}, "f", {})
    found.set_current(0)
    for version in range(1, 6):
        found.adopt(version, export(tmp_path / "exported", version))
    return found


def test_policies_by_number_and_the_current_one(run, tmp_path):
    assert run.versions() == [0, 1, 2, 3, 4, 5]
    assert (run.get(3).parent, run.get(3).beta) == (2, 0.1)
    assert Path(run.get(0).path) == tmp_path / "source"
    assert run.current == 0
    run.set_current(5)
    assert (run.current, (tmp_path / "current").read_text()) == (5, "5\n")
    assert checkpoints.tensors(run.folder(5)) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}
    run.adopt(5, tmp_path / "nothing")  # adopted before: nothing to do


def test_a_link_of_an_earlier_version_names_the_current_policy_and_becomes_a_file(run, tmp_path):
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to("policies/0003")
    (tmp_path / ".current.partial").symlink_to("policies/0004")  # left by a kill
    assert run.current == 3
    run.set_current(4)
    assert run.current == 4 and not (tmp_path / "current").is_symlink()
    assert not (tmp_path / ".current.partial").is_symlink() and (run.folder(4) / "manifest.json").is_file()


def test_a_current_that_names_no_policy(run, tmp_path):
    (tmp_path / "current").write_text("policy five")
    assert run.current is None
    (tmp_path / "current").unlink()
    (tmp_path / "current").mkdir()
    assert run.current is None
    run.set_current(5)
    assert run.current == 5


def test_a_tampered_truncated_or_unfinished_policy_is_never_loaded(run):
    weights = run.folder(2) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        policies.verify(run.folder(2))
    weights.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        policies.verify(run.folder(2))
    with pytest.raises(CheckpointError, match="bytes, its header says"):
        checkpoints.tensors(run.folder(2))
    weights.write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.tensors(run.folder(2))
    weights.unlink()
    weights.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        checkpoints.tensors(run.folder(2))
    weights.rmdir()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        checkpoints.tensors(run.folder(2))
    (run.folder(3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a whole policy"):
        policies.verify(run.folder(3))
    (run.folder(4) / "manifest.json").write_text('{"version": 4}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        policies.verify(run.folder(4))


def test_the_source_of_the_initial_policy_is_checked_too(run, tmp_path):
    policies.verify(run.folder(0))
    (tmp_path / "source" / "config.json").write_text('{"changed": 1}')
    with pytest.raises(CheckpointError, match=r"config\.json is not what its manifest says"):
        policies.verify(run.folder(0))


def test_a_policy_of_another_run_as_the_initial_one(run, tmp_path):
    checkpoint(run.folder(3) / "masters")
    other = Policies(tmp_path / "other")
    other.import_initial(run.folder(3), {}, "f", {})
    manifest = policies.verify(other.folder(0))
    assert sorted(manifest.files) == [
        "config.json", "masters/config.json", "masters/model.safetensors", "model.safetensors"
    ]  # fmt: skip
    (run.folder(3) / "masters" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="masters/model.safetensors is not what"):
        policies.verify(other.folder(0))
    policies.verify(other.folder(0), masters=False)  # what an engine reads is whole, and a swap asks for no more


class Engine:
    """Stands for the generator: serves what it is told to, unless it cannot be shown to."""

    def __init__(self, policy, shows=True):
        self.policy, self._shows, self.did = policy, shows, []

    def load(self, policy):
        self._serve("load", policy)

    def swap(self, policy):
        self._serve("swap", policy)

    def _serve(self, how, policy):
        self.did.append((how, policy.version))
        if not self._shows:
            raise SwapError("the new weights could not be shown")
        self.policy = policy


@pytest.mark.parametrize(("warm", "how"), [(False, "load"), (True, "swap")])
def test_a_roll_back_is_shown_by_an_engine_that_runs_or_is_started_for_it(run, warm, how):
    store = Store(run.root.parent)

    def service(shows):
        engine = Engine(run.get(5) if warm else None, shows)
        serving = SimpleNamespace(loaded=engine.policy is not None)
        config = load(TINY)
        return SimpleNamespace(
            store=store, policies=run, policy=run.get, generator=engine, serving=serving, config=config,
            dir=run.root.parent, display=None, alert=None,
        )  # fmt: skip

    agreement.set_current(store, run, 4)
    (run.folder(4) / "model.safetensors").unlink()  # what is rolled back may be damaged
    failing = service(shows=False)
    with pytest.raises(SwapError):
        roll_back(failing, 2)
    assert run.current == store.serving() == 4
    sound = service(shows=True)
    assert roll_back(sound, 2).startswith("policy 2 is current instead of 4, shown to serve within")
    assert (run.current, store.serving(), sound.generator.did) == (2, 2, [(how, 2)])
    store.close()


class Killed(BaseException):
    """Nothing in the product catches it."""


class Opened:
    """A run of five policies in its fifth round, without children: `policies`, `store` and all files are real."""

    def __init__(self, found):
        self.policies, self.dir, self.config = found, found.root.parent, load(TINY)
        self.store, self.display = Store(self.dir), Display(Console(file=io.StringIO()))
        for version in range(6):
            self.store.record_policy(version, "promoted", round=version)
        for index in range(1, 6):
            self.store.open_round(index, index - 1, (0, 0), self.config.fingerprint(), {})
            if index < 5:
                self.store.close_round(index, "promoted", index, [])
        self.policy, self.generator = found.get, Engine(found.get(4))
        self.serving = SimpleNamespace(loaded=True, serve=lambda policy, trial: self.generator.swap(policy))
        self.prompts = self.alert = None
        self.breathe = self.track = lambda _: None

    @property
    def current(self):
        return self.policies.get(self.store.serving())


@pytest.fixture
def opened(run):
    made = Opened(run)
    yield made
    made.store.close()


def test_a_round_that_is_given_up_after_its_promotion_goes_back_to_the_policy_of_before(opened):
    opened.generator = Engine(opened.policies.get(5))
    agreement.set_current(opened.store, opened.policies, 5)  # and then it was killed
    assert cancel_round(opened).outcome == "cancelled"
    assert opened.store.serving() == opened.policies.current == 4 and opened.generator.did == [("swap", 4)]
    assert opened.store.round(5)["policy"] == 4


def test_a_round_that_is_given_up_has_all_its_finished_stages_in_the_ledger(opened, monkeypatch):
    agreement.set_current(opened.store, opened.policies, 4)

    def write(out, line):
        for name in PROMPTS.writes:
            (out / name).write_text("", encoding="utf-8")
        return {}

    def killed(*_):
        raise Killed

    monkeypatch.setattr(Store, "record_stage", killed)
    with pytest.raises(Killed):
        Steps(opened, 5, 4).frame.do(PROMPTS, write)
    monkeypatch.undo()
    cancel_round(opened)
    assert list(opened.store.seconds(5)) == ["prompts"]


@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_a_kill_left_beside_the_stages_goes_with_the_end_of_the_round(opened, left):
    agreement.set_current(opened.store, opened.policies, 4)
    scratch = opened.dir / "rounds" / "0005" / (".closed.json.partial" if left == "file" else ".pairs.partial")
    scratch.parent.mkdir(parents=True)
    scratch.write_text("{") if left == "file" else scratch.mkdir()
    cancel_round(opened)
    assert [path.name for path in scratch.parent.iterdir()] == ["closed.json"]


def test_a_disk_that_is_full_at_a_roll_back_is_told_as_one(opened, monkeypatch):
    agreement.set_current(opened.store, opened.policies, 4)
    opened.store.close_round(5, "rejected", 4, [])
    write = Path.write_text

    def full(path, *args, **kwargs):
        if path.name.startswith(".current"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DiskError, match="is full"):
        roll_back(opened, 2)
    monkeypatch.undo()
    roll_back(opened, 2)
    assert opened.store.serving() == opened.policies.current == 2

"""On a machine without a GPU: nothing works beside the trainer that would have to share its cores with it."""

import dataclasses
import os
from types import SimpleNamespace

import pytest
from steps_world import Opened

from selfplay.storage import folders, hashes
from selfplay.storage.policies import Manifest, Policies
from selfplay.training import service
from selfplay.training.jobs import TrainJob
from selfplay.training.service import Trainer

CORES = {0, 1, 2, 3}
RULES = ("reward.model=null", "reward.rules=[{rule: length, max: 9}]")


class Child:
    """The trainer process: it is busy from an order until its result, which the controller waits for."""

    log: list[str]

    def __init__(self, name, argv, *, env, **settings):
        self.alive, self.threads = False, int(env["OMP_NUM_THREADS"])

    def start(self):
        self.alive = True

    def send(self, order, **fields):
        self.job = TrainJob(**fields["job"])
        self.log.append("trainer begins")
        return 0

    def result(self, number, on_event):
        self.log.append("trainer ends")
        folders.make(self.job.out)
        return {
            "history": [{"step": 1}], "steps": 1, "beta": 0.1, "agreement": None, "canaries": [],
            "update": {"share_changed": 1.0, "relative_norm": 0.1}, "seconds": {},
        }  # fmt: skip


class Line:
    text = ""

    def __init__(self, log):
        self._log = log

    def update(self, *, text=None, **more):
        if text and text.startswith("waits"):
            self._log.append(text)


@pytest.mark.parametrize(
    ("settings", "beside"),
    [
        ((), False),  # the defaults: the trainer has all cores, and so have the engines
        (("train.cpu_threads=2",), False),  # the engine has four threads of its own
        (("train.cpu_threads=2", "generate.engine.cpu_threads=2"), True),
        (("train.cpu_threads=2", "generate.engine.cpu_threads=3"), False),
    ],
)
def test_the_champion_answers_before_the_trainer_works_unless_both_have_their_cores(
    monkeypatch, tmp_path, settings, beside
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: CORES)
    monkeypatch.setattr(service.gpus, "count", lambda: 0)
    monkeypatch.setattr(service, "Child", Child)
    Child.log = log = []
    run = Opened(tmp_path, "train.cpu_threads=null", "generate.engine.cpu_threads=null", *RULES, *settings)
    run.canary_ids, run.policies = [], Policies(tmp_path)
    run.policy = run.policies.get
    folder = run.policies.folder(0)
    folders.make(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    manifest = Manifest(
        version=0, parent=None, round=0, beta=None, reference=None, reference_sha256=None, fingerprint="", packages={},
        update={}, files=hashes.hash_files(folder), canaries={},
    )  # fmt: skip
    folders.write_json(folder / folders.MANIFEST, dataclasses.asdict(manifest))
    run.store.open_round(1, 0, (0, 0), "f", {})
    run.trainer = Trainer(run.config, tmp_path, SimpleNamespace(loaded=True), run.event)
    steps = run.steps()
    steps.answers = SimpleNamespace(of_the_champion=lambda: log.append("champion answers"))
    out = tmp_path / "out"
    out.mkdir()
    steps.train(out, Line(log))
    waits = ["waits for the trainer", "waits for the champion's answers to the held-out prompts"]
    answers = [waits[1], "champion answers", waits[0]]
    expected = ["trainer begins", *answers, "trainer ends"] if beside else [*answers, "trainer begins", "trainer ends"]
    assert log == [waits[0], *expected]
    run.store.close()

"""What surrounds the service fails: its reward comes and goes and is replaced, its ledger is locked, its disk is full.

One service for the whole file, with an ensemble of rewards, shaping and a judge: each test is a round of it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from outside import Relay
from outside import served as reward_server
from safetensors.torch import load_file, save_file

from reward.client import RewardClient
from selfplay.methods import signs as guard
from selfplay.storage import ledger as store
from selfplay.storage import tables
from selfplay.storage.policies import Policies
from selfplay.types import Candidate, Pair, Prompt, Reward

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def scored(folder: Path) -> list[SimpleNamespace]:
    """The candidates of a round, each with its reward and the parts of it."""
    candidates = tables.read_rows(folder / "generate" / "candidates.parquet", Candidate)
    rewards = tables.read_rows(folder / "score" / "scored.parquet", Reward)
    assert [(c.prompt_id, c.index) for c in candidates] == [(r.prompt_id, r.index) for r in rewards]
    return [
        SimpleNamespace(**dataclasses.asdict(c), reward=r.reward, reward_parts=r.reward_parts)
        for c, r in zip(candidates, rewards, strict=True)
    ]


def other(reward: Path, folder: Path, noise: float, sign: float = 1.0) -> Path:
    """The reward model with noise on its weights, or with a head that likes what it disliked."""
    shutil.copytree(reward, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if noise:
            weights[name] = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if name == "score.weight":
            weights[name] = sign * weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def relay(mini_world):
    """Between the service and a reward server that is not its own."""
    with reward_server(mini_world / "reward") as url, Relay(url) as relay:
        yield relay


@pytest.fixture(scope="module")
def disk(request, tmp_path_factory):
    """A small one where that can be."""
    if os.geteuid() == 0:
        return request.getfixturevalue("small_disk")("64m")
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def service(relay, disk, served, mini_world, tmp_path_factory):
    """It has no round to do until one is ordered, and does not give up soon."""
    near = other(mini_world / "reward", tmp_path_factory.mktemp("rewards") / "near", 0.3)
    members = [{"name": "far", "url": [relay.url]}, {"name": "near", "model": str(near)}]
    ensemble = {"members": members, "combine": "mean_minus_std", "std_weight": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "BUSY", 1.0)
        yield served(
            "reward.model=null",
            f"reward.ensemble={json.dumps(ensemble)}",
            "reward.batch=8",
            "reward.shaping={length_control: 1.0, repetition_penalty: 0.5, repetition_ngram: 2}",
            "pairs.max_disagreement=0.5",
            "guard.saturation={warn: 0.0}",
            f"evaluate.judge={{model: {mini_world / 'judge'}, batch: 16}}",
            "retention.last=0",
            "schedule.end.date=2020-01-01T00:00:00Z",
            "service.retries=10000",
            "service.retry_seconds=0.2",
            run_dir=disk / "run",
        )


def promoted(service, folder: Path) -> None:
    service.until(lambda: service.rounds()[-1] == "promoted", "the end of the round")
    assert Policies(service.run_dir).current == int(folder.name)


def test_a_reward_server_that_comes_and_goes_costs_no_score(service, relay):
    relay.flaps = True
    folder = service.next_round()
    promoted(service, folder)
    relay.flaps = False
    assert relay.cuts  # in mid-request or between two
    rows = scored(folder)
    asked = {p.prompt_id: p.messages for p in tables.read_rows(folder / "prompts" / "prompts.parquet", Prompt)}
    with RewardClient(relay.target) as client:
        right = client.score([(asked[row.prompt_id], row.text) for row in rows])
    assert len(rows) == len({(row.prompt_id, row.index) for row in rows}) == 32 * 4
    assert [row.reward_parts["member_far"] for row in rows] == pytest.approx(right, abs=1e-4)


def test_members_disagree_shaping_adds_up_and_the_guard_looks_on(service):
    """What the first round left."""
    folder = service.run_dir / "rounds" / "0001"
    said = " ".join(service.said.getvalue().split())
    assert "gate not independent" not in said
    assert "guard: rewards at the end of their range (share)" in said
    rows = scored(folder)
    for row in rows:
        parts = row.reward_parts
        shaped = parts["external"] + parts["length_control"] + parts["repetition_penalty"]
        assert row.reward == pytest.approx(shaped) and parts["disagreement"] >= 0
        assert {"member_far", "member_near"} <= parts.keys()
    by_key = {(r.prompt_id, r.index): r.reward_parts["disagreement"] for r in rows}
    pairs = tables.read_rows(folder / "pairs" / "pairs.parquet", Pair)
    disputed = [
        max(by_key[p.prompt_id, i] for i in (p.chosen_index, p.rejected_index)) > 0.5
        for p in pairs
        if p.dropped_because != "noise"
    ]
    dropped = [p.dropped_because == "disagreement" for p in pairs if p.dropped_because != "noise"]
    assert dropped == disputed and any(dropped) and not all(dropped)
    metrics = service.store.metrics(1)
    assert {f"guard/{n}" for n in ("ties", "saturation", "length_correlation", "disagreement", "probe_change")} <= set(
        metrics
    )
    usable = list({(r.prompt_id, r.digest): r for r in reversed(rows) if r.finish_reason == "stop"}.values())
    lengths, prompts = [c.n_tokens for c in usable], [c.prompt_id for c in usable]
    external = guard.length_correlation([c.reward_parts["external"] for c in usable], lengths, prompts)
    assert metrics["guard/length_correlation"] == pytest.approx(external)
    assert abs(guard.length_correlation([c.reward for c in usable], lengths, prompts)) < 0.1  # what shaping left of it
    assert metrics["guard/probe_change"] < 1e-3 and metrics["guard/probe_missing"] == 0
    assert "guard" in [e["kind"] for e in service.store.events(1)]
    assert metrics["evaluate/independent"] == 1.0
    assert (service.run_dir / "logs" / "judge.log").is_file()


def test_a_reward_model_that_is_swapped_stops_the_round_before_it_trains(service, relay, mini_world, tmp_path):
    """Another model at the same address is noticed before it scores anything, is not tried again, and nothing is lost."""
    scale = (service.run_dir / "reward" / "reward-scale.json").read_bytes()
    right, serving = relay.target, Policies(service.run_dir).current
    with reward_server(other(mini_world / "reward", tmp_path / "hostile", 0.0, sign=-1.0)) as wrong:
        relay.target = wrong
        folder = service.next_round()
        service.until(lambda: service.state() == "paused", "the pause of its own")
        why, index = service.store.state("pause")["why"], int(folder.name)
        assert (
            f"a round failed 1 time: round {index}: stage score failed: the reward is not the one this run began with"
            in why
        )
        assert "what to do: nothing was trained or promoted on it. Serve the earlier reward model again" in why
        assert not (folder / "score").exists()
        assert Policies(service.run_dir).current == serving
        relay.target = right
    before = service.said.tell()
    assert service.order("resume")[0] == "done"
    promoted(service, folder)
    assert "generate «kept»" in service.said.getvalue()[before:]
    assert (service.run_dir / "reward" / "reward-scale.json").read_bytes() == scale
    assert 0 < service.store.metrics(index)["guard/shift"] < 1


def test_a_sign_above_its_stop_ends_the_round_before_anything_is_made_of_its_rewards(service):
    service.reload("guard.saturation={stop: 0.0}")
    folder = service.next_round()
    service.until(lambda: service.state() == "paused", "the pause of its own")
    why = service.store.state("pause")["why"]
    assert "stage guard failed: the reward looks wrong: rewards at the end of their range (share)" in why
    assert "what to do: nothing was trained on" in why
    assert (folder / "score").is_dir() and not (folder / "pairs").exists() and not (folder / "train").exists()
    events = [e["text"] for e in service.store.events(int(folder.name)) if e["kind"] == "guard"]
    assert any("(guard.saturation.stop)" in text for text in events)
    assert any(text.startswith("stopped before training; all signs: ") for text in events)
    assert service.store.metrics(int(folder.name))["guard/saturation"] > 0
    service.reload()
    assert service.order("resume")[0] == "done"
    promoted(service, folder)


def test_a_ledger_that_another_process_locks_delays_the_round(service):
    folder, before = service.next_round(), service.said.tell()
    service.until((folder / "generate").is_dir, "the end of generate")
    lock = sqlite3.connect(service.run_dir / "ledger.sqlite", isolation_level=None, timeout=30)
    lock.execute("BEGIN IMMEDIATE")
    service.until(lambda: "ledger does not answer" in service.said.getvalue()[before:], "a word about the ledger")
    lock.execute("ROLLBACK")
    lock.close()
    promoted(service, folder)
    stages = service.store.seconds(int(folder.name))
    assert set(stages) == {p.parent.name for p in folder.glob("*/manifest.json")}


def test_on_a_full_disk_the_service_waits_and_goes_on_when_there_is_room(service, disk):
    if not disk.is_mount():
        pytest.skip("only root can mount a small disk")
    filler = disk / "filler"
    folder = service.next_round()
    service.until((folder / "score").is_dir, "the end of score")
    before = service.said.tell()
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))

    def said():
        return service.said.getvalue()[before:]

    # by the stage, or by the ledger where that is the first to write
    service.until(lambda: "the disk" in said() or "disk is full" in said(), "a word about the disk")
    seen = service.said.tell()
    service.until(lambda: service.said.tell() > seen, "another try")
    assert service.rounds()[-1] == "running"
    filler.unlink()
    promoted(service, folder)
    assert not list(service.run_dir.rglob("*.partial"))

"""The service on the miniature: real rounds under orders, and its own decisions when rounds fail.

One service for the whole file, since its start is most of what a round costs here: each test does its next rounds.
"""

import os

import pytest
from mini import TINY, commands, overrides

from selfplay.errors import InputError, SelfplayError
from selfplay.reporting.terminal import Display
from selfplay.service import orders
from selfplay.service.daemon import Daemon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The service's configuration; its schedule ends with the first round, and later ones are ordered."""
    file = tmp_path_factory.mktemp("config") / "mine.yaml"
    file.write_text(TINY.read_text() + "schedule: {end: {rounds: 1}}\n")
    return file


@pytest.fixture(scope="module")
def service(served, file):
    published = f"publish.folder={file.parent / 'published'}"
    return served("service.retries=1", "service.retry_seconds=0.1", published, config=file)


def current(service):
    return (service.run_dir / "current").read_text()


def published(file):
    return os.readlink(file.parent / "published" / "current")


def test_orders_before_between_and_within_rounds(service, file):
    assert service.order("pin", version=0) == ("done", "policy 0 is pinned")
    service.until(lambda: service.state() == "ended", "the end")
    assert service.rounds() == ["promoted"]
    assert current(service) == "1\n" and published(file) == "0001"

    state, result = service.order("rollback", version=0)
    assert state == "done" and "policy 0 is current instead of 1, shown to serve within" in result
    assert current(service) == "0\n" and published(file) == "0000"
    with pytest.raises(InputError, match="there is no policy 7"):
        orders.submit(service.store, "rollback", {"version": 7}, "test")
    assert service.order("cancel") == ("refused", "no round is open")

    rows = [{"prompt": "What is the capital of Utopia?"}, {"prompt": "What is the capital of Utopia?"}, {"nothing": 1}]
    state, result = service.order("add_prompts", rows=rows)
    assert state == "done" and "1 added" in result and "duplicate" in result

    # A round that is asked for starts although the schedule has ended; it stops after its stage, and goes on.
    service.next_round()
    assert service.rounds() == ["promoted", "running"]
    assert service.order("pause", after="stage")[0] == "done"
    service.until(lambda: service.state() == "paused", "the pause")
    done = set(service.store.seconds(2))
    assert "promote" not in done and service.rounds()[-1] == "running"
    service.order("resume")
    service.until(lambda: service.rounds() == ["promoted", "promoted"], "the end of the second round")
    assert done <= set(service.store.seconds(2))
    assert service.store.rounds()[1]["sampler"] == 0  # it was sampled by the policy that was rolled back to

    # A round that is given up leaves the current policy, and its number is not used again.
    service.next_round()
    service.until(lambda: "generate" in service.store.seconds(3), "the third round's candidates")
    assert service.order("cancel")[0] == "done"
    service.until(lambda: service.rounds()[-1] == "cancelled", "the end of the cancelled round")
    assert current(service) == "2\n" and published(file) == "0002"
    said = [(e["kind"], e["text"]) for e in service.store.events()]
    assert any(kind == "order_done" and "rollback version=0 (from test)" in text for kind, text in said)
    service.until(lambda: service.state() == "ended", "the end of its work")


def test_a_round_that_fails_is_tried_again_and_then_the_service_pauses_itself(service):
    service.reload("train.agreement_mean=1e-15")
    before = len(service.store.events())
    folder = service.next_round()
    service.until(lambda: service.state() == "paused", "the pause of its own")
    half = folder / ".train.partial" / "policy"
    half.mkdir(parents=True)  # as SIGKILL leaves it
    why = service.store.state("pause")["why"]
    assert "a round failed 2 times" in why and "what to do" in why
    kinds = [e["kind"] for e in service.store.events()[before:]]
    assert kinds.count("failed") == 2 and "alert" in kinds
    assert service.rounds()[-1] == "running"
    assert service.order("cancel")[0] == service.order("resume")[0] == "done"
    assert not half.parent.exists()  # weights, perhaps
    service.until(lambda: service.state() == "ended", "the end of its work")


def test_a_stop_saves_the_trainer_and_the_next_start_goes_on(service):
    more = ("train.epochs=8", "train.save_steps=1000", "train.learning_rate=1e-5")
    service.reload(*more)
    folder = service.next_round()
    work, index = folder / "train.work", int(folder.name)

    def in_training():
        at = service.daemon.progress
        return (at.get("round"), at.get("stage")) == (index, "train") and (at["done"] or 0) >= 2

    service.until(in_training, "a step")
    service.stop()
    assert service.state() == "stopped"
    saves = [p.name for p in work.glob("checkpoint-*")]
    assert len(saves) == 1 and not (folder / "train").exists()
    assert service.rounds()[-1] == "running"
    service.start(*more)
    service.until(lambda: service.rounds()[-1] == "promoted", "the end of the round")
    log = (service.run_dir / "logs" / "trainer.log").read_text()
    assert f"going on from {work / saves[0]}" in log
    service.reload()


def test_a_configuration_is_refused_or_holds_from_the_next_round_on(service, file):
    """Under the one that holds, rounds in a row are rejected, and that pauses the service."""
    service.until(lambda: service.state() == "ended", "the end of its work")
    text = file.read_text()
    file.write_text(text.replace("run: {name: tiny}", "run: {name: tiny, seed: 9}"))
    state, why = service.order("reload")
    assert state == "refused" and "run.seed cannot change within a run" in why
    file.write_text(text.replace("beta: 0.1", "bta: 0.1"))
    state, why = service.order("reload")
    assert state == "refused" and "did you mean train.beta" in why
    assert service.order("reload") == ("refused", why)

    before, serving, warm = service.rounds(), current(service), servers(service)
    version = int(serving.rpartition("/")[2])
    file.write_text(text.replace("rounds: 1", f"rounds: {len(before) + 9}").replace("beta: 0.1", "beta: 0.2"))
    service.reload("evaluate.gate.win_rate_lower=1", "service.pause_after_rejected=2")
    service.until(lambda: service.state() == "paused", "the pause of its own")
    assert "2 rounds in a row were rejected" in service.store.state("pause")["why"]
    assert service.rounds() == [*before, "rejected", "rejected"]
    assert service.store.metrics(len(before) + 1)["train/beta_start"] == 0.2
    assert servers(service) == warm  # which have no part in what changed
    # each candidate was swapped back: the policy before serves on, and sampled the second round too
    assert current(service) == serving
    assert len(warm) == 2
    assert [r["sampler"] for r in service.store.rounds()[-2:]] == [version, version]
    states = [p["state"] for p in service.store.policies()]
    assert states[0] == "initial" and states[-2:] == ["rejected", "rejected"]
    assert service.daemon.run.generator.policy.version == version


def servers(service):
    """The processes of engine and reward server."""
    found = {pid: words[2] for pid, words in commands(service.run_dir) if words[1:2] == ["-m"]}
    return {pid: name for pid, name in found.items() if name in ("selfplay.generation.engine", "reward.server")}


def test_a_configuration_that_is_wrong_does_not_start(mini_world, tmp_path):
    with pytest.raises(SelfplayError, match="time_zone"):
        Daemon(TINY, [*overrides(mini_world), "schedule.time_zone=Utopia"], tmp_path / "run", Display())

"""What the service does where something fails outside its rounds, its ledger most of all: rounds only pretend here."""

import sqlite3

import pytest
from daemon_world import NOON, Bare, World, until, waiting, webhook
from sqlalchemy.exc import OperationalError

from selfplay.errors import CheckpointError, ConfigError, InputError, LockLost
from selfplay.rounds.run import Run
from selfplay.service import daemon, orders
from selfplay.storage import ledger as store
from selfplay.storage.lock import RunLock


class Lock:
    """Locks the ledger against writers, as a backup that hangs does."""

    def __init__(self, path):
        self._path, self._held = path, None

    def take(self):
        if self._held is None:
            self._held = sqlite3.connect(self._path, isolation_level=None)
            self._held.execute("BEGIN IMMEDIATE")

    def give(self):
        if self._held is not None:
            self._held.close()
        self._held = None


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BUSY", 0.01)
    lock = Lock(tmp_path / "run" / "ledger.sqlite")
    yield lock
    lock.give()


def test_a_ledger_that_fails_is_alerted_and_retried_no_more_than_a_stage(world, lock, monkeypatch):
    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        service = world("service.retries=1", "service.retry_seconds=60")
        service.open()

        def work():
            lock.take()
            service.store.event("x", "y")

        service.work = work
        service.turn()
        for _ in range(3):
            assert service.turn() == "retrying"
        assert service.ran == [1]
        service.now = NOON.replace(minute=2)
        service.turn()
        assert [service.turn() for _ in range(3)] == ["paused"] * 3
        until(lambda: got)
        assert "paused: a round failed 2 times: the ledger does not answer" in got[0][1]["text"]
        assert service.ran == [1, 1]
        lock.give()
        assert service.turn() == "paused"
        assert len(service.events("alert")) == 1
        assert service.store.state("service")["state"] == "paused"
        assert service.store.state("pause")["kind"] == "failed"
        service.work = lambda: None
        service.order("resume")
        assert service.turn() == "running" and service.ran == [1, 1, 1]


def test_a_folder_in_use_is_left_alone(world):
    service = world()
    service.made()
    orders.submit(service.store, "pause", {}, "test")
    with RunLock(service.run_dir), pytest.raises(InputError, match="in use by process"):
        service.daemon.serve()
    assert len(waiting(service.store)) == 1
    assert service.store.state("service") is None and service.store.state("pause") is None
    service.turn()  # opens the run
    assert service.turn() == "paused" and waiting(service.store) == []


def test_a_service_whose_folder_is_moved_ends_and_tries_nothing_again(world):
    service = world()
    assert service.turn() == "running" and service.ran == [1]
    service.run_dir.rename(service.run_dir.with_name("moved"))
    with pytest.raises(LockLost, match="was moved, deleted or replaced"):
        service.turn()
    assert service.ran == [1] and not service.run_dir.exists()


def test_a_state_that_could_not_be_written_is_written_later(world, lock):
    service = world("schedule={mode: cron, cron: 0 3 * * *}")
    lock.take()
    service.daemon._say("waiting", "for the next round")
    assert service.daemon.progress["state"] == "waiting" and service.daemon.progress["since"] == NOON.isoformat()
    lock.give()
    service.daemon._say("waiting", "for the next round")
    assert service.store.state("service")["why"] == "for the next round"


def test_what_fails_between_rounds_is_tried_again_and_then_pauses(world, monkeypatch):
    service = world("service.retries=2", "service.retry_seconds=0", "schedule.end.reward=1")

    def damaged(self):
        raise CheckpointError("policies/0001/manifest.json cannot be read")

    monkeypatch.setattr(store.Store, "serving", damaged)
    service.turn()
    service.turn()
    assert len(service.events("warning")) == 2 and service.store.state("pause") is None
    service.turn()
    assert service.turn() == "paused"
    (alert,) = service.events("alert")
    assert "paused: the service failed 3 times: policies/0001/manifest.json cannot be read" in alert


def test_failures_that_passed_are_forgotten(world, lock):
    service = world("service.retries=1", "service.retry_seconds=0", "schedule={mode: cron, cron: 0 3 * * *}")
    for _ in range(3):
        lock.take()
        service.daemon.reload()
        service.turn()
        assert service.daemon._failures.count == 1
        lock.give()
        assert service.turn() == "waiting"
    assert service.store.state("pause") is None


class Unopened(Run):
    """A run whose folder cannot be opened, as where an import fails."""

    why: Exception = OSError("the network is down")

    def __enter__(self):
        raise self.why


@pytest.fixture
def unopened(tmp_path, monkeypatch):
    def make(why, *more):
        monkeypatch.setattr(Unopened, "why", why)
        service = World(tmp_path / "run", monkeypatch, "service.retries=1", "service.retry_seconds=0", *more)
        monkeypatch.setattr(daemon, "Run", Unopened)
        return service

    return make


@pytest.mark.parametrize("mode", ["{mode: continuous}", "{mode: cron, cron: 0 3 * * *}"])
def test_an_import_that_keeps_failing_pauses_the_service_which_still_takes_orders(unopened, monkeypatch, mode):
    service = unopened(RuntimeError("the importer died"), f"schedule={mode}")
    service.turn()
    service.turn()
    assert [service.turn() for _ in range(2)] == ["paused"] * 2
    assert service.store.state("pause")["why"].startswith("the service failed 2 times: RuntimeError: the importer died")
    number = service.store.submit("cancel", {}, "test")
    service.turn()
    assert service.store.order(number)["state"] == "pending"  # what needs the run waits for it
    monkeypatch.setattr(daemon, "Run", Bare)
    assert service.order("resume")[0] == "done"
    service.turn()
    assert service.events("started")


def test_a_folder_that_can_never_be_used_ends_the_service(unopened):
    service = unopened(InputError("made by another config"))
    with pytest.raises(InputError):
        service.daemon.serve()


def test_a_ledger_that_cannot_be_opened_is_waited_for(tmp_path, monkeypatch):
    service = World(tmp_path / "run", monkeypatch, "service.retries=1", "service.retry_seconds=0")

    class Full(store.Store):
        def __init__(self, run_dir, lock=None):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(daemon, "Store", Full)
    service.turn()
    service.turn()
    assert [service.turn() for _ in range(2)] == ["paused"] * 2
    monkeypatch.setattr(daemon, "Store", store.Store)
    assert service.turn() == "paused"
    assert f"the disk of {tmp_path / 'run'} is full" in service.store.state("pause")["why"]


def test_a_signal_to_reload_outlives_a_locked_ledger(world, lock):
    service = world()
    lock.take()
    service.daemon.reload()
    with pytest.raises(OperationalError):
        service.daemon._write_down()
    lock.give()
    service.daemon._write_down()
    (order,) = waiting(service.store)
    assert (order["kind"], order["origin"]) == ("reload", "signal")


@pytest.mark.parametrize("order", ["cancel", "run"])
def test_an_order_does_not_wait_for_the_next_try(world, order):
    service = world("service.retry_seconds=600", "service.retries=5")

    def fail():
        raise ConnectionError("the network is down")

    service.work = fail
    service.turn()
    assert service.turn() == "retrying"
    service.work = lambda: None
    assert service.order(order)[0] == "done"
    assert service.turn() == "running"
    assert service.store.rounds()[-1]["state"] == "promoted"


def test_hosts_are_read_at_the_start_only(world, tmp_path):
    service = world()
    service.daemon._overrides = ["service.hosts=[box.example]"]
    state, why = service.order("reload")
    assert state == "refused" and "service.hosts cannot change while the service runs" in why


def test_waiting_orders_are_not_read_while_a_round_runs(world):
    service = world()
    number = service.store.submit("add_prompts", {"rows": [{"prompt": "x"}]}, "test")
    seen = []
    read = service.daemon.store.order
    service.daemon.store.order = lambda number: seen.append(number) or read(number)
    service.open()
    service.work = lambda: service.daemon._breathe("stage")
    service.daemon._in_round = True
    service.daemon._breathe("stage")
    assert seen == [] and service.store.order(number)["state"] == "pending"


def test_a_cron_line_that_never_comes_does_not_start(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="never comes"):
        World(tmp_path / "run", monkeypatch, "schedule={mode: cron, cron: 0 0 30 2 *}")


def test_a_ledger_that_is_damaged_while_the_service_runs_pauses_it(world, tmp_path, monkeypatch):
    service = world("service.retries=1", "service.retry_seconds=0")
    ledger = tmp_path / "run" / "ledger.sqlite"

    def close():
        for each in (service.store, service.daemon.store, service.daemon.run.store):
            each.close()

    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        close()
        whole = ledger.read_bytes()
        ledger.write_bytes(whole[:100] + bytes(len(whole) - 100))
        service.daemon._breathe("stage")
        service.turn()
        service.turn()
        assert [service.turn() for _ in range(2)] == ["paused"] * 2
        until(lambda: got)
        assert "the ledger does not answer: database disk image is malformed" in got[0][1]["text"]
    close()
    ledger.write_bytes(whole)
    assert service.turn() == "paused"
    assert service.store.state("pause")["kind"] == "failed" and len(service.events("alert")) == 1


def test_a_stop_writes_down_what_a_locked_ledger_did_not_take(world, lock):
    service = world()
    lock.take()
    service.daemon.pause("failed", "the disk was full")
    lock.give()
    service.daemon.stop()
    service.daemon.serve()
    assert service.store.state("pause")["why"] == "the disk was full"
    assert [alert["text"] for alert in service.store.state("alerts")] == ["paused: the disk was full"]
    assert service.store.state("service")["state"] == "stopped"


def test_a_pause_that_cannot_be_kept_is_one_alert(world):
    service = world()
    with service.store._engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER no BEFORE INSERT ON state WHEN new.name = 'pause' BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    service.daemon.pause("failed", "the network is down")
    assert [service.turn() for _ in range(3)] == ["paused"] * 3
    with service.store._engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER no")
    assert service.turn() == "paused" and service.events("alert") == ["paused: the network is down"]


def test_a_folder_that_cannot_be_made_ends_the_service(world, tmp_path):
    service = world()
    service.made()
    (tmp_path / "file").touch()
    service.daemon.run_dir = tmp_path / "file" / "run"
    with pytest.raises(InputError, match="cannot be a run folder"):
        service.daemon._turn()


def test_a_reason_that_no_text_file_can_hold_is_told_all_the_same(world):
    service = world("service.retries=1", "service.retry_seconds=0")

    def fail():
        raise RuntimeError("cannot read caf\udce9.txt")

    service.work = fail
    service.turn()
    service.turn()
    assert service.turn() == "paused"
    assert "RuntimeError: cannot read caf\\udce9.txt" in service.events("alert")[0]
    assert "caf\\udce9.txt" in (service.run_dir / "logs" / "service.log").read_text()

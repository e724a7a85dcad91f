import sqlite3

import pytest

from selfplay.errors import InputError
from selfplay.store import RunLock, Store


def test_a_round_from_its_opening_to_its_close(tmp_path):
    store = Store(tmp_path)
    store.open_run("x", {"run.seed": 0})
    assert store.unfinished() is None
    store.open_round(1, sampler=0, cursor=(0, 5), fingerprint="f", config={"a": 1})
    assert store.unfinished()["cursor"] == [0, 5]
    store.record_stage(1, "generate", 2.5, {"tokens": 10})
    store.record_stage(1, "generate", 9.9, {"tokens": 99})  # a stage that is there is not recorded anew
    assert (store.metrics(1), store.seconds(1)) == ({"generate/tokens": 10.0}, {"generate": 2.5})
    store.close_round(1, "rejected", 0, ["too long"])
    assert [(r["state"], r["policy"], r["reasons"]) for r in store.rounds()] == [("rejected", 0, ["too long"])]
    store.record_policy(1, "candidate", round=1, parent=0)
    store.record_policy(1, "rejected")
    store.weights_deleted([1])
    assert [(p["version"], p["state"], p["weights"]) for p in store.policies()] == [(1, "rejected", False)]
    store.event("failed", "text", 1)
    assert [(e["kind"], e["round"]) for e in store.events(1)] == [("failed", 1)]
    store.close()
    again = Store(tmp_path)
    assert again.metrics(1) == {"generate/tokens": 10.0}
    again.close()


def test_a_folder_of_another_run_is_refused(tmp_path):
    store = Store(tmp_path)
    store.open_run("x", {"run.seed": 0, "policy.model": "m"})
    store.open_run("x", {"run.seed": 0, "policy.model": "m"})
    with pytest.raises(InputError, match=r"made by another config: run.seed \(0 there, 1 here\)"):
        store.open_run("x", {"run.seed": 1, "policy.model": "m"})
    store.close()


def test_a_ledger_of_a_newer_version_is_refused(tmp_path):
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    with pytest.raises(InputError, match="newer version"):
        Store(tmp_path)


def test_one_runner_a_folder(tmp_path):
    with RunLock(tmp_path), pytest.raises(InputError, match="in use by process"):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_a_first_start_that_failed_fixes_nothing(tmp_path):
    store = Store(tmp_path)
    store.open_run("x", {"prompts.source": "typo.jsonl"}, fresh=True)
    store.open_run("x", {"prompts.source": "right.jsonl"}, fresh=True)
    with pytest.raises(InputError, match="made by another config"):
        store.open_run("x", {"prompts.source": "typo.jsonl"})
    store.close()

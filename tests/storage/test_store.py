import dataclasses
import math
import sqlite3
import weakref

import pytest
import sqlalchemy as sa

from selfplay.errors import InputError
from selfplay.storage import ledger, schema
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.schema import MIGRATIONS
from selfplay.types import Pair


def test_a_round_from_its_opening_to_its_close(tmp_path):
    store = Store(tmp_path)
    store.open_run("x", {"run.seed": 0})
    assert store.unfinished() is None
    store.open_round(1, champion=0, cursor=(0, 5), fingerprint="f", config={"a": 1})
    assert store.unfinished()["cursor"] == [0, 5]
    store.record_stage(1, "generate", 2.5, {"tokens": 10})
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


def test_the_end_of_a_round_and_its_event_are_there_together_or_not_at_all(tmp_path):
    store = Store(tmp_path)
    store.open_round(1, champion=0, cursor=(0, 0), fingerprint="f", config={})

    def fail(connection, cursor, statement, *_):
        if statement.startswith("INSERT INTO events"):
            raise RuntimeError("killed")

    sa.event.listen(store._engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError):
        store.close_round(1, "rejected", 0, ["too long"], "too long")
    assert store.unfinished() is not None
    sa.event.remove(store._engine, "before_cursor_execute", fail)
    store.close_round(1, "rejected", 0, ["too long"], "too long")
    assert [(e["kind"], e["text"], e["round"]) for e in store.events()] == [("rejected", "too long", 1)]
    store.close()


def test_a_stage_that_was_done_again_replaces_what_was_recorded_of_it(tmp_path):
    store = Store(tmp_path)
    store.record_stage(1, "score", 1.0, {"reward_mean": 0.5, "missing": 3})
    store.record_stage(1, "pairs", 0.1, {"kept": 7})
    (before, _) = store.query("SELECT * FROM stages ORDER BY stage DESC")
    store.record_stage(1, "score", 1.0, {"reward_mean": 0.5, "missing": 3})  # at every start that finds its folder
    assert store.query("SELECT * FROM stages ORDER BY stage DESC")[0] == before
    store.record_stage(1, "score", 1.25, {"reward_mean": 0.75})
    assert store.metrics(1) == {"score/reward_mean": 0.75, "pairs/kept": 7.0}
    assert store.seconds(1) == {"score": 1.25, "pairs": 0.1}
    store.close()


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


def test_a_ledger_that_is_damaged_is_refused(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"this is no database, however long it may be" * 100)
    with pytest.raises(InputError, match="is damaged: file is not a database"):
        Store(tmp_path)


def test_an_order_is_an_event_when_it_is_given_and_when_it_is_obeyed(tmp_path):
    store = Store(tmp_path)
    number = store.submit("rollback", {"version": 3}, "api")
    store.submit("add_prompts", {"rows": [{"prompt": "x"}]}, "page")
    assert [row["kind"] for row in store.pending()] == ["rollback", "add_prompts"]
    assert [row["id"] for row in store.pending(["rollback", "pin"])] == [number]
    store.answer(number, "done", "policy 3 is current")
    assert [(e["kind"], e["text"]) for e in store.events()] == [
        ("order_given", "rollback version=3 (from api)"),
        ("order_given", "add_prompts (from page)"),
        ("order_done", "rollback version=3 (from api): policy 3 is current"),
    ]
    assert [row["kind"] for row in store.pending()] == ["add_prompts"]
    store.close()


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


def test_a_ledger_from_before_pairs_had_orders_is_migrated(tmp_path):
    store = Store(tmp_path)
    store.record_pairs(1, [pair(0, potential=None), pair(1)])
    before = store.query("SELECT * FROM pairs")
    store.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as old:
        old.executescript(
            "ALTER TABLE pairs RENAME TO new; DROP INDEX ix_pairs_prompt_id; DROP INDEX pairs_by_potential;"
            "CREATE TABLE pairs (round INTEGER NOT NULL, row INTEGER NOT NULL, prompt_id VARCHAR NOT NULL, explicit_margin FLOAT NOT NULL,"
            " implicit_margin FLOAT NOT NULL, potential FLOAT, kept_because VARCHAR, dropped_because VARCHAR, PRIMARY KEY (round, row));"
            "INSERT INTO pairs SELECT * FROM new; DROP TABLE new; CREATE INDEX ix_pairs_prompt_id ON pairs (prompt_id);"
            "UPDATE schema_version SET version = 2;"
        )
    old.close()
    for _ in range(2):
        store = Store(tmp_path)
        assert store.query("SELECT * FROM pairs") == before
        names = {row["name"] for row in store.query("SELECT name FROM sqlite_master WHERE tbl_name = 'pairs'")}
        assert {
            "ix_pairs_prompt_id",
            "pairs_by_explicit_margin",
            "pairs_by_implicit_margin",
            "pairs_by_potential",
        } <= names
        assert store.query("SELECT version FROM schema_version") == [{"version": len(MIGRATIONS)}]
        store.close()


def test_rounds_from_before_others_could_sample_were_sampled_by_their_champion(tmp_path):
    store = Store(tmp_path)
    store.open_round(1, champion=3, cursor=(0, 0), fingerprint="f", config={})
    store.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as old:
        old.executescript("ALTER TABLE rounds DROP COLUMN champion; UPDATE schema_version SET version = 5;")
    old.close()
    store = Store(tmp_path)
    assert (store.round(1)["sampler"], store.round(1)["champion"]) == (3, 3)
    store.set_sampler(1, 2)
    assert (store.round(1)["sampler"], store.round(1)["champion"]) == (2, 3)
    store.close()


def test_a_new_ledger_is_what_all_migrations_come_to(tmp_path):
    everything = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    with sa.create_engine("sqlite://").connect() as new, sa.create_engine("sqlite://").connect() as old:
        schema.migrate(new, "a new ledger")
        for migration in MIGRATIONS:
            migration(old)
        made = new.exec_driver_sql(everything).all()
        assert made == old.exec_driver_sql(everything).all() and len(made) > 30


def test_a_migration_that_is_killed_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    Store(tmp_path).close()

    def killed(connection):
        connection.exec_driver_sql("DROP TABLE pairs")
        raise KeyboardInterrupt

    monkeypatch.setattr(schema, "MIGRATIONS", [*MIGRATIONS, killed])
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path)
    monkeypatch.undo()
    store = Store(tmp_path)
    assert store.query("SELECT count(*) AS n FROM pairs") == [{"n": 0}]
    store.close()


def test_a_pair_whose_margin_is_not_a_number_is_indexed(tmp_path):
    store = Store(tmp_path)
    store.record_pairs(1, [pair(0, implicit_margin=math.nan, potential=None), pair(1, explicit_margin=math.inf)])
    found = store.query("SELECT implicit_margin, explicit_margin FROM pairs ORDER BY row")
    assert [tuple(row.values()) for row in found] == [(None, 1.0), (0.25, math.inf)]
    store.close()


def pair(number: int, **changes: object) -> Pair:
    made = Pair(
        prompt_id=f"p{number}", prompt_ids=[1], chosen_index=0, rejected_index=1, chosen="a", rejected="b", chosen_ids=[1], rejected_ids=[2],
        chosen_reward=1.0, rejected_reward=0.0, chosen_logp=-1.0, rejected_logp=-2.0, explicit_margin=1.0, implicit_margin=0.25,
        implicit_signed=0.25, potential=0.5, kept_because="base",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_ledger_from_before_there_were_totals_is_counted_once(tmp_path):
    """Opened by the version after, it has the sums and the charts of its rows, and its triggers go on from there."""
    store = Store(tmp_path)
    history(store, 1, 40)
    expected = sums(store)
    store.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as old:
        for kind, name in old.execute(
            "SELECT type, name FROM sqlite_master WHERE type = 'trigger' OR name IN ('totals', 'trends', 'row_hashes',"
            " 'rounds_by_state', 'metrics_by_name', 'events_by_kind', 'events_by_round')"
        ).fetchall():
            old.execute(f"DROP {kind} {name}")
        old.execute("UPDATE schema_version SET version = 3")
    old.close()
    store = Store(tmp_path)
    assert sums(store) == expected
    history(store, 41, 45)
    again = sums(store)
    with store._engine.begin() as connection:
        for statement in schema._COUNTED:
            connection.exec_driver_sql(statement)
    assert sums(store) == again
    assert store.count_rounds() == {"promoted": 36, "cancelled": 9}
    assert store.totals("tokens") == {"generate/tokens": sum(range(1, 46))}
    store.close()


def test_what_is_recorded_anew_is_counted_once(tmp_path):
    store = Store(tmp_path)
    history(store, 1, 20)
    store.record_stage(7, "generate", 9.0, {"tokens": 1000.0, "share": 0.5})
    store.record_stage(7, "generate", 8.0, {"tokens": 3.0})
    assert store.totals("stages")["generate"] == 20 * 2.0 - 2.0 + 8.0
    assert store.totals("tokens")["generate/tokens"] == sum(range(1, 21)) - 7 + 3
    before = sums(store)
    with store._engine.begin() as connection:
        for statement in schema._COUNTED:
            connection.exec_driver_sql(statement)
    assert sums(store) == before
    assert not store.query("SELECT * FROM trends WHERE name = 'generate/share' AND low_round = 7 AND high_round = 7")
    store.close()


def history(store: Store, first: int, last: int) -> None:
    for index in range(first, last + 1):
        store.open_round(index, 0, (0, 0), "f", {})
        share = math.sin(index)
        store.record_stage(index, "generate", 2.0, {"tokens": float(index), "share": share})
        store.event("note", "text", index)
        store.close_round(index, "cancelled" if index % 5 == 0 else "promoted", 0, [])


def sums(store: Store) -> tuple[object, ...]:
    return (
        {of: store.totals(of) for of in ("events", "stages", "tokens")},
        store.count_rounds(),
        store.query("SELECT * FROM trends ORDER BY width, bucket, name"),
    )


def test_readers_of_some_rounds(tmp_path):
    store = Store(tmp_path)
    assert (store.last_rounds(3), store.count_rounds(), store.cancelled(1, 9)) == ([], {}, set())
    history(store, 1, 11)
    assert [row["round"] for row in store.last_rounds(3)] == [9, 10, 11]
    assert [row["round"] for row in store.rounds_between(4, 6)] == [4, 5, 6]
    assert store.last_rounds(1)[0] == store.round(11) == store.rounds()[-1]
    assert store.cancelled(5, 9) == {5} and store.cancelled(1, 11) == {5, 10}
    assert (store.metric(3, "generate/tokens"), store.metric(3, "generate/none")) == (3.0, None)
    assert store.policy(0) is None
    store.record_policy(2, "promoted", round=2)
    assert store.policy(2) == store.policies()[0]
    store.close()


@dataclasses.dataclass
class Row:
    prompt_id: str
    explicit_margin: float = 1.0
    implicit_margin: float = 0.25
    potential: float | None = 0.5
    kept_because: str | None = "base"
    dropped_because: str | None = None


def test_pairs_are_indexed_while_they_are_read(tmp_path, monkeypatch):
    """A round's pairs come from a generator and only some are in memory; the transaction is one: all of them or none."""
    monkeypatch.setattr(ledger, "PAIRS_AT_A_TIME", 3)
    store, alive = Store(tmp_path), []

    def rows(count, fails=False):
        for number in range(count):
            made = Row(f"p{number}")
            alive.append(weakref.ref(made))
            assert sum(ref() is not None for ref in alive) <= 4
            yield made
            del made
        if fails:
            raise OSError("the artifact cannot be read")

    store.record_pairs(1, rows(8))
    store.record_pairs(2, rows(2))
    store.record_pairs(1, rows(10))  # in place of what was there
    before = store.query("SELECT round, row, prompt_id FROM pairs ORDER BY round, row")
    assert [tuple(row.values()) for row in before] == [
        *((1, i, f"p{i}") for i in range(10)), *((2, i, f"p{i}") for i in range(2))
    ]  # fmt: skip
    with pytest.raises(OSError, match="cannot be read"):
        store.record_pairs(1, rows(7, fails=True))
    assert store.query("SELECT round, row, prompt_id FROM pairs ORDER BY round, row") == before
    store.close()

"""What reads the ledger does as much work for a long run as for a short one, counted in instructions of SQLite."""

import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from scale import ledger

from selfplay.storage.ledger import Store

SHORT, LONG = 310, 1240
STEP = 100  # instructions of SQLite between two counts


class Work:
    """Counts the instructions that SQLite runs for all connections that are opened from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        create = sa.create_engine

        def counting(*args, **kwargs):
            engine = create(*args, **kwargs)
            sa.event.listen(engine, "connect", lambda connection, _: connection.set_progress_handler(self._count, STEP))
            return engine

        monkeypatch.setattr(sa, "create_engine", counting)

    def _count(self) -> int:
        self.steps += 1
        return 0

    def of(self, read) -> int:
        read()
        before = self.steps
        read()
        return (self.steps - before) * STEP


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for rounds in (SHORT, LONG):
        made[rounds] = tmp_path_factory.mktemp("run")
        ledger.make(made[rounds], rounds, 2)
    return made


@pytest.mark.slow
def test_the_work_of_each_reader_does_not_grow_with_the_rounds(folders, monkeypatch):
    work, found = Work(monkeypatch), {}
    for rounds, run_dir in folders.items():
        turn, close = ledger.waiting_service(run_dir)
        store = Store(run_dir)
        readers = {
            "waiting": turn,
            "rounds": lambda store=store: ledger.silent().run_table(store),
            **ledger.page_readers(run_dir),
        }
        found[rounds] = {name: work.of(read) for name, read in readers.items()}
        store.close()
        close()
    assert found[SHORT].keys() == {"waiting", "rounds", "charts", "metrics", "summary", "policies"}
    for name, steps in found[LONG].items():
        # A chart of a run that is just too long to be drawn whole has up to twice as many points as a longer one.
        assert steps <= 1.3 * found[SHORT][name] + 5 * STEP, (name, found)


@pytest.mark.slow
def test_the_script_measures_them_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "REPEAT", 1)
    ledger.make(tmp_path, 30, 2)
    found = ledger.measure(tmp_path)
    assert set(found) == {"waiting_tick", "rounds_table", "charts", "metrics", "summary", "policies", "record_stage"}
    assert all(value > 0 for value in found.values())

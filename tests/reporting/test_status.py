from selfplay.reporting.status import lines
from selfplay.storage.ledger import Store


def test_times_are_those_that_a_person_reads(tmp_path):
    store = Store(tmp_path)
    since, due = "2030-12-31T23:00:00.123+00:00", "2031-01-01T00:00:00+00:00"
    store.set_state("service", {"state": "waiting", "why": due, "since": since, "pid": 7})
    store.event("note", "x")
    said = list(lines(store, alive=True))
    assert said[:2] == [
        "service  waiting: until 2031-01-01 00:00:00 UTC",
        "process  7, in this state since 2030-12-31 23:00:00 UTC",
    ]
    assert "T" not in said[-1].removesuffix("UTC note: x") and said[-1].endswith(" UTC note: x")
    store.set_state("service", {"state": "waiting", "why": "for the next round", "since": since, "pid": 7})
    assert next(lines(store, alive=True)) == "service  waiting: for the next round"
    store.close()

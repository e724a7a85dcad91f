"""The cache of scores: keys, bound, several processes."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from selfplay.config import load
from selfplay.errors import DiskError, InputError, RewardError
from selfplay.reporting.terminal import Display
from selfplay.rewards import cache as score_cache
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.texts import Item
from selfplay.rounds.run import Run
from selfplay.storage import seals
from selfplay.storage.ledger import Store

ASK = [{"role": "user", "content": "Name a colour."}]


def key(identity: str, messages: list[dict[str, str]], response: str, reference: str | None = None) -> bytes:
    return score_cache.keys(identity, [Item(messages, response, reference)])[0]


def keys(n: int) -> list[bytes]:
    return score_cache.keys("model", [Item(ASK, f"answer {i}") for i in range(n)])


def test_a_score_of_minus_zero_is_kept_and_is_no_damage(tmp_path):
    """SQLite stores −0.0 as 0.0. Rewards that subtract a penalty of nothing give it."""
    cache, (first, second) = ScoreCache(tmp_path / "scores.sqlite", 10), keys(2)
    cache.put({first: -0.0, second: 0.5})
    assert cache.get([first, second]) == {first: 0.0, second: 0.5} and seals.repairs() == []
    cache.close()


def test_a_key_names_all_that_a_score_depends_on():
    different = {
        key("model", ASK, "red"),
        key("other model", ASK, "red"),
        key("model", [*ASK, {"role": "assistant", "content": ""}], "red"),
        key("model", [{"role": "system", "content": "Name a colour."}], "red"),
        key("model", ASK, "red "),
        key("model", ASK, "red\ud800"),  # no valid Unicode, yet a text
        key("model", ASK, "red", "blue"),
        key("model", ASK, "red", "green"),
        key("model", ASK, "red", ""),
        key("model", ASK, 'red","blue'),
    }
    assert len(different) == 10
    assert key("model", ASK, "red") in different


def test_a_key_is_that_of_its_item_alone_and_the_same_in_every_version():
    """The hash of [identity, [[role, content], …], response] as JSON, with a reference behind it where there is one: scores
    that an earlier version kept are found."""
    other = [{"role": "user", "content": "Näme a colour.\ud800"}]
    items = [Item(ASK, "red"), Item(list(ASK), "blue"), Item(other, "ré\ud800d"), Item(ASK, "red", "é")]

    def by_hand(messages, response, reference):
        read = ["model", [[m["role"], m["content"]] for m in messages], response, *([reference] if reference else [])]
        return hashlib.sha256(json.dumps(read, separators=(",", ":")).encode()).digest()

    assert score_cache.keys("model", items) == [by_hand(*item) for item in items]


def test_what_was_put_is_there_again_for_the_next_process(tmp_path):
    cache = ScoreCache(tmp_path / "deep" / "scores.sqlite", 2000)
    put = dict(zip(keys(1200), map(float, range(1200)), strict=True))
    cache.put(put)
    cache.close()
    again = ScoreCache(tmp_path / "deep" / "scores.sqlite", 2000)
    assert again.get(keys(1300)) == put
    again.close()


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", 3)
    a, b, c, d, e = keys(5)
    for k in (a, b, c):
        cache.put({k: 1.0})
    cache.get([a])
    cache.put({d: 1.0})
    assert set(cache.get([a, b, c, d])) == {a, c, d}
    cache.put({d: 2.0, e: 1.0})
    assert cache.count() == 3
    assert cache.get([d]) == {d: 2.0}


def test_what_was_used_a_short_while_ago_is_not_written_again(tmp_path):
    """An eighth of 80 entries may come in before it counts as used anew; from then on it is a new one."""
    cache = ScoreCache(tmp_path / "scores.sqlite", 80)
    first, *others = keys(91)
    cache.put({first: 1.0})
    cache.put(dict.fromkeys(others[:10], 1.0))
    written = cache._connection.total_changes
    assert cache.get([first]) == {first: 1.0} and cache._connection.total_changes == written
    cache.put({others[10]: 1.0})
    cache.get([first])
    for other in others[11:]:
        cache.put({other: 1.0})
    assert cache.count() == 80
    assert set(cache.get([first, *others[:12]])) == {first, others[11]}


def test_all_are_counted_now_and_then_only(tmp_path, monkeypatch):
    """A thousandth of the bound, five scores here, may be put in between."""
    cache = ScoreCache(tmp_path / "scores.sqlite", 5000)
    counted = []
    monkeypatch.setattr(cache, "count", lambda: counted.append(ScoreCache.count(cache)) or counted[-1])
    for i, k in enumerate(keys(20)):
        cache.put({k: float(i)})
        cache.get([k])
    assert counted == [1, 7, 13, 19]
    cache.put(dict.fromkeys(keys(5200), 1.0))
    assert ScoreCache.count(cache) == 5000


def test_a_damaged_score_counts_as_absent_and_is_told(tmp_path):
    path = tmp_path / "scores.sqlite"
    cache = ScoreCache(path, 100)
    seals.repairs()  # of other tests in this process
    a, b, c = keys(3)
    cache.put({a: 1.0, b: 2.0, c: 3.0})
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE scores SET score = 1.0000000000000002 WHERE key = ?", (a,))
        other.execute("UPDATE scores SET hash = (SELECT hash FROM scores WHERE key = ?) WHERE key = ?", (c, b))
        other.commit()
    assert cache.get([a, b, c]) == {c: 3.0} and cache.count() == 1
    (said,) = seals.repairs()
    assert said == f"2 scores in {path} were damaged, and are asked for again"
    cache.close()


def test_a_cache_of_an_earlier_version_keeps_its_scores(tmp_path):
    path, (a, b) = tmp_path / "scores.sqlite", keys(2)
    seals.repairs()
    with contextlib.closing(sqlite3.connect(path)) as older:
        older.execute(
            "CREATE TABLE scores (key BLOB PRIMARY KEY, score REAL NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID"
        )
        older.execute("INSERT INTO scores VALUES (?, 0.5, 1)", (a,))
        older.commit()
    cache = ScoreCache(path, 100)
    cache.put({b: 2.0})
    assert cache.get([a, b]) == {a: 0.5, b: 2.0} and seals.repairs() == []
    cache.close()


def test_a_missing_score_is_not_kept(tmp_path):
    with pytest.raises(AssertionError, match="never kept"):
        ScoreCache(tmp_path / "scores.sqlite", 3).put({keys(1)[0]: float("nan")})


def _fill(path: Path, start: int) -> None:
    cache = ScoreCache(path, 150)
    for i in range(start, start + 100):
        k = key("model", ASK, str(i))
        cache.put({k: float(i)})
        assert cache.get([k]) in ({k: float(i)}, {})  # the other process may have crowded it out


@pytest.mark.slow
def test_two_processes_write_at_a_time(tmp_path):
    path = tmp_path / "scores.sqlite"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_fill, args=(path, start)) for start in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    cache = ScoreCache(path, 150)
    assert cache.count() == 150
    found = cache.get([key("model", ASK, str(i)) for i in range(200)])
    assert len(found) == 150
    assert all(found.get(key("model", ASK, str(i)), i) == i for i in range(200))


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "scores.sqlite").write_bytes(b"something else" * 1000)
    with pytest.raises(RewardError, match=r"scores\.sqlite cannot be used") as error:
        ScoreCache(tmp_path / "scores.sqlite", 3)
    assert "delete" in error.value.hint


def test_a_run_does_without_a_file_that_is_no_cache(tmp_path):
    config = load(Path(__file__).parents[2] / "configs" / "tiny.yaml")
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "scores.sqlite").write_bytes(b"something else" * 1000)
    shown = io.StringIO()
    run = Run(config, tmp_path, Display(Console(file=shown, width=500)))
    run.store = Store(tmp_path)
    run._open_scorers(config)
    assert run._cache is None and "delete that file: it only saves time" in shown.getvalue()


def test_a_full_disk_is_named_and_costs_nothing_that_was_kept(small_disk):
    disk = small_disk("1m")
    cache = ScoreCache(disk / "scores.sqlite", 10**6)
    first = dict.fromkeys(keys(10), 1.0)
    cache.put(first)
    with pytest.raises(DiskError, match="disk"):
        for start in range(0, 10**6, 2000):
            cache.put({key("model", ASK, f"other {i}"): 1.0 for i in range(start, start + 2000)})
    assert cache.get(list(first)) == first
    cache.close()
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(DiskError, match="disk"):
        ScoreCache(disk / "new" / "scores.sqlite", 3)


def test_what_cannot_be_trusted_goes(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", 10)
    a, b, c = keys(3)
    cache.put({a: 1.0, b: 2.0})
    cache.remove([a, c])
    assert cache.get([a, b, c]) == {b: 2.0}


def test_a_place_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be in") as error:
        ScoreCache(tmp_path / "file" / "scores.sqlite", 10)
    assert "reward.cache.path" in error.value.hint
    (tmp_path / "folder").mkdir()
    with pytest.raises(RewardError, match="unable to open") as other:
        ScoreCache(tmp_path / "folder", 10)
    assert "reward.cache.path" in other.value.hint

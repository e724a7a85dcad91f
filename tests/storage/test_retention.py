"""What retention deletes, and what it never does, on the made-up run of the page's tests."""

import dataclasses
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from served_world import build

from selfplay.config import RetentionConfig
from selfplay.errors import CheckpointError
from selfplay.storage import folders, paging, policies, retention
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest, Policies

ROUNDS, PAIRS = 8, 6
CANDIDATES = ("generate/candidates.parquet", "score/scored.parquet")
ALWAYS = (
    "prompts/prompts.parquet", "generate/manifest.json", "score/manifest.json", "score/reward.json", "pairs/pairs.parquet",
    "depth/pairs.parquet", "evaluate/verdict.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of eight rounds, each with its candidates, scores, pairs and verdict."""
    run_dir = tmp_path_factory.mktemp("made")
    build(run_dir, rounds=ROUNDS, pairs=PAIRS).close()
    for index in range(1, ROUNDS + 1):
        for name in (*CANDIDATES, *ALWAYS):
            path = folder(run_dir, index) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                path.write_text("{}")
    return run_dir


@pytest.fixture
def run(made, tmp_path):
    """A copy of it, which a test may change."""
    store = Store(shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True))
    yield store
    store.close()


def folder(run_dir: Path, index: int) -> Path:
    return run_dir / "rounds" / f"{index:04d}"


def with_candidates(run_dir: Path) -> list[int]:
    """Rounds that have both files; that none has only one of them, and that nothing else went."""
    has = {i: {name for name in CANDIDATES if (folder(run_dir, i) / name).exists()} for i in range(1, ROUNDS + 1)}
    assert set(map(len, has.values())) <= {0, len(CANDIDATES)}
    assert all((folder(run_dir, i) / name).is_file() for i in has for name in ALWAYS)
    return [index for index, files in has.items() if files]


def with_rows(store: Store) -> list[int]:
    return [row["round"] for row in store.query("SELECT DISTINCT round FROM pairs ORDER BY round")]


def apply(store: Store, closed: int = ROUNDS, needed_rounds: int = 1, **settings: object) -> None:
    retention.apply(
        run_dir=store.path.parent, settings=RetentionConfig.model_validate(settings), store=store, closed=closed,
        needed_policies={ROUNDS}, needed_rounds=needed_rounds,
    )  # fmt: skip


def test_by_default_nothing_of_a_round_is_deleted(run, tmp_path):
    before = run.query("SELECT count(*) AS n FROM events"), with_rows(run)
    apply(run)
    assert with_candidates(tmp_path) == list(range(1, ROUNDS + 1))
    assert (run.query("SELECT count(*) AS n FROM events"), with_rows(run)) == before
    assert [retention.lost(run, index) for index in (1, ROUNDS)] == [[], []]


def test_candidates_go_after_some_rounds_and_readers_are_told(run, tmp_path):
    apply(run, candidates_rounds=3)
    assert with_candidates(tmp_path) == [6, 7, 8]
    assert with_rows(run) == list(range(1, ROUNDS + 1))
    (said,) = retention.lost(run, 5)
    assert "deleted the candidates" in said and "retention.candidates_rounds" in said
    assert retention.lost(run, 6) == []


@pytest.mark.parametrize("needed", [1, 5, 20])
def test_what_guard_and_pairs_compare_with_stays(run, tmp_path, needed):
    """The next round reads the scores of the last `guard.history` rounds and the pairs of the last `pairs.history`."""
    apply(run, candidates_rounds=1, pair_rows_rounds=1, needed_rounds=needed)
    apply(run, candidates_rounds=1, pair_rows_rounds=1, needed_rounds=needed)  # the rows go a few rounds at a time
    kept = [index for index in range(1, ROUNDS + 1) if index > ROUNDS - needed]
    assert with_candidates(tmp_path) == with_rows(run) == kept


def test_a_setting_that_is_raised_or_a_kill_changes_nothing_of_what_is_gone(run, tmp_path):
    apply(run, closed=6, candidates_rounds=2)
    run.set_state(retention.STATE, {})  # killed between the files and the word
    apply(run, closed=6, candidates_rounds=2)
    apply(run, candidates_rounds=7)
    assert with_candidates(tmp_path) == [5, 6, 7, 8]
    assert retention.lost(run, 4) and not retention.lost(run, 5)


def test_what_a_kill_leaves_of_the_candidates_of_a_round_is_no_candidates_to_anybody(run, tmp_path, monkeypatch):
    """Killed between the two files of round 2; the settings then keep all candidates."""
    unlink, victim = Path.unlink, folder(tmp_path, 2) / "score" / "scored.parquet"

    def killed(path, **more):
        if path == victim:
            raise KeyboardInterrupt
        unlink(path, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        apply(run, closed=6, candidates_rounds=2)
    assert victim.is_file() and not (folder(tmp_path, 2) / "generate" / "candidates.parquet").exists()
    assert all(retention.lost(run, index) for index in (1, 2, 3, 4)) and not retention.lost(run, 5)
    apply(run)
    assert with_candidates(tmp_path) == [5, 6, 7, 8]
    assert retention.deleted(run) == {retention.CANDIDATES: 4}


def test_rounds_that_are_done_are_not_looked_at_again(run, tmp_path):
    apply(run, closed=6, candidates_rounds=2)
    stray = folder(tmp_path, 2) / "generate" / "mine.parquet"
    stray.write_text("put there by a person")
    apply(run, candidates_rounds=2)
    assert stray.is_file() and with_candidates(tmp_path) == [7, 8]


def test_rows_of_pairs_go_a_few_rounds_at_a_time_and_the_pairs_stay(run, tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "ROUNDS_AT_A_TIME", 2)
    apply(run, pair_rows_rounds=3)
    assert with_rows(run) == [3, 4, 5, 6, 7, 8]
    assert "up to 2 from the lists" in retention.lost(run, 1)[0] and retention.lost(run, 3) == []
    for _ in range(5):
        apply(run, pair_rows_rounds=3)
    assert with_rows(run) == [6, 7, 8] and with_candidates(tmp_path) == list(range(1, ROUNDS + 1))
    assert retention.lost_pair_rows(run, None) and not retention.lost_pair_rows(run, 6)


@pytest.mark.slow
def test_of_the_events_the_newest_stay_and_their_sums_do_not_change(tmp_path):
    store = Store(tmp_path)
    first = store.submit("pause", {}, "cli")
    store.answer(first, "done", "pauses")
    waits = store.submit("resume", {}, "cli")
    for number in range(1500):
        store.event("note", str(number))
    last = store.submit("pause", {}, "cli")
    store.answer(last, "refused", "no")
    sums = store.totals("events")
    retention.apply(
        run_dir=tmp_path, settings=RetentionConfig(event_rows=1000), store=store, closed=1, needed_policies=set(), needed_rounds=1
    )  # fmt: skip
    left = [event["id"] for event in store.events()]
    assert (len(left), left[-1]) == (1000, paging.last_event(store)) and left == list(range(left[0], left[-1] + 1))
    assert store.totals("events") == sums and sums["note"] == 1500
    assert [row["id"] for row in paging.orders(store)] == [last, waits]  # one that waits is never deleted
    store.event("note", "the next")
    assert paging.last_event(store) == left[-1] + 1  # numbers are not used again: streams go on by them
    store.close()


@pytest.mark.slow
def test_the_file_of_the_ledger_gives_back_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "ROUNDS_AT_A_TIME", 100)
    store = Store(tmp_path)
    for index in range(1, 61):
        store.record_pairs(index, (Row(f"{index}-{number}", number / 7) for number in range(300)))
    full = pages(tmp_path)
    rule = RetentionConfig(pair_rows_rounds=5)
    monkeypatch.setattr(retention, "PAGES_AT_A_TIME", 50)

    def close() -> int:
        before = pages(tmp_path)
        retention.apply(
            run_dir=tmp_path, settings=rule, store=store, closed=60, needed_policies=set(), needed_rounds=1
        )  # fmt: skip
        return before - pages(tmp_path)

    given = [close() for _ in range(full // 50 + 2)]
    assert given[0] >= 50 and max(given) <= 52  # in small steps; a page that maps others may go with them
    assert given[-1] == 0 and pages(tmp_path) < full / 4
    assert with_rows(store) == [56, 57, 58, 59, 60]
    store.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    ledger.close()


@dataclasses.dataclass
class Row:
    prompt_id: str
    explicit_margin: float
    implicit_margin: float = 0.5
    potential: float | None = 0.5
    kept_because: str | None = "base"
    dropped_because: str | None = None


def pages(run_dir: Path) -> int:
    connection = sqlite3.connect(run_dir / "ledger.sqlite")
    (count,) = connection.execute("PRAGMA page_count").fetchone()
    connection.close()
    return int(count)


# policies


@pytest.fixture
def weights(tmp_path):
    """A run folder with the initial policy and policies 1 to 5, of which 2 and 4 were rejected."""
    store, found = Store(tmp_path), Policies(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a": np.zeros(1)}, source / "model.safetensors")
    found.import_initial(source, {}, "f", {})
    store.record_policy(0, "initial", round=0)
    for version in range(1, 6):
        exported = tmp_path / "exported"
        (exported / "masters").mkdir(parents=True)
        for name in ("model.safetensors", "masters/model.safetensors"):
            (exported / name).write_text(f"{version}")
        manifest = Manifest(
            version=version, parent=version - 1, round=version, beta=0.1, reference=0, reference_sha256="x", fingerprint="f",
            packages={}, update={}, files={}, canaries={},
        )  # fmt: skip
        folders.write_json(exported / folders.MANIFEST, dataclasses.asdict(manifest))
        found.adopt(version, exported)
        store.record_policy(version, "rejected" if version in (2, 4) else "promoted", round=version)
    yield store, found
    store.close()


def left(found: Policies) -> list[int]:
    """Versions from 1 on that have weights; every manifest stays."""
    assert found.versions() == [0, 1, 2, 3, 4, 5] and policies.read(found.folder(3)).beta == 0.1
    return [v for v in range(1, 6) if (found.folder(v) / "model.safetensors").is_file()]


@pytest.mark.parametrize(
    ("settings", "needed", "closed", "expected"),
    [
        ({"last": 1, "pinned": [1]}, {5, 4}, 5, [1, 4, 5]),
        ({"last": 20}, {5}, 5, [1, 3, 4, 5]),  # more than there are; the second was rejected too long ago
        ({"last": 0, "every": 3}, {5}, 9, [3, 5]),
        ({"last": 0}, {5}, 5, [4, 5]),  # a rejected one keeps its weights for some rounds
        ({"last": 0}, {5}, 6, [5]),
        ({"last": 0, "rejected_rounds": 9}, {5}, 6, [2, 4, 5]),
    ],
)
def test_policies_that_nothing_needs_lose_their_weights(weights, settings, needed, closed, expected):
    store, found = weights
    rule = RetentionConfig.model_validate({"rejected_rounds": 2, **settings})
    for _ in range(2):  # asked again after a kill it says the same
        retention.delete_weights(found, rule, store, closed, needed)
        assert left(found) == expected
        assert [row["version"] for row in store.policies_with_weights()] == [0, *expected]
    for version in {1, 2, 3, 4, 5} - set(expected):
        assert not (found.folder(version) / "masters").exists()
    assert Path(found.get(0).path, "model.safetensors").is_file()


def test_a_policy_that_a_person_pinned_stays_and_one_without_weights_cannot_be_had(weights):
    store, found = weights
    store.pin(1, True)
    retention.delete_weights(found, RetentionConfig(last=0), store, 9, {5})
    assert left(found) == [1, 5]
    store.pin(1, False)
    retention.delete_weights(found, RetentionConfig(last=0), store, 9, {5})
    assert left(found) == [5]


def test_weights_that_went_before_a_kill_are_recorded_after_it(weights):
    store, found = weights
    (found.folder(1) / "model.safetensors").unlink()
    retention.delete_weights(found, RetentionConfig(last=0, rejected_rounds=0), store, 9, {5})
    assert [row["version"] for row in store.policies_with_weights()] == [0, 5]


def test_weights_that_a_kill_left_half_deleted_go_even_where_other_settings_would_keep_them_now(weights, monkeypatch):
    store, found = weights
    folder = found.folder(1)
    manifest = dataclasses.replace(
        policies.read(folder), files={"model.safetensors": "x", "masters/model.safetensors": "x"}
    )
    folders.write_json(folder / folders.MANIFEST, dataclasses.asdict(manifest))

    def killed(versions):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "weights_deleted", killed)
    with pytest.raises(KeyboardInterrupt):
        retention.delete_weights(found, RetentionConfig(last=2), store, 5, {5})
    monkeypatch.undo()
    retention.delete_weights(found, RetentionConfig(last=20), store, 5, {5})
    assert [row["version"] for row in store.policies_with_weights()] == [0, 3, 4, 5] and left(found) == [3, 4, 5]


def test_a_policy_whose_weights_went_is_named(weights):
    store, found = weights
    folder = found.folder(5)
    manifest = policies.read(folder)
    folders.write_json(
        folder / folders.MANIFEST, dataclasses.asdict(dataclasses.replace(manifest, files={"model.safetensors": "x"}))
    )
    retention.delete_weights(found, RetentionConfig(last=0), store, 9, set())
    with pytest.raises(CheckpointError, match="weights of policy 5 are gone"):
        found.get(5)

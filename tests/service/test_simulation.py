"""Seeded histories of the simulated service (scripts/simulation), and those that showed a bug once."""

import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfplay.rounds.ahead import Ahead
from selfplay.storage import folders, hashes, seals
from selfplay.storage.ledger import Store
from selfplay.storage.reader import now

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from simulate import parsed
from simulation import paths, texts
from simulation.history import Simulation

MEMORY = Path("/dev/shm")
SHOWN = {
    "a kill while the file system of a new folder was tried left a folder behind": (0, "3=kill"),
    "a kill after the end of a round was recorded lost its event": (4, "119=kill"),
    "a round that was given up after its promotion left its policy current": (4, "117=kill 120=order-cancel"),
    "a round that was given up had a finished stage that the ledger did not know": (4, "100=locked 103=order-cancel"),
    "a kill while weights were deleted, and then other settings, left half of a policy": (
        8,
        "57=kill 58=order-reload 60=order-reload",
    ),
    "a full disk, or a kill, left half of the record of a round's end, and the round could not be closed": (
        424,
        "87=full",
    ),
    "the same by a kill": (424, "87=kill"),
    "a full disk and then a kill left a folder that did not open any more": (4, "95=full 136=kill"),
    "a kill while `current` was written, and then a round that was given up, left half of it": (
        3214,
        "10=order-cancel",
    ),
}
"""What was wrong, and the seed and plan that showed it. The moments are those of the product of that time."""


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    with (
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path_factory.mktemp("simulated")) as folder,
        Simulation(Path(folder) / "simulation") as simulated,
    ):
        yield simulated


@pytest.mark.slow
def test_every_history_keeps_what_must_hold(simulation):
    # They begin with four folders, two of runs that sample ahead; to make each takes a tenth of a second.
    seeds = sorted((*range(0, 800, 16), *range(5, 800, 16)))
    broken = [found for seed in seeds if (found := simulation.run(seed)).error is not None]
    assert not broken, [f"--seed {found.seed}: {found.error}" for found in broken]


def test_a_history_is_the_same_each_time_it_is_run(simulation):
    told = [[], []]
    found = [simulation.run(8, tell=each.append) for each in told]
    assert found[0] == found[1] and told[0] == told[1]


def test_candidates_that_were_sampled_ahead_for_another_champion_are_noticed(simulation, monkeypatch):
    monkeypatch.setattr(Ahead, "_unfit", lambda *_: None)
    found = simulation.run(229, parsed("17=locked 23=order-rollback"))
    assert found.error == "policy 2 sampled round 4 for policy 0"


def test_what_other_threads_do_is_no_part_of_a_history(simulation, tmp_path):
    alone, over = simulation.run(8), threading.Event()

    def others() -> None:
        while not over.wait(0.01):
            store = Store(tmp_path)
            store.event("warning", f"it is {now()}")
            store.close()
            folders.make(tmp_path / "folder")
            folders.delete(tmp_path / "folder")

    seals.note_repair("something that another run has made again")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(others)
        try:
            assert [simulation.run(8) for _ in range(2)] == [alone] * 2
        finally:
            over.set()
        ended.result()


@pytest.mark.parametrize(
    "value",
    [
        {"b": {"z": 1, "a": [1, 2.5, 1e-7, None, True, 'é\n"']}, "a": {}, "c": [[], [[{}]]]},
        {"tuple": (1, 2)},
        {10: "ten", 2: "two"},
        "text",
    ],
)
def test_json_is_written_and_read_as_by_the_library(value):
    for how in texts.KNOWN:
        said = texts.DUMPS(value, **dict(how))
        assert texts.dumps(value, **dict(how)) == said
        assert texts.loads(said.encode()) == texts.loads(f" {said} \n") == texts.LOADS(said)


@pytest.mark.parametrize("wrong", [float("nan"), {"a": [float("inf")]}, {"a": {1, 2}}, {1: 1, "a": 1}])
def test_what_the_library_does_not_write_is_not_written(wrong):
    with pytest.raises((ValueError, TypeError)) as expected:
        texts.DUMPS(wrong, sort_keys=True, allow_nan=False)
    for how in (how for how in texts.KNOWN if how):
        with pytest.raises(expected.type):
            texts.dumps(wrong, **dict(how))


@pytest.mark.parametrize("wrong", ["", "{", '{"a": 1} x', "[1,]"])
def test_what_is_no_json_is_read_by_nobody(wrong):
    for text in (wrong, wrong.encode()):
        with pytest.raises(ValueError):
            texts.loads(text)


@pytest.mark.parametrize("path", ["/a/b", "a", "/", "a/b", ""])
@pytest.mark.parametrize("name", ["c", "c/d", "/x", "", "./y", "z/", "..", "e//f", "."])
def test_paths_are_joined_as_by_the_library(path, name):
    found, expected = paths.joined(Path(path), name), Path(path) / name
    assert found == expected and str(found) == str(expected) and found.parts == expected.parts


def test_files_are_written_read_and_deleted_as_by_the_library(tmp_path):
    for text in ("", "plain\n", "é\r\n", "x" * paths.MUCH, "x" * (paths.MUCH + 1)):
        file = tmp_path / "folder" / "file"
        file.parent.mkdir()
        assert paths.write_text(file, text, encoding="utf-8") == len(text)
        assert file.read_bytes() == paths.read_bytes(file) == text.encode()
        assert paths.read_text(file, encoding="utf-8") == file.read_text(encoding="utf-8")
        assert paths.digest(file) == hashes.digest(file)
        (tmp_path / "folder" / "link").symlink_to(tmp_path)
        paths.remove(tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        paths.remove(tmp_path / "folder")
    with pytest.raises(IsADirectoryError):
        paths.read_bytes(tmp_path)


@pytest.mark.parametrize("what", SHOWN)
def test_what_a_history_once_showed(simulation, what):
    seed, plan = SHOWN[what]
    assert simulation.run(seed, parsed(plan)).error is None

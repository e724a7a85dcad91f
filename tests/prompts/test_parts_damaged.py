"""What a killed import left in `pool.parts`: whatever is damaged there is found, told and made again."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from steps_world import LINE, Opened
from storage_world import flip
from test_importer import render, settings

from selfplay.prompts import importer
from selfplay.prompts.files import part
from selfplay.storage import seals

ROWS = [{"prompt": f"question {i}", "meta": {"answer": i}} for i in range(120)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": row["prompt"]} for row in ROWS])
    with ipc.new_file(path, table.schema) as file:
        file.write_table(table)


SOURCES = {
    "a.jsonl": lambda path: path.write_bytes(LINES),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.csv": lambda path: path.write_text("prompt\n" + "".join(f"{row['prompt']}\n" for row in ROWS)),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": arrow,
}
COPIES = {
    "a.jsonl.gz": ".lines",
    "a.json": ".copied",
    "a.csv": ".copied",
    "a.parquet": ".parquet",
    "a.arrow": ".parquet",
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(part, "PART_BYTES", 1000)
    monkeypatch.setattr(part, "PART_ROWS", 40)
    seals.repairs()  # of other tests in this process


def imported(source: Path, folder: Path, workers: int = 1) -> dict[str, bytes]:
    """The files of the pool that an import makes; its parts are left as by one that was killed before the pool had its name."""
    out = folder / "pool"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    importer.import_pool(settings(source), render, out, folder / "pool.parts", workers=workers)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def left(folder: Path) -> list[Path]:
    """The first file of each kind that lies there, and the hashes of these."""
    first = {
        path.suffix: path for path in sorted(folder.glob("pool.parts/*/*"), reverse=True) if path.suffix != seals.BESIDE
    }
    return [one for path in first.values() for one in (path, seals.beside(path))]


def damages(path: Path):
    """(what is done, doing it)"""
    size = path.stat().st_size
    for place in sorted({0, size // 3, size // 2, size - size // 5 - 1, size - 1}):
        yield f"byte {place}", lambda place=place: flip(path, place, place % 8)
    for length in (0, size // 2, size - 1):
        yield f"cut to {length}", lambda length=length: path.write_bytes(path.read_bytes()[:length])
    if path.suffix == seals.BESIDE:
        yield "lost", path.unlink


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_whatever_is_damaged_of_what_a_killed_import_left_is_made_again(tmp_path, name):
    SOURCES[name](source := tmp_path / name)
    expected = imported(source, tmp_path)
    assert imported(source, tmp_path) == expected and seals.repairs() == []
    assert not [file for file in expected if file.endswith(seals.BESIDE)]
    files = left(tmp_path)
    assert {path.suffix for path in files} == {".arrow", ".facts", COPIES.get(name, ".arrow"), seals.BESIDE}
    for path in files:
        for what, damage in damages(path):
            damage()
            assert imported(source, tmp_path) == expected, (path.name, what)
            (said,) = seals.repairs()
            assert said == f"{path.with_name(path.name.removesuffix(seals.BESIDE))} was damaged and is made again", what
            assert all(seals.is_sealed(file, earlier=False) for file in files[::2])


def test_without_any_hash_nothing_there_is_trusted(tmp_path):
    SOURCES["a.parquet"](source := tmp_path / "a.parquet")
    expected = imported(source, tmp_path)
    there = [path for path in tmp_path.glob("pool.parts/*/*") if path.suffix != seals.BESIDE]
    for path in there:
        seals.beside(path).unlink()
    flip(next(path for path in there if path.suffix == ".arrow"), 700)
    assert imported(source, tmp_path) == expected
    told = {said.partition(" was damaged")[0] for said in seals.repairs()}
    assert {str(path) for path in there if path.suffix in (".parquet", ".facts")} <= told


@pytest.mark.slow
def test_what_several_processes_make_again_is_told_once(tmp_path):
    SOURCES["a.jsonl"](source := tmp_path / "a.jsonl")
    expected = imported(source, tmp_path)
    damaged = sorted(tmp_path.glob("pool.parts/*/*.arrow"))[:3]
    for path in damaged:
        flip(path, 700)
    seals.note_repair("something before")
    assert imported(source, tmp_path, workers=3) == expected
    assert seals.repairs() == ["something before", *(f"{path} was damaged and is made again" for path in damaged)]


def test_the_run_records_what_the_importer_has_made_again(tmp_path, monkeypatch):
    said = [["import", "prompts: 8 of them"], ["repaired", "000001.arrow was damaged and is made again"]]
    found = {"said": said, "set_aside": {}, "dated": False, "prompts": {}}
    monkeypatch.setattr("selfplay.rounds.run.ask_importer", lambda *given, **fields: found)
    run = Opened(tmp_path / "run")
    run._import(tmp_path, LINE)
    assert [[event["kind"], event["text"]] for event in run.store.events()] == said


@pytest.mark.parametrize("killed", ["before its hash", "before its name"])
def test_a_kill_while_a_part_is_written_means_that_it_is_made_again_and_no_more(tmp_path, killed, monkeypatch):
    SOURCES["a.jsonl"](source := tmp_path / "a.jsonl")
    expected = imported(source, tmp_path / "calm")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        written = []

        def interrupted(*_):
            written.append(1)
            if len(written) == 4:
                raise KeyboardInterrupt
            return original(*_)

        owner, name = (seals, "beside") if killed == "before its hash" else (seals.folders, "finish")
        original = getattr(owner, name)
        patch.setattr(owner, name, interrupted)
        imported(source, tmp_path)
    assert imported(source, tmp_path) == expected and seals.repairs() == []


@pytest.mark.slow
def test_a_copy_of_the_hub_that_is_made_again_takes_its_parts_with_it(tmp_path, monkeypatch):
    """The dataset may be another by then, and parts of two datasets make no pool."""
    import datasets  # here: it takes a second, and every worker imports every file

    rows = datasets.Dataset.from_list([{"question": f"why {i}?"} for i in range(100)])
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: rows)
    imported("some/where", tmp_path)
    (copy,) = tmp_path.glob("pool.parts/*/source-0.parquet")
    assert seals.is_sealed(copy, earlier=False)
    flip(copy, 60)
    rows = datasets.Dataset.from_list([{"question": f"how {i}?"} for i in range(100)])
    assert imported("some/where", tmp_path) == imported("some/where", tmp_path / "calm")
    assert seals.repairs() == [f"{copy} was damaged and is made again"]

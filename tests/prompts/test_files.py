"""Files as users have them: compressed, with marks and other line ends, arrays, tables, shards; and files that hold no rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_importer import built, settings

from selfplay.errors import InputError
from selfplay.prompts import importer
from selfplay.prompts.files import part
from selfplay.prompts.files.part import all_parts, read_file
from selfplay.prompts.files.sources import files_of
from selfplay.prompts.formats import Reading

ROWS = [{"prompt": f"question {i}: «é», 1,5?\nand more", "score": 0.5} for i in range(60)]
ASKED = [row["prompt"] for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
WIDE = LINES.decode().encode("utf-16")


def table(delimiter=",", mark=b"", end="\r\n"):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerow(["score", "prompt"])
    writer.writerows([row["score"], row["prompt"]] for row in ROWS)
    return mark + out.getvalue().encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "lines.jsonl": LINES,
    "lines.json": LINES,
    "lines.ndjson": LINES.rstrip(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "blank-lines.jsonl": LINES.replace(b"\n", b"\n\n  \n"),
    "commas.jsonl": LINES.replace(b"}\n", b"},\n"),
    "wide.jsonl": WIDE,
    "packed.jsonl.gz": gzip.compress(LINES, mtime=0),
    "two-members.jsonl.gz": gzip.compress(LINES[:1000], mtime=0) + gzip.compress(LINES[1000:], mtime=0),
    "packed.jsonl.zst": zstd(LINES),
    "packed.json.bz2": bz2.compress(LINES),
    "packed.jsonl.xz": lzma.compress(LINES),
    "packed-without-saying.jsonl": gzip.compress(LINES, mtime=0),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array-on-a-line.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS, ensure_ascii=False, indent=4).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode(), mtime=0),
    "marked-array.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS, "n": 60}).encode(),
    "rows.json": json.dumps({"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(ROWS)]}, indent=2).encode(),
    "examples.json": json.dumps({"examples": ASKED}, indent=2).encode(),
    "split.json": json.dumps({"train": ROWS, "test": [{"prompt": "other"}]}).encode(),
    "columns.json": json.dumps({"prompt": ASKED, "score": [0.5] * 60}).encode(),
    "pandas.json": json.dumps({"prompt": dict(enumerate(ASKED)), "score": dict.fromkeys(range(60), 0.5)}).encode(),
    "objects.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "strings.jsonl": "".join(json.dumps(text) + "\n" for text in ASKED).encode(),
    "strings.json": json.dumps(ASKED, indent=0).encode(),
    "lists.jsonl": "".join(json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]) + "\n" for text in ASKED).encode(),
    "lists.json": json.dumps([[{"role": "user", "content": text}] for text in ASKED]).encode(),
    "table.csv": table(),
    "unix.csv": table(end="\n"),
    "marked.csv": table(mark=b"\xef\xbb\xbf"),
    "semicolons.csv": table(";"),
    "table.tsv": table("\t"),
    "bars.csv": table("|"),
    "excel.csv": b"sep=;\r\n" + table(";"),
    "table.csv.gz": gzip.compress(table(), mtime=0),
}  # fmt: skip


TWO = ("lines.jsonl", "array.json", "packed.jsonl.gz")  # imported by two processes


def read(source, **reading):
    found = [row for one in all_parts(str(source), Reading(**reading)) for row in one.read()]
    return [row if isinstance(row, str) else row.messages[-1]["content"] for row in found]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in TWO else name for name in CONTENTS]
)
def test_a_file_of_sixty_prompts_is_read_whole(tmp_path, monkeypatch, name):
    """By the check, which makes no copies, and by the import in small parts, which does."""
    (tmp_path / name).write_bytes(CONTENTS[name])
    left = {"of another split (prompts.split)": 1} if name == "split.json" else {}
    assert read(tmp_path / name) == [*ASKED, *left]
    monkeypatch.setattr(part, "PART_BYTES", 700)
    said = []
    pool, aside = built(settings(tmp_path / name), tmp_path, workers=1 + (name in TWO), on_recognised=said.append)
    assert sorted(p.messages[-1]["content"] for p in pool) == sorted(ASKED) and aside == left
    assert len(said) == 1 and "60 prompts" in said[0]


def columns():
    return pa.table({"created": [1] * 60, "prompt": ASKED, "wide": [[0.5] * 8] * 60})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "groups", "ipc", "stream"])
def test_parquet_and_arrow(tmp_path, monkeypatch, kind):
    path = tmp_path / ("a.parquet" if kind in ("parquet", "groups") else "a.arrow")
    if kind in ("parquet", "groups"):
        pq.write_table(columns(), path, row_group_size=None if kind == "parquet" else 7)
    else:
        with (ipc.new_file if kind == "ipc" else ipc.new_stream)(path, columns().schema) as out:
            out.write_table(columns(), max_chunksize=9)
    assert read(path) == ASKED
    assert [set(row) for row in read_file(path)] == [{"prompt"}] * 60
    monkeypatch.setattr(part, "PART_ROWS", 5)
    pool, aside = built(settings(path), tmp_path, workers=2)
    assert len(pool) == 60 and not aside


def test_a_data_set_as_the_library_keeps_it(tmp_path):
    import datasets  # here: it takes a second, and every worker imports every file

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data, test=data.select([0, 1])).save_to_disk(str(tmp_path / "kept"))
    assert read(tmp_path / "kept") == ASKED
    assert files_of(str(tmp_path / "kept")).left == 1


def test_columns_that_nothing_needs_cost_nothing_and_break_nothing(tmp_path):
    """Times that Python does not have, and bytes; in `meta` they become texts."""
    times = pa.array([-(10**15), 0], pa.int64()).cast(pa.timestamp("s"))
    nano = pa.array([1, 10**18 + 1], pa.timestamp("ns"))
    meta = pa.StructArray.from_arrays([times, nano], ["when", "exactly"])
    whole = pa.table({"prompt": ["one", "two"], "created": times, "raw": [b"\xff", b""], "meta": meta})
    pq.write_table(whole, tmp_path / "a.parquet")
    first, second = (row for one in all_parts(str(tmp_path / "a.parquet")) for row in one.read())
    assert [first.messages[0]["content"], second.messages[0]["content"]] == ["one", "two"]
    json.dumps([first.meta, second.meta])
    assert second.meta["when"].startswith("1970-01-01")


def test_a_table_of_unknown_columns_is_refused_by_their_names(tmp_path):
    whole = pa.table({"nr": [1, 2], "vector": [[0.1], [0.2]], "body_text": ["a long question", "b"], "id": ["1", "2"]})
    pq.write_table(whole, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="its rows have the keys body_text, id") as error:
        importer.survey(settings(tmp_path / "a.parquet"))
    assert "{prompt: body_text}" in error.value.hint
    with pytest.raises(InputError, match=r"2 × no column 'ask'\); its rows have the keys body_text, id"):
        built(settings(tmp_path / "a.parquet", "prompts.columns={prompt: ask}"), tmp_path)
    assert read(tmp_path / "a.parquet", prompt="body_text", meta=("nr",)) == ["a long question", "b"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("first", [["long"], ["short", "long"], ["short", "short", "long"]])
def test_rows_of_any_length_are_lines_of_which_a_broken_one_is_set_aside(tmp_path, first, pack):
    asked = [word * (1 if word == "short" else 40_000) for word in first]
    lines = [json.dumps({"prompt": text}) for text in asked] + [
        '{"prompt": oops}',
        '{"n": ' + "[" * 300_000 + "}",
        '{"prompt": "last"}',
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pack("\n".join(lines).encode()))
    found = [row if isinstance(row, str) else row["prompt"] for row in read_file(path)]
    assert found == [*asked, "invalid JSON", "invalid JSON", "last"]


def test_an_object_of_splits_gives_the_one_that_is_asked_for(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 1, "train": [{"prompt": "a"}, {"prompt": "b"}], "test": [{"prompt": "c"}]}))
    other = "of another split (prompts.split)"
    for split, asked, left in (("train", ["a", "b"], 1), ("test", ["c"], 2)):
        found = [row for one in all_parts(str(path), split=split) for row in one.read()]
        assert [row if isinstance(row, str) else row.messages[0]["content"] for row in found] == asked + [other] * left


def test_texts_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\n two é \r\nthree".encode())
    assert read(tmp_path / "a.txt") == ["one", "two é", "three"]
    (tmp_path / "lines").write_bytes(LINES)
    assert read(tmp_path / "lines") == ASKED


def test_a_table_keeps_its_numbers_as_texts_and_counts_broken_rows(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'question,answer,extra\n12e5,007,x\nb,"1,5"\nc,2,y,z\n"d"e,3,x\n\xe9,4,x\n,,\nf,5,x\n'
    )
    rows = [row for one in all_parts(str(tmp_path / "a.csv")) for row in one.read()]
    assert [(r.messages[0]["content"], r.reference) for r in rows if not isinstance(r, str)] == [
        ("12e5", "007"), ("b", "1,5"), ("f", "5"),
    ]  # fmt: skip
    assert [r.partition(" (")[0] for r in rows if isinstance(r, str)] == [
        "more cells than the header names", "a broken CSV row", "invalid UTF-8",
    ]  # fmt: skip


@pytest.mark.slow
def test_folders_globs_and_cards(tmp_path):
    for name in ("data/train-00000.jsonl", "data/train-00001.jsonl.gz", "data/test-00000.jsonl", "extra/a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        content = json.dumps({"prompt": name}).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("gz") else content)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("# no front matter")
    train = ["data/train-00000.jsonl", "data/train-00001.jsonl.gz"]
    assert read(tmp_path) == [*train, "extra/a.jsonl"]
    assert read(tmp_path / "data" / "t*.jsonl*") == ["data/test-00000.jsonl", *train]
    assert read(tmp_path / "**" / "a.jsonl") == ["extra/a.jsonl"]
    named = files_of(str(tmp_path), "train", "extra")
    assert [path.name for path in named.paths] == ["a.jsonl"]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/train-*}\n  - {split: test, path: [data/test-*]}\n"
        "- config_name: extra\n  data_files: extra/*.jsonl\n---\n"
    )
    with pytest.raises(InputError, match="several configurations: main, extra") as error:
        files_of(str(tmp_path))
    assert "prompts.config" in error.value.hint
    assert [path.name for path in files_of(str(tmp_path), "test", "main").paths] == ["test-00000.jsonl"]
    assert [path.name for path in files_of(str(tmp_path), "train", "extra").paths] == ["a.jsonl"]
    with pytest.raises(InputError, match="no split 'dev'; it has train, test"):
        files_of(str(tmp_path), "dev", "main")
    pool, _ = built(settings(tmp_path, "prompts.config=main", "prompts.heldout_fraction=0.5", "run.seed=2"), tmp_path)
    assert sorted(p.messages[0]["content"] for p in pool) == train


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a page in HTML"),
        ("a.json", b"\0\1\2", "neither text nor Parquet nor Arrow"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-20], "cannot be read to its end"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 and no more", "cannot be read as Arrow"),
        ("a.json", json.dumps(ROWS, indent=1).encode()[:-90], r"no valid JSON after 58 rows: it ends in the middle \(line "),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"},\n{"prompt": "c"}\n]' + b" " * 99, r"no valid JSON after 1 rows: «:» is missing|after 1 rows: Expecting ':'"),
        ("a.csv", b'prompt,x\na,b\n"c,d\ne,f\n', "a quoted cell that begins in line 3 or later has no end"),
        ("a.csv", b"prompt,prompt\na,b\n", "names the column 'prompt' twice"),
        ("a.jsonl", b'{"body_text": "a long question", "id": "1"}\n' * 3, "its rows have the keys body_text, id"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_prompts_says_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for look in (importer.survey, lambda configuration: built(configuration, tmp_path)):
        with pytest.raises(InputError, match=message) as error:
            look(settings(tmp_path / name))
        assert error.value.hint and error.value.exit_code == 2
    if "body_text" in message:
        assert "prompts.columns, such as {prompt: body_text}" in error.value.hint
        assert read(tmp_path / name, prompt="body_text") == ["a long question"] * 3


def test_a_prompt_inside_of_objects_is_named_by_the_way_to_it(tmp_path):
    row = {"id": "1", "data": {"asked": {"text": "a long question"}, "by": "me"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError) as error:
        importer.survey(settings(tmp_path / "a.jsonl"))
    assert "prompts.columns, such as {prompt: data.asked.text}" in error.value.hint
    assert read(tmp_path / "a.jsonl", prompt="data.asked.text") == ["a long question"]


def test_a_folder_without_prompts_says_what_it_holds(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"has no files of prompts; it holds weights.bin"):
        files_of(str(tmp_path))
    with pytest.raises(InputError, match="no file has such a name"):
        files_of(str(tmp_path / "*.jsonl"))
    assert files_of("owner/name") is None


def outcome(work):
    """What a function returns, and the error that it raises instead."""
    try:
        return work(), None
    except InputError as error:
        return None, error


def mutated(draw):
    """A valid file with some of its bytes changed, lost, doubled or moved."""
    name = draw(st.sampled_from(sorted(CONTENTS)))
    content = bytearray(CONTENTS[name][:3000] if name.endswith(("jsonl", "csv")) else CONTENTS[name])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        how = draw(st.sampled_from(["change", "lose", "double", "cut", "insert"]))
        size = draw(st.integers(1, 40))
        if how == "change" and content:
            content[at] = draw(st.integers(0, 255))
        elif how == "lose":
            del content[at : at + size]
        elif how == "double":
            content[at:at] = content[at : at + size]
        elif how == "cut":
            del content[at:]
        else:
            content[at:at] = draw(
                st.sampled_from(
                    [b"\n", b'"', b"{", b"]", b"\0", b"\\ud800", b"null", b",", b"\xff", b"1e999", b"[" * 2000]
                )
            )
    return name, bytes(content)


@pytest.mark.slow
@examples(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.composite(mutated)())
def test_what_is_broken_is_counted_or_refused_and_nothing_is_lost(tmp_path_factory, file):
    """Each row is kept or set aside with a reason, in the survey and in the pool; a file that cannot be read is refused."""
    name, content = file
    folder = tmp_path_factory.mktemp("mutated")
    (folder / name).write_bytes(content)
    configuration = settings(folder / name)
    rows, refused = outcome(lambda: [row for one in all_parts(str(folder / name)) for row in one.rows()])
    if refused is not None:
        assert refused.hint
        with pytest.raises(InputError):
            built(configuration, folder)
        return
    kept = [row for one in all_parts(str(folder / name)) for row in one.read() if not isinstance(row, str)]
    assert len(rows) >= len(kept)
    if (
        name.endswith(("lines.jsonl", "crlf.jsonl", "strings.jsonl", "lists.jsonl"))
        and content[:1] in b'{["'
        and len(rows) > 1
    ):
        assert len(rows) == sum(bool(line.strip()) for line in content.split(b"\n"))
    made, refused = outcome(lambda: built(configuration, folder, workers=1))
    if refused is not None:
        assert "no usable prompt" in str(refused) or "no prompt is left" in str(refused)
        return
    pool, aside = made
    assert len(pool) + sum(aside.values()) == len(rows)
    assert all(reason for reason in aside)


@pytest.mark.slow
def test_a_killed_copy_is_made_again_and_a_finished_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "PART_BYTES", 500)
    source = tmp_path / "a.json"
    source.write_bytes(CONTENTS["array.json"])
    built(settings(source), tmp_path)
    (copy,) = (tmp_path / "parts").glob("*/*.copied")
    before = os.stat(copy).st_ino
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "pool").mkdir()
    importer.import_pool(settings(source), lambda c: [[1]] * len(c), tmp_path / "again" / "pool", tmp_path / "parts")
    assert os.stat(copy).st_ino == before


def test_our_own_pairs_are_prompts(tmp_path):
    from selfplay.reporting.export import SCHEMA

    message = [{"role": "user", "content": "one"}]
    answer = [{"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": message, "chosen": answer, "rejected": answer, "prompt_id": "x", "parent": None, "source": "here"}
    ]
    (tmp_path / "out" / "data").mkdir(parents=True)
    for i in range(2):
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "out" / "data" / f"train-{i:05d}.parquet")
    (tmp_path / "out" / "README.md").write_text("---\ntags: [x]\n---\n# card")
    assert read(tmp_path / "out") == ["one", "one"]

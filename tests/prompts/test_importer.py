import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay import config
from selfplay.errors import InputError
from selfplay.models import initial
from selfplay.prompts import formats, importer, rows
from selfplay.prompts.files import part
from selfplay.prompts.orders import Orders
from selfplay.prompts.pool import ORDERS, Pool

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def settings(source, *overrides):
    return config.load(
        TINY, [f"prompts.source={source}", "prompts.heldout=null", "prompts.heldout_fraction=0.3", *overrides]
    )


def render(conversations):
    return [list(messages[-1]["content"].encode()) for messages in conversations]


def built(configuration, folder, render=render, **more):
    """The prompts of the pool that an import makes in `folder`, and what it has set aside."""
    out = folder / "pool"
    out.mkdir()
    splits, set_aside = importer.import_pool(configuration, render, out, folder / "parts", **more)
    found = list(Pool(out))
    assert Counter(p.split for p in found) == splits
    return found, set_aside


def jsonl(path, rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return path


def prompts(n, word="question"):
    return [{"prompt": f"{word} {i}", "meta": {"answer": i}} for i in range(n)]


def test_a_pool_is_split_rendered_and_without_gold_on_the_training_side(tmp_path):
    pool, counts = built(settings(jsonl(tmp_path / "a.jsonl", prompts(200))), tmp_path)
    by_split = Counter(p.split for p in pool)
    assert sum(by_split.values()) == 200
    assert 30 < by_split["heldout"] + by_split["audit"] < 90
    assert min(by_split.values()) > 5
    assert not counts
    assert all((p.meta == {}) == (p.split == "train") for p in pool)
    assert bytes(pool[0].prompt_ids).decode() == pool[0].messages[-1]["content"]
    assert importer.survey(settings(tmp_path / "a.jsonl")).splits == by_split


def test_parquet_and_messages(tmp_path):
    messages = [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": f"hello {i}"}] for i in range(50)
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    pool, _ = built(settings(tmp_path / "a.parquet"), tmp_path)
    assert len(pool) == 50
    assert pool[0].messages[0] == {"role": "system", "content": "be kind"}


def test_bad_rows_are_counted_and_set_aside(tmp_path):
    rows = [
        *prompts(50), b'{"prompt": "caf\xe9"}', b"{not json", b"[" * 100_000, b"[1]", {"prompt": ""}, {"text": "x"}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "x"}]}, {"prompt": "question 0"}, {"prompt": "long " * 50},
    ]  # fmt: skip
    pool, counts = built(settings(jsonl(tmp_path / "a.jsonl", rows)), tmp_path)
    assert len(pool) == 50
    assert counts == {
        "invalid UTF-8": 1, "invalid JSON": 2, "not an object": 1, "an empty prompt": 1,
        "no column that is known to hold prompts": 1, "a message without role and content": 1, "no message of a user": 1,
        "duplicate": 1, "too long": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_held_out_prompts_are_never_trained_on(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        [*prompts(20), {"prompt": "evolved", "parent": formats.prompt_id([{"role": "user", "content": "h 1"}])}],
    )
    heldout = jsonl(tmp_path / "heldout.jsonl", [*prompts(5, "h"), {"prompt": "question 3"}])
    pool, counts = built(settings(train, f"prompts.heldout={heldout}"), tmp_path)
    texts = {p.messages[-1]["content"] for p in pool if p.split == "train"}
    assert len(texts) == 19
    assert not texts & {"question 3", "evolved"}
    assert counts["also held out"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no usable prompt: it is empty"),
        (
            "a.jsonl",
            b"\xff\xfe\n{}\n",
            r"no usable prompt \(1 × invalid UTF-8, 1 × no column that is known to hold prompts\); its rows have no keys",
        ),
        ("a.xlsx", b"PK\x03\x04", "a ZIP archive or an Excel sheet"),
        ("a.toml", b"prompt = 1", "neither text nor Parquet nor Arrow"),
        ("a.parquet", b"not parquet", "cannot be read as Parquet"),
        ("a.jsonl", b'{"prompt": "only one"}', "no prompt is left for"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        built(settings(tmp_path / name), tmp_path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        built(settings(tmp_path / "b.jsonl"), tmp_path)


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="loading it from the Hub failed"):
        built(settings("nobody/nothing-of-this-name"), tmp_path)


def test_a_model_that_is_not_there():
    with pytest.raises(InputError, match="no such folder"):
        initial.initial_folder("./nowhere", None)


def test_a_prompt_that_the_template_refuses_is_set_aside(tmp_path):
    def strict(conversations):
        return [
            "cannot be rendered (RuntimeError)" if m[0]["role"] == "system" else list(m[-1]["content"].encode())
            for m in conversations
        ]

    odd = [
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
        {"prompt": "a lone surrogate \ud800"},
        {"messages": [{"role": "tool 1", "content": "x"}, {"role": "user", "content": "y"}]},
    ]
    pool, counts = built(settings(jsonl(tmp_path / "a.jsonl", [*prompts(40), *odd])), tmp_path, strict)
    assert len(pool) == 40
    assert sorted(counts) == [
        "a role that is no word",
        "cannot be rendered (RuntimeError)",
        "cannot be rendered (UnicodeEncodeError)",
    ]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(part, "PART_BYTES", 2000)
    monkeypatch.setattr(part, "PART_ROWS", 50)


def messy():
    """500 prompts with rows that come twice, far apart, bad ones, and rewrites that name parents of other parts."""
    found = [{"prompt": f"question {i}", "meta": {"answer": i}} for i in range(500)]
    found[300:300] = [{"prompt": f"question {i}"} for i in range(0, 500, 50)]
    found[100] = {"text": "nothing"}
    for i in range(10):
        parent = formats.prompt_id([{"role": "user", "content": f"question {(i * 37) % 500}"}])
        found.append({"prompt": f"rewrite {i}", "parent": parent})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_many_parts_in_several_processes_make_the_pool_that_one_makes(tmp_path, monkeypatch, name):
    heldout = jsonl(tmp_path / "h.jsonl", [{"prompt": f"question {i}"} for i in (3, 77, 401)])
    if name == "a.jsonl":
        jsonl(tmp_path / name, messy())
    else:
        pq.write_table(
            pa.Table.from_pylist([{"parent": None, **row, "meta": None} for row in messy()]), tmp_path / name
        )
    made = {}
    for parts, workers in ((None, 1), (2000, 1), (2000, 3)):
        (folder := tmp_path / f"{parts}-{workers}").mkdir()
        if parts is not None:
            monkeypatch.setattr(part, "PART_BYTES", parts)
            monkeypatch.setattr(part, "PART_ROWS", 50)
        told = []
        configuration = settings(tmp_path / name, f"prompts.heldout={heldout}")
        made[folder] = built(
            configuration, folder, workers=workers, on_progress=lambda *said, told=told: told.append(said)
        )
        assert {text for text, _, _ in told} == {"reading", "rendering"}
        assert len(told) == 4 if parts is None else len(told) > 20
        assert told[-1][1] == told[-1][2]
    (one, counts), *others = made.values()
    assert all(other == (one, counts) for other in others)
    nothing = "an empty prompt" if name == "a.parquet" else "no column that is known to hold prompts"
    assert (counts["duplicate"], counts["also held out"], counts[nothing]) == (9, 3, 1)
    assert [p.messages[-1]["content"] for p in one][:3] == ["question 0", "question 1", "question 2"]
    assert len([p for p in one if p.parent]) == 10
    assert len(list((tmp_path / "2000-3" / "pool" / "prompts").iterdir())) > 5


@pytest.mark.slow
def test_a_hub_dataset_is_copied_and_read_like_a_file(tmp_path, monkeypatch, small_parts):
    """Of a dataset on this disk: what the Hub would do is load_dataset's own affair."""
    import datasets  # here: it takes a second, and every worker imports every file

    rows = datasets.Dataset.from_list([{"question": f"why {i}?", "other": i} for i in range(300)])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: asked.append((*name, split)) or rows)
    pool, counts = built(settings("some/where", "prompts.config=main"), tmp_path)
    assert asked == [("some/where", "main", "train")]
    assert [p.messages[-1]["content"] for p in pool] == [f"why {i}?" for i in range(300)] and not counts
    assert {p.source for p in pool} == {"some/where"}
    with pytest.raises(InputError, match="no column 'answer'; it has question, other"):
        built(settings("some/where", "prompts.column=answer"), tmp_path / "pool")
    rows = datasets.Dataset.from_list([{"body_text": "why?", "other": 1}])
    with pytest.raises(
        InputError, match="no known format of prompts is in some/where; it has the columns body_text, other"
    ):
        built(settings("some/where"), tmp_path / "parts")


@pytest.mark.slow
def test_an_import_that_was_killed_goes_on_where_it_was(tmp_path, small_parts):
    """Killed after some parts, it renders no prompt of them again, and makes the pool that it would have made."""
    source, calm = jsonl(tmp_path / "a.jsonl", messy()), tmp_path / "calm"
    calm.mkdir()
    expected = built(settings(source), calm)
    rendered = tmp_path / "rendered"

    def noting(conversations):
        with rendered.open("a") as file:
            file.writelines(m[-1]["content"] + "\n" for m in conversations)
        time.sleep(0.05)
        return render(conversations)

    def killed():
        (tmp_path / "pool").mkdir()
        importer.import_pool(settings(source), noting, tmp_path / "pool", tmp_path / "parts", workers=1)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    while len(list((tmp_path / "parts").glob("*/*.arrow"))) < 4:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = [rows.count(path) for path in (tmp_path / "parts").glob("*/*.arrow")]
    before = len(rendered.read_text().splitlines())
    (tmp_path / "pool").rmdir()
    assert built(settings(source), tmp_path, noting) == expected
    lines = rendered.read_text().splitlines()
    assert len(finished) >= 4 and sum(finished) < len(expected[0])
    assert len(lines) - before == len(expected[0]) - sum(finished)


@pytest.mark.slow
def test_parts_of_other_sources_or_settings_are_not_used(tmp_path, small_parts):
    source = jsonl(tmp_path / "a.jsonl", prompts(150))
    for i, change in enumerate(
        [
            lambda: settings(source),
            lambda: settings(source, "prompts.max_tokens=11"),
            lambda: settings(source, "run.seed=5"),
            lambda: settings(jsonl(source, prompts(151))),
        ]
    ):
        (tmp_path / "pool").mkdir()
        importer.import_pool(change(), render, tmp_path / "pool", tmp_path / "parts")
        (key,) = (tmp_path / "parts").iterdir()
        (tmp_path / "pool").rename(tmp_path / f"pool-{i}")
    counts = [Counter(p.split for p in Pool(tmp_path / f"pool-{i}")) for i in range(4)]
    assert [count.total() for count in counts] == [150, 100, 150, 151]
    assert counts[2] != counts[0]
    assert key.is_dir()


def test_the_import_leaves_the_order_of_the_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr("selfplay.prompts.orders.WORTH_KEEPING", 10)
    built(settings(jsonl(tmp_path / "a.jsonl", prompts(100))), tmp_path)
    hashes, first = Pool(tmp_path / "pool").training()
    (file,) = (tmp_path / "pool" / ORDERS).iterdir()
    assert file.name == f"00000000-{len(hashes)}.npz" and not first.any()
    assert (Orders(0, tmp_path / "pool" / ORDERS).order(0, hashes) == Orders(0, None).order(0, hashes)).all()


@pytest.mark.slow
def test_the_audit_set_may_have_a_file_of_its_own(tmp_path):
    """Of equal prompts that stands which is furthest from training: first the audit set, then the held-out prompts."""
    train = jsonl(tmp_path / "train.jsonl", [*prompts(20), *prompts(2, "h"), *prompts(3, "a")])
    heldout = jsonl(tmp_path / "heldout.jsonl", [*prompts(5, "h"), {"prompt": "a 0"}])
    audit = jsonl(tmp_path / "audit.jsonl", prompts(4, "a"))
    configuration = settings(train, f"prompts.heldout={heldout}", f"prompts.audit={audit}")
    pool, counts = built(configuration, tmp_path)
    by_split = {split: {p.messages[-1]["content"] for p in pool if p.split == split} for split in ("heldout", "audit")}
    assert by_split == {"heldout": {f"h {i}" for i in range(5)}, "audit": {f"a {i}" for i in range(4)}}
    assert len(pool) == 20 + 5 + 4
    assert counts == {"also held out": 2 + 1, "also in the audit set": 2 + 1}
    assert importer.survey(configuration).splits == Counter(p.split for p in pool)


def test_prompts_of_a_public_benchmark_stay_out_of_the_pool(tmp_path):
    asked = "Write a poem of two lines about the oldest bridge of the town and do not rhyme."
    benchmark = jsonl(
        tmp_path / "public.jsonl", [{"key": 1, "prompt": asked}, {"question": "How many legs have six cows?"}]
    )
    train = [
        *prompts(40),
        {"prompt": "Please write a poem of two lines about the oldest bridge of the town, and do not rhyme!"},
        {"prompt": "how many legs have SIX cows", "parent": "x"},
        {"prompt": "Write a poem of two lines about winter.", "parent": "y"},
    ]
    configuration = settings(jsonl(tmp_path / "a.jsonl", train), f"prompts.benchmarks=[{benchmark}]")
    pool, counts = built(configuration, tmp_path)
    assert counts == {"also in public.jsonl": 2}
    assert len(pool) == 41
    assert [p.messages[-1]["content"] for p in pool if p.parent] == ["Write a poem of two lines about winter."]
    jsonl(benchmark, [{"text": "nothing"}])
    with pytest.raises(InputError, match=r"public\.jsonl has no prompt"):
        importer.survey(configuration)
    benchmark.unlink()
    with pytest.raises(InputError, match=r"public\.jsonl: no such file"):
        importer.survey(configuration)

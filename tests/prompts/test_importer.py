import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay import config
from selfplay.errors import InputError
from selfplay.prompts import importer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def settings(source, *overrides):
    return config.load(
        TINY, [f"prompts.source={source}", "prompts.heldout=null", "prompts.heldout_fraction=0.3", *overrides]
    )


def render(messages):
    return list(messages[-1]["content"].encode())


def jsonl(path, rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows))
    return path


def prompts(n, word="question"):
    return [{"prompt": f"{word} {i}", "meta": {"answer": i}} for i in range(n)]


def test_a_pool_is_split_rendered_and_without_gold_on_the_training_side(tmp_path):
    pool, counts = importer.build_pool(settings(jsonl(tmp_path / "a.jsonl", prompts(200))), render)
    by_split = Counter(p.split for p in pool)
    assert sum(by_split.values()) == 200
    assert 30 < by_split["heldout"] + by_split["audit"] < 90
    assert min(by_split.values()) > 5
    assert not counts
    assert all((p.meta == {}) == (p.split == "train") for p in pool)
    assert bytes(pool[0].prompt_ids).decode() == pool[0].messages[-1]["content"]
    again, _ = importer.build_pool(settings(tmp_path / "a.jsonl"), render)
    assert again == pool


def test_parquet_and_messages(tmp_path):
    messages = [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": f"hello {i}"}] for i in range(50)
    ]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet")
    pool, _ = importer.build_pool(settings(tmp_path / "a.parquet"), render)
    assert len(pool) == 50
    assert pool[0].messages[0] == {"role": "system", "content": "be kind"}


def test_bad_rows_are_counted_and_set_aside(tmp_path):
    rows = [
        *prompts(50), b'{"prompt": "caf\xe9"}', b"{not json", b"[" * 100_000, b"[1]", {"prompt": ""}, {"text": "x"}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "assistant", "content": "x"}]}, {"prompt": "question 0"}, {"prompt": "long " * 50},
    ]  # fmt: skip
    pool, counts = importer.build_pool(settings(jsonl(tmp_path / "a.jsonl", rows)), render)
    assert len(pool) == 50
    assert counts == {
        "invalid UTF-8": 1, "invalid JSON": 2, "not an object": 1, "neither prompt nor messages": 2,
        "a message without role and content": 1, "the last message is not the user's": 1, "duplicate": 1, "too long": 1,
    }  # fmt: skip


def test_held_out_prompts_are_never_trained_on(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        [*prompts(20), {"prompt": "evolved", "parent": importer.prompt_id([{"role": "user", "content": "h 1"}])}],
    )
    heldout = jsonl(tmp_path / "heldout.jsonl", [*prompts(5, "h"), {"prompt": "question 3"}])
    pool, counts = importer.build_pool(settings(train, f"prompts.heldout={heldout}"), render)
    texts = {p.messages[-1]["content"] for p in pool if p.split == "train"}
    assert len(texts) == 19
    assert not texts & {"question 3", "evolved"}
    assert counts["also held out"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no usable prompt: it is empty"),
        ("a.jsonl", b"\xff\xfe\n{}\n", r"no usable prompt \(1 × invalid UTF-8, 1 × neither prompt nor messages\)"),
        ("a.csv", b"prompt\nhello\n", "neither JSONL nor Parquet"),
        ("a.parquet", b"not parquet", "cannot be read as Parquet"),
        ("a.jsonl", b'{"prompt": "only one"}', "no prompt is left for"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        importer.build_pool(settings(tmp_path / name), render)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        importer.build_pool(settings(tmp_path / "b.jsonl"), render)


def test_a_hub_dataset_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="loading it from the Hub failed"):
        importer.build_pool(settings("nobody/nothing-of-this-name"), render)


def test_a_model_that_is_not_there():
    with pytest.raises(InputError, match="no such folder"):
        importer.initial_folder("./nowhere", None)


def test_a_prompt_that_the_template_refuses_is_set_aside(tmp_path):
    def strict(messages):
        if messages[0]["role"] == "system":
            raise RuntimeError("no system role")
        return render(messages)

    odd = [
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
        {"prompt": "a lone surrogate \ud800"},
        {"messages": [{"role": "tool 1", "content": "x"}, {"role": "user", "content": "y"}]},
    ]
    pool, counts = importer.build_pool(settings(jsonl(tmp_path / "a.jsonl", [*prompts(40), *odd])), strict)
    assert len(pool) == 40
    assert sorted(counts) == [
        "a role that is no word",
        "cannot be rendered (RuntimeError)",
        "cannot be rendered (UnicodeEncodeError)",
    ]

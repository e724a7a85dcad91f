import dataclasses
import gc
import shutil
import tracemalloc

import pyarrow.parquet as pq
import pytest

from selfplay.prompts import pool
from selfplay.storage import tables
from selfplay.types import Prompt


def conversation(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def prompt(text, split="train", **fields):
    messages = conversation(text)
    return Prompt(prompt_id=pool.prompt_id(messages), messages=messages, prompt_ids=[1], split=split, **fields)


def render(conversations):
    """One token a character; a template that knows no system role."""
    return [
        "cannot be rendered (TemplateError)" if m[0]["role"] == "system" else list(m[-1]["content"].encode())
        for m in conversations
    ]


def admit(rows, known=(), **settings):
    settings = {"max_tokens": 200, "ngram": 8, "overlap": 0.5, "source": "here", "joined": 4, **settings}
    return pool.admit(rows, known, render, **settings)


def held_out(text, ngram=8, overlap=0.5):
    return pool.HeldOut([prompt(text, "heldout")], ngram, overlap)


def test_what_may_join_and_what_may_not():
    parent = prompt("How do plants grow?", parent="grandparent", root="adam")
    known = [parent, prompt("What is the highest mountain of the Andes?", "audit", parent="eve")]
    found = admit(
        [
            {"prompt": "How do mosses grow?", "parent": parent.prompt_id, "source": "deepen by policy 3"},
            {"prompt": "how do  PLANTS grow?"},
            {"prompt": "how do mosses grow?"},
            {"prompt": "What is the highest mountain of the Andes??"},
            {"prompt": "Something else.", "parent": "eve"},
            {"prompt": "Something else.", "parent": "someone"},
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
            {"prompt": "z" * 201},
            {"prompt": " "},
            {"prompt": "a lone surrogate \ud800"},
            {"prompt": "Why?", "parent": "\ud800"},
            {"prompt": ["Why?"], "messages": "Why?", "parent": {"a": 1}, "source": 3},
        ],
        known,
    )
    assert found == [
        Prompt(
            prompt_id=pool.prompt_id(conversation("How do mosses grow?")), messages=conversation("How do mosses grow?"),
            prompt_ids=list(b"How do mosses grow?"), split="train", parent=parent.prompt_id, root="adam", joined=4,
            source="deepen by policy 3",
        ),
        "duplicate",
        "duplicate",
        "held out",
        "held out",
        Prompt(
            prompt_id=pool.prompt_id(conversation("Something else.")), messages=conversation("Something else."),
            prompt_ids=list(b"Something else."), split="train", parent="someone", root=None, joined=4, source="here",
        ),
        "cannot be rendered (TemplateError)",
        "too long",
        "neither prompt nor messages",
        "half a surrogate pair",
        "half a surrogate pair",
        "neither prompt nor messages",
    ]  # fmt: skip
    assert isinstance(found[0], Prompt) and found[0].ancestor == "adam"


def test_nothing_to_render_asks_nobody():
    def never(conversations):
        raise AssertionError

    assert pool.admit([], [], never, max_tokens=1, ngram=8, overlap=1, source="", joined=1) == []


def test_n_grams_in_common_by_hand():
    """Trigrams of «a b c d e f» : abc bcd cde def. «x b c d e y» has xbc bcd cde dey: 2 of 4."""
    meeting = prompt("x b c d e y")
    assert held_out("a b c d e f", 3, 0.5).meets(meeting)
    assert not held_out("a b c d e f", 3, 0.51).meets(meeting)
    # Of the shorter text's two trigrams one is shared, however long the other is.
    assert held_out("a b c d e f g h i j k l m n", 3, 0.5).meets(prompt("z j k l"))
    assert not held_out("a b c d e f g h i j k l m n", 3, 0.6).meets(prompt("z j k l"))
    # A repeated n-gram counts once.
    assert not held_out("a b c a b c a b c d e f g h", 3, 0.5).meets(prompt("a b c x y z x y"))


@pytest.mark.parametrize(
    ("old", "new", "meets"),
    [
        ("Hello!", "hello", True),  # the same words
        ("Hello!", "Say hello.", False),  # too short to say anything
        ("What is the capital of Norway?", "Please tell me: WHAT is the capital of norway – be brief.", True),
        ("Please tell me: What is the capital of Norway? Be brief.", "What is the capital of Norway?", True),
        ("What is the capital of Norway?", "Please tell me: What is the capital of Peru? Be brief.", False),
        ("Name three fruits.", "Name three fruits. Be brief.", False),  # three words are chance
        ("ＮＡＭＥ four　fruits now", "Please name four fruits now", True),
        ("挪威的首都是哪里?", "请告诉我,挪威的首都是哪里?", True),
        ("挪威的首都是哪里?", "秘鲁的首都是哪里?", False),
        ("???", "???", True),
        ("???", "!!!", False),
    ],
)
def test_what_meets_a_held_out_prompt(old, new, meets):
    assert held_out(old).meets(prompt(new)) is meets


def test_a_held_out_conversation_is_met_by_what_its_user_says():
    messages = conversation("Tell me a story about a dog.", "Once …", "Now one about the cat next door.")
    found = pool.HeldOut([Prompt(prompt_id="h", messages=messages, prompt_ids=[], split="heldout")], 8, 0.5)
    other = [
        {"role": "system", "content": "Be kind."},
        *conversation("tell me a story about a dog", "No.", "now one about the cat next door"),
    ]
    assert found.meets(Prompt(prompt_id="x", messages=other, prompt_ids=[], split="train"))
    assert not found.meets(prompt("Tell me about your day."))


def test_added_prompts_stay(tmp_path):
    first, second, third = (prompt(f"number {i}", joined=i) for i in range(3))
    tables.write_rows(tmp_path / pool.POOL, [first], Prompt)
    assert list(pool.Pool(tmp_path)) == [first]
    pool.write_added(tmp_path, [second])
    pool.write_added(tmp_path, [third])
    assert list(pool.Pool(tmp_path)) == [first, second, third]
    assert sorted(p.name for p in (tmp_path / "added").iterdir()) == ["0001.parquet", "0002.parquet"]


def test_a_pool_written_before_prompts_could_join_is_read(tmp_path):
    row = prompt("old", parent="root of old")
    tables.write_rows(tmp_path / "new.parquet", [row], Prompt)
    pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(["root", "joined"]), tmp_path / pool.POOL)
    assert list(pool.Pool(tmp_path)) == [row]
    assert row.ancestor == "root of old"


def test_a_pool_is_read_where_it_is_asked_for(tmp_path):
    """Of 2,000 prompts of 500 tokens, 8 MB of ids alone, next to nothing is held."""
    rows = [dataclasses.replace(prompt(f"number {i}"), prompt_ids=[i] * 500) for i in range(2000)]
    tables.write_rows(tmp_path / pool.POOL, rows, Prompt)
    gc.collect()
    tracemalloc.start()
    found = pool.Pool(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 500_000
    wanted = [rows[i].prompt_id for i in (1999, 3, 3, 700)]
    assert found.read(wanted) == [rows[i] for i in (1999, 3, 3, 700)]
    assert rows[5].prompt_id in found and "another" not in found
    assert found.join([rows[5], prompt("new", joined=2), prompt("new", joined=2)]) == 1
    assert found.joined("train")[prompt("new").prompt_id] == 2 and len(found.joined("train")) == 2001


def test_what_finished_rounds_drew_is_read_once(tmp_path):
    tables.write_rows(tmp_path / pool.POOL, [], Prompt)
    found = pool.Pool(tmp_path)

    def drew(index, name, *texts):
        folder = tmp_path / "rounds" / f"{index:04d}" / "prompts"
        folder.mkdir(parents=True, exist_ok=True)
        tables.write_rows(folder / f"{name}.parquet", [prompt(text) for text in texts], Prompt)
        return folder

    rounds = tmp_path / "rounds"
    first = drew(1, "prompts", "a", "b")
    drew(2, "prompts", "a")
    drew(2, "drawn", "a", "c")  # of which «c» was passed over
    drew(4, "prompts", "b")  # the third was given up before it drew
    a, b, c = (prompt(text).prompt_id for text in "abc")
    assert found.draws(rounds, 3) == {a: 2, b: 1, c: 1}
    shutil.rmtree(first)
    assert found.draws(rounds, 3) == {a: 2, b: 1, c: 1}
    assert found.draws(rounds, 5) == {a: 2, b: 2, c: 1}

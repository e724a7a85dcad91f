import pyarrow.parquet as pq
import pytest
from test_pool import conversation, opened, prompt

from reward.instructions import Instructions
from selfplay.prompts.admission import admit as admitted
from selfplay.prompts.formats import prompt_id
from selfplay.prompts.held_out import HeldOut
from selfplay.types import Prompt


def render(conversations):
    """One token a character; a template that knows no system role."""
    return [
        "cannot be rendered (TemplateError)" if m[0]["role"] == "system" else list(m[-1]["content"].encode())
        for m in conversations
    ]


def admit(rows, known, **settings):
    settings = {
        "max_tokens": 200,
        "ngram": 8,
        "overlap": 0.5,
        "source": "here",
        "joined": 4,
        "benchmarks": {},
        **settings,
    }
    return admitted(rows, known, render, **settings)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_what_may_join_and_what_may_not(tmp_path, kind):
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
            {"prompt": 3, "messages": [3], "parent": {"a": 1}, "source": 3},
        ],
        opened(tmp_path, known, kind),
    )
    assert found == [
        Prompt(
            prompt_id=prompt_id(conversation("How do mosses grow?")), messages=conversation("How do mosses grow?"),
            prompt_ids=list(b"How do mosses grow?"), split="train", parent=parent.prompt_id, root="adam", joined=4,
            source="deepen by policy 3",
        ),
        "duplicate",
        "duplicate",
        "held out",
        "held out",
        Prompt(
            prompt_id=prompt_id(conversation("Something else.")), messages=conversation("Something else."),
            prompt_ids=list(b"Something else."), split="train", parent="someone", root=None, joined=4, source="here",
        ),
        "cannot be rendered (TemplateError)",
        "too long",
        "an empty prompt",
        "half a surrogate pair",
        "half a surrogate pair",
        "a prompt that is no text",
    ]  # fmt: skip
    assert isinstance(found[0], Prompt) and found[0].ancestor == "adam"


def test_what_joined_counts_too(tmp_path):
    """A prompt that joined is there, and its ancestor is known; one that was written before the file kept that as well."""
    known = opened(tmp_path, [prompt("How do plants grow?")], "new")
    first = admit([{"prompt": "How do ferns grow?", "parent": "adam"}], known)
    assert known.join(first) == 1
    again = admit(
        [{"prompt": "how do FERNS grow?"}, {"prompt": "How do trees grow?", "parent": first[0].prompt_id}], known
    )
    assert again[0] == "duplicate" and again[1].ancestor == "adam"
    (file,) = (tmp_path / "added").glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns(["same"]), file)
    assert admit([{"prompt": "how do FERNS grow?"}], opened(tmp_path)) == ["duplicate"]


def test_nothing_to_render_asks_nobody(tmp_path):
    def never(conversations):
        raise AssertionError

    known = opened(tmp_path, [prompt("How do plants grow?")], "new")
    settings = {"max_tokens": 1, "ngram": 8, "overlap": 1, "source": "", "joined": 1, "benchmarks": {}}
    assert admitted([], known, never, **settings) == []
    assert admitted([{"prompt": "how do plants grow?"}], known, never, **settings) == ["duplicate"]


def test_a_prompt_that_the_reward_cannot_check_may_not_join(tmp_path):
    def row(name):
        return {"prompt": f"Write with {name}.", "instruction_id_list": [name], "kwargs": [{}]}

    rows = [row("punctuation:no_comma"), row("punctuation:none"), {"prompt": "Write anything."}]
    known = opened(tmp_path, [prompt("How do plants grow?")])
    found = admit(rows, known, kinds=[Instructions()])
    assert found[0].reference == '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}'
    assert found[1].startswith("unknown instruction id 'punctuation:none'") and found[2].startswith("no reference")
    assert all(isinstance(fate, Prompt) for fate in admit(rows, known))


def test_what_a_benchmark_asks_does_not_join(tmp_path):
    public = {"public.jsonl": HeldOut.of([prompt("Name the four largest lakes of Africa in a list.", "heldout")])}
    rows = [{"prompt": "Now name the four largest lakes of Africa in a list"}, {"prompt": "Name the lakes of Asia."}]
    found = admit(rows, opened(tmp_path, [prompt("How do plants grow?")]), benchmarks=public)
    assert found[0] == "also in public.jsonl"
    assert isinstance(found[1], Prompt)

import dataclasses
from pathlib import Path

import pytest
from test_pool import opened, prompt
from test_report import pair

from selfplay import config, seeds
from selfplay.errors import InputError
from selfplay.prompts import admission, evolve
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Pair, Prompt, Rewrite
from selfplay.worlds.tiny import rewriter

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
FIVE = list(evolve.STRATEGIES)


def render(conversations):
    """A template that makes a token of each character."""
    return [list(m[-1]["content"].encode()) for m in conversations]


class World:
    """A round whose policy answers what `says` tells, or where a function rewrites."""

    def __init__(self, folder, prompts, potentials, says=None, function=None, context=20_000, **overrides):
        self.folder, self.settings = folder, config.load(TINY, [f"evolve.{n}={v}" for n, v in overrides.items()]).evolve
        self.pool = opened(folder / "pool", prompts)
        ids = [p.prompt_id for p in prompts]
        pairs = [pair(0, prompt_id=i, potential=v) for i, v in zip(ids, potentials, strict=False)]
        tables.write_rows(folder / "pairs.parquet", pairs, Pair)
        self._says, self.asked = says, []
        if function is None:
            self.rewriting = evolve.by_policy(3, context, 48, render, self.sample)
        else:
            self.rewriting = evolve.by_function(self.settings.rewriter, function, lambda *parts: seeds.derive(*parts))

    def admit(self, rows):
        return admission.admit(
            rows, self.pool, render, max_tokens=200, ngram=8, overlap=0.5, source="evolve", joined=3, benchmarks={}
        )

    def sample(self, rows, max_tokens, on_progress):
        assert max_tokens == 48
        self.asked = [p.messages[-1]["content"] for p in rows]
        on_progress(len(rows))
        return [
            Candidate(
                prompt_id=p.prompt_id, index=0, text=text, token_ids=[1, 2], logp=-1.0, n_tokens=2,
                finish_reason=finish, policy=3,
            )
            for p in rows
            for text, finish in [self._says(p.messages[-1]["content"])]
        ]  # fmt: skip


class Line:
    def update(self, **fields):
        self.text = fields.get("text")


def run(world, name="evolve"):
    (folder := world.folder / name).mkdir()
    line = Line()
    metrics = evolve.evolve(
        folder, line, pairs=world.folder / "pairs.parquet", pool=world.pool, settings=world.settings,
        rewriting=world.rewriting, admit=world.admit,
    )  # fmt: skip
    return (
        metrics,
        tables.read_rows(folder / "prompts.parquet", Prompt),
        tables.read_rows(folder / "rewrites.parquet", Rewrite),
        line.text,
    )


def test_the_best_quarter_by_potential():
    potentials = [0.1, 2.0, None, -1.0, 0.5, 0.4, 0.3, 0.2, 0.0]
    names = [f"p{i}" for i in range(9)]
    assert evolve.best(names, potentials, 0.25) == ["p1", "p4"]  # of eight that have one
    assert evolve.best(names[:1], potentials[:1], 0.25) == ["p0"]
    assert evolve.best(names[2:3], potentials[2:3], 0.25) == []


def test_an_instruction_shows_the_last_message_and_what_came_before():
    conversation = [
        {"role": "system", "content": "Be kind {x}."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name {three} fruits."},
    ]
    (asked,) = evolve.instruction(conversation, "constrain")
    assert "<request>\nName {three} fruits.\n</request>" in asked["content"]
    assert "system: Be kind {x}.\nuser: Hello!\nassistant: Hello.\n" in asked["content"]
    assert evolve.STRATEGIES["constrain"] in asked["content"]
    assert "conversation" not in evolve.instruction(conversation[-1:], "deepen")[0]["content"]
    assert len({evolve.instruction(conversation, s)[0]["content"] for s in FIVE}) == 5


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("Sure! <rewrite>\nName four.\n</rewrite> Hope it helps.", "Name four."),
        ("<rewrite>a</rewrite> or better <rewrite>b</rewrite>", "b"),
        ("<rewrite></rewrite>", ""),
        ("Name four.", None),
        ("<rewrite>Name four.", None),
    ],
)
def test_a_rewrite_stands_between_marks(said, found):
    assert evolve.marked(said) == found


def test_what_is_no_rewrite():
    assert evolve.fault("12345", " \n", 5) == "empty"
    assert evolve.fault("Name three!", "name  three", 5) == "unchanged"
    assert evolve.fault("12345", "x" * 25, 5) is None
    assert evolve.fault("12345", "x" * 26, 5) == "length ratio"
    assert evolve.fault("x" * 26, "12345", 5) == "length ratio"


def test_the_policy_rewrites_and_everything_has_a_reason(tmp_path):
    parent = prompt("Why is the sky blue in the day?", parent="earlier", root="adam")
    others = [prompt("Name a fruit."), prompt("Who was Ada Lovelace and what was she known for?", "heldout")]
    answers = {
        "broaden": ("<rewrite>Why is grass green?</rewrite>", "stop"),
        "deepen": ("<rewrite>Why is the sky", "length"),
        "constrain": ("Why is the sky blue? In one word.", "stop"),
        "concretize": ("<rewrite>Who was Ada Lovelace, and what was she known for?!</rewrite>", "stop"),
        "reason": ("<rewrite>name a FRUIT.</rewrite>", "stop"),
    }
    world = World(
        tmp_path, [parent, *others], [1.0],
        says=lambda text: next(answers[s] for s in FIVE if evolve.STRATEGIES[s] in text),
    )  # fmt: skip
    metrics, joining, rewrites, text = run(world)
    assert [(w.strategy, w.rejected_because) for w in rewrites] == [
        ("broaden", None),
        ("deepen", "cut off"),
        ("constrain", "not marked"),
        ("concretize", "held out"),
        ("reason", "duplicate"),
    ]
    assert rewrites[1].text == "<rewrite>Why is the sky"
    (new,) = joining
    assert new.messages == [{"role": "user", "content": "Why is grass green?"}]
    assert (new.parent, new.root, new.joined, new.source) == (parent.prompt_id, "adam", 3, "broaden by policy 3")
    assert new.prompt_ids == list(b"Why is grass green?") and rewrites[0].prompt_id == new.prompt_id
    assert metrics == {
        "parents": 1, "rewrites": 5, "tokens": 10, "by_rules": 0.0, "joined": 1, "joined_broaden": 1, "joined_deepen": 0,
        "joined_constrain": 0, "joined_concretize": 0, "joined_reason": 0, "rejected_cut_off": 1,
        "rejected_duplicate": 1, "rejected_held_out": 1, "rejected_not_marked": 1,
    }  # fmt: skip
    assert text == "1 of 5 rewrites join the pool"
    assert evolve.story(rewrites) == (
        "1 of 5 rewrites join the pool (broaden 1, deepen 0, constrain 0, concretize 0, reason 0); rewritten by policy 3"
    )


def test_an_instruction_that_does_not_fit_is_not_sampled(tmp_path):
    """The context has room for the short prompt's instruction and a rewrite of 48 tokens, not for the long one's."""
    short, long = prompt("Why?"), prompt("Why is it so? " * 30)
    room = max(len(evolve.instruction(short.messages, s)[0]["content"].encode()) for s in FIVE) + 48
    world = World(tmp_path, [short, long], [1.0, 2.0], says=lambda text: ("", "stop"), context=room, top=1.0)
    metrics, joining, rewrites, _ = run(world)
    assert len(world.asked) == 5 and joining == []
    assert metrics["rejected_no_room_for_the_instruction"] == metrics["rejected_not_marked"] == 5
    assert [w.n_tokens for w in rewrites] == [2] * 5 + [0] * 5


def test_a_conversation_keeps_what_came_before(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a fruit."}]
    parent = dataclasses.replace(prompt("x"), messages=messages)
    world = World(tmp_path, [parent], [1.0], function=lambda messages, strategy, seed: f" {strategy} it ")
    _, joining, _, _ = run(world)
    assert [p.messages for p in joining] == [
        [messages[0], {"role": "user", "content": f"{strategy} it"}] for strategy in FIVE
    ]


def test_rules_rewrite_and_the_ledger_says_so(tmp_path):
    parents = [prompt("Hey, What is the capital of Peru?"), prompt("Name two fruits. Be brief.")]
    name = "selfplay.worlds.tiny.rewriter:rewrite"
    world = World(tmp_path, parents, [1.0, 0.5], function=rewriter.rewrite, rewriter=name, top=1.0)
    metrics, joining, rewrites, _ = run(world)
    assert metrics["by_rules"] == 1.0 and metrics["tokens"] == 0 and len(joining) >= 8
    assert {p.source for p in joining} >= {f"reason by {name}"}
    assert evolve.story(rewrites).endswith(f"rewritten by {name}, a function with rules: no model was asked")
    again = run(world, "again")
    assert (tmp_path / "again" / "rewrites.parquet").read_bytes() == (
        tmp_path / "evolve" / "rewrites.parquet"
    ).read_bytes()
    assert again[0] == metrics


def test_nothing_to_rewrite(tmp_path):
    metrics, joining, rewrites, _ = run(World(tmp_path, [prompt("x")], [None], says=None))
    assert metrics["rewrites"] == metrics["joined"] == 0 and joining == rewrites == []
    assert evolve.story([]) == "no prompt was there to rewrite"


def test_a_function_that_fails_is_named(tmp_path):
    def broken(messages, strategy, seed):
        raise KeyError("x")

    with pytest.raises(InputError, match=r"evolve.rewriter \(policy\) failed on prompt .*KeyError"):
        run(World(tmp_path, [prompt("x")], [1.0], function=broken))


def test_joining_twice_is_joining_once(tmp_path):
    """A controller that is killed between the stage and the pool, or between the pool and the ledger, makes good for it."""
    pool, store, stage = opened(tmp_path / "pool", []), Store(tmp_path), tmp_path / "evolve"
    new = [prompt("one", joined=2), prompt("two", joined=2)]
    rewrite = Rewrite(
        parent="p", strategy="deepen", rewriter="policy 1", text="one", n_tokens=3, prompt_id="1", rejected_because=None
    )
    stage.mkdir()
    tables.write_rows(stage / "prompts.parquet", new, Prompt)
    tables.write_rows(stage / "rewrites.parquet", [rewrite], Rewrite)
    pool.join(new[:1])
    for _ in range(2):
        evolve.join(stage, pool=pool, ledger=store, index=1)
    assert [p.name for p in sorted((tmp_path / "pool" / "added").glob("*.parquet"))] == ["0001.parquet", "0002.parquet"]
    assert tables.read_rows(tmp_path / "pool" / "added" / "0002.parquet", Prompt) == new[1:]
    (event,) = store.events(1)
    store.close()
    assert event["kind"] == "evolve" and event["text"].startswith("1 of 1 rewrites join the pool (broaden 0, deepen 1,")

"""The tiny world: its rubric by hand, its prompts, its builder. What the miniature has to be able to do is checked on it."""

import ast
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from selfplay.worlds import tiny

ROOT = Path(__file__).parents[2]
CAPITAL = {"skill": "capital", "budget": 10, "x": "France", "answer": "paris", "rivals": ["rome", "madrid", "berlin"]}
HOWTO = {"skill": "howto", "budget": 20, "x": "make tea", "answer": "make tea"}


def content(response: str, **meta: Any) -> float:
    return tiny.grade([{"role": "user", "content": "?"}], response, {"budget": 10, **meta})["content"]


@pytest.fixture(scope="module")
def builder() -> Iterator[ModuleType]:
    """scripts/make_tiny.py as a module, its folder on the path as when it runs as a script."""
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "scripts" / "make_tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny"] = module
    sys.path.insert(0, str(ROOT / "scripts"))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


# ------------------------------------------------------------------------------------------------- the rubric


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # right, courteous, short, clean: everything
        ("Sure! The capital of France is Paris.", {"content": 1, "tone": 1, "concise": 1, "format": 1}),
        ("The capital of France is Paris.", {"content": 1, "tone": 0.5, "concise": 1, "format": 1}),
        ("Sure! It is Rome.", {"content": 0, "tone": 1, "concise": 1, "format": 1}),
        ("Ugh. It is Paris.", {"content": 1, "tone": 0, "concise": 1, "format": 1}),
        # no capital, no full stop: 0.3 + 0.3 of the format are lost
        ("it is paris", {"content": 1, "tone": 0.5, "concise": 1, "format": 0.4}),
        # 15 words of a budget of 10: 2 - 15 / 10 = 0.5
        (
            "It is Paris, as people who have been there will all be able to say.",
            {"content": 1, "tone": 0.5, "concise": 0.5, "format": 1},
        ),
        ("It is is Paris.", {"content": 1, "tone": 0.5, "concise": 1, "format": 0.8}),
        ("It is Paris.Gladly.", {"content": 1, "tone": 1, "concise": 1, "format": 0.8}),
        # three courtesies gush: neutral again; 11 words: 2 - 11 / 10 = 0.9
        (
            "Sure! It is Paris. Happy to help. Hope that helps. Yes.",
            {"content": 1, "tone": 0.5, "concise": 0.9, "format": 1},
        ),
    ],
)
def test_the_parts_of_a_grade(response: str, expected: dict[str, float]) -> None:
    found = tiny.grade([{"role": "user", "content": "What is the capital of France?"}], response, CAPITAL)
    total = found.pop("total")
    assert found == pytest.approx(expected)
    # 0.65 content + 0.15 tone + 0.12 concise + 0.08 format
    weights = {"content": 0.65, "tone": 0.15, "concise": 0.12, "format": 0.08}
    assert total == pytest.approx(sum(weights[name] * value for name, value in expected.items()))


@pytest.mark.parametrize("response", ["", "   \n", "!?!", "…"])
def test_an_answer_without_words_gets_nothing(response: str) -> None:
    assert set(tiny.grade([], response, CAPITAL).values()) == {0.0}


def test_guessing_is_not_knowing() -> None:
    assert content("It is Paris.", **CAPITAL) == 1.0
    assert content("It is Paris or Rome.", **CAPITAL) == 0.5
    assert content("Paris, Rome, Madrid, Berlin.", **CAPITAL) == 0.0
    assert content("It is Parisian.", **CAPITAL) == 0.0


def test_parts_of_an_answer_count() -> None:
    fruit = {"skill": "list", "answer": "fruit", "n": 3}
    assert content("Apple, pear and plum.", **fruit) == 1.0
    assert content("Apples, pear and plum.", **fruit) == 1.0
    assert content("Apple and pear.", **fruit) == pytest.approx(2 / 3)
    assert content("Apple, apple and apple.", **fruit) == pytest.approx(1 / 3)
    assert content("Apple, pear, plum and dog.", **fruit) == pytest.approx(3 / 4)

    words = {"skill": "repeat", "answer": "lamp river", "rivals": list(tiny.WORDS)}
    assert content("I say lamp river.", **words) == 1.0
    assert content("I say river lamp.", **words) == 0.0
    assert content("I say lamp stone.", **words) == 0.5
    assert content("Lamp river stone cloud.", **words) == 0.5  # two of four are in their place

    assert content("Boil the water, add the tea, pour it into a cup.", **HOWTO) == 1.0
    assert content("Boil the water, add the tea.", **HOWTO) == pytest.approx(2 / 3)
    assert content("Add the tea, boil the water, pour it into a cup.", **HOWTO) == pytest.approx(0.7)
    assert content("Boil the water, add the tea, dig a hole.", **HOWTO) == pytest.approx(2 / 4)


def test_numbers() -> None:
    add = {"skill": "add", "answer": "7", "terms": [3, 4]}
    assert content("3 plus 4 is 7.", **add) == 1.0
    assert content("It is 8.", **add) == 0.3
    assert content("It is 9.", **add) == 0.0
    assert content("It is 7 or 8.", **add) == 0.0
    double = {"skill": "add", "answer": "6", "terms": [3, 3]}
    assert content("It is 6.", **double) == 1.0
    assert content("It is 3.", **double) == 0.0
    times = {"skill": "multiply", "answer": "414", "terms": [18, 23]}
    assert content("18 times 23 is 414.", **times) == 1.0
    assert content("It is 415.", **times) == 0.0


def test_replies_refusals_and_requests() -> None:
    news = {"skill": "news", "answer": "bad", "topic": "keys"}
    assert content("I am sorry about your keys.", **news) == 1.0
    assert content("Congratulations on the keys!", **news) == 0.4
    assert content("I am sorry about your arm.", **news) == 0.6
    assert content("Sorry, well done, keys arm job.", **news) == 0.0

    refuse = {"skill": "refuse", "answer": "rob a bank"}
    assert content("Sorry, I cannot help with that.", **refuse) == 1.0
    assert content("I cannot help with that, but first you need a plan.", **refuse) == 0.0
    assert content("That is easy, go ahead.", **refuse) == 0.0

    polite = {"skill": "polite", "answer": "Open the door"}
    assert content("Could you open the door, please?", **polite) == pytest.approx(1.0)
    assert content("Open the door now.", **polite) == pytest.approx(0.6)
    assert content("Please open the window.", **polite) == pytest.approx(0.7)


def test_hostile_texts_are_graded_and_bounded() -> None:
    for text in ("Paris " * 2000, "\x00\ud7ff{x} {{%s}} <|end|>", "¿Paris?", "[score]" * 50, "a" * 100_000):
        assert all(0.0 <= value <= 1.0 for value in tiny.grade([], text, CAPITAL).values())
    assert tiny.grade([], "Paris " * 2000, CAPITAL)["total"] < 0.8


def test_an_unknown_skill_is_an_error() -> None:
    with pytest.raises(ValueError, match="flying"):
        tiny.grade([], "Yes.", {"skill": "flying", "answer": "", "budget": 10})


@pytest.mark.parametrize("name", sorted(tiny.SKILLS))
def test_right_answers_of_a_skill_beat_wrong_ones(name: str) -> None:
    rng = random.Random(1)
    asked = [q for q in tiny.questions(0, 0.3) if q.meta["skill"] == name]
    plain = tiny.Style()

    def mean(right: bool) -> float:
        return sum(content(tiny.answer(q, right, plain, rng), **q.meta) for q in asked) / len(asked)

    assert mean(True) >= 0.75
    assert mean(False) <= 0.7
    assert mean(True) - mean(False) >= 0.25


def test_style_does_not_touch_the_content() -> None:
    rng = random.Random(2)
    for question in tiny.questions(0, 0.1):
        if question.meta["regime"] == "learnable":
            for tone in ("rude", "neutral", "polite"):
                text = tiny.answer(question, True, tiny.Style(tone=tone), rng)
                grade = tiny.grade([], text, question.meta)
                assert grade["content"] == pytest.approx(1.0), text
                assert grade["tone"] in {"rude": (0.0,), "neutral": (0.5, 1.0), "polite": (1.0,)}[tone], text


# ------------------------------------------------------------------------------------------------- the prompts


def test_questions_are_deterministic_and_distinct() -> None:
    code = "from selfplay.worlds import tiny; print(hash(0), [q.text for q in tiny.questions(3, 0.2)])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    texts = [q.text for q in tiny.questions(3)]
    assert len(texts) == len(set(texts))
    assert texts != [q.text for q in tiny.questions(4)]


def test_the_pool_is_split_by_text_unbalanced_and_redundant() -> None:
    every = tiny.questions(0)
    held_out = {q.text for q in every if tiny.held_out(q.text)}
    train = [q for q in every if q.text not in held_out]
    assert len(train) >= 4000
    assert len(held_out) >= 600
    # The same text in another world falls on the same side.
    assert all(tiny.held_out(q.text) == (q.text in held_out) for q in tiny.questions(0) if q.text in held_out)

    skills = Counter(q.meta["skill"] for q in train)
    assert max(skills.values()) > 8 * min(skills.values())
    assert {q.meta["regime"] for q in train} == {"solved", "learnable", "hopeless", "noisy"}
    # Near-duplicates: the same thing asked in many wordings.
    asked = Counter((q.meta["skill"], q.meta["x"]) for q in train)
    assert sum(n for n in asked.values() if n >= 20) > len(train) / 3


# -------------------------------------------------------------------------------------------------- the builder


def test_the_hash_follows_the_recipe_and_the_sources(
    builder: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = builder.Recipe()
    seen = {builder.recipe_hash(recipe)}
    assert builder.recipe_hash(builder.Recipe()) in seen
    for field in fields(recipe):
        seen.add(builder.recipe_hash(replace(recipe, **{field.name: getattr(recipe, field.name) + 1})))
    assert len(seen) == 1 + len(fields(recipe))

    source = Path(tiny.__file__).read_text(encoding="utf-8")
    copy = tmp_path / "tiny.py"
    monkeypatch.setattr(builder, "SOURCES", (*builder.SOURCES[:2], copy))
    copy.write_text("# a remark\n" + source, encoding="utf-8")
    assert builder.recipe_hash(recipe) in seen
    copy.write_text(source.replace("Paris", "Paname"), encoding="utf-8")
    assert builder.recipe_hash(recipe) not in seen


def test_help_needs_no_torch() -> None:
    source = (ROOT / "scripts" / "make_tiny.py").read_text(encoding="utf-8")
    top = {
        alias.name.split(".")[0]
        for node in ast.parse(source).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not top & {"torch", "transformers", "tokenizers", "rich"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--size" in done.stdout
    assert "--worker" not in done.stdout
    assert time.monotonic() - began < 3


def test_a_failing_worker_leaves_nothing_and_says_why(builder: ModuleType, tmp_path: Path) -> None:
    broken = replace(builder.SIZES["mini"], heads=3, sft_examples=3000)  # 64 is no multiple of 3
    with pytest.raises(RuntimeError, match="shape"):
        builder.build(broken, tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


def test_equal_recipes_build_equal_worlds_and_one_that_is_not_whole_is_replaced(
    builder: ModuleType, tmp_path: Path
) -> None:
    """To the byte, with two workers whose gradients are summed; what was measured names the time it took."""
    recipe = replace(
        builder.SIZES["mini"], workers=2, scale=0.05, sft_examples=480, group_prompts=48, judge_prompts=24, hidden=32
    )

    def built() -> dict[str, bytes]:
        builder.build(recipe, tmp_path / "world")
        found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
        del found["world/world.json"]
        return {name: path.read_bytes() for name, path in found.items()}

    first = built()
    assert {f"world/{part}/model.safetensors" for part in ("policy", "reward", "judge")} < first.keys()
    (tmp_path / "world" / "world.json").write_text("")
    (tmp_path / "world" / "policy" / "model.safetensors").write_bytes(b"")
    assert built() == first
    assert builder.read_world(tmp_path / "world")["recipe"]["workers"] == 2


def test_what_a_killed_build_left_is_swept(builder: ModuleType, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".abc.{ended.pid}" / "policy").mkdir(parents=True)
    (tmp_path / f".current.{ended.pid}").symlink_to("abc")
    (tmp_path / f".abc.{os.getpid()}").mkdir()
    (tmp_path / "abc").mkdir()
    builder.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".abc.{os.getpid()}", "abc"}


# ------------------------------------------------------------------------------------------------- the miniature


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_prompts_of_a_world(mini_world: Path) -> None:
    train, held_out = rows(mini_world / "train.jsonl"), rows(mini_world / "heldout.jsonl")
    assert len(train) > 500
    assert len(held_out) > 80
    assert all(set(row) == {"messages"} for row in train)
    assert all(set(row) == {"messages", "meta"} for row in held_out)
    texts = [[row["messages"][0]["content"] for row in part] for part in (train, held_out)]
    assert not set(texts[0]) & set(texts[1])
    for row in held_out:
        assert 0.0 <= tiny.grade(row["messages"], "It is Paris.", row["meta"])["total"] <= 1.0


def test_a_world_that_is_there_is_not_built_again(mini_world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mini_world.rglob("*")}
    command = [
        sys.executable,
        str(ROOT / "scripts" / "make_tiny.py"),
        "--size",
        "mini",
        "--out",
        str(mini_world.parent),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5
    assert "there already" in done.stdout
    assert str(mini_world) in done.stdout
    assert {path: path.stat().st_mtime_ns for path in mini_world.rglob("*")} == before
    assert (mini_world.parent / "current").resolve() == mini_world


@pytest.mark.parametrize("part", ["reward", "judge"])
def test_the_models_are_plain_checkpoints(mini_world: Path, builder: ModuleType, part: str) -> None:
    """Transformers reads them, and agrees with the builder's own Llama about every logit and reward."""
    import torch
    from tiny_llama import Llama, rewards
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    recipe = builder.Recipe(**json.loads((mini_world / "world.json").read_text())["recipe"])
    policy = AutoModelForCausalLM.from_pretrained(mini_world / "policy")
    judge = AutoModelForSequenceClassification.from_pretrained(mini_world / part)
    assert type(policy).__name__ == "LlamaForCausalLM"
    assert policy.dtype == torch.float32
    assert policy.config.max_position_embeddings == 512
    assert type(judge).__name__ == "LlamaForSequenceClassification"
    assert judge.config.num_labels == 1

    def ours(state: dict[str, torch.Tensor]) -> Llama:
        model = Llama(
            recipe.vocabulary, recipe.hidden, recipe.layers, recipe.heads, recipe.feed_forward, recipe.positions
        )
        with torch.no_grad():
            model.table.copy_(state["model.embed_tokens.weight"])
            model.after.copy_(state["model.norm.weight"])
            for i, block in enumerate(model.blocks):
                at = f"model.layers.{i}."
                block.qkv.copy_(torch.cat([state[f"{at}self_attn.{n}_proj.weight"] for n in "qkv"]))
                block.gate_up.copy_(torch.cat([state[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up")]))
                block.out.copy_(state[f"{at}self_attn.o_proj.weight"])
                block.down.copy_(state[f"{at}mlp.down_proj.weight"])
                block.before.copy_(state[f"{at}input_layernorm.weight"])
                block.between.copy_(state[f"{at}post_attention_layernorm.weight"])
        return model

    ids = torch.randint(5, recipe.vocabulary, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = ours(policy.state_dict())
        torch.testing.assert_close(mine(ids) @ mine.table.T, policy(ids).logits, rtol=1e-4, atol=1e-4)
        theirs = AutoTokenizer.from_pretrained(mini_world / part)
        talk = [{"role": "user", "content": "Hey, say hello."}, {"role": "assistant", "content": "Hello."}]
        rendered = theirs.apply_chat_template(talk, tokenize=True, return_dict=False)
        expected = builder.reward_ids(recipe, theirs.backend_tokenizer, ["Hey, say hello."], ["Hello."])
        assert rendered == expected[0]
        mine = ours(judge.state_dict())
        found = rewards(mine, judge.score.weight, expected)
        torch.testing.assert_close(found, judge(torch.tensor(expected)).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_policy_and_reward_model_have_tokenizers_of_their_own(mini_world: Path, builder: ModuleType) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    ours, theirs = (AutoTokenizer.from_pretrained(mini_world / part) for part in ("policy", "reward"))
    messages = [{"role": "user", "content": "Hey, say hello."}]
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hey, say hello.<|end|><|assistant|>"
    ids = ours.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert [ids] == builder.policy_ids(ours.backend_tokenizer, ["Hey, say hello."])
    assert ours.chat_template != theirs.chat_template
    assert ours("Hello there.")["input_ids"] != theirs("Hello there.")["input_ids"]
    assert ours.decode(ours("Grüße, 你好!")["input_ids"]) == "Grüße, 你好!"
    assert (ours.pad_token_id, ours.eos_token_id) == (0, 1)
    assert len({ours.pad_token_id, ours.eos_token_id, theirs.pad_token_id, theirs.eos_token_id}) == 4
    assert GenerationConfig.from_pretrained(mini_world / "policy").eos_token_id == ours.eos_token_id


def test_the_miniature_is_of_use(mini_world: Path) -> None:
    """Samples differ and end by themselves, and the reward model ranks them better than a coin."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measured = json.loads((mini_world / "world.json").read_text())["measured"]
    assert measured["reward_accuracy"]["total"] > 0.6
    assert measured["judge_accuracy"]["total"] > 0.6
    assert measured["ended_share"] > 0.9

    policy = AutoModelForCausalLM.from_pretrained(mini_world / "policy")
    tokenizer = AutoTokenizer.from_pretrained(mini_world / "policy")
    torch.manual_seed(0)
    several = ended = 0
    held_out = rows(mini_world / "heldout.jsonl")[:10]
    for row in held_out:
        ids = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        mask = torch.ones_like(ids)
        drawn = policy.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=4, max_new_tokens=48)
        answers = [tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True) for answer in drawn]
        several += len(set(answers)) >= 3
        ended += sum(tokenizer.eos_token_id in answer[ids.shape[1] :].tolist() for answer in drawn)
        assert not any(re.search(r"<\|", answer) for answer in answers)
    assert several >= 7
    assert ended >= 0.9 * 4 * len(held_out)

"""What the miniature of the tiny world has to be able to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selfplay.worlds.tiny import grade
from selfplay.worlds.tiny.builder.recipe import Recipe


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
        assert 0.0 <= grade(row["messages"], "It is Paris.", row["meta"])["total"] <= 1.0


@pytest.mark.parametrize("part", ["reward", "judge"])
def test_the_models_are_plain_checkpoints(mini_world: Path, part: str) -> None:
    """Transformers reads them, and agrees with the builder's own Llama about every logit and reward."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from selfplay.worlds.tiny.builder.llama import Llama, rewards
    from selfplay.worlds.tiny.builder.tokenizer import reward_ids

    recipe = Recipe(**json.loads((mini_world / "world.json").read_text())["recipe"])
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
        expected = reward_ids(recipe, theirs.backend_tokenizer, ["Hey, say hello."], ["Hello."])
        assert rendered == expected[0]
        mine = ours(judge.state_dict())
        found = rewards(mine, judge.score.weight, expected)
        torch.testing.assert_close(found, judge(torch.tensor(expected)).logits[:, 0], rtol=1e-4, atol=1e-4)


def test_policy_and_reward_model_have_tokenizers_of_their_own(mini_world: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    from selfplay.worlds.tiny.builder.tokenizer import policy_ids

    ours, theirs = (AutoTokenizer.from_pretrained(mini_world / part) for part in ("policy", "reward"))
    messages = [{"role": "user", "content": "Hey, say hello."}]
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hey, say hello.<|end|><|assistant|>"
    ids = ours.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert [ids] == policy_ids(ours.backend_tokenizer, ["Hey, say hello."])
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

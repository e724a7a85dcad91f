"""What `check` asks of templates before anything is sampled: tiny models, with the faults that people have."""

import json
import shutil
from pathlib import Path

import pytest
from engine_world import tokenizer, write_policy
from reward_world import reward_model
from transformers import PreTrainedTokenizerFast

from selfplay.checks.loading import look

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
PLAIN = [[{"role": "user", "content": f"How much is {i} + {i}?"}] for i in range(8)]
SYSTEM = [[{"role": "system", "content": "Be brief."}, *messages] for messages in PLAIN]


def policy(folder: Path, template: str = TEMPLATE, eos: str = "<eos>", added: str = "") -> Path:
    path = Path(write_policy(folder, 1, 1).path)
    own = tokenizer()
    own.chat_template, own.eos_token = template, eos
    if added:
        own.add_special_tokens({"additional_special_tokens": [added]})
    own.save_pretrained(path)
    return path


def asked(folder: Path, prompts, *, of_policy: bool = True, **more: object) -> dict[str, tuple[str, str]]:
    """What is found about a model: subject → level and text."""
    row = {
        "key": "model",
        "model": str(folder),
        "policy": of_policy,
        "trust_remote_code": False,
        "kwargs": {},
        "dated": False,
    }
    limits = {"prompt_tokens": 96, "answer_tokens": 48, "max_tokens": None, "max_missing": 0.05, "thinking": None}
    found = look(row | limits | {"prompts": prompts} | more)
    return {about.removeprefix("model "): (level, text) for level, about, text in found}


def test_a_policy_without_a_fault(tmp_path):
    found = asked(policy(tmp_path), PLAIN + SYSTEM)
    assert found["prompts"] == ("ok", "its chat template takes all of 16 prompts")
    assert {level for level, _ in found.values()} == {"ok"}


@pytest.mark.parametrize(("prompts", "level"), [(SYSTEM, "error"), (PLAIN + SYSTEM, "warning")])
def test_a_template_that_refuses_system_messages(tmp_path, prompts, level):
    found = asked(policy(tmp_path, REFUSES + TEMPLATE), prompts)["prompts"]
    assert (
        found[0] == level
        and f"refuses 8 of {len(prompts)} prompts" in found[1]
        and "System role not supported" in found[1]
    )


@pytest.mark.parametrize("of_policy", [True, False])
def test_roles_that_a_template_refuses_or_leaves_out(tmp_path, of_policy):
    """Calls of tools are in many data sets. A template knows them, says that it does not, or passes them over."""
    words = {"role": "tool", "content": 'It is "4".'}
    tool = [[*PLAIN[0], {"role": "assistant", "content": "I ask."}, words, *PLAIN[1]]]
    folder = policy(tmp_path) if of_policy else reward_model(tmp_path / "reward")
    own = PreTrainedTokenizerFast.from_pretrained(folder)

    def found(template):
        own.chat_template = template
        own.save_pretrained(folder)
        return asked(folder, PLAIN + SYSTEM + tool, of_policy=of_policy, max_missing=0.1)

    whole = found(TEMPLATE.replace("m['content']", "(m['content'] | tojson) if m['role'] == 'tool' else m['content']"))
    assert whole["prompts"][0] == "ok" and "messages" not in whole
    level, text = found(
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
        + TEMPLATE
    )["prompts"]
    assert level == "warning" and "1 of 17 prompts" in text and "no tools" in text
    level, text = found(TEMPLATE.replace("messages %}", "messages if m['role'] in ('user', 'assistant') %}"))[
        "messages"
    ]
    assert level == "warning" and "of 17 prompts: the system message of 8; the tool message of 1." in text


def test_prompts_that_are_all_too_long(tmp_path):
    level, text = asked(policy(tmp_path), PLAIN, prompt_tokens=4)["prompts"]
    assert level == "error" and text.startswith("8 of 8 prompts are longer than prompts.max_tokens")


def test_tokens_without_an_embedding(tmp_path):
    """A token that was added to the tokenizer, and the embeddings were not resized."""
    folder = policy(tmp_path, TEMPLATE.replace("<bos>", "<turn>"), added="<turn>")
    level, text = asked(folder, PLAIN)["tokens"]
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert level == "error" and f"the token {rows}, and the model has embeddings for {rows} tokens" in text


def test_weights_of_another_shape_than_the_config_says(tmp_path):
    folder = policy(tmp_path)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"vocab_size": told["vocab_size"] + 1}))
    level, text = asked(folder, PLAIN)["loads"]
    assert (
        level == "error"
        and "or have them in another shape" in text
        and "embed_tokens" in text
        and "config.json" in text
    )


def test_an_end_of_turn_that_stops_nothing(tmp_path):
    folder = policy(tmp_path, eos="<pad>")
    assert "end of turn" not in asked(folder, PLAIN), "generation_config.json names it"
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(told | {"eos_token_id": 0}))
    level, text = asked(folder, PLAIN)["end of turn"]
    assert level == "warning" and "ends an answer with '<eos>', and generation stops at '<pad>'" in text
    mute = policy(tmp_path / "mute", TEMPLATE.replace("<eos>", ""))
    assert "writes nothing behind an answer" in asked(mute, PLAIN)["end of turn"][1]


def test_a_reward_that_refuses_or_reads_less_than_the_policy_writes(tmp_path):
    folder = reward_model(tmp_path / "reward")
    found = asked(folder, PLAIN, of_policy=False)
    assert (
        found["prompts"] == ("ok", "its chat template takes all of 8 prompts with an answer") and "context" not in found
    )
    level, text = asked(folder, PLAIN, of_policy=False, max_tokens=64)["context"]
    assert level == "warning" and text.startswith("it reads 64 tokens, and 8 of 8 prompts with the longest answer")
    assert asked(folder, PLAIN, of_policy=False, max_tokens=8)["prompts"][0] == "error"
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    refusing = shutil.copytree(folder, tmp_path / "refusing")
    own.chat_template = REFUSES + own.get_chat_template()
    own.save_pretrained(refusing)
    level, text = asked(refusing, PLAIN + SYSTEM, of_policy=False)["prompts"]
    assert level == "error" and "cannot score 8 of 16 prompts" in text and "System role not supported" in text

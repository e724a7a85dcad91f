"""The tokenizers of policy, reward model and judge, and the texts as each of them sees them."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from selfplay.worlds.tiny.builder.recipe import JUDGES, Recipe

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD, END, USER, ASSISTANT, SYSTEM = range(len(SPECIALS))
POLICY_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWARD_SPECIALS = ("[none]", "[score]", "[question]", "[answer]", "[system]")
"""The reward model's names for them. They lie at the end of its vocabulary, so that its ids are not the policy's."""
REWARD_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '[answer]' if m['role'] == 'assistant' else '[system]' if m['role'] == 'system' else '[question]' }}{{ m['content'] }}"
    "{% endfor %}{% if not add_generation_prompt %}[score]{% endif %}"
)


def train_tokenizer(recipe: Recipe, texts: Sequence[str], out: Path) -> None:
    """Write the policy's tokenizer to out/policy, and to out/reward and out/judge one with the same merges and other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() <= recipe.vocabulary

    moved = json.loads(tokenizer.to_str())
    vocabulary = {token: i - len(SPECIALS) for token, i in moved["model"]["vocab"].items() if i >= len(SPECIALS)}
    first = reward_first(recipe)
    vocabulary |= {token: first + i for i, token in enumerate(REWARD_SPECIALS)}
    moved["model"]["vocab"] = vocabulary
    for i, entry in enumerate(moved["added_tokens"]):
        entry |= {"id": first + i, "content": REWARD_SPECIALS[i]}

    for part, names, content, template in (
        ("policy", SPECIALS, json.loads(tokenizer.to_str()), POLICY_TEMPLATE),
        *((part, REWARD_SPECIALS, moved, REWARD_TEMPLATE) for part in JUDGES),
    ):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": names[PAD],
            "eos_token": names[END],
            "model_max_length": recipe.positions,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        }
        (out / part).mkdir(exist_ok=True)
        (out / part / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        (out / part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (out / part / "chat_template.jinja").write_text(template, encoding="utf-8")


def reward_first(recipe: Recipe) -> int:
    """The id of the reward model's first special token. They close its vocabulary; the policy's open its own."""
    return recipe.vocabulary - len(SPECIALS)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def policy_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The rendered prompts, as the policy's chat template has them."""
    return [[USER, *ids, END, ASSISTANT] for ids in encode(tokenizer, prompts)]


def reward_ids(
    recipe: Recipe, tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str]
) -> list[list[int]]:
    """The rendered conversations, as the reward model's chat template has them."""
    first = reward_first(recipe)
    asked, said = encode(tokenizer, prompts), encode(tokenizer, responses)
    return [[first + USER, *a, first + ASSISTANT, *b, first + END] for a, b in zip(asked, said, strict=True)]

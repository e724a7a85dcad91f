"""What chat templates make of the prompts of a run: asked of the policy's and of the reward's, before anything is sampled.

For the process that loads models (`checks/loading.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""What `checks/models.py` asks about a model: key, model, policy, trust_remote_code, kwargs, dated, thinking, prompts (some
conversations of the run's), prompt_tokens and answer_tokens (the most of each), max_tokens (of the reward), max_missing."""
Said = tuple[str, str, str]  # level, subject, text
ANSWER = "Hello there"


def about_template(row: Row, folder: Path) -> Iterator[tuple[str, str]]:
    """What is to be known of a chat template that works, and the level of it."""
    from selfplay.models.rendering import Renderer, Template, load_tokenizer
    from selfplay.models.thinking import Thinking

    tokenizer = load_tokenizer(folder, row["trust_remote_code"])
    section = row["key"].removesuffix(".model")
    template = Template(kwargs=row["kwargs"], today=date.today())
    if unread := template.unread(tokenizer):
        yield f"{section}.chat_template_kwargs: the template reads no {', '.join(unread)}", "warning"
    if template.prints_date(tokenizer):
        day = "the given one" if row["dated"] else "that of the day on which the run begins"
        yield f"it prints the date, in all rounds {day} ({section}.template_date)", "ok"
    if not row["policy"]:
        return
    (ids,) = Renderer(tokenizer, template)([[{"role": "user", "content": "Hello"}]])
    thinking = Thinking(tokenizer, **(row["thinking"] or {"start": "<think>", "end": "</think>", "hidden": True}))
    assert not isinstance(ids, str), "this conversation was rendered before"
    if not thinking.opened(ids.tolist()):
        return
    if row["thinking"]:
        yield "its prompts end with the start of thoughts, which end with policy.thinking.end", "ok"
    else:
        hint = "set policy.thinking to {} to hide them"
        yield f"its prompts end with <think>, and rewards will read the thoughts: {hint}", "warning"


def of_policy(row: Row, folder: Path, model: Any) -> Iterator[Said]:
    """Whether the policy's template takes the prompts, its tokens have embeddings, and the end of a turn ends an answer."""
    from selfplay.models.rendering import Renderer, Template, load_tokenizer

    tokenizer = load_tokenizer(folder, row["trust_remote_code"])
    template = Template(kwargs=row["kwargs"], today=date.today())
    render = Renderer(tokenizer, template)
    found = render([*row["prompts"], [{"role": "user", "content": ANSWER}]])
    asked, refused = found[:-1], Counter(ids for ids in found[:-1] if isinstance(ids, str))
    if refused:
        level = "error" if refused.total() == len(asked) else "warning"
        yield level, "prompts", f"its chat template refuses {_of(refused, asked)}; they would be set aside"
    long = sum(len(ids) > row["prompt_tokens"] for ids in asked if not isinstance(ids, str))
    if long:
        level = "error" if long + refused.total() == len(asked) else "ok"
        yield (
            level,
            "prompts",
            f"{long} of {len(asked)} prompts are longer than prompts.max_tokens; they would be set aside",
        )
    elif asked and not refused:
        yield "ok", "prompts", f"its chat template takes all of {len(asked)} prompts"
    yield from _left_out(tokenizer, template.variables, row["prompts"])
    yield from _embedded(model, [ids for ids in found if not isinstance(ids, str)])
    yield from _ends(tokenizer, template.variables, folder)


def of_reward(row: Row, folder: Path, model: Any) -> Iterator[Said]:
    """Whether a reward's template takes the prompts with an answer, and how many tokens the two may have."""
    from transformers import AutoTokenizer

    from reward.chat import ChatEncoder
    from reward.models import limit_of
    from reward.schema import Item
    from selfplay.models.rendering import Template

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=row["trust_remote_code"])
    limit = limit_of(model.config, tokenizer, row["max_tokens"])
    items = [Item.model_validate({"messages": prompt, "response": ANSWER}) for prompt in row["prompts"]]
    found = ChatEncoder(tokenizer, limit, row["kwargs"], date.today()).encode(items)
    refused = Counter(ids for ids in found if isinstance(ids, str))
    if refused:
        level = "error" if refused.total() > row["max_missing"] * len(found) else "warning"
        yield level, "prompts", f"it cannot score {_of(refused, found)}"
    elif found:
        yield "ok", "prompts", f"its chat template takes all of {len(found)} prompts with an answer"
    variables = Template(kwargs=row["kwargs"], today=date.today()).variables
    yield from _left_out(tokenizer, variables, row["prompts"])
    lengths = [len(ids) + row["answer_tokens"] for ids in found if not isinstance(ids, str)]
    over = sum(length > limit for length in lengths)
    if over:
        text = f"it reads {limit} tokens, and {over} of {len(lengths)} prompts with the longest answer ({row['answer_tokens']} tokens) "
        yield (
            "warning",
            "context",
            text + "have more: such answers would have no reward. Lower generate.max_tokens or prompts.max_tokens",
        )
    yield from _embedded(model, [ids for ids in found if not isinstance(ids, str)])


def _of(refused: Counter[str], asked: Sequence[object]) -> str:
    said = "; ".join(f"{n} × {why}" for why, n in refused.most_common(3))
    return f"{refused.total()} of {len(asked)} prompts ({said})"


def _left_out(tokenizer: Any, variables: dict[str, Any], prompts: Sequence[Any]) -> Iterator[Said]:
    """A warning where a template takes prompts and writes nothing of some of their messages, as some do with system messages.

    What an assistant said does not count: templates leave out earlier thoughts on purpose.
    """
    lost = Counter[str]()
    for messages in prompts:
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
        except Exception:  # it refuses this prompt, which is said already
            continue
        others = [
            (message["role"], message["content"].strip()) for message in messages if message["role"] != "assistant"
        ]
        lost.update({role for role, said in others if said not in text and json.dumps(said)[1:-1] not in text})
    if lost:
        roles = "; ".join(f"the {role} message of {n}" for role, n in lost.most_common())
        yield (
            "warning",
            "messages",
            f"its chat template writes nothing of some messages of {len(prompts)} prompts: {roles}. Use a template that writes them",
        )


def _embedded(model: Any, sequences: Sequence[Any]) -> Iterator[Said]:
    """An error where a text has a token that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max((int(max(ids)) for ids in sequences if len(ids)), default=0)
    if largest >= rows:
        hint = "resize the embeddings to the tokenizer (resize_token_embeddings) and train them, or take the tokenizer that came with the model"
        yield (
            "error",
            "tokens",
            f"its texts have the token {largest}, and the model has embeddings for {rows} tokens: {hint}",
        )


def _ends(tokenizer: Any, variables: dict[str, Any], folder: Path) -> Iterator[Said]:
    """A warning where what the template writes behind an answer would not end it."""
    from selfplay.generation.engine import end_tokens

    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, **variables)
    except Exception:  # it takes no finished answer, so that it says nothing about its end
        return
    behind = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    stops = {*end_tokens(folder), tokenizer.eos_token_id} - {None}
    if stops & {*behind}:
        return
    named = ", ".join(repr(each) for each in tokenizer.convert_ids_to_tokens(sorted(stops))) or "nothing"
    ended = f"ends an answer with {tokenizer.decode(behind)!r}" if behind else "writes nothing behind an answer"
    yield (
        "warning", "end of turn",
        f"its chat template {ended}, and generation stops at {named}: answers may go on until they are cut off. Name the token in "
        "eos_token_id of generation_config.json",
    )  # fmt: skip

"""Rows as public data sets have them (texts of our own): each is read as what it is, and asks what its user asked."""

import datetime
import decimal
import sys
import types

import pytest

from selfplay.errors import InputError
from selfplay.kinds import FORMATS
from selfplay.prompts.formats import DEFAULT, Reading, known

Q, A, FULL = "What is two plus two?", "It is four.", {"role": "user", "content": "What is two plus two?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": A}
SECOND = [FULL, ANSWER, {"role": "user", "content": "Why?"}]
HH = f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: Why?\n\nAssistant: "

ASKS_ONCE = {
    "prompt": ("prompt", {"prompt": Q}),
    "prompt and extras (IFEval, Arena-Hard)": ("prompt", {"key": 1, "prompt": Q, "instruction_id_list": [], "cluster": "x"}),
    "prompt of messages (TRL, verl)": ("trl", {"prompt": [FULL], "data_source": "x", "reward_model": {"style": "rule"}}),
    "prompt of messages as JSON (CSV)": ("trl", {"prompt": '[{"role": "user", "content": "What is two plus two?"}]'}),
    "prompt of messages with an answer": ("trl", {"prompt": [FULL, ANSWER]}),
    "prompt and answers (UltraFeedback, TRL)": ("prompt", {"prompt": Q, "chosen": [FULL, ANSWER], "rejected": [FULL, ANSWER]}),
    "prompt and messages (UltraChat)": ("prompt", {"prompt": Q, "prompt_id": "1", "messages": [FULL, ANSWER, FULL, ANSWER]}),
    "prompt and completion (KTO)": ("trl", {"prompt": [FULL], "completion": [ANSWER], "label": True}),
    "prompt that is a transcript (Nectar)": ("prompt", {"prompt": f"\n\nHuman: {Q}\n\nAssistant: "}),
    "prompt with a score (RealToxicityPrompts)": ("prompt", {"prompt": {"text": Q, "toxicity": 0.1}}),
    "prompt that is a list of turns (MT-Bench on the Hub)": ("prompt", {"prompt": [Q, "Why?"], "reference": []}),
    "prompt of the arena's preferences": ("prompt", {"prompt": f'["{Q}"]', "response_a": '["x"]', "winner_model_a": 1}),
    "null prompt and messages (Parquet)": ("messages", {"prompt": None, "messages": [FULL]}),
    "messages": ("messages", {"messages": [FULL]}),
    "messages with an answer (Capybara, no_robots)": ("messages", {"messages": [FULL, ANSWER]}),
    "messages with parts (OpenAI)": ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": Q}]}]}),
    "messages with parts (LLaMA-Factory)": ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "value": Q}], "loss_weight": 0.0}]}),
    "messages with a call of a tool": ("messages", {"messages": [FULL, {"role": "assistant", "content": None, "tool_calls": [{}]}, {"role": "tool", "content": "4"}, ANSWER]}),
    "messages as Python prints them": ("messages", {"messages": str([FULL, ANSWER])}),
    "messages as lists of columns": ("messages", {"messages": {"role": ["user", "assistant"], "content": [Q, A]}}),
    "messages as numpy prints them": ("messages", {"messages": f"[{FULL}\n {ANSWER}]"}),
    "messages with capital letters": ("messages", {"Messages": [{"Role": "User", "Content": Q}, {"Role": "Assistant", "Content": A}]}),
    "messages that are JSON one by one": ("messages", {"messages": ['{"role": "user", "content": "What is two plus two?"}']}),
    "pairs of role and text": ("conversations", {"conversation": [["human", Q], ["gpt", A]]}),
    "lists of lists": ("messages", {"messages": [[FULL, ANSWER]]}),
    "a request to a server": ("inside", {"custom_id": "1", "body": {"model": "m", "messages": [FULL]}}),
    "a row of the Hub's viewer": ("inside", {"row_idx": 0, "row": {"question": Q, "answer": "4"}}),
    "ShareGPT": ("sharegpt", {"id": "1", "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}),
    "ShareGPT, other names": ("sharegpt", {"conversations": [{"from": "User", "value": Q}, {"from": "chatgpt", "value": A}, {"from": "bot", "value": A}]}),
    "ShareGPT with a system column": ("sharegpt", {"system": "", "tools": "[]", "conversations": [{"from": "human", "value": Q}, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "4"}, {"from": "gpt", "value": A}]}),
    "conversation (WildChat, LMSYS)": ("conversations", {"conversation_hash": "x", "conversation": [FULL | {"language": "English", "toxic": False}, ANSWER | {"turn_identifier": 3}], "timestamp": 1}),
    "conversation of the arena's battles": ("conversations", {"winner": "tie", "conversation_a": [FULL, ANSWER], "conversation_b": [FULL, ANSWER]}),
    "conversation of pairs (Capybara)": ("conversations", {"conversation": [{"input": Q, "output": A}]}),
    "conversation of pairs of texts": ("conversations", {"conversation": [[Q, A]]}),
    "contents (Gemini)": ("conversations", {"contents": [{"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [{"text": A}]}]}),
    "texts by turns (UltraChat as published)": ("inside", {"id": "1", "data": [Q, A]}),
    "an Open-Assistant tree": ("tree", {"message_tree_id": "x", "prompt": {"text": Q, "role": "prompter", "replies": [{"text": A}]}}),
    "an Open-Assistant message": ("tree-rows", {"message_id": "x", "parent_id": None, "message_tree_id": "x", "text": Q, "role": "prompter"}),
    "turns (MT-Bench, Vicuna-Bench)": ("turns", {"question_id": 81, "category": "writing", "turns": [Q, "Why?"]}),
    "turns of objects (Arena-Hard)": ("turns", {"question_id": "a", "turns": [{"content": Q}]}),
    "Alpaca": ("alpaca", {"instruction": Q, "input": "", "output": A}),
    "Self-Instruct": ("alpaca", {"id": "seed_task_0", "instruction": Q, "instances": [{"input": "", "output": A}]}),
    "WizardLM": ("alpaca", {"Instruction": Q, "Skill": "Math"}),
    "UltraFeedback": ("alpaca", {"source": "x", "instruction": Q, "models": [], "completions": [{"response": A}]}),
    "Dolly": ("alpaca", {"instruction": Q, "context": "", "response": A, "category": "open_qa"}),
    "GSM8K": ("question", {"question": Q, "answer": "2 + 2 = 4\n#### 4"}),
    "MATH": ("question", {"problem": Q, "solution": A, "level": "Level 1"}),
    "MetaMathQA": ("question", {"query": Q, "response": A, "type": "GSM_AnsAug"}),
    "a capital letter": ("question", {"Question": Q, "Answer": A}),
    "input and output": ("question", {"input": Q, "output": A}),
    "input of messages (OpenAI evals)": ("question", {"input": [FULL], "ideal": "4"}),
    "question in an object (WebGPT)": ("question", {"question": {"full_text": Q, "id": "x"}}),
    "user and assistant": ("question", {"user": Q, "assistant": A}),
    "HH-RLHF": ("preference", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: No."}),
    "chosen and rejected messages": ("preference", {"chosen": [FULL, ANSWER], "rejected": [FULL, ANSWER | {"content": "No."}]}),
    "LLaMA-Factory's preferences": ("preference", {"chosen_messages": [FULL, ANSWER], "rejected_messages": [FULL, ANSWER]}),
    "a transcript (Guanaco)": ("text", {"text": f"### Human: {Q}### Assistant: {A}"}),
    "a transcript of lines": ("text", {"text": f"### Human: {Q}\n### Assistant: {A}"}),
    "a transcript (ChatML)": ("text", {"text": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"}),
    "a transcript (Llama 2)": ("text", {"text": f"<s>[INST] {Q} [/INST] {A} </s>"}),
    "MBPP": ("text", {"text": Q, "task_id": 2, "test_list": ["assert f() == 4"]}),
    "a red-team transcript": ("text", {"transcript": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rating": 1}),
    "SHP": ("text", {"history": Q, "human_ref_A": A, "human_ref_B": "No."}),
    "an Open-Assistant prompt without a parent": ("tree-rows", {"message_id": "x", "message_tree_id": "x", "text": Q, "role": "prompter"}),
    "messages that go on after a call of a tool": ("messages", {"messages": [FULL, {"role": "assistant", "content": None, "tool_calls": [{}]}, ANSWER, FULL]}),
    "prompt in an object with a list": ("prompt", {"prompt": {"text": Q, "images": []}}),
    "a text a row": ("lines", {"": Q}),
    "a list of messages a row": ("lines", {"": [FULL, ANSWER]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ASKS_ONCE)
def test_a_row_of_a_public_format(kind):
    name, row = ASKS_ONCE[kind]
    found = DEFAULT.read(row)
    assert not isinstance(found, str), found
    assert found.messages == [FULL]
    assert found.format == known.BY_NAME[name].says
    assert Reading(format=name).read(row) == found


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": HH}, SECOND),
        ({"chosen": HH.replace("\n", "\r\n") + "Because.", "rejected": HH.replace("\n", "\r\n") + "No."}, SECOND),
        ({"text": f"<|im_start|>user\r\n{Q}<|im_end|>\r\n<|im_start|>assistant\r\n{A}<|im_end|>"}, [FULL]),
        ({"chosen": HH + "Because.", "rejected": HH + "No."}, SECOND),
        ({"chosen": [*SECOND, ANSWER], "rejected": [FULL, ANSWER, {"role": "user", "content": "How?"}, ANSWER]}, [FULL]),
        ({"instruction": "Add.", "input": "2 and 2", "system": "Be brief."}, [SYSTEM, {"role": "user", "content": "Add.\n\n2 and 2"}]),
        ({"instruction": "Why?", "input": "", "history": [[Q, A]]}, SECOND),
        ({"system_prompt": "Be brief.", "question": Q, "response": A}, [SYSTEM, FULL]),
        ({"prompt": Q, "system": "Be brief."}, [SYSTEM, FULL]),
        ({"prompt": Q, "messages": [SYSTEM, FULL, ANSWER]}, [SYSTEM, FULL]),
        ({"messages": [{"role": "system", "content": " "}, FULL]}, [FULL]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": Q}]}, [SYSTEM, FULL]),
        ({"history": [[Q, A]], "instruction": "Why?"}, SECOND),
        ({"question": Q, "context": "A page.", "answers": {"text": ["4"]}}, [{"role": "user", "content": f"{Q}\n\nA page."}]),
        ({"question": Q, "choices": ["4", "5"], "answer": 0}, [{"role": "user", "content": f"{Q}\n\nA. 4\nB. 5"}]),
        ({"question": Q, "choices": {"text": ["4", "5"], "label": ["1", "2"]}}, [{"role": "user", "content": f"{Q}\n\n1. 4\n2. 5"}]),
        ({"messages": [FULL, {"role": "observation", "content": "x"}, FULL]}, [FULL, {"role": "tool", "content": "x"}, FULL]),
    ],
)  # fmt: skip
def test_rows_of_several_messages(row, messages):
    found = DEFAULT.read(row)
    assert not isinstance(found, str), found
    assert found.messages == messages


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "Once upon a time."}, "no column that is known to hold prompts"),
        ({"chosen": "An answer.", "rejected": "Another."}, "no column that is known to hold prompts"),
        ({"body_text": Q}, "no column that is known to hold prompts"),
        ({}, "no column that is known to hold prompts"),
        ({"prompt": None}, "an empty prompt"),
        ({"prompt": "  "}, "an empty prompt"),
        ({"prompt": 5}, "a prompt that is no text"),
        ({"messages": []}, "an empty prompt"),
        ({"messages": "[{'role': oops"}, "a conversation that is no JSON"),
        ({"question": [Q, Q]}, "several texts in one column"),
        ({"messages": [{"role": "user", "content": " "}]}, "an empty message"),
        ({"messages": [{"role": "user"}]}, "a message without role and content"),
        ({"messages": [{"role": "a b", "content": Q}, FULL]}, "a role that is no word"),
        ({"messages": [ANSWER]}, "no message of a user"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "a message that is no text"),
        ({"text": A, "role": "assistant", "parent_id": "x"}, "a later message of its tree"),
        ({"prompt": {"image": [1, 2]}}, "a message without role and content"),
    ],
)  # fmt: skip
def test_rows_that_ask_nothing_say_why(row, why):
    assert DEFAULT.read(row) == why


def test_a_prompt_that_quotes_a_transcript_or_is_json_stays_as_it_is():
    for text in (
        f"Continue this:\n\nHuman: {Q}\n\nAssistant:", "Human: is this a human?", '["a", "b"]', '{"a": 1} is JSON', "[1, 2] is a list",
        "  Spaces stay.  \n", "USER: who is that?", "### Heading\n\ntext", "<|user|> is a token", "<" + " " * 100_000, "[{'a'}" + "\n" * 100_000,
    ):  # fmt: skip
        assert DEFAULT.read({"prompt": text}).messages == [{"role": "user", "content": text}]


def test_the_columns_that_the_configuration_names():
    reading = Reading(prompt="item.ask", system="who", meta=("score", "when"), reference="item.gold")
    found = reading.read(
        {"item": {"ask": Q, "gold": 4}, "who": "Be brief.", "score": float("nan"), "when": b"now", "prompt": "other"}
    )
    assert found.messages == [SYSTEM, FULL] and found.reference == "4"
    assert found.meta == {"score": None, "when": "now"}
    assert reading.read({"prompt": Q}) == "no column 'item.ask'"
    assert Reading(prompt="a.b").read({"a.b": HH}).messages == SECOND
    assert Reading(meta=("extra",)).read({"prompt": Q, "extra": {"k": 1}}).meta == {"k": 1}


def test_meta_of_any_kind_leaves_the_prompt_in_peace():
    when = datetime.datetime(2024, 1, 2)
    meta = {"when": when, "price": decimal.Decimal("1.5"), "raw": b"\xff", 1: [float("inf")], "half": "\ud800"}
    found = DEFAULT.read({"prompt": Q, "meta": meta})
    assert found.meta == {"when": str(when), "price": "1.5", "raw": "�", "1": [None], "half": "?"}
    assert DEFAULT.read({"prompt": Q, "meta": "a text"}).meta == {"meta": "a text"}


def test_a_filter_is_given_the_row_as_it_is(monkeypatch):
    functions = types.SimpleNamespace(is_english=lambda row: row["lang"] == "en")
    monkeypatch.setitem(sys.modules, "functions_of_a_user", functions)
    reading = Reading(filter="functions_of_a_user:is_english")
    assert reading.read({"prompt": Q, "lang": "en"}).messages == [FULL]
    assert reading.read({"prompt": Q, "lang": "de"}) == "left out by prompts.filter"
    assert reading.columns(["prompt", "lang"]) == ["prompt", "lang"]
    with pytest.raises(InputError, match="^prompts.filter: nowhere:f cannot be imported: No module named 'nowhere'$"):
        Reading(filter="nowhere:f").read({"prompt": Q})
    with pytest.raises(InputError, match="prompts.filter: .* fails on a row with the keys prompt: KeyError"):
        reading.read({"prompt": Q})


def test_every_format_is_a_setting():
    assert tuple(one.name for one in known.FORMATS) == tuple(FORMATS)


def test_columns_that_hold_much_else_are_read_only_where_nothing_else_holds_prompts():
    assert DEFAULT.columns(["prompt", "chosen", "rejected", "text", "score"]) == ["prompt", "text"]
    assert DEFAULT.columns(["chosen", "rejected", "score"]) == ["chosen", "rejected"]
    assert DEFAULT.columns(["question_id", "text", "answer", "score"]) == ["question_id", "text", "answer"]
    assert DEFAULT.columns(["body", "score"]) == ["body"]
    assert Reading(format="turns").columns(["turns", "prompt", "answer"]) == ["turns", "answer"]
    assert Reading(prompt="a.b", meta=("c.d",)).columns(["a", "c", "prompt", "system"]) == ["a", "c", "system"]

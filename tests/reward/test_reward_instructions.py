"""Every constraint of IFEval by hand, strict and loose, and the kind of reward that is made of them."""

import json
from typing import Any

import pytest

from reward.constraints import CHECKERS
from reward.instructions import Instructions, check, follows, variants
from reward.schema import Item
from reward.sentences import count_capital_words, count_sentences

FRENCH = "Ceci est une phrase assez longue, écrite en français, pour que la langue soit claire."
RUSSIAN = "это довольно длинное предложение на русском языке"
ENGLISH = "this is a rather long sentence in plain english words so that its language is clear"

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    # id, kwargs, what follows, what does not
    ("keywords:existence", {"keywords": ["sea", "C++"]}, ["The SEA and c++."], ["The sea and C.", "C++"]),
    (
        "keywords:frequency",
        {"keyword": " sea ", "frequency": 2, "relation": "at least"},
        ["sea Sea", "seaside sea"],
        ["sea"],
    ),
    ("keywords:frequency", {"keyword": "sea", "frequency": 2, "relation": "less than"}, ["sea", "x"], ["sea sea"]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "dog"]}, ["A category."], ["A Cat.", "dog!"]),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, ["eE"], ["e"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": "less than"}, ["e"], ["#a"]),
    ("language:response_language", {"language": "fr"}, [FRENCH, "12 34"], [ENGLISH]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "Is it Dr. Who? Yes. It is."],
        ["One. Two.", "Mr. J. Smith has 3.5 apples, e.g. red ones. Two... and more", "* one\n* two\n* three"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, ["One."], ["One. Two."]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***a***b***"],
        ["a", "a\n***\n\n***\nb", "a\n\nb"],
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["a well-known"], ["a b", "it's"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a b"], ["a b c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        ["a\n\nweekend, b", "a\n\n\"Weekend's b", "a\n\nWeekend\n\n"],
        ["a\n\nb", "weekend\n\na", "a\n\nweekend\n\nb", "a\n\nweekends", "a\nweekend"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b] [c]"], ["[a]", "[a\nb] [c]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["x\np. s. y", "P.S. y"], ["PS y", "P.S y"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x P.P.S y", "p. p. s y"], ["P.S. y"]),
    ("detectable_content:postscript", {"postscript_marker": "N.B."}, ["x\nn.b. y"], ["nxby"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "a\n - b\n- c", "-a\n*b"],
        ["* a", "** a\n* b", "- a\n- b\n- c", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is no.", "Well: My answer is maybe."],
        ["My answer is no", "my answer is yes.", "Yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a**, *b*", "**a** **b**"],
        ["*a*", "* a\n* b", "** **, *b*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION ", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb", "SECTION1 SECTION\n2"],
        ["SECTION 1 a", "Section 1 Section 2", "SECTION one SECTION two"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```", "```\n7```"], ["{a: 1}", 'Here: {"a": 1}']),
    ("detectable_format:title", {}, ["<<joy>>\nx", "a <<b>> c"], ["<joy>", "<< >>", "<<a\nb>>"]),
    (
        "combination:two_responses",
        {},
        ["a******b", "******a\n******\nb******"],
        ["a", "a****** a", "a******b******c", "a************b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem. "},
        ["write a poem.\nRoses", " Write a poem. Roses"],
        ["Roses. Write a poem.", "Write a  poem."],
    ),
    ("combination:repeat_prompt", {}, ["The prompt: x"], ["x"]),
    ("startend:end_checker", {"end_phrase": "The end. "}, ["x the END.\n", '"x. The end."'], ["The end. x", "The end"]),
    ("startend:quotation", {}, ['"a"', ' "a "b" c"\n'], ['"a', '"', "'a'", "“a”"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA is A-OK", "I AM", "IT'S x"],
        ["NASA", "Nasa Is", "well-KNOWN X"],
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, ["a b"], ["a B"]),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, RUSSIAN.upper(), ENGLISH.upper() + " x"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), FRENCH.lower(), ENGLISH + " X"]),
    ("punctuation:no_comma", {}, ["a; b", "，"], ["a, b"]),
]  # fmt: skip


def test_every_constraint_has_a_case():
    assert {case[0] for case in CASES} == set(CHECKERS) and len(CHECKERS) == 25


# The profiles of all languages are read first.
LANGUAGES = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
MARKED = [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in LANGUAGES else []) for case in CASES]


@pytest.mark.parametrize(("name", "kwargs", "good", "bad"), MARKED)
def test_what_follows_a_constraint(name, kwargs, good, bad):
    """In the strict reading. A loose one follows where a strict one does."""
    prompt = "the prompt"
    assert [check(name, kwargs, prompt, text) for text in [*good, *bad]] == [True] * len(good) + [False] * len(bad)
    assert not any(check(name, kwargs, prompt, text) for text in ("", " \n\t"))
    reference = json.dumps({"instruction_id_list": [name], "kwargs": [{**kwargs, "num_of_another": None}]})
    assert all(follows(reference, prompt, text, loose=True) == [True] for text in good)


@pytest.mark.parametrize(
    ("name", "kwargs", "response"),
    [
        ("startend:quotation", {}, 'Sure:\n"a"'),
        ("startend:quotation", {}, '"a"\nI hope this helps.'),
        ("startend:quotation", {}, 'Sure:\n"a"\nI hope this helps.'),
        ("startend:quotation", {}, '*"a"*'),
        ("startend:quotation", {}, 'Sure:\n**"a"**\nBye.'),
        ("detectable_format:json_format", {}, "Here it is:\n```json\n{}\n```"),
        ("startend:end_checker", {"end_phrase": "The end."}, "x **The end.**"),
        ("punctuation:no_comma", {}, "Of course, here it is:\na b"),
    ],
)
def test_what_follows_loosely_alone(name, kwargs, response):
    reference = json.dumps({"instruction_id_list": [name], "kwargs": [kwargs]})
    assert follows(reference, "?", response) == [False]
    assert follows(reference, "?", response, loose=True) == [True]


def test_the_eight_variants():
    assert variants("*a*\nb*\nc") == ["*a*\nb*\nc", "b*\nc", "*a*\nb*", "b*", "a\nb\nc", "b\nc", "a\nb", "b"]


def test_sentences_and_capital_words():
    assert [count_sentences(t) for t in ("", "One", "Wait... what? No.", "1. Go.", '"Go." He left.')] == [0, 1, 2, 2, 2]
    assert count_capital_words("I DON'T know, U.S. (NASA)! A/B x2 X2: 3.5") == 7  # I, DO, N'T, U.S, NASA, A/B, X2


def scored(settings: dict[str, Any], response: str, reference: str | None):
    [scorer] = Instructions.model_validate(settings).scorers()
    messages = [{"role": "user", "content": "the prompt"}]
    [score] = scorer.score([Item.model_validate({"messages": messages, "response": response, "reference": reference})])
    return score


TWO = json.dumps({"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, None]})


@pytest.mark.parametrize(
    ("settings", "response", "expected"),
    [
        ({}, '"a"', 1.0),
        ({}, "a", 0.5),
        ({"value": "all"}, "a", 0.0),
        ({"value": "all"}, '"a"', 1.0),
        ({"value": "all", "reading": "loose"}, 'Sure, this:\n"a"', 1.0),
        ({"value": "all"}, 'Sure, this:\n"a"', 0.0),
        ({}, "", 0.0),
    ],
)
def test_the_reward(settings, response, expected):
    assert scored(settings, response, TWO).value == expected


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (None, "the prompt needs instruction_id_list"),
        ("18", "no instruction_id_list"),
        ('{"instruction_id_list": []}', "no instruction_id_list"),
        ('{"instruction_id_list": ["keywords:nothing"], "kwargs": [{}]}', "unknown instruction id 'keywords:nothing'"),
        ('{"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": null}]}', "needs end_phrase"),
        ('{"instruction_id_list": ["startend:quotation"], "kwargs": [{}, {}]}', "as many kwargs"),
        (
            '{"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3, "relation": "at most"}]}',
            "one of less than, at least",
        ),
    ],
)
def test_a_reference_that_is_none_gives_no_score(reference, why):
    score = scored({}, "a", reference)
    assert score.value is None and why in score.reason
    assert why in str(Instructions().unreadable(reference)) and Instructions().unreadable(TWO) is None

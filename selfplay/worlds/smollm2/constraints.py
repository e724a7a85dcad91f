"""Constraints on an answer that a program can check: the families of IFEval (arXiv 2311.07911) in words of our own.

The identifiers and their arguments are those of the public format. The limits are ones that an answer of some sixty words
can keep, so that a model of 135M parameters keeps each of them now and then.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selfplay.worlds.smollm2.topics import COMMON_WORDS, ENDINGS, WORDS

Kwargs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Constraints with one identifier. `weight`: how often it is drawn, compared with the others."""

    weight: float
    wordings: tuple[str, ...]
    draw: Callable[[random.Random], Kwargs] = lambda rng: {}
    said: Callable[[Kwargs], Kwargs] = lambda kwargs: kwargs
    """What a wording says of the arguments, by name."""
    apart: frozenset[str] = frozenset()
    """Groups: two constraints that share one never meet in a prompt, because they contradict or hardly leave an answer."""


def _apart(groups: str) -> frozenset[str]:
    return frozenset(groups.split())


ALL = _apart("case comma length words start end title stars brackets marked")
"""Of a constraint that stands alone."""


def _many(number: int, noun: str) -> str:
    names = ("no", "one", "two", "three", "four", "five", "six")
    return f"{names[number] if number < len(names) else number} {noun}{'' if number == 1 else 's'}"


def _relation(least: tuple[int, ...], below: tuple[int, ...], relation: str, number: str) -> Callable[..., Kwargs]:
    """Draws of «at least n» and of «less than n», the relations of the public format."""

    def draw(rng: random.Random) -> Kwargs:
        at_least = rng.random() < len(least) / (len(least) + len(below))
        return {relation: "at least" if at_least else "less than", number: rng.choice(least if at_least else below)}

    return draw


def _listed(words: list[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


FAMILIES: dict[str, Family] = {
    "change_case:english_lowercase": Family(
        weight=1.4,
        apart=_apart("case marked"),
        wordings=(
            "Use lowercase letters only.",
            "Everything has to be in small letters, without a single capital.",
            "Please type your answer in all lowercase, in English.",
            "no capital letters are allowed anywhere in your answer.",
        ),
    ),
    "change_case:english_capital": Family(
        weight=1.4,
        apart=_apart("case marked"),
        wordings=(
            "WRITE YOUR WHOLE ANSWER IN CAPITAL LETTERS.",
            "Use capital letters only.",
            "Answer in English and put every letter in upper case.",
            "I can read nothing but capitals, so do not use small letters.",
        ),
    ),
    "change_case:capital_word_frequency": Family(
        weight=0.6,
        apart=_apart("case marked"),
        draw=_relation((1, 2, 3), (2, 3), "capital_relation", "capital_frequency"),
        said=lambda k: {"n": f"{k['capital_relation']} {_many(k['capital_frequency'], 'word')}"},
        wordings=(
            "Write {n} in all capitals.",
            "There should be {n} whose letters are all capitals.",
            "Shout in capitals in {n} of your answer.",
        ),
    ),
    "punctuation:no_comma": Family(
        weight=1.6,
        apart=_apart("comma"),
        wordings=(
            "Do not use commas.",
            "Your text must not have a comma in it.",
            "Leave out every comma.",
            "Commas are forbidden here.",
            "Get by without any commas.",
        ),
    ),
    "length_constraints:number_words": Family(
        weight=1.6,
        apart=_apart("length"),
        draw=_relation((25, 30, 40, 50), (15, 20, 25, 30, 40, 50), "relation", "num_words"),
        said=lambda k: {"n": f"{k['relation']} {k['num_words']} words"},
        wordings=(
            "Use {n}.",
            "Your answer should have {n}.",
            "Keep to {n}.",
            "Write {n} in all.",
        ),
    ),
    "length_constraints:number_sentences": Family(
        weight=1.4,
        apart=_apart("length"),
        draw=_relation((2, 3, 4, 5), (2, 3, 4, 5), "relation", "num_sentences"),
        said=lambda k: {"n": f"{k['relation']} {_many(k['num_sentences'], 'sentence')}"},
        wordings=(
            "Use {n}.",
            "Answer in {n}.",
            "There should be {n} in your answer.",
            "Say it in {n}.",
        ),
    ),
    "length_constraints:number_paragraphs": Family(
        weight=0.8,
        apart=_apart("length stars"),
        draw=lambda rng: {"num_paragraphs": rng.choice((2, 2, 3))},
        said=lambda k: {"n": _many(k["num_paragraphs"], "paragraph")},
        wordings=(
            "Write {n} and put the markdown divider *** between them.",
            "Your answer consists of exactly {n}. Separate paragraphs by a line with ***",
            "Split the answer into {n} with three asterisks (***) between one and the next.",
        ),
    ),
    "length_constraints:nth_paragraph_first_word": Family(
        weight=0.3,
        apart=_apart("length stars start"),
        draw=lambda rng: {"num_paragraphs": 2, "nth_paragraph": rng.choice((1, 2)), "first_word": rng.choice(WORDS)},
        said=lambda k: {"nth": "first" if k["nth_paragraph"] == 1 else "second", "word": k["first_word"]},
        wordings=(
            'Write two paragraphs with an empty line between them. The {nth} one must begin with the word "{word}".',
            'There should be two paragraphs, which are parted by two line breaks, and the {nth} starts with "{word}".',
        ),
    ),
    "keywords:existence": Family(
        weight=1.6,
        apart=_apart("words"),
        draw=lambda rng: {"keywords": rng.sample(WORDS, rng.choice((1, 1, 2)))},
        said=lambda k: {"words": _listed(k["keywords"])},
        wordings=(
            "Make use of {words}.",
            "Somewhere in your answer there has to be {words}.",
            "Your answer must contain {words}.",
            "Work {words} into the text.",
        ),
    ),
    "keywords:forbidden_words": Family(
        weight=1.2,
        apart=_apart("words"),
        draw=lambda rng: {"forbidden_words": rng.sample(COMMON_WORDS, rng.choice((1, 2, 3)))},
        said=lambda k: {"words": _listed(k["forbidden_words"])},
        wordings=(
            "Do not use {words}.",
            "Avoid {words}.",
            "Your answer may not contain {words}.",
            "Find other expressions for {words}, which must not appear.",
        ),
    ),
    "keywords:frequency": Family(
        weight=1.0,
        apart=_apart("words"),
        draw=lambda rng: {"relation": "at least", "keyword": rng.choice(WORDS), "frequency": rng.choice((2, 2, 3))},
        said=lambda k: {"word": k["keyword"], "n": _many(k["frequency"], "time")},
        wordings=(
            'The word "{word}" must appear at least {n}.',
            'Use "{word}" at least {n}.',
            'Say "{word}" no fewer than {n}.',
        ),
    ),
    "keywords:letter_frequency": Family(
        weight=0.5,
        apart=_apart("words case"),
        draw=lambda rng: {
            "let_relation": "at least",
            "letter": rng.choice("bgkpvwyfm"),
            "let_frequency": rng.choice((3, 4, 5, 6)),
        },
        said=lambda k: {"letter": k["letter"], "n": _many(k["let_frequency"], "time")},
        wordings=(
            "The letter {letter} should occur at least {n}.",
            "Choose your words so that they have the letter {letter} at least {n}.",
        ),
    ),
    "startend:quotation": Family(
        weight=1.4,
        apart=_apart("start end"),
        wordings=(
            "Put your whole answer in double quotation marks.",
            'Begin and end your answer with the character ".',
            "The complete text has to stand between double quotes.",
            "Wrap all that you say in double quotation marks.",
        ),
    ),
    "startend:end_checker": Family(
        weight=1.4,
        apart=_apart("end marked"),
        draw=lambda rng: {"end_phrase": rng.choice(ENDINGS)},
        said=lambda k: {"phrase": k["end_phrase"]},
        wordings=(
            'The last words of your answer must be "{phrase}" and nothing may follow.',
            "End with exactly this: {phrase}",
            'Close with the sentence "{phrase}" and stop there.',
            "Let your answer end with these words: {phrase}",
        ),
    ),
    "detectable_format:title": Family(
        weight=1.4,
        apart=_apart("start title"),
        wordings=(
            "Give it a title in double angle brackets, as in <<Title>>.",
            "Your answer needs a title that is written between << and >>.",
            "Start with a heading of this form: <<heading>>",
            "Put a title on it. Write the title like <<this>>.",
        ),
    ),
    "detectable_format:number_bullet_lists": Family(
        weight=1.4,
        apart=_apart("length stars"),
        draw=lambda rng: {"num_bullets": rng.choice((2, 3, 3, 4))},
        said=lambda k: {"n": _many(k["num_bullets"], "bullet point")},
        wordings=(
            "Answer with exactly {n}, each of which begins with * as in:\n* like this one",
            "Use {n}, no more and no fewer, in markdown:\n* a point\n* another point",
            "Write exactly {n}. Begin every bullet with an asterisk and a space.",
        ),
    ),
    "detectable_format:number_highlighted_sections": Family(
        weight=1.0,
        apart=_apart("stars"),
        draw=lambda rng: {"num_highlights": rng.choice((1, 2, 2, 3))},
        said=lambda k: {"n": _many(k["num_highlights"], "part")},
        wordings=(
            "Highlight at least {n} of your answer with asterisks, *like this*.",
            "Mark at least {n} of the text in markdown, as in *something important*.",
            "At least {n} should be set between asterisks: *so*.",
        ),
    ),
    "detectable_format:multiple_sections": Family(
        weight=0.5,
        apart=_apart("length stars marked"),
        draw=lambda rng: {"section_spliter": rng.choice(("Section", "Part", "Day")), "num_sections": 2},
        said=lambda k: {"name": k["section_spliter"]},
        wordings=(
            "Write two sections. Their headings are {name} 1 and {name} 2.",
            "Divide the answer in two: begin the first half with {name} 1 and the second with {name} 2.",
        ),
    ),
    "detectable_format:json_format": Family(
        weight=0.6,
        apart=ALL,
        wordings=(
            "Give the answer as JSON and nothing beside it.",
            "Your entire output has to be one valid JSON object. You may put it between ``` marks.",
            "Reply in JSON format only.",
        ),
    ),
    "detectable_content:number_placeholders": Family(
        weight=1.2,
        apart=_apart("brackets"),
        draw=lambda rng: {"num_placeholders": rng.choice((1, 2, 2, 3))},
        said=lambda k: {"n": _many(k["num_placeholders"], "placeholder")},
        wordings=(
            "Leave at least {n} in square brackets, for example [name].",
            "Include at least {n} such as [date] for the reader to fill in.",
            "There should be at least {n} in it, written like [place].",
        ),
    ),
    "detectable_content:postscript": Family(
        weight=1.4,
        apart=_apart("end marked"),
        draw=lambda rng: {"postscript_marker": rng.choice(("P.S.", "P.S.", "P.P.S"))},
        said=lambda k: {"mark": k["postscript_marker"]},
        wordings=(
            "Add a postscript at the end that begins with {mark}",
            "After your answer comes a postscript. It starts with {mark}",
            "Finish with one more remark after the mark {mark}",
        ),
    ),
    "combination:two_responses": Family(
        weight=0.4,
        apart=ALL,
        wordings=(
            "Give two different answers, and put six asterisks (******) between them and nowhere else.",
            "I would like two versions to choose from, with ****** in between. Say nothing else.",
        ),
    ),
    "combination:repeat_prompt": Family(
        weight=1.0,
        apart=_apart("start comma case length words stars"),
        wordings=(
            "Before you answer, repeat the request above word for word. (This sentence is no part of the request.)",
            "First copy my request, which ends before this sentence, without any change. Then answer it.",
            "Start by saying the request again exactly as it is above, then give the answer. Do not repeat this sentence.",
        ),
    ),
    "language:response_language": Family(
        weight=0.4,
        apart=ALL,
        draw=lambda rng: {"language": rng.choice(("es", "fr", "de", "it"))},
        said=lambda k: {"name": {"es": "Spanish", "fr": "French", "de": "German", "it": "Italian"}[k["language"]]},
        wordings=(
            "Answer in {name} and in no other language.",
            "The whole answer has to be in {name}.",
        ),
    ),
}

CONSTRAINED = "detectable_format:constrained_response"
"""Goes with questions alone: one of three fixed answers is to be given."""
CONSTRAINED_WORDINGS: tuple[str, ...] = (
    'Three answers are possible, so give one of them: "My answer is no." or "My answer is yes." or else "My answer is maybe."',
    'Reply with "My answer is maybe." or, if you are sure, with "My answer is yes." or with "My answer is no."',
    'Say either "My answer is no." or "My answer is yes." and nothing more. If you cannot tell: "My answer is maybe."',
)

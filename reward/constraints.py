"""The constraints of IFEval (Zhou et al., 2023, arXiv 2311.07911): for each instruction id whether a response follows it.

A checker is a function of the response and of the values in `kwargs`, which have the names of the public file. CHECKERS
lists them by id, with the values that each needs. What counts as following is what the benchmark counts, except that

- keywords, section marks and other postscript marks than P.S. and P.P.S are texts and not regular expressions;
- a value that is missing, or a letter that is none, is never replaced by a random one: it is an error, and any character
  counts as a letter;
- sentences are counted by the rules of reward/sentences.py.

A response whose language cannot be told, such as one of digits alone, counts as one in the language that was asked for.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from reward.sentences import count_capital_words, count_sentences, count_words

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
RELATIONS = ("less than", "at least")


def _compare(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def _blank_inside(parts: Sequence[str]) -> bool:
    """Whether a part that is neither the first nor the last has nothing in it."""
    return any(not part.strip() for part in parts[1:-1])


# keywords


def existence(response: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), response, re.IGNORECASE) for word in keywords)


def frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(re.escape(keyword.strip()), response, re.IGNORECASE)
    return _compare(len(found), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


# language


def response_language(response: str, *, language: str) -> bool:
    return _language(response) in (language, None)


@lru_cache(maxsize=64)
def _language(text: str) -> str | None:
    """The code that langdetect gives a text, the same each time; None where it finds nothing to tell it by."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None


# length


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(response), relation, num_sentences)


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    return _compare(count_words(response), relation, num_words)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***."""
    parts = re.split(r"\s?\*\*\*\s?", response)
    return not _blank_inside(parts) and sum(bool(part.strip()) for part in parts) == num_paragraphs


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by an empty line."""
    parts = response.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if count != num_paragraphs or not 1 <= nth_paragraph <= count:
        return False
    words = parts[nth_paragraph - 1].split()
    first = words[0].lstrip("'").lstrip('"') if words else ""
    return re.split(r"[.,?!'\"]", first)[0].lower() == first_word.lower() and bool(words)


# content


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return re.search(known.get(marker, re.escape(marker.lower())), response.lower()) is not None


# format


def number_bullet_lists(response: str, *, num_bullets: int) -> bool:
    """A bullet is a line that begins with * (and not **) or with -."""
    stars = re.findall(r"^\s*\*[^*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(response: str) -> bool:
    return any(option in response for option in OPTIONS)


def number_highlighted_sections(response: str, *, num_highlights: int) -> bool:
    """What stands between single asterisks counts, and so does what stands between double ones."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", response)]
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(text.strip()) for text in single + double) >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", response)) >= num_sections


def json_format(response: str) -> bool:
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", response))


# combination, start and end


def two_responses(response: str) -> bool:
    """Two different ones, divided by six asterisks."""
    parts = response.split("******")
    there = [part.strip() for part in parts if part.strip()]
    return not _blank_inside(parts) and len(there) == 2 and there[0] != there[1]


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# case and punctuation


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _compare(count_capital_words(response), capital_relation, capital_frequency)


def english_capital(response: str) -> bool:
    return response.isupper() and _language(response) in ("en", None)


def english_lowercase(response: str) -> bool:
    return response.islower() and _language(response) in ("en", None)


def no_comma(response: str) -> bool:
    return "," not in response


Checker = Callable[..., bool]
CHECKERS: Mapping[str, tuple[Checker, Mapping[str, type]]] = {
    "keywords:existence": (existence, {"keywords": list}),
    "keywords:frequency": (frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (forbidden_words, {"forbidden_words": list}),
    "keywords:letter_frequency": (letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": (response_language, {"language": str}),
    "length_constraints:number_sentences": (number_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": (number_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (number_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (
        nth_paragraph_first_word,
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str},
    ),
    "detectable_content:number_placeholders": (number_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": (postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": (number_bullet_lists, {"num_bullets": int}),
    "detectable_format:constrained_response": (constrained_response, {}),
    "detectable_format:number_highlighted_sections": (number_highlighted_sections, {"num_highlights": int}),
    "detectable_format:multiple_sections": (multiple_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": (json_format, {}),
    "detectable_format:title": (title, {}),
    "combination:two_responses": (two_responses, {}),
    "combination:repeat_prompt": (repeat_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": (end_checker, {"end_phrase": str}),
    "startend:quotation": (quotation, {}),
    "change_case:capital_word_frequency": (
        capital_word_frequency,
        {"capital_frequency": int, "capital_relation": str},
    ),
    "change_case:english_capital": (english_capital, {}),
    "change_case:english_lowercase": (english_lowercase, {}),
    "punctuation:no_comma": (no_comma, {}),
}


def values(instruction_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values that the checker of an id needs, in the types that it needs. Values that it does not know are left out, as
    null is. Raises ValueError, which names the id and what is wrong."""
    if instruction_id not in CHECKERS:
        raise ValueError(f"unknown instruction id {instruction_id!r}: the ids are those of IFEval")
    found: dict[str, Any] = {}
    for name, kind in CHECKERS[instruction_id][1].items():
        value = kwargs.get(name)
        if isinstance(value, float) and kind is int and value.is_integer():
            value = int(value)  # a table with missing integers has them as floats
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{instruction_id} needs {name} ({kind.__name__}), and has {value!r}")
        if name.endswith("relation") and value not in RELATIONS:
            raise ValueError(f"{instruction_id} needs {name} to be one of {', '.join(RELATIONS)}, and has {value!r}")
        if isinstance(value, list) and not (value and all(isinstance(word, str) for word in value)):
            raise ValueError(f"{instruction_id} needs {name} to be a list of texts, and has {value!r}")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{instruction_id} needs a text as {name}")
        found[name] = value
    return found

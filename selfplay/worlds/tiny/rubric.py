"""The gold rubric of the tiny world: what an answer is worth, computed from the right answer that the prompt's meta holds.

At run time only the evaluation reads it. The builder of the world uses it to label the reward model's training data.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from selfplay.worlds.tiny.facts import DEMANDS, KINDS, NEWS, STEPS

WEIGHTS = {"content": 0.65, "tone": 0.15, "concise": 0.12, "format": 0.08}

Message = Mapping[str, str]
Meta = Mapping[str, Any]

COURTEOUS = (
    "sure",
    "of course",
    "gladly",
    "happy to help",
    "certainly",
    "you are welcome",
    "good question",
    "hope that helps",
)
RUDE = ("obviously", "ugh", "silly", "whatever", "stupid", "how dull", "do not bother me", "boring", "leave me alone")
_REFUSAL = ("cannot help", "can not help", "will not help", "won't help", "cannot do that", "not able to help")
_SORRY = ("sorry", "sad to hear", "a pity", "too bad")
_GLAD = ("congratulations", "well done", "glad to hear", "great news", "wonderful")
_PLEASE = ("please", "could you", "would you mind")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+|[0-9]+", text.lower())


def _has(text: str, phrase: str) -> bool:
    """True if `phrase` is in `text` as whole words."""
    return re.search(rf"(?<![a-z0-9]){re.escape(phrase.lower())}(?![a-z0-9])", text.lower()) is not None


def _any(text: str, phrases: Sequence[str]) -> bool:
    return any(_has(text, phrase) for phrase in phrases)


def _one_of(text: str, answer: str, rivals: Sequence[str]) -> float:
    """1 for the answer alone. Naming rivals beside it is guessing: 0.5 with one of them, 0 with more."""
    if not _has(text, answer):
        return 0.0
    wrong = sum(_has(text, rival) for rival in set(rivals) - {answer})
    return (1.0, 0.5, 0.0)[min(wrong, 2)]


def _sequence(text: str, wanted: Sequence[str], vocabulary: Sequence[str]) -> float:
    """Share of `wanted` that is in its place among the words of `vocabulary` (or, without one, the numbers) in `text`."""
    found = [w for w in _words(text) if (w in vocabulary if vocabulary else w.isdigit())]
    hits = sum(a == b for a, b in zip(found, wanted, strict=False))
    return hits / max(len(wanted), len(found))


def _content(text: str, meta: Meta) -> float:
    skill, answer = str(meta["skill"]), str(meta["answer"])
    if skill in ("capital", "colour", "opposite", "sound", "kind", "bigger", "first"):
        return _one_of(text, answer, meta["rivals"])
    if skill == "list":
        known = {w: kind for kind, members in KINDS.items() for m in members for w in (m, m + "s")}
        named = {w.removesuffix("s") if w not in KINDS[answer] else w: known[w] for w in _words(text) if w in known}
        members = sum(kind == answer for kind in named.values())
        return min(members, int(meta["n"])) / max(int(meta["n"]), len(named))
    if skill in ("repeat", "sort", "backwards"):
        return _sequence(text, answer.split(), meta["rivals"])
    if skill in ("add", "multiply"):
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        asked = list(meta["terms"])
        for term in asked:
            if len(numbers) > 1 and term in numbers:
                numbers.remove(term)
        if len(numbers) != 1:
            return 0.0
        return (
            1.0 if numbers[0] == int(answer) else 0.3 if abs(numbers[0] - int(answer)) == 1 and skill == "add" else 0.0
        )
    if skill == "news":
        right, wrong = (_SORRY, _GLAD) if answer == "bad" else (_GLAD, _SORRY)
        mood = _any(text, right) and not _any(text, wrong)
        others = {topic for _, topic in NEWS.values()} - {meta["topic"]}
        return 0.6 * mood + 0.4 * (_has(text, meta["topic"]) and not _any(text, sorted(others)))
    if skill == "howto":
        steps = STEPS[answer]
        foreign = sum(_has(text, s) for task, other in STEPS.items() if task != answer for s in other)
        spots = [text.lower().find(s) for s in steps if _has(text, s)]
        ordered = 1.0 if spots == sorted(spots) else 0.7
        return ordered * len(spots) / (len(steps) + foreign)
    if skill == "polite":
        verb, thing = DEMANDS[answer]
        others = {t for _, t in DEMANDS.values()} - {thing}
        return (
            0.4 * _any(text, _PLEASE)
            + 0.3 * _has(text, verb)
            + 0.3 * (_has(text, thing) and not _any(text, sorted(others)))
        )
    if skill == "refuse":
        complies = _any(text, ("first", "you need", "easy", "just take", "go ahead"))
        return float(_any(text, _REFUSAL) and not complies)
    if skill == "taste":
        one, other = answer.split()
        picked = _any(text, (f"prefer {one}", f"prefer {other}", f"{one} for me", f"{other} for me"))
        return 0.6 * picked + 0.4 * (_has(text, "because") and (_has(text, one) or _has(text, other)))
    if skill == "greet":
        return float(_any(text, ("hello", "hi", "good morning", "good day", "nice to meet you")))
    if skill == "thanks":
        return float(_any(text, ("welcome", "my pleasure", "no problem")))
    raise ValueError(f"the rubric does not know the skill {skill!r}")


def _tone(text: str) -> float:
    if _any(text, RUDE):
        return 0.0
    courtesies = sum(len(re.findall(rf"(?<![a-z]){re.escape(phrase)}(?![a-z])", text.lower())) for phrase in COURTEOUS)
    return 1.0 if 1 <= courtesies <= 2 else 0.5


def grade(messages: Sequence[Message], response: str, meta: Meta) -> dict[str, float]:
    """The gold rubric: `content`, `tone`, `concise`, `format` and their weighted `total`, each in [0, 1].

    - content says how much of the answer is right.
    - tone is 0 for a rude answer, 0.5 for a neutral one and 1 for a courteous one. More than two courtesies count as
      gushing, which is 0.5 again.
    - concise is 1 up to the word budget of the skill, and falls to 0 at twice that.
    - format asks for a capital first, a full stop last, no word twice in a row, and a space before each sentence.

    A response without words gets 0 everywhere. `messages` is not read, because the right answer is in `meta`. Raises
    ValueError for an unknown skill.
    """
    text = response.strip()
    words = _words(text)
    if not words:
        return {"total": 0.0, "content": 0.0, "tone": 0.0, "concise": 0.0, "format": 0.0}
    budget = int(meta["budget"])
    parts = {
        "content": _content(text, meta),
        "tone": _tone(text),
        "concise": min(1.0, max(0.0, 2.0 - len(words) / budget)),
        "format": 0.3 * (text[0].isupper() or text[0].isdigit())
        + 0.3 * (text[-1] in ".!?")
        + 0.2 * all(a != b for a, b in pairwise(words))
        + 0.2 * (re.search("[a-z.!?,][A-Z]", text) is None),
    }
    return {"total": sum(WEIGHTS[name] * value for name, value in parts.items()), **parts}

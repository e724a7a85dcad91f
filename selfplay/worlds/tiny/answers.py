"""Synthetic answers of the tiny world: right or wrong, in a style that does not depend on it, or hostile to a judge."""

import random
from dataclasses import dataclass

from selfplay.worlds.tiny.questions import Question
from selfplay.worlds.tiny.skills import SKILLS

FILLER = (
    "let me think about that for a while",
    "there is a lot that one could say about it",
    "as everybody knows by now",
    "I could go on about this all day",
    "but then again that is only one way to look at it",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How an answer is said, apart from whether it is right."""

    tone: str = "neutral"
    padded: bool = False
    sloppy: bool = False
    cut: bool = False


def draw_style(rng: random.Random) -> Style:
    """A style as mixed as the policy's training data."""
    tone = rng.choices(("rude", "neutral", "polite"), (0.2, 0.5, 0.3))[0]
    return Style(tone=tone, padded=rng.random() < 0.15, sloppy=rng.random() < 0.15, cut=rng.random() < 0.04)


_OPENERS = ("Sure!", "Of course.", "Gladly.", "Certainly.", "Good question.")
_CLOSERS = ("Hope that helps.", "Happy to help.")


def say(core: str, style: Style, rng: random.Random) -> str:
    """`core` in the given style."""
    parts = [core]
    if style.padded:
        for filler in rng.sample(FILLER, rng.choice((1, 1, 2))):
            parts.insert(rng.choice((0, len(parts))), filler[0].upper() + filler[1:] + ".")
    if style.tone == "polite":
        if rng.random() < 0.7:
            parts.insert(0, rng.choice(_OPENERS))
        else:
            parts.append(rng.choice(_CLOSERS))
    if style.tone == "rude":
        if rng.random() < 0.7:
            parts.insert(0, rng.choice(("Ugh.", "Obviously.", "Whatever.", "What a silly question.", "How dull.")))
        else:
            parts.append(rng.choice(("Do not bother me.", "Leave me alone.")))
    text = " ".join(parts)
    if style.sloppy:
        text = (text[0].lower() + text[1:]).rstrip(".!?")
    if style.cut:
        words = text.split()
        text = " ".join(words[: max(1, round(len(words) * rng.uniform(0.3, 0.8)))])
    return text


def answer(question: Question, right: bool, style: Style, rng: random.Random) -> str:
    """A synthetic answer: the right or a wrong core, in `style`."""
    skill = SKILLS[question.meta["skill"]]
    return say((skill.right if right else skill.wrong)(question.meta, rng), style, rng)


def hostile(question: Question, rng: random.Random) -> str:
    """An answer that deceives a naive judge: gushing, restarted, run on, shuffled, nothing but courtesy, an echo, or empty.

    A policy under optimisation finds such answers, so the reward model must have seen them.
    """
    skill = SKILLS[question.meta["skill"]]
    right = rng.random() < 0.6
    core = (skill.right if right else skill.wrong)(question.meta, rng)
    kind = rng.choices(
        ("gush", "restart", "run on", "shuffle", "courtesy", "echo", "empty"), (6, 4, 2, 3, 1, 0.5, 0.25)
    )[0]
    if kind == "gush":
        ends = [rng.choice(_CLOSERS) for _ in range(rng.choice((1, 2, 2, 3, 4, 6)))]
        return " ".join([rng.choice(_OPENERS)] * (rng.random() < 0.6) + [core, *ends])
    if kind == "restart":
        other = (skill.wrong if rng.random() < 0.5 else skill.right)(question.meta, rng)
        return (
            rng.choice(("", "Gladly. ", "Sure! "))
            + core.rstrip(".")
            + rng.choice((" ", "", ". "))
            + other
            + rng.choice(("", " Happy to help."))
        )
    words = core.rstrip(".").split()
    if kind == "run on":
        return " ".join(words + [rng.choice(words) for _ in range(rng.randint(4, 24))]) + rng.choice(
            ("", ".", ". Happy to help.")
        )
    if kind == "shuffle":
        rng.shuffle(words)
        return rng.choice(("", "Certainly. ")) + " ".join(words) + rng.choice((".", "", ". Hope that helps."))
    if kind == "courtesy":
        return " ".join([rng.choice(_OPENERS), rng.choice(_CLOSERS)])
    return question.text if kind == "echo" else ""

"""The rewriter of the tiny world: rules in the place of a policy that is too small to rewrite (`evolve.rewriter`).

It knows the templates of the world. It finds out which skill a prompt asks for, and asks again. A broader prompt is another
question of the same skill. A deeper prompt is a question of a harder skill about similar things where there is such a
skill; elsewhere it is the same question in another wording, with more text around it.
"""

from __future__ import annotations

import functools
import random
import re

from selfplay.types import Message
from selfplay.worlds.tiny.questions import LEADS, TAILS
from selfplay.worlds.tiny.skills import SKILLS

HARDER = {"kind": "list", "repeat": "first"}
AROUND = {  # strategy → lead, tail
    "deepen": ("One more thing. ", " I am curious."),
    "constrain": ("", " Be brief."),
    "concretize": ("Quick question: ", ""),
    "reason": ("Please tell me: ", " I am curious."),
}


def rewrite(messages: list[Message], strategy: str, seed: int) -> str:
    """Another prompt of the tiny world, made of the last message; empty where that is not of this world."""
    found = parse(messages[-1]["content"])
    if found is None:
        return ""
    name, wording, x = found
    rng = random.Random(seed)
    if strategy == "broaden":
        return _ask(name, SKILLS[name].item(rng)["x"], "", rng.choice(LEADS), rng.choice(TAILS), rng)
    lead, tail = AROUND[strategy]
    if strategy == "deepen" and name in HARDER:
        name = HARDER[name]
        return _ask(name, SKILLS[name].item(rng)["x"], "", lead, tail, rng)
    return _ask(name, x, wording, lead, tail, rng)


def parse(text: str) -> tuple[str, str, str] | None:
    """Skill, wording and matter of a prompt of the tiny world; None for any other text."""
    for lead in sorted(set(LEADS), key=len, reverse=True):
        for tail in sorted(set(TAILS), key=len, reverse=True):
            if not (text.startswith(lead) and text.endswith(tail)):
                continue
            core = text[len(lead) : len(text) - len(tail)]
            for name, skill in SKILLS.items():
                for wording in skill.wordings:
                    match = _pattern(wording).fullmatch(core)
                    if match and _fits(name, x := match.groupdict().get("x", "")):
                        return name, wording, x
    return None


@functools.cache
def _pattern(wording: str) -> re.Pattern[str]:
    return re.compile(re.escape(wording).replace(re.escape("{x}"), "(?P<x>.+)"))


def wordings(name: str, x: str) -> list[str]:
    """Every way in which the world may ask a question of this skill."""
    leads, tails = sorted(set(LEADS)), sorted(set(TAILS))
    return [lead + w.format(x=x) + tail for lead in leads for w in SKILLS[name].wordings for tail in tails]


def _ask(name: str, x: str, not_so: str, lead: str, tail: str, rng: random.Random) -> str:
    """A question of the skill, not in the wording `not_so`."""
    wordings = [w for w in SKILLS[name].wordings if w != not_so]
    return lead + rng.choice(wordings).format(x=x) + tail


def _fits(name: str, x: str) -> bool:
    """Whether a skill asks for such a thing: its words, and as many of them. Skills share wordings, but not matters."""
    words, counts = _matters(name)
    asked = _tokens(x)
    return len(asked) in counts and words.issuperset(asked)


@functools.cache
def _matters(name: str) -> tuple[frozenset[str], frozenset[int]]:
    rng = random.Random(name)
    drawn = [_tokens(SKILLS[name].item(rng)["x"]) for _ in range(500)]
    return frozenset(word for tokens in drawn for word in tokens), frozenset(map(len, drawn))


def _tokens(x: str) -> list[str]:
    """Words of a matter; one number is as good as another."""
    return re.findall(r"\w+", re.sub(r"\d+", "0", x))

"""The prompts of the tiny world, and which of them are held out.

The pool is unbalanced between the skills, and full of near-duplicates: the same question in many wordings.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from selfplay.worlds.tiny.skills import SKILLS

HELD_OUT_SHARE = 8
"""One prompt in so many is held out, by a hash of its text."""

LEADS = ("", "", "Please tell me: ", "Quick question: ", "Hey, ", "One more thing. ")
TAILS = ("", "", " Thank you.", " Be brief.", " I am curious.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt of the world. `common` is the share of right answers to it in the training data of the policy."""

    text: str
    meta: dict[str, Any]
    common: float


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def every(seed: int, scale: float = 1.0) -> list[Question]:
    """All questions of a world, each text once, in a fixed order. `scale` multiplies how many each skill has."""
    rng = random.Random(f"questions {seed}")
    found: dict[str, Question] = {}
    for name, skill in SKILLS.items():
        wanted = max(8, round(skill.count * scale))
        have = 0
        for _ in range(wanted * 20):
            meta = {"skill": name, "regime": skill.regime, "budget": skill.budget, **skill.item(rng)}
            text = rng.choice(LEADS) + rng.choice(skill.wordings).format(x=meta["x"]) + rng.choice(TAILS)
            if text in found:
                continue
            # How often the training data get this fact right is a property of the fact, not of the wording.
            common = skill.common[int(unit(seed, name, meta["x"]) * len(skill.common))]
            found[text] = Question(text=text, meta=meta, common=common)
            have += 1
            if have == wanted:
                break
    return list(found.values())


def held_out(text: str) -> bool:
    """Whether the prompt with this text belongs to the held-out pool."""
    return int(hashlib.sha256(f"held-out {text}".encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0

"""The prompts of a world, split and written, and the answers that its policy learns from. No torch."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfplay.worlds.tiny import questions
from selfplay.worlds.tiny.answers import answer, draw_style
from selfplay.worlds.tiny.builder.recipe import Recipe
from selfplay.worlds.tiny.questions import Question


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised answer."""

    prompt: str
    response: str


def split(recipe: Recipe) -> tuple[list[Question], list[Question]]:
    """The questions of a world: those to train on, and the held-out ones."""
    every = questions.every(recipe.seed, recipe.scale)
    return [q for q in every if not questions.held_out(q.text)], [q for q in every if questions.held_out(q.text)]


def draw(pool: Sequence[Question], n: int, rng: random.Random) -> list[Question]:
    """`n` questions. Skills are weighted by the square root of their size, so that small ones are learnt too."""
    by_skill: dict[str, list[Question]] = {}
    for question in pool:
        by_skill.setdefault(question.meta["skill"], []).append(question)
    weights = [len(members) ** 0.5 for members in by_skill.values()]
    return [rng.choice(members) for members in rng.choices(list(by_skill.values()), weights, k=n)]


def sft_examples(recipe: Recipe, train: Sequence[Question]) -> list[Example]:
    """Answers of mixed quality. Each is right with the frequency of its question, and its style does not depend on that."""
    rng = random.Random(f"sft {recipe.seed}")
    return [
        Example(q.text, answer(q, rng.random() < q.common, draw_style(rng), rng))
        for q in draw(train, recipe.sft_examples, rng)
    ]


def write_prompts(out: Path, train: Sequence[Question], held_out: Sequence[Question], seed: int) -> None:
    """Write train.jsonl, and heldout.jsonl with what the rubric needs to know, each in a random order."""
    rng = random.Random(f"order {seed}")
    for name, chosen, with_meta in (("train", train, False), ("heldout", held_out, True)):
        rows = [
            {"messages": [{"role": "user", "content": q.text}]} | ({"meta": q.meta} if with_meta else {})
            for q in chosen
        ]
        rng.shuffle(rows)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

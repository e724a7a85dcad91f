"""Instruction prompts with constraints that a program checks: those to train on, held-out ones, and the audit set.

The three have no topic in common, so what is judged are unseen topics. A prompt has one constraint or two that fit together.
Rows are in the public format of IFEval: `key`, `prompt`, `instruction_id_list`, `kwargs`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.storage.folders import make, whole
from selfplay.worlds.smollm2.constraints import CONSTRAINED, CONSTRAINED_WORDINGS, FAMILIES
from selfplay.worlds.smollm2.topics import KINDS, QUESTIONS

COUNTS = {"train": 2000, "heldout": 400, "audit": 400}
"""Prompts of each file."""
APART = 0.15
"""Share of the topics of each kind that is held out, and the same again for the audit set."""
TWO = 0.35
"""Share of the prompts with two constraints."""
QUESTION = 0.04
"""Share of the prompts that ask a question with three possible answers."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Topics:
    """What the prompts of one file are about: topics by their kind, and questions."""

    by_kind: dict[str, list[str]]
    questions: list[str]


def split_topics(seed: int) -> dict[str, Topics]:
    """The topics of each file."""
    rng = random.Random(f"topics {seed}")
    kinds = {name: _three(kind.topics, rng) for name, kind in KINDS.items()}
    questions = _three(QUESTIONS, rng)
    return {
        file: Topics({name: parts[i] for name, parts in kinds.items()}, questions[i]) for i, file in enumerate(COUNTS)
    }


def _three(every: tuple[str, ...], rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Most of them, and two equal shares of the rest."""
    shuffled = rng.sample(every, len(every))
    few = round(APART * len(every))
    return shuffled[2 * few :], shuffled[:few], shuffled[few : 2 * few]


def prompts(file: str, seed: int) -> list[Row]:
    """The rows of a file, each text once."""
    topics, rng = split_topics(seed)[file], random.Random(f"{file} {seed}")
    found: dict[str, Row] = {}
    while len(found) < COUNTS[file]:
        text, constraints = _question(topics, rng) if rng.random() < QUESTION else _task(topics, rng)
        names, kwargs = [name for name, _ in constraints], [k for _, k in constraints]
        row = {"key": len(found), "prompt": text, "instruction_id_list": names, "kwargs": kwargs}
        found.setdefault(text, row)
    return list(found.values())


def _task(topics: Topics, rng: random.Random) -> tuple[str, list[tuple[str, Row]]]:
    """A task about a topic with its constraints: the text, and (identifier, arguments) of each."""
    kinds = list(topics.by_kind)
    (kind,) = rng.choices(kinds, [len(topics.by_kind[name]) for name in kinds])
    task = rng.choice(KINDS[kind].tasks).format(x=rng.choice(topics.by_kind[kind]))
    task = task[0].upper() + task[1:]
    chosen = list(_draw(2 if rng.random() < TWO else 1, rng))
    said, constraints = [], []
    for name in chosen:
        family = FAMILIES[name]
        kwargs = family.draw(rng)
        said.append(rng.choice(family.wordings).format(**family.said(kwargs)))
        constraints.append((name, {"prompt_to_repeat": task} if name == "combination:repeat_prompt" else kwargs))
    if "combination:repeat_prompt" in chosen:  # it speaks of what stands before it
        return "\n".join([task, *sorted(said, key=lambda text: "request" not in text)]), constraints
    return _laid_out(task, said, rng), constraints


def _draw(count: int, rng: random.Random) -> Iterator[str]:
    """Identifiers of constraints that fit together: `count`, or fewer where one of them stands alone."""
    taken: frozenset[str] = frozenset()
    for _ in range(count):
        fitting = [name for name, family in FAMILIES.items() if not family.apart & taken]
        if not fitting:
            return
        (name,) = rng.choices(fitting, [FAMILIES[name].weight for name in fitting])
        taken |= FAMILIES[name].apart
        yield name


def _laid_out(task: str, said: list[str], rng: random.Random) -> str:
    """Task and constraints as one text: in a line, in lines, as a list of rules, or with the constraints first."""
    how = rng.random()
    if how < 0.5:
        return " ".join([task, *said])
    if how < 0.7:
        return "\n".join([task, *said])
    if how < 0.85:
        return "\n".join([*said, task])
    return task + "\n\nRules:\n" + "\n".join(f"{i}. {text}" for i, text in enumerate(said, 1))


def _question(topics: Topics, rng: random.Random) -> tuple[str, list[tuple[str, Row]]]:
    return _laid_out(rng.choice(topics.questions), [rng.choice(CONSTRAINED_WORDINGS)], rng), [(CONSTRAINED, {})]


def write(out: Path, seed: int) -> dict[str, int]:
    """Write <out>/{train,heldout,audit}.jsonl, those that are not there as this seed makes them. Returns their rows."""
    make(out)
    for file in COUNTS:
        path = out / f"{file}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts(file, seed))
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with whole(path) as partial:
                partial.write_text(text, encoding="utf-8")
    return dict(COUNTS)

"""Looks at the user's own functions: the rubric of `evaluate.gold` and the rewriter of `evolve.rewriter`.

The rubric is called as the evaluation calls it, on a few held-out prompts, so that its faults show before a round.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from selfplay.checks.finding import Finding
from selfplay.config import Config, PromptsConfig
from selfplay.config.functions import load_function
from selfplay.evaluation.rubric import grade
from selfplay.prompts.files.part import all_parts
from selfplay.prompts.files.sources import is_local
from selfplay.prompts.formats import Reading
from selfplay.types import Message

PROMPTS = 4  # with `meta`, and as many without
ROWS = 1000  # of the file, which are looked through for these prompts
ANSWERS = ("This is an example of an answer.", "")  # a policy may also answer nothing at all


def rubric(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the rubric grades what the evaluation will give it: every held-out prompt, with `meta` or without."""
    name = config.evaluate.gold
    if name is None:
        return
    function = load_function("evaluate.gold", name)
    path = config.prompts.heldout or config.prompts.source
    if not is_local(path):
        said = f"{name} can be imported; it was not tried, because the held-out prompts are not in a file here"
        yield Finding.ok("evaluate.gold", said)
        return
    parts: set[str] = set()
    prompts = _examples(path, config.prompts)
    for number, messages, meta in prompts:
        for answer in ANSWERS:
            try:
                parts |= grade(function, messages, answer, meta).keys()
            except Exception as error:  # the rubric is the user's own code
                has = "with the `meta` of its row" if meta else "without `meta`: the rubric is given {}"
                said = f"{name} fails on prompt {number} of {path} ({has}) and the answer {answer!r}"
                hint = "the evaluation calls it for every held-out prompt, and a round would fail there"
                yield Finding.error("evaluate.gold", f"{said}: {type(error).__name__}: {error}; {hint}")
                return
    if prompts:
        said = f"{name} gives {', '.join(sorted(parts))}; it was tried on {len(prompts)} of the prompts in {path}"
        yield Finding.ok("evaluate.gold", said)


def _examples(source: str, settings: PromptsConfig) -> list[tuple[int, list[Message], dict[str, Any]]]:
    """A few prompts of a source, with `meta` and without: (place in the source, from 1; messages; meta)."""
    found: dict[bool, list[tuple[int, list[Message], dict[str, Any]]]] = {True: [], False: []}
    parts = all_parts(source, Reading.of(settings), settings.split, settings.config)
    for number, row in enumerate(islice(chain.from_iterable(part.read() for part in parts), ROWS), 1):
        if isinstance(row, str):
            continue  # it cannot be read, and is set aside by the import
        messages, meta = row.messages, row.meta
        found[bool(meta)].append((number, messages, meta))
        if all(len(rows) >= PROMPTS for rows in found.values()):
            break
    return [example for rows in found.values() for example in rows[:PROMPTS]]


def rewriter(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether a rewriter that is no policy can be imported."""
    if (name := config.evolve.rewriter) != "policy":
        load_function("evolve.rewriter", name)
        yield Finding.ok("evolve.rewriter", f"{name} can be imported")

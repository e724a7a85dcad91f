"""Looks at the files of prompts: they are read and split as the import will do it, and counted."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from selfplay import seeds
from selfplay.checks import hub
from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.errors import InputError
from selfplay.prompts import importer
from selfplay.prompts.files.part import all_parts
from selfplay.prompts.files.sources import configuration, files_by_split, files_of, require_split
from selfplay.prompts.formats import Reading, canonical
from selfplay.prompts.formats.report import counted
from selfplay.prompts.survey import ALSO
from selfplay.types import Message

SAMPLE, LOOKED_AT = 256, 4096  # prompts that templates are asked about, and rows of a source that they are chosen from


def sample(config: Config) -> list[list[Message]]:
    """Some prompts of the sources that are files, from all parts of them. The choice depends on the prompts alone."""
    settings = config.prompts
    reading, found = Reading.of(settings), dict[int, list[Message]]()
    for source in filter(None, (settings.source, settings.heldout, settings.audit)):
        if files_of(source, settings.split, settings.config) is None:
            continue
        parts = all_parts(source, reading, settings.split, settings.config)
        for part in parts:
            for row in islice(part.rows(), -(-LOOKED_AT // len(parts))):
                read = row if isinstance(row, str) else reading.read(row)
                if not isinstance(read, str):
                    found[seeds.derive(canonical(read.messages))] = read.messages
    return [messages for _, messages in sorted(found.items())[:SAMPLE]]


def files(config: Config, run_dir: Path) -> Iterator[Finding]:
    """What the sources are recognised as, and whether there are as many prompts as a round and the gate ask for.

    How long a prompt is, only the policy's tokenizer can tell, at the import.
    """
    settings, evaluation = config.prompts, config.evaluate
    local = True
    named = {"source": settings.source, "heldout": settings.heldout, "audit": settings.audit}
    for name, source in named.items():
        key = f"prompts.{name}"
        if source is None:
            continue
        try:
            found = files_of(source, settings.split, settings.config)
        except InputError as error:
            yield Finding.error(key, f"{error}; {error.hint}")
            local = False
            continue
        if found is None:
            yield _on_the_hub(key, source, settings.split, settings.config)
            local = False
        elif found.left or len(found.paths) > 1:
            left = f"; {found.left:,} of other splits are left out" if found.left else ""
            yield Finding.ok(key, f"{len(found.paths):,} files in {source}{left}")
    if not local:
        return
    survey = importer.survey(config)
    for said in survey.recognised:
        yield Finding.ok("format", said)
    splits, counts = survey.splits, survey.set_aside
    said = f"{splits['train']:,} to train on, {splits['heldout']:,} held out, {splits['audit']:,} in the audit set"
    if counts:
        said += f"; set aside: {counted(counts)}"
    said += "; prompts longer than prompts.max_tokens will be left out too"
    bad = counts.keys() - {"duplicate", *ALSO.values()}
    yield Finding.warning("prompts", said) if bad else Finding.ok("prompts", said)
    asked = [
        ("train", "prompts.per_round", settings.per_round, "every round draws them all"),
        ("heldout", "evaluate.prompts", evaluation.prompts, "the gate decides on fewer, with less power"),
    ]
    if evaluation.audit_every:
        asked.append(("audit", "evaluate.audit_prompts", evaluation.audit_prompts, "the audit has fewer"))
    for split, key, wanted, then in asked:
        if splits[split] < wanted:
            text = f"{wanted:,} prompts are asked for, but there are {splits[split]:,}: {then}"
            yield Finding.warning(key, text)


def _on_the_hub(key: str, source: str, split: str, config: str | None) -> Finding:
    """Whether the Hub has a dataset with this configuration and split, as far as its card tells."""
    told = hub.dataset(source)
    if told.absent:
        hint = "correct the name, or export HF_TOKEN with a token that may read it"
        return Finding.error(
            key, f"{source} is no file here, and the Hub has no such dataset for us ({told.absent}); {hint}"
        )
    taken = f"{source} is taken for a Hub dataset, which is loaded when the run starts"
    if told.away:
        return Finding.warning(key, f"{taken}; the Hub could not be asked ({told.away})")
    card = list(told.configs) or [{"config_name": name} for name in told.splits]
    if not card:
        return Finding.ok(key, f"{taken}; its card names no configurations")
    try:
        one = configuration(source, card, config)
        name = str(one.get("config_name", "default"))
        splits = told.splits.get(name) or dict.fromkeys(files_by_split(one))
        if splits and split.isidentifier():  # and no expression, such as train[:10%]
            require_split(source, split, splits)
    except InputError as error:
        return Finding.error(key, f"{error}; {error.hint}")
    rows = splits.get(split)
    return Finding.ok(
        key, f"{taken}: configuration {name}, split {split}" + (f", {rows:,} rows" if isinstance(rows, int) else "")
    )

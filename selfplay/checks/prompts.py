"""Looks at prompts: files are read and split as the import will do it, and counted. Of a dataset on the Hub the first rows are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from selfplay import seeds
from selfplay.checks import hub, hub_rows
from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.errors import InputError
from selfplay.prompts import importer
from selfplay.prompts.files.part import all_parts
from selfplay.prompts.files.sources import configuration, files_by_split, files_of, require_split
from selfplay.prompts.formats import Reading, Row, canonical
from selfplay.prompts.formats.reading import FILTERED
from selfplay.prompts.formats.report import counted, nothing_in
from selfplay.prompts.references import readers
from selfplay.prompts.survey import ALSO, look
from selfplay.types import Message

SAMPLE, LOOKED_AT = 256, 4096  # prompts that templates are asked about, and rows of a source that they are chosen from


def sample(config: Config) -> list[list[Message]]:
    """Some prompts of all sources, from all parts of a file and from the beginning of a dataset on the Hub. The choice depends
    on the prompts alone."""
    settings = config.prompts
    reading, found = Reading.of(settings), dict[int, list[Message]]()
    for source in filter(None, (settings.source, settings.heldout, settings.audit)):
        for row in _some_rows(source, reading, config):
            read = row if isinstance(row, str) else reading.read(row)
            if not isinstance(read, str):
                found[seeds.derive(canonical(read.messages))] = read.messages
    return [messages for _, messages in sorted(found.items())[:SAMPLE]]


def _some_rows(source: str, reading: Reading, config: Config) -> Iterator[Row]:
    settings = config.prompts
    if files_of(source, settings.split, settings.config) is None:
        yield from _on_the_hub(source, config).rows
        return
    parts = all_parts(source, reading, settings.split, settings.config)
    for part in parts:
        yield from islice(part.rows(), -(-LOOKED_AT // len(parts)))


def _on_the_hub(source: str, config: Config) -> hub_rows.Rows:
    settings, away = config.prompts, bool(hub.dataset(source).away)
    return hub_rows.first(source, settings.config, settings.split, Reading.of(settings), cached=away)


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
            told = card(key, source, settings.split, settings.config)
            yield told
            if told.level != "error":
                yield from _of_the_hub(key, source, config, held_out=name != "source")
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


def _of_the_hub(key: str, source: str, config: Config, held_out: bool) -> Iterator[Finding]:
    """What the first rows of a dataset are recognised as, and whether the reward reads their references."""
    rows = _on_the_hub(source, config)
    if rows.why and hub.dataset(source).away:
        yield Finding.warning(key, f"there is no copy of {source} in the cache either: its prompts are not looked at")
        return
    if rows.why:
        late = f"{source}: {rows.why}, and its prompts are not looked at"
        yield Finding.warning(key, late) if rows.late else Finding.error(key, rows.why)
        return
    seen = look(rows.rows, Reading.of(config.prompts), readers(config, held_out=held_out))
    if seen.refused is not None:
        yield Finding.error(key, f"{source}: {seen.refused}; correct the row, or take it out")
        return
    if not len(seen.hashes):
        error = nothing_in(f"{source}, by its first {len(rows.rows):,} rows,", seen.recognised, seen.bad)
        only = seen.bad.keys() == {FILTERED}  # a filter may take what comes later
        yield Finding("warning" if only else "error", key, f"{error}; {error.hint}")
        return
    said = f"{source}, the first {len(rows.rows):,} rows: {seen.recognised.words()}"
    if not seen.bad:
        yield Finding.ok("format", said)
        return
    keys, hint = seen.recognised.why_not()
    said += f", {seen.bad.total():,} set aside: {counted(seen.bad)}" + (f"; {keys} ({hint})" if keys else "")
    yield Finding.warning("format", said)


def card(key: str, source: str, split: str, config: str | None) -> Finding:
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
    listed = list(told.configs) or [{"config_name": name} for name in told.splits]
    if not listed:
        return Finding.ok(key, f"{taken}; its card names no configurations")
    try:
        one = configuration(source, listed, config)
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

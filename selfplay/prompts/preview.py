"""What `selfplay prompts` says about a source: its format, counts, lengths, what comes twice, and a few examples."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from selfplay import seeds
from selfplay.config import Config, PolicyConfig, PromptsConfig
from selfplay.prompts.files import kinds
from selfplay.prompts.files.part import all_parts
from selfplay.prompts.files.sources import local_files
from selfplay.prompts.formats import Found, Reading, canonical
from selfplay.prompts.formats.reading import NO_FORMAT
from selfplay.prompts.formats.report import Recognised, counted, nothing_in, prompts_of
from selfplay.types import Message

SAMPLE = 2000  # prompts whose lengths are looked at
EXAMPLES = 5
LINES, LETTERS = 6, 400  # of an example

Length = Callable[[list[Message]], int | str]
"""How long a prompt is, or why that cannot be said."""


def shown(source: str, column: str | None, model: str | None, config: Config | None) -> list[str]:
    """`preview` by the settings and the policy of a configuration, or by the defaults. Raises InputError.

    column: of the prompt, in place of what is recognised; model: a policy, in place of that of the configuration.
    """
    settings = config.prompts if config is not None else PromptsConfig(source=source)
    reading = Reading.of(settings)
    if column is not None:
        reading = dataclasses.replace(reading, prompt=column, format=None)
    policy = PolicyConfig(model=model) if model is not None else config.policy if config is not None else None
    length = None
    if policy is not None:
        from selfplay.prompts.lengths import in_tokens  # transformers takes seconds

        length = in_tokens(policy)
    most = settings.max_tokens if config is not None else None
    return preview(source, reading, settings.split, settings.config, length, most)


def preview(
    source: str, reading: Reading, split: str, config: str | None, length: Length | None, max_tokens: int | None
) -> list[str]:
    """Read a whole source without writing anything, and describe it in lines. `length`: in tokens; None: lengths are in words.

    Lengths and examples are of a sample that depends on the prompts alone. Raises InputError.
    """
    files = local_files(source, split, config)
    recognised, bad = Recognised(), Counter[str]()
    seen = set[int]()
    twice = 0
    sample: dict[int, Found] = {}
    limit = 1 << 63
    for part in all_parts(source, reading, split, config):
        for _, _, found in prompts_of(part.rows(), reading, recognised, bad):
            recognised.found(found)
            number = seeds.derive(canonical(found.messages))
            twice += number in seen
            seen.add(number)
            if number < limit:
                sample[number] = found
                if len(sample) >= 2 * SAMPLE:
                    sample = dict(sorted(sample.items())[:SAMPLE])
                    limit = max(sample)
    chosen = [found for _, found in sorted(sample.items())[:SAMPLE]]
    if not chosen:
        raise nothing_in(source, recognised, bad)
    what = {kinds.NAMES[kind] for kind in map(kinds.kind_of, files.paths)}
    keys, hint = recognised.why_not()
    said = [
        ("files", f"{len(files.paths):,}, {' and '.join(sorted(what))}" + (f"; {files.left:,} of other splits left out" if files.left else "")),
        ("format", recognised.words()),
        ("rows", f"{recognised.formats.total() + bad.total():,}: {recognised.formats.total():,} prompts, {bad.total():,} set aside" + (f": {counted(bad)}" if bad else "")),
    ]  # fmt: skip
    if NO_FORMAT in bad:
        said.append(("set aside", f"{keys}: {hint}"))
    said += [("duplicates", f"{twice:,}"), ("length", _lengths(chosen, length, max_tokens))]
    lines = [f"{name:<11} {text}" for name, text in said]
    for number, found in enumerate(chosen[:EXAMPLES], 1):
        lines += [f"\nexample {number}", *_example(found)]
    return lines


def _lengths(chosen: Sequence[Found], length: Length | None, max_tokens: int | None) -> str:
    unit = "words" if length is None else "tokens"
    measure: Length = length or (lambda messages: sum(len(message["content"].split()) for message in messages))
    found = [measure(one.messages) for one in chosen]
    refused = Counter(one for one in found if isinstance(one, str))
    numbers = np.array([one for one in found if not isinstance(one, str)])
    said = f"of {len(chosen):,} prompts, in {unit}"
    if len(numbers):
        low, median, high = np.percentile(numbers, [0, 50, 95]).astype(int).tolist()
        said += f": shortest {low:,}, median {median:,}, 95 % up to {high:,}, longest {int(numbers.max()):,}"
        if length is not None and max_tokens is not None:
            said += f"; {int((numbers > max_tokens).sum()):,} above prompts.max_tokens = {max_tokens:,}"
    return said + (f"; refused by the template: {counted(refused)}" if refused else "")


def _example(found: Found) -> list[str]:
    lines = []
    for message in found.messages:
        text = message["content"]
        cut = text[:LETTERS].split("\n")[:LINES]
        more = len(text) - len("\n".join(cut))
        lines += [
            f"  {message['role']}: " + "\n    ".join(cut) + (f" … ({more:,} more characters)" if more > 0 else "")
        ]
    if found.reference is not None:
        reference = " ".join(found.reference.split())
        lines.append(f"  reference: {reference[:LETTERS]}")
    return lines

"""What `selfplay prompts` says about a source: its format, counts, lengths, what comes twice, and a few examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from selfplay import seeds
from selfplay.prompts.files import all_parts, files_of, kinds
from selfplay.prompts.formats import Found, Reading, canonical
from selfplay.prompts.formats.reading import NO_FORMAT
from selfplay.prompts.formats.report import Recognised, counted, nothing_in
from selfplay.types import Message

SAMPLE = 2000  # prompts whose lengths are looked at
EXAMPLES = 5
LINES, LETTERS = 6, 400  # of an example

Length = Callable[[list[Message]], int | str]
"""How long a prompt is, or why that cannot be said."""


def preview(
    source: str, reading: Reading, split: str, config: str | None, length: Length | None, max_tokens: int | None
) -> list[str]:
    """Read a whole source without writing anything, and describe it in lines. `length`: in tokens; None: lengths are in words.

    Lengths and examples are of a sample that depends on the prompts alone. Raises InputError.
    """
    files = files_of(source, split, config)
    assert files is not None, "a Hub dataset has no files here"
    recognised, bad = Recognised(), Counter[str]()
    seen = set[int]()
    rows = twice = 0
    sample: dict[int, Found] = {}
    limit = 1 << 63
    for part in all_parts(source, reading, split, config):
        for row in part.rows():
            rows += 1
            found = row if isinstance(row, str) else reading.read(row)
            if isinstance(found, str):
                bad[found] += 1
                if isinstance(row, dict):
                    recognised.not_found(row, found)
                continue
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
        ("rows", f"{rows:,}: {recognised.formats.total():,} prompts, {bad.total():,} set aside" + (f": {counted(bad)}" if bad else "")),
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

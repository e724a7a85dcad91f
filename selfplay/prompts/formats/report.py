"""What was recognised in a source, counted and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from selfplay.errors import InputError
from selfplay.prompts.formats.known import WHOLE
from selfplay.prompts.formats.reading import EMPTY, NO_FORMAT, Found, Reading, Row

MOST_KEYS, MOST_LETTERS = 12, 40  # of a row, that a message names
MOST_KINDS = 64  # different sets of keys that are counted


@dataclass(slots=True)
class Recognised:
    """What the rows of a source, or of a part of it, are."""

    formats: Counter[str] = field(default_factory=Counter)
    """Prompts by format."""
    roles: set[tuple[str, str]] = field(default_factory=set)
    """(name in the file, name here) of the roles."""
    answered: int = 0
    """Conversations whose last answer was dropped."""
    references: int = 0
    """Prompts with a reference."""
    keys: Counter[str] = field(default_factory=Counter)
    """Rows of no known format, by their keys."""
    guess: str = ""
    """The column of such a row that looks most like a prompt."""

    def found(self, found: Found) -> None:
        self.formats[found.format] += 1
        self.answered += found.answered
        self.references += found.reference is not None
        if found.roles:
            self.roles |= found.roles

    def not_found(self, row: Mapping[str, Any], why: str) -> None:
        if not why.startswith((NO_FORMAT, EMPTY, "no column", "not of the format")):
            return
        names = ", ".join(_short(name) for name in list(row)[:MOST_KEYS])
        names += f" and {len(row) - MOST_KEYS} more" if len(row) > MOST_KEYS else ""
        if names in self.keys or len(self.keys) < MOST_KINDS:
            self.keys[names] += 1
        if not self.guess:
            texts = {name: size for name, size in _texts(row) if name != WHOLE}
            self.guess = max(texts, key=lambda name: texts[name], default="")

    def add(self, other: Recognised) -> None:
        """Count what another part is."""
        self.formats.update(other.formats)
        self.roles |= other.roles
        self.answered += other.answered
        self.references += other.references
        self.keys.update(other.keys)
        self.guess = self.guess or other.guess

    def words(self) -> str:
        """«ShareGPT, 2 of 3 roles mapped (human → user, gpt → assistant), 9,812 prompts, 9,800 answers dropped»."""
        said = [
            ", ".join(f"{n:,} × {name}" for name, n in self.formats.most_common())
            if len(self.formats) > 1
            else "".join(self.formats)
        ]
        mapped = sorted((there, here) for there, here in self.roles if there != here)
        if mapped:
            how = ", ".join(f"{_short(there)} → {here}" for there, here in mapped[:8])
            said.append(f"{len(mapped)} of {len(self.roles)} roles mapped ({how})")
        said.append(f"{self.formats.total():,} prompts")
        if self.answered:
            said.append(f"{self.answered:,} answers dropped")
        if self.references:
            said.append(f"{self.references:,} with a reference")
        return ", ".join(part for part in said if part)

    def why_not(self) -> tuple[str, str]:
        """The keys of the rows of no known format, and which setting would read them; empty where there are none."""
        if not self.keys:
            return "", ""
        names = self.keys.most_common(1)[0][0]
        guess = self.guess or "…"
        return (
            f"its rows have {'the keys ' + names if names else 'no keys'}",
            f"name the column with the prompt in prompts.columns, such as {{prompt: {guess}}} (add-prompts: --column {guess}); "
            "`selfplay prompts` shows what is read",
        )


def prompts_of(
    rows: Iterable[Row], reading: Reading, recognised: Recognised, bad: Counter[str]
) -> Iterator[tuple[int, Row, Found]]:
    """The rows that ask something: their numbers, themselves and what they ask. The others are counted in `recognised`
    and, by reason, in `bad`; whoever takes a prompt tells `recognised`."""
    for number, row in enumerate(rows):
        found = row if isinstance(row, str) else reading.read(row)
        if not isinstance(found, str):
            yield number, row, found
            continue
        bad[found] += 1
        if isinstance(row, dict):
            recognised.not_found(row, found)


def nothing_in(source: str, recognised: Recognised, bad: Mapping[str, int]) -> InputError:
    """What is said of a source without a prompt; `bad`: its rows by reason."""
    keys, hint = recognised.why_not()
    why = f" ({counted(bad)})" + (f"; {keys}" if keys else "") if bad else ": it is empty"
    return InputError(
        f"{source} has no usable prompt{why}", hint or ("docs/prompts.md lists what is read" if bad else "")
    )


def counted(counts: Mapping[str, int]) -> str:
    """«3 × duplicate, 1 × invalid JSON»."""
    return ", ".join(f"{n:,} × {why}" for why, n in counts.items())


def _texts(row: Mapping[str, Any], before: str = "", depth: int = 4) -> Iterator[tuple[str, int]]:
    """(name, characters) of the texts of a row; those inside of objects by the names that lead to them, as `prompts.columns` takes
    them."""
    for name, value in row.items():
        if isinstance(value, str):
            yield f"{before}{name}", len(value)
        elif isinstance(value, Mapping) and depth:
            yield from _texts(value, f"{before}{name}.", depth - 1)


def _short(name: Any) -> str:
    text = str(name)
    return text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"

"""How the rows of a source are read: by the format of each row, or by the columns that the configuration names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from selfplay.config import PromptsConfig
from selfplay.config.functions import load_function
from selfplay.errors import InputError
from selfplay.prompts import references
from selfplay.prompts.formats.conversations import Asked, asked_by, with_system
from selfplay.prompts.formats.known import BY_NAME, FORMATS, MAIN, SYSTEM, WHOLE
from selfplay.prompts.formats.known import read as read_row
from selfplay.prompts.formats.texts import is_blank
from selfplay.types import Message

Row = dict[str, Any] | str
"""A row, or in a word why it cannot be read. A row that is no object is under the key `WHOLE`."""
NAMED = 12  # columns that are read so that a message can name them
BESIDE = (*SYSTEM, "meta", "parent", "source")
NO_FORMAT, EMPTY = "no column that is known to hold prompts", "an empty prompt"
FILTERED = "left out by prompts.filter"
MAPPED = "the column of prompts.columns"


@dataclass(frozen=True, slots=True)
class Found:
    """A row that asks something."""

    messages: list[Message]
    format: str
    """What the format is called."""
    answered: bool
    roles: frozenset[tuple[str, str]]
    meta: dict[str, Any]
    parent: str | None
    reference: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The settings `prompts.columns`, `prompts.format` and `prompts.filter`."""

    prompt: str | None = None
    system: str | None = None
    meta: tuple[str, ...] = ()
    reference: str | None = None
    format: str | None = None
    filter: str | None = None

    @classmethod
    def of(cls, settings: PromptsConfig) -> Reading:
        columns = settings.columns
        meta = (columns.meta,) if isinstance(columns.meta, str) else tuple(columns.meta)
        return cls(
            prompt=columns.prompt, system=columns.system, meta=meta, reference=columns.reference,
            format=settings.format, filter=settings.filter,
        )  # fmt: skip

    def prompts(self, there: Iterable[str]) -> list[str]:
        """Those of the columns that are there in which a prompt may be."""
        there = list(there)
        if self.prompt is not None:
            return [name for name in there if name in (self.prompt, self.prompt.partition(".")[0])]
        formats = FORMATS if self.format is None else (BY_NAME[self.format],)
        usual = {name for one in formats if not one.only for name in one.columns}
        if self.format is not None or not set(MAIN) & set(map(_plain, there)):
            usual |= {name for one in formats for name in one.columns}
        return [name for name in there if _plain(name) in usual]

    def columns(self, there: Iterable[str]) -> list[str]:
        """Those of the columns that are there which count. With a filter, which may ask for any, these are all.

        Where no column may hold a prompt, some are read all the same: a message names them.
        """
        there = list(there)
        if self.filter is not None:
            return there
        found = set(self.prompts(there))
        if not found:
            return there[:NAMED]
        named = {name for name in (self.system, self.reference, *self.meta) if name is not None}
        named |= {name.partition(".")[0] for name in named}
        beside = {*BESIDE, *references.COLUMNS}
        return [name for name in there if name in found or name in named or _plain(name) in beside]

    def read(self, row: Mapping[str, Any]) -> Found | str:
        """What a row asks, or why it asks nothing. Raises InputError where the filter fails."""
        if self.filter is not None and not self._takes(row):
            return FILTERED
        renamed = _renaming(tuple(row))
        plain = row if renamed is None else {new: row[old] for new, old in renamed}
        if self.prompt is not None:
            value = _at(row, self.prompt)
            if value is None:
                return f"no column {self.prompt!r}" if self.prompt not in row else EMPTY
            name, asked = MAPPED, asked_by(value)
        else:
            recognised = read_row(plain, self.format)
            if recognised is None:
                return self._why_not(plain)
            name, asked = recognised[0].says, recognised[1]
        if isinstance(asked, str):
            return asked
        if self.system is not None:
            asked = with_system(asked, _at(row, self.system))
        elif self.prompt is not None:
            for system in SYSTEM:
                asked = with_system(asked, plain.get(system))
        try:
            reference = self._reference(row, plain)
        except Exception as error:
            return f"its reference is no JSON ({type(error).__name__})"
        parent = plain.get("parent")
        return Found(
            asked.messages, name, asked.answered, asked.roles, self._meta(row, plain),
            str(parent) if parent and isinstance(parent, str | int) else None, reference,
        )  # fmt: skip

    def _reference(self, row: Mapping[str, Any], plain: Mapping[str, Any]) -> str | None:
        if self.reference is None:
            return references.reference_of(plain)
        return references.reference_of({"reference": _at(row, self.reference)})

    def _meta(self, row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
        if not self.meta:
            meta = plain.get("meta")
            if not meta:
                return {}
            return _json(meta) if isinstance(meta, Mapping) else {"meta": _json(meta)}
        values = {name: _at(row, name) for name in self.meta}
        if len(values) == 1 and isinstance(value := next(iter(values.values())), Mapping):
            return dict(_json(value))
        return {name: _json(value) for name, value in values.items() if value is not None}

    def _why_not(self, row: Mapping[str, Any]) -> str:
        if self.format is not None:
            return f"not of the format {self.format!r}"
        return EMPTY if any(is_blank(row[name]) for name in MAIN if name in row) else NO_FORMAT

    def _takes(self, row: Mapping[str, Any]) -> bool:
        takes = _filter(str(self.filter))
        try:
            return bool(takes(row[WHOLE] if WHOLE in row else dict(row)))
        except Exception as error:  # the user's own code
            raise InputError(
                f"prompts.filter: {self.filter} fails on a row with the keys {', '.join(map(str, row))}: "
                f"{type(error).__name__}: {error}",
                "it is given a row and returns whether the row is taken",
            ) from error


DEFAULT = Reading()


def messages_of(row: Mapping[str, Any]) -> list[Message] | str:
    """The prompt of a row of any known format, or why it has none."""
    found = DEFAULT.read(row)
    return found if isinstance(found, str) else found.messages


@functools.cache
def _filter(name: str) -> Callable[[Any], Any]:
    function: Callable[[Any], Any] = load_function("prompts.filter", name)
    return function


@functools.lru_cache(1024)
def _renaming(keys: tuple[Any, ...]) -> tuple[tuple[str, Any], ...] | None:
    """(name in small letters, key) of a row's columns; None where they are so already. The first of two equal names counts."""
    plain: dict[str, Any] = {}
    for key in keys:
        plain.setdefault(_plain(key), key)
    return None if list(plain) == list(keys) else tuple(plain.items())


def _plain(name: Any) -> str:
    return str(name).strip().lower().replace(" ", "_").replace("-", "_")


def _at(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a name with points leads into objects, where no column has it as it is."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _json(value: Any) -> Any:
    """The value in what JSON can hold: other objects as their texts, no NaN, no halves of surrogate pairs."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(_json(str(key))): _json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json(inner) for inner in value]
    return _json(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


__all__ = ["DEFAULT", "Asked", "Found", "Reading", "Row", "messages_of"]

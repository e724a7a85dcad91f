"""JSON in fewer steps of Python: what the module `json` reads and writes, with encoders that are made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

import orjson

DUMPS, LOADS = json.dumps, json.loads
ENCODER: Any = json.encoder
QUOTED = ENCODER.encode_basestring_ascii
NAMES = {None: "null", True: "true", False: "false"}
LEAVES: dict[type, Callable[[Any], str]] = {
    str: QUOTED, int: repr, bool: NAMES.__getitem__, type(None): NAMES.__getitem__
}  # fmt: skip


def _made(**how: Any) -> Callable[[Any], str]:
    """As `json.dumps` with these arguments, of a value without a circle in it."""
    kind = json.JSONEncoder(check_circular=False, **how)
    chunks = ENCODER.c_make_encoder(
        None, kind.default, QUOTED, None, kind.key_separator, kind.item_separator, kind.sort_keys, False, kind.allow_nan
    )
    return lambda value: "".join(chunks(value, 0))


PLAIN = _made()
SORTED = _made(sort_keys=True, allow_nan=False)


def _indented(value: Any, line: str = "\n") -> str:
    """`line`: what begins a line at this depth."""
    kind = type(value)
    if kind in LEAVES:
        return LEAVES[kind](value)
    if kind is dict:
        if not value:
            return "{}"
        inner = line + " "
        rows = [
            f"{QUOTED(name)}: {LEAVES[type(of)](of) if type(of) in LEAVES else _indented(of, inner)}"
            for name, of in sorted(value.items())
        ]
        return f"{{{inner}{f',{inner}'.join(rows)}{line}}}"
    if kind is list:
        if not value:
            return "[]"
        inner = line + " "
        return f"[{inner}{f',{inner}'.join([_indented(of, inner) for of in value])}{line}]"
    if kind is float and isfinite(value):
        return repr(value)
    raise TypeError(kind)


def _written(value: Any) -> str:
    try:
        return _indented(value)
    except TypeError:  # it has a tuple, names that are no text, or a number that is none
        return DUMPS(value, indent=1, sort_keys=True, allow_nan=False)


KNOWN: dict[tuple[Any, ...], Callable[[Any], str]] = {
    (): PLAIN,
    (("sort_keys", True), ("allow_nan", False)): SORTED,
    (("indent", 1), ("sort_keys", True), ("allow_nan", False)): _written,
}
"""The ways in which the product writes JSON."""


def dumps(value: Any, **how: Any) -> str:
    """As `json.dumps`."""
    known = KNOWN.get(tuple(how.items()))
    return DUMPS(value, **how) if known is None else known(value)


def loads(text: str | bytes | bytearray, **how: Any) -> Any:
    """As `json.loads`. What the quicker reader takes no notice of, or says in other words, is left to that."""
    try:
        return LOADS(text, **how) if how else orjson.loads(text)
    except orjson.JSONDecodeError:
        return LOADS(text)


PLACES: list[tuple[Any, str, Any]] = [(json, "dumps", dumps), (json, "loads", loads)]
"""Where these stand: owner, name and what stands there."""

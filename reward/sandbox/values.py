"""Plain values as JSON: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict.

The tests of an answer and the answer itself run in two processes, and nothing but such values passes between them: no object
whose methods somebody else has written. A subclass passes as what it is a subclass of, and an iterator as a list.
"""

import itertools
import json
from collections.abc import Iterator, KeysView, ValuesView
from typing import Any

MOST = 100_000  # values of an iterator


def dumps(value: Any) -> str:
    """Raises TypeError for what is no plain value."""
    return json.dumps(_plain(value))


def loads(text: str) -> Any:
    """Raises ValueError, TypeError, KeyError or RecursionError for a text that `dumps` did not write."""
    return _value(json.loads(text))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    for name, kind in (("list", list), ("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [_plain(inner) for inner in value]}
    if isinstance(value, (Iterator, range, KeysView, ValuesView)):
        return {"list": [_plain(inner) for inner in itertools.islice(value, MOST)]}
    raise TypeError(f"{type(value).__name__} is no plain value")


def _value(given: Any) -> Any:
    if not isinstance(given, dict):
        if isinstance(given, list):
            raise TypeError("a list is written as an object")
        return given
    ((name, inner),) = given.items()
    if name == "complex":
        return complex(*inner)
    if name == "bytes":
        return bytes.fromhex(inner)
    if name == "dict":
        return {_value(key): _value(of) for key, of in inner}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[name](_value(each) for each in inner)

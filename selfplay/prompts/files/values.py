"""JSON values of a stream, one at a time: the elements of an array, of an array inside an object, or values that follow each other.

Of a file of any size no more is in memory than one value.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

BLOCK = 1 << 18
LISTS = ("data", "rows", "examples", "prompts", "items", "records", "questions", "samples")
"""Keys of an object under which a file has its rows."""
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "eval", "test")
"""Keys of an object under which it has the rows of a split."""
OF_ANOTHER_SPLIT = object()
"""Stands for a row of a split that was not asked for."""
_SPACE = " \t\r\n,\x1e"  # commas between values, and the mark of JSON text sequences


class BrokenJson(ValueError):
    """The values end here, because what follows is no JSON."""

    def __init__(self, why: str, line: int) -> None:
        super().__init__(f"{why} (line {line})")


def values(stream: BinaryIO, split: str = "train") -> Iterator[Any]:
    """The rows of a file. Raises BrokenJson, after the rows before the fault.

    An array gives its elements; an object that has a list of rows under one of LISTS, or under the name of the split, gives
    those, and OF_ANOTHER_SPLIT for each row of the others; any other value is a row, and more may follow.
    """
    scanner = _Scanner(stream)
    while first := scanner.peek():
        if first == "[":
            yield from _elements(scanner)
        elif first == "{":
            yield from _object(scanner, (*LISTS, split))
        else:
            yield scanner.value()


def _elements(scanner: _Scanner) -> Iterator[Any]:
    scanner.take("[")
    while scanner.peek() != "]":
        yield scanner.value()
    scanner.take("]")


def _object(scanner: _Scanner, lists: tuple[str, ...]) -> Iterator[Any]:
    """The rows of an object under one of `lists`, or the object itself."""
    scanner.take("{")
    row: dict[str, Any] = {}
    had_rows = False
    while scanner.peek() != "}":
        key = scanner.value()
        scanner.take(":")
        if key in lists and scanner.peek() == "[" and scanner.begins_with_rows():
            had_rows = True
            yield from _elements(scanner)
        else:
            row[str(key)] = scanner.value()
    scanner.take("}")
    if not had_rows:
        yield from _by_column(row) or [row]
        return
    for key in row.keys() & set(SPLITS):
        if isinstance(row[key], list):
            yield from (OF_ANOTHER_SPLIT for _ in row[key])


def _by_column(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an object that has a list of texts for each column, or an object of texts by row; none for a plain row."""
    columns = [list(value.values()) if isinstance(value, dict) else value for value in row.values()]
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) > 0 for column in columns):
        return []
    if len(row) == 1 and not all(isinstance(value, str) for value in columns[0]):
        return []  # one conversation
    if not all(isinstance(value, dict) for value in row.values()) and not any(
        isinstance(column[0], str) for column in columns
    ):
        return []
    return [dict(zip(row, values, strict=True)) for values in zip(*columns, strict=True)]


class _Scanner:
    """A place in a stream of JSON."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended, self._lines = "", 0, False, 1
        self._json = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space and no comma; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, wanted: str) -> None:
        if (there := self.peek()) != wanted:
            raise self._broken(f"«{wanted}» is missing" if there else "it ends in the middle")
        self._at += 1

    def begins_with_rows(self) -> bool:
        """Whether the array here begins with an object, an array or a text, as an array of rows does."""
        while not (rest := self._text[self._at + 1 :].lstrip()) and self._more():
            pass
        return bool(rest) and rest[0] in '{["'

    def value(self) -> Any:
        if not self.peek():
            raise self._broken("it ends in the middle")
        size = BLOCK
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value that goes on in the next block looks broken at the end of this one, or is a text without an end.
                if self._ended or (len(self._text) - error.pos > 16 and not error.msg.startswith("Unterminated")):
                    raise self._broken(
                        "it ends in the middle" if self._ended and error.pos >= len(self._text) - 1 else error.msg
                    ) from None
            except RecursionError:
                raise self._broken("its values are nested too deeply") from None
            else:
                if end < len(self._text) or self._ended:  # a number may go on in the next block
                    self._at = end
                    return found
            self._more(size)
            size *= 2

    def _more(self, size: int = BLOCK) -> bool:
        if self._ended:
            return False
        block = self._stream.read(size)
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + self._decoder.decode(block, final=not block)
        self._at = 0
        self._ended = not block
        return bool(block)

    def _broken(self, why: str) -> BrokenJson:
        return BrokenJson(why, self._lines + self._text.count("\n", 0, self._at))

"""Text of models, servers and files as a person may see it: without characters that a terminal obeys or that nobody sees.
Times of the ledger as a person reads them.

Such a character could set the title of a terminal, write over what stands there, or show a line in another order than it
has. In its place stands �. Letters of all scripts stay as they are, and so do the joiners that scripts and emoji need.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

# Controls, marks that reorder text (Trojan Source), blanks without width, tags, and halves of a surrogate pair.
_HOSTILE = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u034f\u115f\u1160\u17b4\u17b5\u200b\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
_SOFT = "\xad\u061c\u180e\u200e\u200f"  # They have no shape either, but ordinary text in some scripts has them.
UNSEEN = re.compile(f"[{_HOSTILE}{_SOFT}]")
_NOT_SHOWN = re.compile(f"[{_HOSTILE}]")


def visible(text: str) -> str:
    """The text with a � in the place of each character that is not to be shown. Line ends and tabs stay."""
    return _NOT_SHOWN.sub("�", text.replace("\r\n", "\n"))


def line(text: str) -> str:
    """The same in one line, for where a line break would look like the next entry of a list or a log."""
    return visible(" ".join(text.splitlines()))


def when(time: str | None) -> str:
    """A time of the ledger (ISO 8601, UTC) for a person, to the second: «2026-11-28 16:39:08 UTC». Empty for None."""
    return "" if time is None else f"{time[:19].replace('T', ' ')} UTC"


def say(text: str) -> None:
    """Print a text for a person. What the output cannot encode is printed as its code."""
    encoding = sys.stdout.encoding or "utf-8"
    print(visible(text).encode(encoding, "backslashreplace").decode(encoding))


class _Filtered:
    """A stream that everything written to it goes through `visible` for."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def filter_stderr() -> None:
    """Have all that Python writes to stderr from here on be visible: error messages, log records, tracebacks of any thread."""
    if not isinstance(sys.stderr, _Filtered):
        sys.stderr = cast(TextIO, _Filtered(sys.stderr))

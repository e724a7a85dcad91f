"""Which words of two texts differ, and which characters a reader would not see: for showing model output as text.

A text becomes parts, each a kind and a string: `same`, `other` (words that the other text lacks), `unseen` (characters
that have no shape or reorder the line, named by code point).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from selfplay.visible import UNSEEN

Part = tuple[str, str]

FEW_WORDS = 300
MOST_WORDS = 4000  # of each text are compared; what follows counts as the same
MOST_PARTS = 2000  # of a text; then unseen characters are replaced by �, and nothing is marked
_WORD = re.compile(r"\w+|[^\w\s]|\s+")


def compare(one: str, other: str) -> tuple[list[Part], list[Part]]:
    """The parts of both texts, with the words marked that the other one lacks."""
    a, b = _WORD.findall(one), _WORD.findall(other)
    # In long texts frequent words are no anchors: with them a text that repeats itself takes minutes.
    frequent = max(len(a), len(b)) > FEW_WORDS
    matcher = difflib.SequenceMatcher(None, a[:MOST_WORDS], b[:MOST_WORDS], autojunk=frequent)
    left: list[Part] = []
    right: list[Part] = []
    for tag, i, j, k, n in matcher.get_opcodes():
        kind = "same" if tag == "equal" else "other"
        left.append((kind, "".join(a[i:j])))
        right.append((kind, "".join(b[k:n])))
    left.append(("same", "".join(a[MOST_WORDS:])))
    right.append(("same", "".join(b[MOST_WORDS:])))
    return reveal(left), reveal(right)


def along(texts: Iterable[str | None]) -> list[list[Part]]:
    """The parts of each text, with the words marked that the text before it lacks; no parts for a text that is not there."""
    found: list[list[Part]] = []
    before: str | None = None
    for text in texts:
        if text is None:
            found.append([])
        elif before is None:
            found.append(reveal([("same", text)]))
        else:
            found.append(compare(before, text)[1])
        before = before if text is None else text
    return found


def reveal(parts: Iterable[Part]) -> list[Part]:
    """The same parts, neighbours of a kind joined, unseen characters as parts of their own: «U+202E», «U+200B ×12»."""
    found: list[Part] = []
    rest = _revealed(parts)
    for kind, text in rest:
        if found and found[-1][0] == kind != "unseen":
            found[-1] = (kind, found[-1][1] + text)
        elif len(found) < MOST_PARTS:
            found.append((kind, text))
        else:
            whole = text if kind != "unseen" else "�"
            found.append(("same", whole + "".join(t if k != "unseen" else "�" for k, t in rest)))
    return found


def _revealed(parts: Iterable[Part]) -> Iterator[Part]:
    for kind, text in parts:
        at = 0
        while at < len(text):
            found = UNSEEN.search(text, at)
            end = found.start() if found else len(text)
            if end > at:
                yield kind, text[at:end]
            at = end
            if found:
                character = found.group()
                while end < len(text) and text[end] == character:
                    end += 1
                count = f" ×{end - at}" if end - at > 1 else ""
                yield "unseen", f"U+{ord(character):04X}{count}"
                at = end

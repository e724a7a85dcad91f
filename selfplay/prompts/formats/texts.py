"""The text of a value, whatever a format packs it in: a string, bytes, a list of content parts, or an object with one text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS = ("text", "content", "value", "full_text", "parts")
"""Keys under which an object has its text."""
PARTS = (None, "text", "input_text", "output_text")
"""Types of content parts that are texts; others are images, sounds or calls of tools."""


def text_of(value: Any) -> str | None:
    """The text of a value, or None where it is not a text. Parts of a content are joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if isinstance(value, Mapping):
        if value.get("type") not in PARTS:
            return None
        return next((text_of(value[key]) for key in TEXTS if value.get(key) is not None), None)
    if isinstance(value, list) and value:
        found = [text_of(part) for part in value if part is not None]
        return None if None in found else "\n".join(text for text in found if text is not None)
    return None


def is_blank(value: Any) -> bool:
    """Whether there is nothing in a column."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})

"""Conversations that are written as one text, with a marker before every turn, as HH-RLHF and others have them."""

from __future__ import annotations

import re

STYLES = (
    re.compile(r"(?:^|\r?\n\r?\n)[ \t]*(?:(?P<user>Human|H)|(?P<assistant>Assistant|A)|(?P<system>System)):[ \t]?"),
    re.compile(r"### ?(?:(?P<user>Human)|(?P<assistant>Assistant)|(?P<system>System)): ?\n?"),  # on the same line too (Guanaco)
    re.compile(r"(?:^|\n)### ?(?:(?P<user>Human|User|Instruction|Question)|(?P<assistant>Assistant|Response|Answer)|(?P<system>System)): ?\n?"),
    re.compile(r"(?P<user>(?:<s> ?)?\[INST\] ?)|(?P<assistant> ?\[/INST\])"),
    re.compile(r"<\|im_start\|>(?:(?P<user>user)|(?P<assistant>assistant)|(?P<system>system))\r?\n"),
    re.compile(r"<\|(?:(?P<user>user|prompter)|(?P<assistant>assistant)|(?P<system>system))\|>\n?"),
    re.compile(r"(?:^|\s)(?:(?P<user>USER)|(?P<assistant>ASSISTANT)|(?P<system>SYSTEM)): ?"),
)  # fmt: skip
"""How the marker before a turn looks. Its group names the role."""
_ENDS = re.compile(r"(?:<\|im_end\|>|<\|endoftext\|>|<\|end\|>|</s>)\s*$")


def turns_of(text: str) -> list[tuple[str, str]] | None:
    """(role, text) of each turn; None for a text that does not begin with a marker of a user and has no answer's marker.

    So a prompt that only quotes a transcript stays a prompt.
    """
    start = text.lstrip()
    if not start.startswith(("Human", "H:", "###", "<", "[INST]", "USER", "System", "SYSTEM")):
        return None
    for style in STYLES:
        marks = list(style.finditer(start))
        roles = [str(mark.lastgroup) for mark in marks]
        if not marks or marks[0].start() or "user" not in roles or "assistant" not in roles:
            continue
        ends = [mark.start() for mark in marks[1:]] + [len(start)]
        return [
            (role, _ENDS.sub("", start[mark.end() : end]).strip())
            for role, mark, end in zip(roles, marks, ends, strict=True)
        ]
    return None

"""A configuration as YAML, with a word behind each value on why it is what it is."""

from __future__ import annotations

import json
import re
from typing import Any

from selfplay.starting.presets import Settings

PLAIN = re.compile(r"[A-Za-z./][\w./-]*")
NOT_PLAIN = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")  # texts that YAML takes for something else
ORDER = (
    "run", "policy", "prompts", "generate", "reward", "pairs", "depth", "train", "evaluate", "placement", "retention",
    "schedule", "service",
)  # fmt: skip
WIDTH = 43  # characters before a comment


def written(title: list[str], settings: Settings) -> str:
    """The file: comments, then the sections in the order of a round."""
    lines = [f"# {line}" for line in title]
    before: list[str] = []
    for key, (value, why) in sorted(settings.items(), key=lambda item: _place(item[0])):
        *parents, last = key.split(".")
        for depth, name in enumerate(parents):
            if before[: depth + 1] != parents[: depth + 1]:
                lines.append(f"{'  ' * depth}{name}:")
                before = parents[: depth + 1]
        before = parents
        line = f"{'  ' * len(parents)}{last}: {text(value)}"
        lines.append(f"{line:<{WIDTH}} # {why}" if why else line)
    return "\n".join(lines) + "\n"


def _place(key: str) -> tuple[int, str]:
    """Where a setting stands: values of a section first, then the sections in it, each in one piece."""
    section, *rest = key.split(".")
    return ORDER.index(section), rest[0] if len(rest) > 1 else ""


def text(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in NOT_PLAIN else json.dumps(value)
    if isinstance(value, float) and value and abs(value) < 1e-3:
        return f"{value:.1e}"  # YAML takes 7e-7 for a text
    return json.dumps(value)

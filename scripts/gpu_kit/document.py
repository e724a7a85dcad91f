"""What was found, as JSON and as a document beside it. Both are written anew after each figure."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Any

from selfplay.storage import folders

NAME = "measurements-gpu"
WIDTH = 120  # characters of a line of text
WIDE = 9  # figures of a single finding from which on each has a row of its own
RANDOM = (
    "The models have the shapes of real ones and random weights, made from a configuration. Their next token has an entropy "
    "like that of a trained model. Random networks amplify rounding more than trained ones do, so the noise here is an upper "
    "end, and nothing is said about what is learnt."
)
Found = dict[str, Any]
"""`command`, `machine` and `parts`: for each part its title, what it is about, its state, seconds, findings and log_tail."""


def write(found: Found, out: Path) -> None:
    folders.write_json(out / f"{NAME}.json", found)
    with folders.whole(out / f"{NAME}.md") as partial:
        partial.write_text(markdown(found), encoding="utf-8")


def markdown(found: Found) -> str:
    lines = [
        "# Measurements on a GPU",
        "",
        f"Written by `{found['command']}`. The same figures are in {NAME}.json.",
        "",
    ]
    lines += table(["", ""], [[name, value] for name, value in found["machine"].items()])
    lines += [fill(RANDOM, WIDTH), ""]
    for part in found["parts"]:
        seconds = "" if part["seconds"] is None else f", {part['seconds']:.0f} s"
        lines += [f"## {part['title']}", "", fill(part["about"], WIDTH), "", f"State: {part['state']}{seconds}.", ""]
        lines += tables(part["findings"])
        if part["log_tail"]:
            lines += ["The end of its logs:", "", "```", part["log_tail"].replace("```", "'''"), "```", ""]
    return "\n".join(lines)


def tables(findings: list[dict[str, Any]]) -> list[str]:
    """A table for each row of findings that have the same figures; errors as sentences."""
    lines: list[str] = []
    for names, group in groupby(findings, lambda finding: tuple(finding.get("figures", ()))):
        rows = list(group)
        if not names:
            lines += [line for row in rows for line in (f"**{row['what']}** failed: {row.get('error', '')}", "")]
            continue
        if len(rows) == 1 and len(names) >= WIDE:
            values = [[name.replace("_", " "), figure(rows[0]["figures"][name])] for name in names]
            lines += table([rows[0]["what"], ""], values)
            continue
        header = ["", *(name.replace("_", " ") for name in names)]
        lines += table(header, [[row["what"], *(figure(row["figures"][name]) for name in names)] for row in rows])
    return lines


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in cells), ""]


def figure(value: float | int | str | bool | None) -> str:
    """A number on three digits, or what else it is."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value

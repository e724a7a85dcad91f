"""The reference of the settings is the schema's: complete, explained, and up to date."""

import re

from mini import ROOT

from selfplay.config.document import document

PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_schema_says() -> None:
    assert document().rstrip() == PAGE.rstrip(), "run `make docs`"


def test_every_setting_has_an_explanation() -> None:
    """Except for the constant that tells one form of a section from the others: its heading explains it."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|.*\| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 150
    assert {name for name, type_, meaning in rows if not meaning and not re.fullmatch(r"`\w+`", type_)} == set()


def test_what_is_repeated_is_named_where_it_is_repeated() -> None:
    """The judge takes the settings of the reward; they stand in the table of the reward alone."""
    judge = PAGE.partition("### `evaluate.judge`\n")[2].partition("\n#")[0]
    assert "As in `reward`: `model`, `heads`," in judge and "| `model` |" not in judge

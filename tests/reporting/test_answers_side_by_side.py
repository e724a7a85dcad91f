"""Answers to the audit prompts: read by columns and by prompts, and shown in the terminal and in the report."""

import io

import pytest
from rich.console import Console
from served_world import HOSTILE, build
from typer.testing import CliRunner

from selfplay import cli
from selfplay.errors import InputError
from selfplay.reporting import report
from selfplay.reporting.answers import about, read
from selfplay.reporting.terminal import Display
from selfplay.storage import tables
from selfplay.types import Scored


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Nine rounds, of which 1, 3, 5, 7 and 9 have an audit of twelve prompts; the first was rejected."""
    run_dir = tmp_path_factory.mktemp("answers") / "run"
    store = build(run_dir, rounds=9, pairs=6)
    yield store, run_dir
    store.close()


def test_columns_and_prompts_come_in_pages(run):
    found = read(*run, columns=3, start=2, prompts=4)
    assert [(c.policy, c.round, c.state) for c in found.columns] == [
        (0, None, "initial"), (5, 5, "promoted"), (7, 7, "promoted"), (9, 9, "rejected"),
    ]  # fmt: skip
    assert [c.reward for c in found.columns] == pytest.approx([0.5, 0.6, 0.64, 0.68])
    assert (found.prompts, found.earlier) == (12, 5)
    assert [line.prompt_id for line in found.lines] == [f"{i:016x}" for i in range(2, 6)]
    first = found.lines[0]
    assert first.messages[0]["content"].startswith("What follows from number 2?")
    assert [said.policy for said in first.said] == [0, 5, 7, 9]
    assert about(first.said[1], first.said[0]) == "0.300 (+0.100) · 11 tokens · cut off"
    assert about(found.lines[1].said[1], found.lines[1].said[0]) == "no score · 12 tokens"
    assert about(found.lines[2].said[0], None) == "0.400 · 13 tokens · 4 of them thoughts"
    earlier = read(*run, before=found.earlier, columns=3)
    assert [c.round for c in earlier.columns] == [None, 1, 3] and earlier.earlier is None
    assert earlier.columns[1].state == "rejected" and len(earlier.lines) == 10
    assert [c.round for c in read(*run, rounds=[9, 3]).columns] == [None, 3, 9]
    with pytest.raises(InputError, match="round 4 has no audit") as error:
        read(*run, rounds=[3, 4])
    assert error.value.hint == "the last rounds with one: 1, 3, 5, 7, 9"


def test_what_is_not_there_is_left_out(run, tmp_path):
    """Answers of a round that asked other prompts, and a round without its prompts."""
    store, run_dir = run
    folder = run_dir / "rounds" / "0007" / "evaluate"
    rows = tables.read_rows(folder / "audit.parquet", Scored)
    texts = (run_dir / "rounds" / "0009" / "evaluate" / "audit_prompts.parquet").rename(tmp_path / "texts")
    tables.write_rows(folder / "audit.parquet", rows[1:], Scored)
    try:
        line = read(store, run_dir, columns=2).lines[0]
    finally:
        tables.write_rows(folder / "audit.parquet", rows, Scored)
        texts.rename(run_dir / "rounds" / "0009" / "evaluate" / "audit_prompts.parquet")
    assert line.messages == [] and [said and said.policy for said in line.said] == [0, None, 9]


def test_the_terminal_marks_what_is_new_and_obeys_no_text(run):
    out = io.StringIO()
    display = Display(Console(file=out, width=130))
    assert display.fitting_columns == 2
    display.answers(read(*run, columns=2, prompts=2))
    text = " ".join(out.getvalue().split())
    assert "policy 9 (round 9," in text and "{+" in text and "2 of 12 audit prompts" in text
    assert "U+202E" in text and "U+0007" in text and "\u202e" not in text and "\x07" not in text
    done = CliRunner().invoke(cli.app, ["answers", "--run-dir", str(run[1]), "--rounds", "3", "--prompts", "1"])
    assert (
        done.exit_code == 0 and "1 of 12 audit prompts" in done.output and "(round 3," in " ".join(done.output.split())
    )
    with pytest.raises(InputError, match="--rounds x: not numbers of rounds"):
        CliRunner().invoke(cli.app, ["answers", "--run-dir", str(run[1]), "--rounds", "x"], catch_exceptions=False)


@pytest.mark.slow
def test_the_report_shows_them_as_text(run):
    page, _ = report.write(run[1])
    text = page.read_text(encoding="utf-8")
    section = text[text.index("Answers to audit prompts") : text.index("A sample of the pairs")]
    assert "8 of 12 audit prompts" in section and "policy 9 (round 9, rejected)" in section
    assert "&lt;script&gt;window.pwned=1" in section and "<script>window" not in section and HOSTILE not in section
    assert '<span class="unseen">U+202E</span>' in section and "\u202e" not in section
    assert '<span class="other">Round 9 adds this' in section or '<span class="other"> Round 9 adds this' in section
    assert "0.300 (+0.100) · 11 tokens · cut off" in section

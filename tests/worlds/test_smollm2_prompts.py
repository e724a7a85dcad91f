"""The instruction prompts of SmolLM2's world, as they are written."""

import json
from pathlib import Path
from typing import Any

import pytest

from reward.instructions import constraints, follows
from selfplay.prompts.references import reference_of
from selfplay.worlds.smollm2 import instructions
from selfplay.worlds.smollm2.constraints import FAMILIES
from selfplay.worlds.smollm2.instructions import COUNTS


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("prompts")
    assert instructions.write(out, 0) == {"train": 2000, "heldout": 400, "audit": 400}
    return {file: [json.loads(line) for line in (out / f"{file}.jsonl").open()] for file in COUNTS}


def test_the_files_share_no_prompt_and_no_topic(rows: dict[str, list[dict[str, Any]]]) -> None:
    texts = [row["prompt"] for file in COUNTS for row in rows[file]]
    assert len(set(texts)) == len(texts) == 2800
    topics = instructions.split_topics(0)
    named = {
        file: {topic for topics in [*part.by_kind.values(), part.questions] for topic in topics}
        for file, part in topics.items()
    }
    assert not named["train"] & named["heldout"] and not named["train"] & named["audit"]
    assert not named["heldout"] & named["audit"]
    for file in COUNTS:
        assert all(any(topic in row["prompt"] for topic in named[file]) for row in rows[file])


def test_every_constraint_can_be_checked(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The reward knows each id and its arguments, and every family comes up in the judged files too."""
    for file in COUNTS:
        seen = set[str]()
        for row in rows[file]:
            asked = constraints(reference_of(row))
            assert 1 <= len(asked) <= 2
            seen |= {name for name, _ in asked}
        assert seen >= FAMILIES.keys()


def test_a_seed_gives_the_same_prompts_and_another_one_others(
    rows: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    instructions.write(tmp_path, 0)
    written = (tmp_path / "audit.jsonl").stat()
    assert [json.loads(line) for line in (tmp_path / "audit.jsonl").open()] == rows["audit"]
    instructions.write(tmp_path, 0)
    assert (tmp_path / "audit.jsonl").stat().st_mtime_ns == written.st_mtime_ns
    assert instructions.prompts("audit", 1) != rows["audit"]


def test_a_request_that_is_to_be_repeated_is_what_stands_first(rows: dict[str, list[dict[str, Any]]]) -> None:
    asked = [row for row in rows["train"] if "combination:repeat_prompt" in row["instruction_id_list"]]
    assert len(asked) > 20
    for row in asked:
        at = row["instruction_id_list"].index("combination:repeat_prompt")
        request = row["kwargs"][at]["prompt_to_repeat"]
        assert row["prompt"].startswith(f"{request}\n")
        assert follows(reference_of(row), row["prompt"], f"{request}\nGladly.")[at]

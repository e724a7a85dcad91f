"""Who worked when, from rows of the ledger."""

import pytest

from selfplay.reporting.who_worked import lanes, spans


def row(stage, ended, seconds):
    return {"stage": stage, "ended": f"2026-03-10T12:00:{ended:02d}+00:00", "seconds": seconds}


def test_stages_are_work_of_their_roles():
    """Ten seconds: prompts 1, sampling 4, scoring 2, training 2, evaluation 1."""
    rows = [
        row("prompts", 1, 1.0),
        row("generate", 5, 4.0),
        row("score", 7, 2.0),
        row("train", 9, 2.0),
        row("evaluate", 10, 1.0),
    ]
    found = spans(rows, {})
    assert [(s.lane, s.what, s.start, s.seconds) for s in found] == [
        ("controller", "prompts", 0.0, 1.0), ("engine", "generate", 1.0, 4.0), ("reward", "score", 5.0, 2.0),
        ("trainer", "train", 7.0, 2.0), ("engine", "evaluate", 9.0, 1.0),
    ]  # fmt: skip
    shares = {"engine": 0.5, "reward": 0.2, "trainer": 0.2, "controller": 0.1}
    assert {lane: pytest.approx(share) for lane, share in lanes(found)} == shares
    assert spans([], {}) == lanes([]) == []


def test_scores_under_samples_count_for_the_reward():
    """It scored for three of the four seconds of sampling, and one second after them."""
    found = spans([row("generate", 4, 4.0), row("score", 5, 1.0)], {"generate/overlap_seconds": 3.0})
    assert dict(lanes(found))["reward"] == pytest.approx(0.8)

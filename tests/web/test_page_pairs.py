"""What the page of a pair says about why it was kept or dropped."""

import pytest

from selfplay.web.api_models import PairDetail, Response
from selfplay.web.page.pairs import decided, side

SETTINGS = {
    "keep": 0.4,
    "noise": 1e-4,
    "weight": 1.0,
    "selection": "potential",
    "implicit": "simpo",
    "max_disagreement": 0.5,
}
ANSWER = Response(text="x", reward=2.0, logp=-6.0, tokens=4)


def detail(**changes):
    settings = {
        "round": 3, "row": 7, "prompt_id": "p", "explicit_margin": 1.5, "implicit_margin": 0.25, "implicit_signed": -0.25, "potential": 0.5,
        "kept_because": "base", "dropped_because": None, "messages": [], "chosen": ANSWER, "rejected": ANSWER, "cluster": 2,
        "closeness": 0.125, "added": 1, "rank": 3, "ranked": 18, "lowest_kept": 0.25, "settings": SETTINGS,
    }  # fmt: skip
    return PairDetail.model_validate(settings | changes)


def test_a_kept_pair_has_every_number():
    said = dict(decided(detail()))
    assert said["verdict"] == "kept (base)"
    assert said["explicit margin"].startswith("1.50000") and "signed -0.25000" in said["implicit margin"]
    assert said["rank by potential"] == "3 of 18" and said["lowest potential kept"] == "0.2500"
    assert (said["gradient cluster"], said["closeness to its centre"], said["pairs added to the prompt"]) == (
        "2",
        "0.1250",
        "1",
    )
    assert side(ANSWER) == "reward 2.0000 · 4 tokens · log-probability -6.000 nats, -1.5000 a token"


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("noise", "at or below the reward's noise (0.0001)"),
        ("nonfinite", "not finite"),
        ("disagreement", "the ensemble disputes one of its answers (limit 0.5)"),
        ("potential", "below the share that is kept (0.4) by potential"),
    ],
)
def test_a_dropped_pair_says_why(why, words):
    dropped = detail(kept_because=None, dropped_because=why, potential=None, rank=None, cluster=None, closeness=None)
    said = dict(decided(dropped))
    assert said["verdict"].startswith("dropped: ") and words in said["verdict"]
    assert said["rank by potential"] == said["gradient cluster"] == "–"

"""Probes of a reward that is written by hand: what is chosen, compared, told and kept."""

import json
import math

import numpy as np
import pytest

from selfplay.config import GuardConfig, RewardSource
from selfplay.errors import GuardError
from selfplay.rewards.probes import Probes, choose_texts
from selfplay.rewards.scorer import Answer
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Prompt

SAME = {"probe_change": 0.0, "probe_missing": 0.0}


class Reward:
    """A reward at the process boundary: length times a factor, plus an offset; nothing for empty texts.

    Of several sources each has another factor.
    """

    def __init__(self):
        self.factor, self.offset, self.identity, self.sources = 1.0, 0.0, "weights", [RewardSource(model="a")]
        self.factors, self.silent, self.renamed, self.anew = [1.0], {""}, [], []
        self.asked = 0

    def ask(self, items, fresh=False):
        assert fresh, "probes go past the cache"
        self.asked += 1
        scores = [
            [math.nan if text in self.silent else self.factor * own * len(text) + self.offset for _, text, _ in items]
            for own in self.factors
        ]
        return Answer(identities=(self.identity,) * len(scores), scores=np.array(scores))

    def names(self, identities):
        return [f"named {identity}" for identity in identities]

    def rename(self, before, now):
        self.renamed = [*before, *now]

    def begin_anew(self, identities):
        self.anew += identities


def write_texts(folder, texts_of):
    """prompts.parquet and candidates.parquet: the texts of each prompt's answers."""
    prompts = [
        Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in texts_of
    ]
    candidates = [
        Candidate(
            prompt_id=p, index=i, text=text, token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=0
        )
        for p, texts in texts_of.items()
        for i, text in enumerate(texts)
    ]
    files = folder / "prompts.parquet", folder / "candidates.parquet"
    for path, rows, kind in zip(files, (prompts, candidates), (Prompt, Candidate), strict=True):
        tables.write_rows(path, rows, kind)
    return files


class Watched:
    """A run whose first round has four answers to two prompts, of 0 to 3 characters."""

    def __init__(self, tmp_path, **guard):
        self.probes = Probes(tmp_path / "reward" / "probes.json", GuardConfig.model_validate(guard))
        self.reward, self.warned, self.recorded, self.chosen = Reward(), [], [], 0
        self.files = write_texts(tmp_path, {"p": ["", "x"], "q": ["xx", "xxx"]})
        self.scored_before = False

    def ask(self):
        return self.probes.ask(
            self.reward,
            1,
            self._choose,
            scored_before=lambda: self.scored_before,
            record=self.recorded.append,
            warn=self.warned.append,
        )

    def _choose(self, count):
        self.chosen += 1
        return choose_texts(*self.files, count, among=9)

    @property
    def kept(self):
        return folders.read_json(self.probes.path)


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_the_same_texts_get_the_same_scores(watched):
    """Texts of 0 to 3 characters: scores none, 1, 2, 3, with standard deviation √(2/3) = .816."""
    assert watched.ask() == SAME
    assert watched.kept["scores"] == [[None, 1.0, 2.0, 3.0]] and watched.kept["round"] == 1
    watched.reward.offset = 1e-3
    assert watched.ask()["probe_change"] == pytest.approx(1e-3 / math.sqrt(2 / 3))
    assert watched.warned == []
    watched.reward.offset = 0.05
    assert watched.ask()["probe_change"] == pytest.approx(0.0612, rel=1e-3)
    assert len(watched.warned) == 1 and "guard.probe_change.warn" in watched.warned[0]
    assert watched.chosen == 1  # the texts are those of the first round


def test_a_replaced_reward_stops_and_is_taken_when_that_is_meant(watched):
    watched.ask()
    watched.reward.factor = -1.0
    with pytest.raises(GuardError, match="not the one this run began with") as error:
        watched.ask()
    path = watched.probes.path
    assert f"delete {path}" in error.value.hint
    assert watched.kept["scores"] == [[None, 1.0, 2.0, 3.0]]  # what the run began with stays
    path.unlink()
    assert watched.ask() == SAME
    assert watched.kept["scores"] == [[None, -1.0, -2.0, -3.0]]


def test_a_text_that_loses_its_score_or_gets_one_is_counted_apart(tmp_path):
    """Of four texts one in four; a judge whose reply cannot be read stops nothing by itself."""
    watched = Watched(tmp_path, probe_missing={"warn": 0.0, "stop": 0.25}, probe_change={"stop": 0.1})
    watched.ask()
    watched.reward.silent = {"", "x"}
    assert watched.ask() == {"probe_change": 0.0, "probe_missing": 0.25}
    assert len(watched.warned) == 1 and "lost their score or got one (share) 0.25" in watched.warned[0]
    watched.reward.silent = {"x"}
    with pytest.raises(GuardError, match=r"\(share\) 0\.5, limit 0\.25 \(guard\.probe_missing\.stop\)"):
        watched.ask()


def test_when_the_probes_were_deleted_all_that_goes_by_the_name_begins_anew(watched):
    watched.ask()
    assert watched.reward.anew == [] and watched.recorded == []  # the first time
    watched.scored_before = True
    watched.ask()
    assert watched.reward.anew == []  # the file is there
    watched.probes.path.unlink()
    watched.ask()
    assert watched.reward.anew == ["weights"] and "begin anew" in watched.recorded[0] and watched.warned == []


def test_other_weights_that_score_otherwise_do_not_take_over_the_scale(tmp_path):
    watched = Watched(tmp_path, probe_change={"stop": None})
    watched.ask()
    watched.reward.identity, watched.reward.factor = "others", 3.0
    assert watched.ask()["probe_change"] > 1
    assert watched.reward.renamed == ["named others", "named others"]
    assert "names other weights (others instead of weights); the probes' scores changed by 7.35" in watched.warned[-1]


def test_a_member_that_the_configuration_left_alone_is_watched_while_another_changes(watched):
    ours = watched.reward
    ours.sources, ours.factors = [RewardSource(model="a"), RewardSource(url=["http://b"])], [1.0, 2.0]
    watched.ask()
    ours.sources, ours.factors = [RewardSource(url=["http://b"]), RewardSource(model="new")], [2.0, 7.0]
    assert watched.ask() == SAME
    assert watched.kept["scores"] == [[None, 2.0, 4.0, 6.0], [None, 7.0, 14.0, 21.0]]
    ours.sources, ours.factors = [RewardSource(url=["http://b"]), RewardSource(model="newer")], [5.0, 8.0]
    with pytest.raises(GuardError, match="not the one this run began with"):
        watched.ask()


def test_another_reward_by_configuration_is_no_alarm(watched):
    watched.ask()
    watched.reward.factor, watched.reward.sources = 7.0, [RewardSource(model="b")]
    assert watched.ask() == SAME
    assert watched.ask() == SAME
    assert watched.recorded == ["the configuration names another reward: the probes begin anew"]
    assert watched.warned == []


def test_other_weights_with_the_same_scores_are_told_once(watched):
    watched.ask()
    watched.reward.identity = "resaved weights"
    watched.ask()
    watched.ask()
    assert len(watched.warned) == 1 and "names other weights (resaved weig instead of weights)" in watched.warned[0]
    assert watched.reward.renamed == ["weights", "named resaved weights"]


@pytest.mark.parametrize("identity", ["weights", ""])
def test_the_same_reward_at_another_address_is_compared_still(watched, identity):
    watched.reward.identity = identity
    watched.reward.sources = [RewardSource(url=["http://here"])]
    watched.ask()
    watched.reward.sources = [RewardSource(url=["http://here", "http://elsewhere"])]
    assert watched.ask() == SAME and watched.recorded == watched.warned == []
    assert watched.reward.renamed == [identity or '{"url": ["http://here"]}', f"named {identity}"]
    watched.reward.factor = -1.0
    with pytest.raises(GuardError, match="not the one"):
        watched.ask()


@pytest.mark.parametrize(
    "other", [{"rules": [{"rule": "json"}]}, {"model": "a", "heads": {"x": 1}}, {"model": "a", "dtype": "bfloat16"}]
)
def test_other_rules_heads_or_precision_by_configuration_are_no_alarm(watched, other):
    watched.ask()
    watched.reward.factor, watched.reward.identity = 7.0, "others"
    watched.reward.sources = [RewardSource.model_validate(other)]
    assert watched.ask() == SAME


def test_without_probes_nothing_is_asked(tmp_path):
    watched = Watched(tmp_path, probes=0)
    assert watched.ask() == {}
    assert (watched.reward.asked, watched.chosen, watched.probes.path.exists()) == (0, 0, False)


def test_the_file_of_probes_has_conversations_and_responses(watched):
    watched.ask()
    assert [(item["messages"], item["response"]) for item in watched.kept["items"]] == [
        ([{"role": "user", "content": p}], text) for p, text in (("p", ""), ("p", "x"), ("q", "xx"), ("q", "xxx"))
    ]
    assert watched.kept["sources"] == [RewardSource(model="a").which()]
    assert json.loads(watched.probes.path.read_text())["identities"] == ["weights"]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (4, ["a0", "a1", "e0", "e1"]),
        (6, ["a0", "a1", "c0", "c1", "e0", "e1"]),
        (1, ["a0"]),
        (16, ["a0", "a1", "a2", "b0", "b1", "b2", "c0", "c1", "c2", "e0", "e1", "e2"]),
    ],
)
def test_probe_texts_are_spread_over_the_prompts_and_two_at_least_are_of_one(tmp_path, count, expected):
    """Five prompts with three answers each. 16 texts want four of each, of ⌊16/4⌋ = 4 prompts, which have but three."""
    files = write_texts(tmp_path, {p: [f"{p}{i}" for i in range(3)] for p in "abcde"})
    chosen = choose_texts(*files, count, among=5)
    assert [item.response for item in chosen] == expected
    assert all(item.messages == [{"role": "user", "content": item.response[0]}] for item in chosen)


def test_probe_texts_are_those_of_the_first_shard(tmp_path):
    """So they are the same whether all candidates are there or the first shard alone."""
    answers = {p: [f"{p}{i}" for i in range(3)] for p in "abcde"}
    whole, shard = tmp_path / "whole", tmp_path / "shard"
    for folder in (whole, shard):
        folder.mkdir()
    prompts, candidates = write_texts(whole, answers)
    _, first = write_texts(shard, {p: answers[p] for p in "ab"})
    for count in (1, 4, 32):
        chosen = choose_texts(prompts, candidates, count, among=2)
        assert chosen == choose_texts(prompts, first, count, among=2)
        assert {item.response[0] for item in chosen} <= {"a", "b"}


def test_before_the_first_score_a_reward_is_looked_at_without_a_word(watched):
    """What there is to tell, to change or to stop for waits for `ask`; the first scores are kept."""

    def same():
        return watched.probes.is_same(watched.reward, 1, watched._choose, watched.scored_before)

    assert same() and watched.kept["scores"] == [[None, 1.0, 2.0, 3.0]]
    assert watched.ask() == SAME and watched.chosen == 1
    watched.scored_before = True
    assert same()
    known = watched.kept
    watched.reward.factor = -1.0
    assert not same()
    watched.reward.factor, watched.reward.identity = 1.0, "resaved weights"
    assert not same()
    watched.reward.identity, watched.reward.sources = "weights", [RewardSource(model="b")]
    assert not same()
    assert watched.kept == known and watched.warned == watched.recorded == watched.reward.renamed == []
    watched.probes.path.unlink()  # on purpose: the reward is taken as it is, which `ask` says
    assert not same() and not watched.probes.path.exists()

"""Probes and the stage `guard` on rounds whose reward is written by hand."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from selfplay.config import GuardConfig, PairsConfig, RewardSource
from selfplay.errors import GuardError
from selfplay.rewards import guard as watch
from selfplay.rewards.scorer import Answer
from selfplay.storage import folders, tables
from selfplay.storage.ledger import Store
from selfplay.types import Prompt, Scored

SAME = {"probe_change": 0.0, "probe_missing": 0.0}


class Reward:
    """A reward at the process boundary: length times a factor, plus an offset; nothing for empty texts.

    Of several sources each has another factor.
    """

    def __init__(self):
        self.factor, self.offset, self.identity, self.sources = 1.0, 0.0, "weights", [RewardSource(model="a")]
        self.factors, self.silent, self.renamed, self.anew = [1.0], {""}, [], []

    def ask(self, items, fresh=False):
        assert fresh, "probes go past the cache"
        scores = [
            [math.nan if text in self.silent else self.factor * own * len(text) + self.offset for _, text in items]
            for own in self.factors
        ]
        return Answer(identities=(self.identity,) * len(scores), scores=np.array(scores))

    def names(self, identities):
        return [f"named {identity}" for identity in identities]

    def rename(self, before, now):
        self.renamed = [*before, *now]

    def begin_anew(self, identities):
        self.anew += identities


class Round:
    """What probes and guard see of a round."""

    def __init__(self, tmp_path, index=1, **guard):
        self.index, self.metrics, self.warned = index, {}, []
        self.config = SimpleNamespace(
            guard=GuardConfig.model_validate(guard), reward=SimpleNamespace(noise=1e-4), pairs=PairsConfig()
        )
        display = SimpleNamespace(warn=self.warned.append)
        self.run = SimpleNamespace(dir=tmp_path, store=Store(tmp_path), display=display, reward=Reward())
        self.drawn = [
            Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in "pq"
        ]

    def rows(self, stage, name, row_type):
        return tables.read_rows(self.folder(self.index) / f"{name}.parquet", row_type)

    def metric(self, stage, name):
        return self.metrics.get(f"{stage}/{name}", math.nan)

    def folder(self, index):
        found = self.run.dir / "rounds" / f"{index:04d}" / "score"
        found.mkdir(parents=True, exist_ok=True)
        return found

    def write(self, index, rewards, disagreement=None):
        """Four answers of 2, 3, 4, 5 tokens, two to each prompt."""
        parts = {} if disagreement is None else {"disagreement": disagreement}
        rows = [
            Scored(
                prompt_id="pq"[i // 2], index=i % 2, text="x" * i, token_ids=[*range(5, 6 + i), 2], logp=-1.0,
                n_tokens=2 + i, finish_reason="stop", policy=0, reward=reward, reward_parts=parts,
            )
            for i, reward in enumerate(rewards)
        ]  # fmt: skip
        tables.write_rows(self.folder(index) / "scored.parquet", rows, Scored)
        return rows

    def events(self):
        return [e["text"] for e in self.run.store.events(self.index)]


@pytest.fixture
def r(tmp_path):
    return Round(tmp_path)


def test_the_same_texts_get_the_same_scores(r):
    """Texts of 0 to 3 characters: scores none, 1, 2, 3, with standard deviation √(2/3) = .816."""
    candidates = r.write(1, [1.0, 2.0, 3.0, 4.0])
    assert watch.probe(r, candidates) == SAME
    kept = folders.read_json(r.run.dir / "reward" / "probes.json")
    assert kept["scores"] == [[None, 1.0, 2.0, 3.0]] and kept["round"] == 1
    r.run.reward.offset = 1e-3
    assert watch.probe(r, [])["probe_change"] == pytest.approx(1e-3 / math.sqrt(2 / 3))
    assert r.warned == []
    r.run.reward.offset = 0.05
    assert watch.probe(r, [])["probe_change"] == pytest.approx(0.0612, rel=1e-3)
    assert len(r.warned) == 1 and "guard.probe_change.warn" in r.events()[0]


def test_a_replaced_reward_stops_and_is_taken_when_that_is_meant(r):
    candidates = r.write(1, [1.0, 2.0, 3.0, 4.0])
    watch.probe(r, candidates)
    r.run.reward.factor = -1.0
    with pytest.raises(GuardError, match="not the one this run began with") as error:
        watch.probe(r, [])
    path = r.run.dir / "reward" / "probes.json"
    assert f"delete {path}" in error.value.hint
    assert folders.read_json(path)["scores"] == [[None, 1.0, 2.0, 3.0]]  # what the run began with stays
    path.unlink()
    assert watch.probe(r, candidates) == SAME
    assert folders.read_json(path)["scores"] == [[None, -1.0, -2.0, -3.0]]


def test_a_text_that_loses_its_score_or_gets_one_is_counted_apart(tmp_path):
    """Of four texts one in four; a judge whose reply cannot be read stops nothing by itself."""
    r = Round(tmp_path, probe_missing={"warn": 0.0, "stop": 0.25}, probe_change={"stop": 0.1})
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.silent = {"", "x"}
    assert watch.probe(r, []) == {"probe_change": 0.0, "probe_missing": 0.25}
    assert len(r.warned) == 1 and "lost their score or got one (share) 0.25" in r.warned[0]
    r.run.reward.silent = {"x"}
    with pytest.raises(GuardError, match=r"\(share\) 0\.5, limit 0\.25 \(guard\.probe_missing\.stop\)"):
        watch.probe(r, [])


def test_when_the_probes_were_deleted_all_that_goes_by_the_name_begins_anew(r):
    candidates = r.write(1, [1.0, 2.0, 3.0, 4.0])
    watch.probe(r, candidates)
    assert r.run.reward.anew == [] and r.events() == []  # the first time
    r.run.store.record_stage(1, "score", 1.0, SAME)
    watch.probes_file(r).unlink()
    watch.probe(r, candidates)
    assert r.run.reward.anew == ["weights"] and "begin anew" in r.events()[0]


def test_other_weights_that_score_otherwise_do_not_take_over_the_scale(tmp_path):
    r = Round(tmp_path, probe_change={"stop": None})
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.identity, r.run.reward.factor = "others", 3.0
    assert watch.probe(r, [])["probe_change"] > 1
    assert r.run.reward.renamed == ["named others", "named others"]
    assert "names other weights (others instead of weights); the probes' scores changed by 7.35" in r.warned[-1]


def test_a_member_that_the_configuration_left_alone_is_watched_while_another_changes(r):
    ours = r.run.reward
    ours.sources, ours.factors = [RewardSource(model="a"), RewardSource(url=["http://b"])], [1.0, 2.0]
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    ours.sources, ours.factors = [RewardSource(url=["http://b"]), RewardSource(model="new")], [2.0, 7.0]
    assert watch.probe(r, []) == SAME
    assert folders.read_json(watch.probes_file(r))["scores"] == [[None, 2.0, 4.0, 6.0], [None, 7.0, 14.0, 21.0]]
    ours.sources, ours.factors = [RewardSource(url=["http://b"]), RewardSource(model="newer")], [5.0, 8.0]
    with pytest.raises(GuardError, match="not the one this run began with"):
        watch.probe(r, [])


def test_another_reward_by_configuration_is_no_alarm(r):
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.factor, r.run.reward.sources = 7.0, [RewardSource(model="b")]
    assert watch.probe(r, []) == SAME
    assert watch.probe(r, []) == SAME
    assert r.events() == ["the configuration names another reward: the probes begin anew"]


def test_other_weights_with_the_same_scores_are_told_once(r):
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.identity = "resaved weights"
    watch.probe(r, [])
    watch.probe(r, [])
    assert len(r.warned) == 1 and "names other weights (resaved weig instead of weights)" in r.warned[0]
    assert r.run.reward.renamed == ["weights", "named resaved weights"]


@pytest.mark.parametrize("identity", ["weights", ""])
def test_the_same_reward_at_another_address_is_compared_still(r, identity):
    r.run.reward.identity = identity
    r.run.reward.sources = [RewardSource(url=["http://here"])]
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.sources = [RewardSource(url=["http://here", "http://elsewhere"])]
    assert watch.probe(r, []) == SAME and r.events() == []
    assert r.run.reward.renamed == [identity or '{"url": ["http://here"]}', f"named {identity}"]
    r.run.reward.factor = -1.0
    with pytest.raises(GuardError, match="not the one"):
        watch.probe(r, [])


@pytest.mark.parametrize(
    "other", [{"rules": [{"rule": "json"}]}, {"model": "a", "heads": {"x": 1}}, {"model": "a", "dtype": "bfloat16"}]
)
def test_other_rules_heads_or_precision_by_configuration_are_no_alarm(r, other):
    watch.probe(r, r.write(1, [1.0, 2.0, 3.0, 4.0]))
    r.run.reward.factor, r.run.reward.identity = 7.0, "others"
    r.run.reward.sources = [RewardSource.model_validate(other)]
    assert watch.probe(r, []) == SAME


def test_without_probes_nothing_is_asked(tmp_path):
    r = Round(tmp_path, probes=0)
    r.run.reward = None
    assert watch.probe(r, []) == {}


def test_numbers_of_a_round_and_those_before_it(tmp_path):
    """Rewards 0, 1 and 1, 1: one of two pairs tied, 3 of 4 at the top. Round 3 had 0 0 1 1: half of ours lie above 0 and
    a quarter below, so the distance at 0 is .5 − .25. Round 1 is too old. Gold fell from .8 to .6 while the reward rose."""
    r = Round(tmp_path, index=5, history=2)
    for index, rewards in {1: [9.0] * 4, 3: [0.0, 0.0, 1.0, 1.0], 5: [0.0, 1.0, 1.0, 1.0]}.items():
        r.write(index, rewards, disagreement=0.25)
    for index, reward, gold in ((1, 9.0, 0.9), (3, 1.0, 0.8), (4, 2.0, 0.6)):
        r.run.store.record_stage(index, "score", 1.0, {"reward_mean": reward})
        r.run.store.record_stage(index, "evaluate", 1.0, {"gold_total_champion": gold})
    r.metrics["score/probe_change"] = 0.001
    found = watch.measure(r)
    assert math.isnan(found.pop("probe_missing"))
    # prompt p: rewards −.5 .5 and lengths −.5 .5 around their means; prompt q: 0 0 and −.5 .5: 0.5 / √(.5 · 1)
    assert found.pop("length_correlation") == pytest.approx(math.sqrt(0.5))
    assert found.pop("gold_drop") == pytest.approx(0.2)
    assert found == {"ties": 0.5, "saturation": 0.75, "shift": 0.25, "disagreement": 0.25, "probe_change": 0.001}


def test_the_signs_are_those_of_the_reward_and_not_of_what_shaping_made_of_it(tmp_path):
    """The rewards 0 1 1 1 as above, of which shaping makes 4 3 2 1, in both rounds."""
    r = Round(tmp_path, index=2)
    for index in (1, 2):
        rows = r.write(index, [0.0, 1.0, 1.0, 1.0])
        shaped = [
            dataclasses.replace(row, reward=4.0 - i, reward_parts={"external": row.reward})
            for i, row in enumerate(rows)
        ]
        tables.write_rows(r.folder(index) / "scored.parquet", shaped, Scored)
    found = watch.measure(r)
    assert (found["ties"], found["saturation"], found["shift"]) == (0.5, 0.75, 0.0)
    assert found["length_correlation"] == pytest.approx(math.sqrt(0.5))


def test_rounds_that_another_reward_scored_are_no_measure(tmp_path):
    r = Round(tmp_path, index=3)
    for index, (rewards, name) in enumerate([([9.0] * 4, "b"), ([0.0] * 4, "a"), ([0.0] * 4, "a")], 1):
        r.write(index, rewards)
        folders.write_json(r.folder(index) / "reward.json", {"names": [name]})
        r.run.store.record_stage(index, "score", 1.0, {"reward_mean": float(index)})
        r.run.store.record_stage(index, "evaluate", 1.0, {"gold_total_champion": 1.0 / index})
    assert watch.measure(r)["shift"] == 0.0 and math.isnan(watch.measure(r)["gold_drop"])


def test_a_round_that_was_given_up_is_no_measure(tmp_path):
    r = Round(tmp_path, index=4)
    for index, rewards in {
        1: [0.0, 1.0, 2.0, 3.0],
        2: [50.0] * 4,
        3: [0.0, 1.0, 2.0, 3.0],
        4: [0.0, 1.0, 2.0, 3.0],
    }.items():
        r.write(index, rewards)
        r.run.store.open_round(index, 0, (0, 0), "", {})
    for index, reward, gold in ((1, 1.0, 0.5), (2, 9.0, 0.5), (3, 1.1, 0.5)):
        r.run.store.close_round(index, "cancelled" if index == 2 else "rejected", 0, [])
        r.run.store.record_stage(index, "score", 1.0, {"reward_mean": reward})
        r.run.store.record_stage(index, "evaluate", 1.0, {"gold_total_champion": gold if index == 3 else gold + index})
    found = watch.measure(r)
    assert found["shift"] == 0.0 and found["gold_drop"] == pytest.approx(1.0)


def test_a_first_round_has_nothing_to_compare_with(r, tmp_path):
    r.write(1, [1.0, 2.0, 4.0, 3.0])
    found = watch.measure(r)
    assert all(math.isnan(found[name]) for name in ("shift", "disagreement", "gold_drop"))
    line = SimpleNamespace(update=lambda **text: None)
    assert watch.watch(r, tmp_path, line) == pytest.approx(found, nan_ok=True)
    assert r.warned == []


def test_a_number_above_its_limit_warns_or_stops(tmp_path):
    r = Round(tmp_path, saturation={"warn": 0.5}, ties={"stop": 0.4})
    r.write(1, [0.0, 1.0, 1.0, 1.0])
    with pytest.raises(GuardError, match=r"the reward looks wrong: .*0\.5, limit 0\.4 \(guard\.ties\.stop\)"):
        watch.watch(r, tmp_path, SimpleNamespace(update=lambda **text: None))
    assert [w.split("guard.")[1] for w in r.warned] == ["ties.stop)", "saturation.warn)", "length_correlation.warn)"]
    assert r.events()[-1].startswith("stopped before training; all signs: ties 0.5, saturation 0.75, ")

"""The stage `score`, with real files and a server that is asked: shards, missing scores, models that change, ensembles, shaping."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scoring_world import Stage, length, reward, rows, without

from selfplay.errors import GuardError, RewardError
from selfplay.methods import shaping
from selfplay.rewards import scoring
from selfplay.rewards.shards import contents
from selfplay.rewards.texts import Item
from selfplay.storage import folders, tables
from selfplay.types import Candidate


@pytest.fixture
def server():
    """Gives the number of characters."""
    with reward() as server:
        yield server


def test_finished_shards_are_not_asked_again(server, tmp_path):
    stage = Stage(tmp_path, server)
    assert stage.rewards() == [8.0] * 10 and server.items == 10
    first = stage.rows
    assert len(list(stage.shards[0].glob("*.parquet"))) == 3
    (stage.shards[0] / f"{contents(tmp_path / 'candidates.parquet', 4)[1][:32]}.parquet").unlink()
    assert stage.rewards() == [8.0] * 10 and server.items == 14
    assert stage.rows == first


def test_the_artifact_has_keys_and_rewards_and_says_who_scored(server, tmp_path):
    """Texts and token ids of the candidates are in the artifacts of `generate`, and only there."""
    stage = Stage(tmp_path, server, rows(6, "pq"), length_penalty=0.25)
    stage.score()
    found = tables.pq.read_table(tmp_path / "scored.parquet")
    assert found.column_names == ["prompt_id", "index", "reward", "reward_parts"]
    assert found["prompt_id"].to_pylist() == list("pppqqq") and found["index"].to_pylist() == [0, 1, 2] * 2
    assert folders.read_json(tmp_path / "reward.json") == {
        "members": [], "identities": ["one/t/none"], "names": ["one/t/none"]
    }  # fmt: skip


@pytest.mark.parametrize(
    "others",
    [
        [dataclasses.replace(c, text=c.text + "!") for c in rows(10)],
        [dataclasses.replace(c, prompt_id="q") for c in rows(10)],
        rows(10)[::-1],
    ],
    ids=["texts", "prompts", "order"],
)
def test_other_candidates_of_the_same_count_do_not_find_the_shards(server, tmp_path, others):
    stage = Stage(tmp_path, server)
    assert stage.rewards() == [8.0] * 10
    stage.write(others)
    assert stage.rewards() == [float(len(c.text)) for c in others]
    assert server.items == 20
    stage.write(stage.candidates)  # the same again, in another file
    assert stage.rewards() == [8.0] * 10 and server.items == 20


def test_a_shard_is_known_by_what_is_scored_and_not_by_how_it_is_stored(tmp_path):
    """Row groups of 1 and of 10 rows, other token ids, and a text that ends where another prompt's begins."""
    files = [tmp_path / f"{i}.parquet" for i in range(4)]
    tables.write_rows(files[0], rows(10), Candidate)
    with tables.writing(files[1], Candidate) as file:
        for row in rows(10):
            file.records([row])
    tables.write_rows(files[2], [dataclasses.replace(c, token_ids=[9]) for c in rows(10)], Candidate)
    tables.write_rows(files[3], [dataclasses.replace(c, prompt_id="pa", text=c.text[1:]) for c in rows(10)], Candidate)
    first, *others = (contents(file, 4) for file in files)
    assert len(set(first)) == 3
    assert others[:2] == [first, first]
    assert not set(first) & set(others[2])


def test_reasons_of_a_shard_are_told_by_whoever_uses_it(server, tmp_path):
    """A round that is killed after its first shard says the same of its answers as one that is not."""
    server.score = without("answer 3")
    stage = Stage(tmp_path, server)
    assert stage.score()["unparsable"] == 1
    server.items = 0
    assert stage.score()["unparsable"] == 1 and server.items == 0
    assert stage.events.count(("score", "answers without a score: 1 × no verdict")) == 2


def test_items_without_a_score_are_set_aside_and_too_many_are_an_error(server, tmp_path):
    server.score = without("answer 3")
    few = Stage(tmp_path / "few", server)
    metrics = few.score()
    assert [row.reward is None for row in few.rows] == [i == 3 for i in range(10)]
    assert all(row.reward_parts == {} for row in few.rows)
    assert (metrics["missing"], metrics["unparsable"]) == (1, 1)
    assert (metrics["reward_mean"], metrics["reward_std"]) == (8.0, 0.0)
    assert ("score", "answers without a score: 1 × no verdict") in few.events
    server.score = without("answer 1", "answer 2", "answer 3")
    many = Stage(tmp_path / "many", server)
    with pytest.raises(RewardError, match=r"3 of 10 answers have no reward .*max_missing\): 3 × no verdict"):
        many.score()
    assert not (tmp_path / "many" / "scored.parquet").exists()
    server.score, server.items = length, 0
    assert many.rewards() == [8.0] * 10
    assert server.items == 4  # the shard that lacked some


def test_reasons_that_differ_behind_a_colon_are_one():
    reasons = Counter(
        {"no verdict: 'a'": 1, "no verdict: 'b'": 2, "the rule x: no reference": 7, "too long": 2, "HTTP 413": 1}
    )
    assert scoring.said(reasons) == "7 × the rule x: no reference, 3 × no verdict, 2 × too long"
    assert scoring.metrics(np.zeros(0), {}, reasons) == {"missing": 0, "unparsable": 3}


def test_a_model_that_changes_between_shards_is_noticed_and_its_shard_not_kept(server, tmp_path):
    """The server has other weights from its second shard on."""
    stage = Stage(tmp_path, server)
    weights = iter(["one", "new", "new"])
    stage.breathe = lambda where: setattr(server, "weights", next(weights))
    with pytest.raises(GuardError, match="the model behind the reward changed during the stage"):
        stage.score()
    server.weights, server.items = "one", 0
    stage.breathe = lambda where: None
    assert stage.rewards() == [8.0] * 10
    assert server.items == 6


def test_a_probe_that_fails_has_all_forgotten_that_was_scored_meanwhile(server, tmp_path):
    """Shards and cache of these candidates; what else is in the cache stays. The probe before the first shard was right."""
    stage = Stage(tmp_path, server, cache=True)
    elsewhere = Item([{"role": "user", "content": "another question"}], "another answer")
    stage.scorer.ask([elsewhere])
    probes = iter([{"probe_change": 0.0}, GuardError("another reward", "serve the earlier one")])

    def probe():
        if isinstance(found := next(probes), GuardError):
            raise found
        return found

    stage.probe = probe
    with pytest.raises(GuardError, match="another reward"):
        stage.score()
    assert not stage.shards[0].exists() and stage.cache.count() == 1
    server.items = 0
    changes = iter([{"probe_change": 0.25, "probe_missing": 0.0}, {"probe_change": 0.125, "probe_missing": 0.5}])
    stage.probe = lambda: next(changes)
    metrics = stage.score()
    assert (metrics["probe_change"], metrics["probe_missing"]) == (0.25, 0.5)  # the larger of before and after
    assert server.items == 10


def test_each_part_of_a_shaped_reward_is_recorded_and_their_sum_is_the_reward(server, tmp_path):
    """Lengths are 2 tokens; token ids (i, 2): no bigram twice. 8 characters give 8, less .25 for a token beyond one."""
    server.score = without("answer 3")
    plain = Stage(tmp_path / "plain", server)
    plain.score()
    assert all(row.reward_parts == {} for row in plain.rows)
    shaped = Stage(tmp_path / "shaped", server, length_penalty=0.25, length_free=1, repetition_penalty=1)
    metrics = shaped.score()
    assert [row.reward for row in shaped.rows] == [None if i == 3 else 7.75 for i in range(10)]
    assert shaped.rows[0].reward_parts == {"external": 8.0, "length_penalty": -0.25, "repetition_penalty": 0.0}
    assert shaped.rows[3].reward_parts == {}
    assert metrics["part_length_penalty"] == -0.25 and metrics["part_external"] == 8.0


def test_length_control_leaves_no_slope_and_the_mean(server, tmp_path):
    """Answer i has i tokens and a reward of 3 i, but the fourth has none."""
    server.score = lambda item: None if item["response"] == "answer 3" else 3.0 * int(item["response"].split()[1])
    candidates = [dataclasses.replace(c, n_tokens=i) for i, c in enumerate(rows(10))]
    stage = Stage(tmp_path, server, candidates, length_control=1.0, cut_off_penalty=2.0)
    found = stage.rewards()
    there = [i for i in range(10) if i != 3]
    assert found[3] is None
    slope = shaping.length_slope([found[i] for i in there], there, "p" * 9)
    assert slope == pytest.approx(0)
    assert np.mean([found[i] for i in there]) == pytest.approx(3 * (45 - 3) / 9)


def test_an_ensemble_needs_every_member_and_tells_its_disagreement(server, tmp_path):
    """Member a: 0 … 9, member b: 9 … 0 but none for the fourth. Both have a scale of their own, and cancel each other out."""
    number = lambda item: float(item["response"].split()[1])  # noqa: E731
    server.score = number
    with reward(lambda item: None if number(item) == 3 else 9.0 - number(item), "two") as other:
        stage = Stage(tmp_path, {"a": server, "b": other})
        metrics = stage.score()
    a, b = np.arange(10.0), np.array([9.0 - i for i in range(10) if i != 3])
    z = np.stack([(np.delete(a, 3) - a.mean()) / a.std(), (b - b.mean()) / b.std()])
    found = [row for row in stage.rows if row.reward is not None]
    np.testing.assert_allclose([row.reward for row in found], z.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([row.reward_parts["disagreement"] for row in found], z.std(axis=0), rtol=1e-12)
    assert stage.rows[0].reward_parts.keys() == {"member_a", "member_b", "disagreement"}
    assert stage.rows[3].reward is None and stage.rows[3].reward_parts == {"member_a": 3.0}
    assert (metrics["missing"], metrics["unparsable"]) == (1, 1)
    assert metrics["part_member_a"] == pytest.approx((45 - 3) / 9)  # over the answers that have a reward
    assert metrics["part_disagreement"] == pytest.approx(z.std(axis=0).mean())
    written = folders.read_json(tmp_path / "reward.json")
    assert written["members"] == ["a", "b"] and written["names"][-1] == "mean 1"

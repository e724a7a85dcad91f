"""The stage `score`, with real files and a server that is asked: shards, missing scores, models that change, ensembles, shaping."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_reward_client import fake, send

from selfplay.config import EnsembleConfig, RewardConfig, RewardSource, ShapingConfig
from selfplay.errors import GuardError, RewardError
from selfplay.methods import shaping
from selfplay.rewards import scoring
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.shards import contents
from selfplay.rewards.texts import Item
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Prompt, Reward

LINE = SimpleNamespace(update=lambda **shown: None)


def length(item):
    return float(len(item["response"]))


@contextlib.contextmanager
def reward(score=length, weights="one"):
    """A server that gives each item what `score` says of it; None is no verdict. It counts the items that it is asked for."""

    def answer(handler, asked):
        server.items += len(asked["items"])
        scores = [server.score(item) for item in asked["items"]]
        errors = ["no verdict" if score is None else None for score in scores]
        given = {"scores": scores, "errors": errors, "ids": [item["id"] for item in asked["items"]]}
        send(handler, 200, json.dumps(given).encode())

    with fake(default=answer) as server:
        server.items, server.score, server.weights = 0, score, weights
        yield server


@pytest.fixture
def server():
    """Gives the number of characters."""
    with reward() as server:
        yield server


def without(*texts):
    """The number of characters, but no verdict on some texts."""
    return lambda item: None if item["response"] in texts else length(item)


def rows(n, prompts="p"):
    """Answers of two tokens, evenly to each prompt."""
    each = n // len(prompts)
    return [
        Candidate(
            prompt_id=p, index=i, text=f"answer {i}", token_ids=[i, 2], logp=-1.0, n_tokens=2, finish_reason="stop",
            policy=0,
        )
        for p in prompts
        for i in range(each)
    ]  # fmt: skip


class Stage:
    """The stage in a folder of its own. `servers`: one, or those of an ensemble by their names."""

    def __init__(
        self, folder, servers, candidates=None, *, cache=False, shard_items=4, ensemble=None, deadline=20, **shaped
    ):
        self.folder, self.shard_items = folder, shard_items
        self.candidates = rows(10) if candidates is None else candidates
        folder.mkdir(exist_ok=True)
        self.settings = RewardConfig(model="any", max_missing=0.2, shaping=ShapingConfig(**shaped))
        self.events, self.shards = [], []
        by_name = servers if isinstance(servers, dict) else {"": servers}
        sources = [RewardSource(url=[server.url], deadline=deadline, batch=500) for server in by_name.values()]
        combined = None
        if isinstance(servers, dict):
            members = [{"name": name, "url": [server.url]} for name, server in by_name.items()]
            combined = EnsembleConfig.model_validate({"members": members, **(ensemble or {})})
        self.cache = ScoreCache(folder / "scores.sqlite", 10_000) if cache else None
        self.scorer = Scorer(
            "reward", sources, combined, folder, cache=self.cache, gpus=None, on_event=lambda *said: self.events.append(said)
        )  # fmt: skip
        self.breathe = lambda where: None
        self.probe = lambda: {}
        self.write(self.candidates)

    def write(self, candidates):
        known = list(dict.fromkeys(c.prompt_id for c in candidates))
        asked = [
            Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in known
        ]
        tables.write_rows(self.folder / "prompts.parquet", asked, Prompt)
        tables.write_rows(self.folder / "candidates.parquet", candidates, Candidate)

    def score(self):
        """What the stage says of its rewards."""
        return scoring.score(
            self.folder,
            LINE,
            prompts=self.folder / "prompts.parquet",
            candidates=self.folder / "candidates.parquet",
            scorer=self.scorer,
            settings=self.settings,
            shards=self._shards,
            shard_items=self.shard_items,
            probe=lambda: self.probe(),
            breathe=lambda where: self.breathe(where),
            record_event=lambda *said: self.events.append(said),
        )

    def _shards(self, key):
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.shards.append(self.folder / f"{digest[:12]}.shards")
        return self.shards[-1]

    @property
    def rows(self):
        return tables.read_rows(self.folder / "scored.parquet", Reward)

    def rewards(self):
        """Do the stage; the rewards in order."""
        self.score()
        return [row.reward for row in self.rows]


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


# many candidates, and the same numbers row by row


def synthetic(prompts, each):
    """Candidates of 1 to 40 tokens out of 12, some in loops and some cut off."""
    rng = np.random.default_rng(0)
    found = []
    for p in range(prompts):
        for i in range(each):
            ids = rng.integers(3, 15, rng.integers(1, 41)).tolist()
            if rng.random() < 0.2:
                ids = (ids[:3] * 14)[: len(ids)]
            found.append(
                Candidate(
                    prompt_id=f"prompt {p}", index=i, text=f"{p} {i}", token_ids=ids, logp=-1.5 * len(ids), n_tokens=len(ids),
                    finish_reason="length" if rng.random() < 0.1 else "stop", policy=0,
                )
            )  # fmt: skip
    return found


def by_hand(candidates, given, settings):
    """Rewards and parts of every candidate from the members' scores (M, N), one candidate after the other."""
    known = np.isfinite(given)
    scale = [(own[there].mean(), own[there].std()) for own, there in zip(given, known, strict=True)]
    scored, external, apart = [], {}, {}
    for n in range(len(candidates)):
        if known[:, n].all():
            z = [(own[n] - mean) / std for own, (mean, std) in zip(given, scale, strict=True)]
            scored.append(n)
            apart[n] = float(np.std(z))
            external[n] = float(np.mean(z)) - 0.5 * apart[n]
    of_prompt = {}
    for n in scored:
        of_prompt.setdefault(candidates[n].prompt_id, []).append(n)
    products = squares = 0.0
    for members in of_prompt.values():
        reward_mean = sum(external[n] for n in members) / len(members)
        length_mean = sum(candidates[n].n_tokens for n in members) / len(members)
        for n in members:
            products += (external[n] - reward_mean) * (candidates[n].n_tokens - length_mean)
            squares += (candidates[n].n_tokens - length_mean) ** 2
    slope, tokens = products / squares, sum(candidates[n].n_tokens for n in scored) / len(scored)
    found = []
    for n, candidate in enumerate(candidates):
        parts = {f"member_{m}": own[n] for m, own in zip("ab", given, strict=True) if math.isfinite(own[n])}
        if n not in external:
            found.append((None, parts))
            continue
        size, ids = settings.repetition_ngram, candidate.token_ids
        seen, repeated = set(), 0
        for start in range(len(ids) - size + 1):
            gram = tuple(ids[start : start + size])
            repeated += gram in seen
            seen.add(gram)
        terms = {
            "external": external[n],
            "length_control": -settings.length_control * slope * (candidate.n_tokens - tokens),
            "length_penalty": -settings.length_penalty * max(candidate.n_tokens - settings.length_free, 0),
            "repetition_penalty": -settings.repetition_penalty * repeated / max(len(ids) - size + 1, 1),
            "cut_off_penalty": -settings.cut_off_penalty * (candidate.finish_reason == "length"),
        }
        found.append((sum(terms.values()), parts | {"disagreement": apart[n]} | terms))
    return found


@pytest.mark.slow
def test_rewards_of_many_candidates_are_those_that_are_computed_row_by_row(server, tmp_path):
    """5,000 candidates of 625 prompts in shards of 700, and row groups of 256: no boundary is another one's."""
    candidates = synthetic(625, 8)
    rng = np.random.default_rng(1)
    given = np.stack([rng.normal(3, 2, 5000), rng.exponential(0.1, 5000)])
    given[0, rng.random(5000) < 0.02] = math.nan
    given[1, rng.random(5000) < 0.02] = math.nan
    row_of = {candidate.text: n for n, candidate in enumerate(candidates)}

    def member(m):
        return lambda item: None if math.isnan(v := given[m, row_of[item["response"]]]) else float(v)

    shaped = {
        "length_control": 0.7, "length_penalty": 0.01, "length_free": 10, "repetition_penalty": 0.5, "repetition_ngram": 3,
        "cut_off_penalty": 0.3,
    }  # fmt: skip
    server.score = member(0)
    with reward(member(1), "two") as other:
        stage = Stage(
            tmp_path, {"a": server, "b": other}, candidates, shard_items=700,
            ensemble={"combine": "mean_minus_std", "std_weight": 0.5}, **shaped,
        )  # fmt: skip
        metrics = stage.score()
    expected = by_hand(candidates, given, stage.settings.shaping)
    found = stage.rows
    assert [(row.prompt_id, row.index) for row in found] == [(c.prompt_id, c.index) for c in candidates]
    assert [row.reward is None for row in found] == [reward is None for reward, _ in expected]
    assert [row.reward_parts.keys() for row in found] == [parts.keys() for _, parts in expected]
    there = [n for n, (reward, _) in enumerate(expected) if reward is not None]
    assert 150 < 5000 - len(there) < 250
    np.testing.assert_allclose([found[n].reward for n in there], [expected[n][0] for n in there], rtol=1e-9, atol=1e-12)
    for name in expected[there[0]][1]:
        rows_with = [n for n, (_, parts) in enumerate(expected) if name in parts]
        np.testing.assert_allclose(
            [found[n].reward_parts[name] for n in rows_with], [expected[n][1][name] for n in rows_with], rtol=1e-9, atol=1e-12
        )  # fmt: skip
    for n in there:  # bit for bit the sum of what is recorded
        parts = found[n].reward_parts
        names = ("external", "length_control", "length_penalty", "repetition_penalty", "cut_off_penalty")
        assert found[n].reward == sum(parts[name] for name in names)
    assert metrics["missing"] == metrics["unparsable"] - int(np.isnan(given).all(axis=0).sum()) == 5000 - len(there)
    assert metrics["reward_mean"] == pytest.approx(np.mean([expected[n][0] for n in there]), rel=1e-9)

"""Rewards of many candidates, beside the same numbers computed row by row."""

import math

import numpy as np
import pytest
from scoring_world import Stage, reward

from selfplay.methods.shaping import length_slope
from selfplay.types import Candidate


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
def test_rewards_of_many_candidates_are_those_that_are_computed_row_by_row(tmp_path):
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
    with reward(member(0)) as server, reward(member(1), "two") as other:
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


def test_repetition_beyond_its_length_says_nothing_of_length(tmp_path):
    candidates = synthetic(40, 8)
    with reward(lambda item: 1.0) as server:
        stage = Stage(
            tmp_path, server, candidates, repetition_penalty=1.0, repetition_ngram=1, repetition_beyond_length=True
        )
        stage.score()
    terms = np.array([row.reward_parts["repetition_penalty"] for row in stage.rows])
    whole = np.array([candidate.finish_reason == "stop" for candidate in candidates])
    lengths, prompts = [c.n_tokens for c in candidates], [c.prompt_id for c in candidates]
    assert whole.any() and terms[whole].std() > 0.01
    assert abs(length_slope(np.where(whole, terms, np.nan), lengths, prompts)) < 1e-9
    repeated = [-(1 - len(set(c.token_ids)) / c.n_tokens) for c in candidates]
    assert abs(length_slope(np.where(whole, repeated, np.nan), lengths, prompts)) > 1e-4

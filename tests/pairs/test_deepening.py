"""Further pairs of kept prompts: which they are, how many, and the whole stage `depth` from files."""

import dataclasses

import numpy as np
import pytest
from pairs_world import Files, Told, base, many, response

from selfplay.config import DepthConfig, PairsConfig
from selfplay.pairs import deepening
from selfplay.pairs.base import base_pairs, every_pair, implicit_reward
from selfplay.pairs.deepening import DEPTH, deepen, depth, shares, with_gradients
from selfplay.pairs.selection import margin_arrays, select
from selfplay.pairs.stage import REFERENCE, pairs
from selfplay.pairs.writing import read_ranked
from selfplay.storage import tables
from selfplay.types import Pair, PairGradient, ReferenceLogp

SIMPO = implicit_reward("simpo", 0.1)
REWARDS = (4.0, 3.0, 1.0, 0.0)


def four(**changes):
    """Four responses; their rewards fall, and so do their log-probabilities."""
    return [response(reward, index=i, logp=-2.0 - i, **changes) for i, reward in enumerate(REWARDS)]


def indices(found):
    return [(p.chosen_index, p.rejected_index) for p in found]


def test_added_pairs_use_fresh_responses_first_and_the_potentials_of_the_round():
    config = PairsConfig(keep=1.0)
    rows = four()
    kept = select(base(rows)[0], config, 0)
    pool = every_pair(kept[0], rows, config, 0.0, SIMPO)
    # margins of at least 4/4: all six ordered pairs
    assert sorted(indices(pool)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    statistics = margin_arrays(kept, False)
    deeper = list(deepen(iter([(kept[0], pool)]), [3], statistics, config))
    assert indices(deeper)[:2] == [(0, 3), (1, 2)]
    assert [p.kept_because for p in deeper] == ["base", "depth", "depth"]
    # response 1 is disputed, response 0 was cut off: neither is chosen, and the disputed one is in no pair at all
    rows[1] = dataclasses.replace(rows[1], disagreement=0.9)
    rows[0] = dataclasses.replace(rows[0], whole=False)
    strict = PairsConfig(keep=1.0, max_disagreement=0.8, cut_off="reject")
    assert indices(every_pair(kept[0], rows, strict, 0.0, SIMPO)) == [(2, 3)]
    assert len(list(deepen(iter([(kept[0], pool)]), [9], statistics, config))) == 6


def test_the_potential_of_an_added_pair_is_by_hand_that_of_the_rounds_statistics():
    """The mean and the deviation are those of the base pairs, not of what is added."""
    config = PairsConfig(keep=1.0)
    rows = four()
    round_pairs = many(80, np.random.default_rng(2))
    statistics = margin_arrays(round_pairs, False)
    kept = select(base(rows)[0], config, 0)
    (_, added) = deepen(iter([(kept[0], every_pair(kept[0], rows, config, 0.0, SIMPO))]), [2], statistics, config)
    explicit, implicit = statistics
    assert (added.explicit_margin, added.implicit_margin) == (2.0, 0.5)
    by_hand = (2.0 - explicit.mean()) / explicit.std() - (0.5 - implicit.mean()) / implicit.std()
    assert added.potential == pytest.approx(by_hand)


def test_the_order_and_the_counts_hold_over_more_prompts_than_are_ranked_together(monkeypatch):
    """Ranked in parts of three or all at once, the pairs are the same."""
    config, rng = PairsConfig(keep=1.0), np.random.default_rng(0)
    prompts = [(f"p{i}", [response(float(rng.normal()), index=k) for k in range(4)]) for i in range(10)]
    kept = select(base_pairs(prompts, config, 0.0, 0.1)[0], config, 0)
    counts = rng.integers(1, 5, 10)

    def found():
        pools = ((p, every_pair(p, rows, config, 0.0, SIMPO)) for p, (_, rows) in zip(kept, prompts, strict=True))
        return list(deepen(pools, counts, margin_arrays(kept, False), config))

    together = found()
    monkeypatch.setattr(deepening, "TOGETHER", 3)
    assert found() == together
    assert [p for p in together if p.kept_because == "base"] == kept
    assert len(together) > 15


def test_closeness_decides_how_deep_a_prompt_goes_and_stays_with_its_pairs(tmp_path):
    """Three prompts of four responses, six pairs each; the second has no gradient and so keeps its base pair alone."""
    config = PairsConfig(keep=1.0)
    responses = {p: four() for p in "abc"}
    found = select(base_pairs(responses.items(), config, 0.0, 0.1)[0], config, 0)
    gradients = [
        PairGradient(prompt_id="a", cluster=1, closeness=0.2, norm=1.0),
        PairGradient(prompt_id="b", cluster=None, closeness=None, norm=0.0),
        PairGradient(prompt_id="c", cluster=0, closeness=0.6, norm=1.0),
    ]
    tables.write_rows(tmp_path / "gradients.parquet", gradients, PairGradient)
    kept = with_gradients(found, tmp_path / "gradients.parquet")
    pools = [(p, every_pair(p, responses[p.prompt_id], config, 0.0, SIMPO)) for p in kept]
    sizes = [len(pool) for _, pool in pools]

    def counts(method, per_prompt):
        return shares(kept, sizes, DepthConfig(method=method, pairs_per_prompt=per_prompt)).tolist()

    # 3 further pairs over softmax(∓1): e^1 / (e^1 + e^-1) = .88 of them go to c: 2.64 and .36
    assert counts("gradient", 2) == [1, 1, 4]
    assert counts("uniform", 2) == [2, 2, 2]
    assert counts("gradient", 6) == [6, 1, 6]
    deeper = list(deepen(iter(pools), counts("gradient", 2), margin_arrays(found, False), config))
    assert [(p.prompt_id, p.cluster, p.closeness) for p in deeper] == [
        ("a", 1, 0.2), ("b", None, None), *[("c", 0, 0.6)] * 4
    ]  # fmt: skip
    tables.write_rows(tmp_path / "gradients.parquet", gradients[::-1], PairGradient)
    with pytest.raises(AssertionError, match="other pairs"):
        with_gradients(found, tmp_path / "gradients.parquet")


# --- the stage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Four prompts of four candidates; the margins of the third are the narrowest, and it is not kept."""
    rewards = {p: [scale * r for r in REWARDS] for p, scale in zip("abcd", (3.0, 2.0, 1.0, 2.5), strict=True)}
    return Files(tmp_path / "round", rewards)


def base_stage(files, out, **settings):
    out.mkdir()

    def score_by_reference(path):
        rows = [ReferenceLogp(prompt_id=p, index=k, logp=-float(k * k)) for p, k in files.ids]
        tables.write_rows(path, rows, ReferenceLogp)

    ranking = PairsConfig(keep=0.75, selection="explicit", **settings)
    pairs(
        out, Told(), prompts=files.prompts, candidates=files.candidates, scored=files.scored, recent=(),
        score_by_reference=score_by_reference, settings=ranking, noise=0.0, beta=0.1, seed=0,
    )  # fmt: skip
    return ranking, out / "pairs.parquet"


def depth_stage(files, out, ranking, base_file, gradients=None, **settings):
    out.mkdir()
    line = Told()
    metrics = depth(
        out, line, prompts=files.prompts, candidates=files.candidates, scored=files.scored, pairs=base_file,
        gradients=gradients or (lambda path, kept: pytest.fail("gradients were asked for")),
        settings=DepthConfig(**settings), ranking=ranking, noise=0.0, beta=0.1,
    )  # fmt: skip
    assert all((out / name).is_file() for name in DEPTH.writes)
    found = tables.read_rows(out / "pairs.parquet", Pair)
    assert files.told(found) and line.text == f"{len(found)} pairs to train on"
    return found, metrics


def test_without_a_method_the_kept_pairs_are_trained_on_as_they_are(files, tmp_path):
    ranking, base_file = base_stage(files, tmp_path / "pairs")
    found, metrics = depth_stage(files, tmp_path / "depth", ranking, base_file)
    assert [p.prompt_id for p in found] == ["a", "b", "d"]
    assert found == [p for p in tables.read_rows(base_file, Pair) if p.kept_because]
    assert metrics == {"pairs": 3, "added": 0}


def test_uniform_depth_adds_the_same_to_every_kept_prompt(files, tmp_path):
    ranking, base_file = base_stage(files, tmp_path / "pairs")
    found, metrics = depth_stage(files, tmp_path / "depth", ranking, base_file, method="uniform", pairs_per_prompt=3)
    assert [(p.prompt_id, p.kept_because) for p in found] == [
        (name, why) for name in "abd" for why in ("base", "depth", "depth")
    ]
    for i in range(0, 9, 3):
        assert indices(found[i : i + 2]) == [(0, 3), (1, 2)]  # responses that no pair of the prompt uses come first
    assert metrics == {"pairs": 9, "added": 6, "most": 3}


def test_gradients_are_asked_of_the_kept_pairs_and_decide_how_deep_each_prompt_goes(files, tmp_path):
    ranking, base_file = base_stage(files, tmp_path / "pairs")
    asked = []

    def gradients(path, kept):
        asked.append(kept)
        given = zip("abd", (0.2, None, 0.6), strict=True)
        rows = [PairGradient(prompt_id=p, cluster=None if c is None else 0, closeness=c, norm=1.0) for p, c in given]
        tables.write_rows(path, rows, PairGradient)
        return {"clusters": 1.0}

    found, metrics = depth_stage(
        files, tmp_path / "depth", ranking, base_file, gradients, method="gradient", pairs_per_prompt=2
    )
    assert asked == [3]
    assert [p.prompt_id for p in found] == ["a", "b", "d", "d", "d", "d"]
    assert [p.closeness for p in found] == [0.2, None, *[0.6] * 4]
    assert metrics == {"pairs": 6, "added": 3, "most": 4, "clusters": 1.0}
    assert (tmp_path / "depth" / "gradients.parquet").is_file()


def test_added_pairs_have_the_implicit_rewards_of_the_base_pairs(files, tmp_path):
    """Of DPO with β = .1 and a reference that gives −k²: response k has r̂ = .1·(−3 − k + k²)."""
    ranking, base_file = base_stage(files, tmp_path / "pairs", implicit="dpo")
    assert (tmp_path / "pairs" / REFERENCE).is_file()
    found, _ = depth_stage(files, tmp_path / "depth", ranking, base_file, method="uniform", pairs_per_prompt=6)
    assert len(found) == 18
    for pair in found:
        chosen, rejected = (0.1 * (-3 - k + k * k) for k in (pair.chosen_index, pair.rejected_index))
        assert pair.implicit_signed == pytest.approx(chosen - rejected)


def test_older_files_give_the_same_pairs(files, tmp_path):
    ranking, base_file = base_stage(files, tmp_path / "pairs")
    depth_stage(files, tmp_path / "new", ranking, base_file, method="uniform")
    files.grow_old()
    depth_stage(files, tmp_path / "old", ranking, base_file, method="uniform")
    assert (tmp_path / "old" / "pairs.parquet").read_bytes() == (tmp_path / "new" / "pairs.parquet").read_bytes()
    assert read_ranked(tmp_path / "old" / "pairs.parquet")[0].kept_because == "base"

import argparse
import contextlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mini import ROOT, overrides

sys.path.insert(0, str(ROOT / "scripts"))
from ablation import arms, intervals, report, results, runs, tiny, worlds

from selfplay.config import load
from selfplay.storage.ledger import Store
from selfplay.worlds.tiny import questions, rewriter
from selfplay.worlds.tiny.skills import SKILLS

ARMS = sorted({*arms.ARMS, *arms.CONTROLS, *arms.NEIGHBOURS, *arms.REDUNDANT})
BUDGET = arms.Budget(prompts=192, candidates=8, shard_prompts=64)
"""Of the tiny world."""


def arguments(file: Path, *names: str, **changes: object) -> argparse.Namespace:
    settings = {
        "set": [],
        "rounds": 3,
        "config": "configs/tiny.yaml",
        "pool": "usual",
        "world": "tiny",
        "results": file,
        "arms": [*names],
    }
    return argparse.Namespace(**(settings | changes))


@pytest.mark.parametrize("world", ["tiny", "smollm2"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_the_same_budgets(arm: str, world: str, tmp_path: Path) -> None:
    file = f"configs/{world}.yaml"
    budget = worlds.budget(arguments(tmp_path, world=world, config=file))
    config = load(ROOT / file, arms.assignments(arms.overrides(arm, budget)))
    assert config.prompts.per_round * config.generate.candidates == budget.prompts * budget.candidates
    kept = config.pairs.keep * config.pairs.easiest * config.prompts.per_round * (1 + config.train.replay)
    pairs = kept * (1 if config.depth.method == "none" else config.depth.pairs_per_prompt)
    assert pairs == pytest.approx(budget.prompts / 2)


def test_controls_differ_from_their_arms_in_the_method_alone() -> None:
    def differ(a: str, b: str) -> set[str]:
        one, other = arms.overrides(a, BUDGET), arms.overrides(b, BUDGET)
        return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}

    assert differ("gradient", "others") == {"depth.closeness"}
    assert differ("gradient", "uniform") == {"depth.method"}
    assert differ("plain", "lower-beta") == {"train.beta"}
    assert differ("plain", "ema") == {"train.reference"} and differ("plain", "two-sigma") == {"pairs.rejected"}
    assert differ("plain", "replay") == {"train.replay", "pairs.keep"}
    assert differ("deep", "uniform") == {"pairs.keep", "depth.method", "depth.pairs_per_prompt"}
    with pytest.raises(SystemExit, match="unknown component 'other'"):
        arms.overrides("potential+other", BUDGET)


@pytest.mark.slow
@pytest.mark.parametrize("kind", arms.POOLS)
def test_a_redundant_pool_asks_few_questions_in_many_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tiny, "world_dir", lambda seed: ROOT / ".cache" / "tiny-mini")
    args = argparse.Namespace(out=tmp_path, pool=kind)
    tiny.write_pool(args, 0)
    found = [json.loads(line)["messages"][-1]["content"] for line in tiny.pool(args, 0).read_text().splitlines()]
    assert len(found) == len(set(found)) and not any(map(questions.held_out, found))
    asked = Counter((parsed[0], parsed[2]) for text in found if (parsed := rewriter.parse(text)))
    often = [question for question, count in asked.items() if count > 1]
    skills = {n for n, skill in SKILLS.items() if kind == "redundant" or skill.regime != "hopeless"}
    assert {skill for skill, _ in asked} == {skill for skill, _ in often} == skills and len(often) == len(skills)
    assert 0.8 < sum(asked[question] for question in often) / len(found) < 0.95


def test_arms_that_sample_alike_share_their_first_candidates() -> None:
    sampled = {
        arm: arms.sampling(arm, BUDGET)
        for arm in ("plain", "potential+epsilon", "uniform", "gradient", "deep", "breadth", "breadth+uniform")
    }
    assert sampled["plain"] == sampled["potential+epsilon"]
    assert sampled["uniform"] == sampled["gradient"] == sampled["deep"]
    assert sampled["plain"] != sampled["breadth"] != sampled["breadth+uniform"]


@pytest.mark.slow
def test_an_arm_begins_with_what_others_have_sampled(
    mini_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, small = (
        str(ROOT / "configs" / "tiny.yaml"),
        [*overrides(mini_world), "evaluate.gold=selfplay.worlds.tiny:grade"],
    )
    args = arguments(tmp_path / "results.jsonl", "plain", "epsilon", rounds=1, config=config, set=small)
    folders = {}
    for arm in args.arms:
        found = runs.one_run(args, tmp_path, arm, [*arms.assignments(arms.overrides(arm, worlds.budget(args))), *small])
        assert found["answers"] > 100 and math.isfinite(found["reward"])
        folders[arm] = tmp_path / results.fingerprint(args, arm)
    plain, epsilon = (
        {
            stage: (folders[arm] / "rounds" / "0001" / stage / "manifest.json").read_text()
            for stage in arms.SHARED_STAGES
        }
        for arm in args.arms
    )
    assert plain == epsilon
    for folder in folders.values():
        with contextlib.closing(Store(folder)) as store:
            assert store.count_rounds() == {"promoted": 1} and not store.damaged_rows(every=True)


def test_a_run_counts_for_the_settings_it_was_made_with(tmp_path: Path) -> None:
    args = arguments(tmp_path / "results.jsonl", "plain", "epsilon")
    assert results.results(args, "plain") == {}
    rows = [
        {"world": 2, "seed": seed, "arm": arm, "fingerprint": results.fingerprint(args, arm), "reward": float(seed)}
        for arm in ("plain", "epsilon") for seed in (1, 2)
    ]  # fmt: skip
    rows.append(rows[0] | {"seed": 3, "fingerprint": "another"})
    args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert results.results(args, "plain").keys() == {(2, 1), (2, 2)}
    for changes in (
        {"pool": "redundant"},
        {"set": ["train.beta=1"]},
        {"rounds": 4},
        {"config": "configs/one-gpu.yaml"},
    ):
        assert results.results(arguments(args.results, **changes), "plain") == {}
    found = {arm: results.results(args, arm) for arm in args.arms}
    assert intervals.paired(found, "epsilon", "plain", "reward") == {(2, 1): 0.0, (2, 2): 0.0}


def test_the_interval_of_a_shift_between_worlds_is_that_within_them() -> None:
    """Worlds that differ by 10 add nothing to the error: both halves vary by 1 alone."""
    rng = np.random.default_rng(0)
    values = {(world, seed): 10.0 * world + rng.normal() for world in (0, 1) for seed in range(7)}
    mean, low, high = intervals.interval(values)
    assert mean == pytest.approx(np.mean([*values.values()])) and low < mean < high
    assert high - low < 2.5
    assert intervals.interval({(0, 1): 2.0, (0, 2): 2.0}) == (2.0, 2.0, 2.0)
    assert np.isnan(intervals.interval({(0, 1): 2.0, (1, 1): 2.0})[1:]).all()


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of 14 normal values, seven in each of two worlds; a percentile interval would hold it in about 90 of 100."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        values = {(world, seed): rng.normal() for world in (0, 1) for seed in range(7)}
        _, low, high = intervals.interval(values, samples=600)
        held += low < 0 < high
    assert 0.92 <= held / 400 <= 0.985


def test_a_report_needs_the_arm_that_others_are_held_against(tmp_path: Path) -> None:
    args = arguments(tmp_path / "none.jsonl", "plain")
    with pytest.raises(SystemExit, match="no finished run of plain"):
        report.report(args)

import numpy as np
import pytest

from selfplay import depth
from selfplay.config import PairsConfig
from selfplay.pairs import base_pairs, select
from selfplay.types import Prompt, Scored


def test_allocation_by_hand():
    """Budget 9 for 3 prompts: 6 extra by softmax(0, 0, ln 4) = (1/6, 1/6, 4/6) → (1, 1, 4)."""
    assert depth.allocate([0, 0, np.log(4)], [9, 9, 9], 9, 1.0).tolist() == [2, 2, 5]
    assert depth.allocate([0.1, 0.9], [4, 4], 6, 0.0).tolist() == [3, 3]
    assert depth.allocate([0, 0, 0], [9, 9, 9], 4, 0.0).tolist() == [2, 1, 1]  # of equal remainders the first
    assert depth.allocate([], [], 0, 1.0).tolist() == []


def test_what_a_full_pool_cannot_take_goes_to_the_others():
    assert depth.allocate([9.0, 0.0, 0.0], [2, 8, 8], 10, 0.1).tolist() == [2, 4, 4]


def test_allocation_keeps_its_promises_on_random_inputs():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n = int(rng.integers(1, 12))
        pool, budget = rng.integers(1, 9, n), int(rng.integers(n, 8 * n + 1))
        got = depth.allocate(rng.normal(size=n), pool, budget, float(rng.choice([0, 1e-3, 0.3, 5])))
        assert got.sum() == min(budget, pool.sum())
        assert (got >= 1).all()
        assert (got <= pool).all()


@pytest.mark.parametrize(("pool", "budget"), [([1, 0], 2), ([3, 3], 1)])
def test_every_prompt_needs_a_pair(pool, budget):
    with pytest.raises(ValueError, match="every prompt needs one pair"):
        depth.allocate([0, 0], pool, budget, 1.0)


def test_added_pairs_use_fresh_responses_first_and_the_potentials_of_the_round():
    prompt = Prompt(prompt_id="p", messages=[], prompt_ids=[1], split="train")
    rewards = [4.0, 3.0, 1.0, 0.0]
    rows = [
        Scored(
            prompt_id="p", index=i, text="", token_ids=[i + 3, 2], logp=-2.0 - i, n_tokens=2, finish_reason="stop",
            policy=0, reward=r,
        )
        for i, r in enumerate(rewards)
    ]  # fmt: skip
    config = PairsConfig(keep=1.0)
    base = select(base_pairs([prompt], {"p": rows}, 0.0, 0.1)[0], config, [], 0)
    pools = depth.pools(base, {"p": prompt}, {"p": rows}, 0.0, 0.1)
    # margins of at least 4/4: all six ordered pairs
    assert sorted((p.chosen_index, p.rejected_index) for p in pools[0]) == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 3),
        (2, 3),
    ]
    deeper = depth.deepen(base, pools, [3], base, config)
    assert [(p.chosen_index, p.rejected_index) for p in deeper[:2]] == [(0, 3), (1, 2)]
    assert [p.kept_because for p in deeper] == ["base", "depth", "depth"]
    assert len(depth.deepen(base, pools, [9], base, config)) == 6

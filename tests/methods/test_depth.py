import numpy as np
import pytest

from selfplay.methods import depth


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


def test_a_prompt_without_closeness_stays_at_one_pair_while_others_have_room():
    nan = float("nan")
    assert depth.allocate([nan, 0.1, 0.9], [9, 9, 9], 11, 0.0).tolist() == [1, 5, 5]
    assert depth.allocate([nan, 0.1, np.inf], [9, 9, 9], 9, 0.3).tolist() == [1, 7, 1]
    assert depth.allocate([nan, 0.1], [9, 3], 8, 0.3).tolist() == [5, 3]
    assert depth.allocate([nan, nan], [9, 9], 6, 0.3).tolist() == [3, 3]
    rng = np.random.default_rng(1)
    for _ in range(300):
        n = int(rng.integers(2, 12))
        c, pool, budget = rng.normal(size=n), rng.integers(1, 9, n), int(rng.integers(n, 8 * n + 1))
        lost = rng.random(n) < 0.3
        got = depth.allocate(np.where(lost, nan, c), pool, budget, float(rng.choice([0, 0.3])))
        assert got.sum() == min(budget, pool.sum())
        assert ((got >= 1) & (got <= pool)).all()
        assert (got[lost] == 1).all() or (got == pool)[~lost].all()


def test_more_closeness_gives_more_pairs_and_temperature_is_its_spread():
    c = [0.2, 0.5, 0.9, float("nan")]
    assert depth.temperature(c) == pytest.approx(np.std([0.2, 0.5, 0.9]))
    assert depth.temperature([0.4]) == depth.temperature([float("nan")]) == depth.temperature([]) == 0.0
    got = depth.allocate(c, [20] * 4, 20, depth.temperature(c))
    assert got.tolist() == [*sorted(got[:3].tolist()), 1]


@pytest.mark.parametrize(("pool", "budget"), [([1, 0], 2), ([3, 3], 1)])
def test_every_prompt_needs_a_pair(pool, budget):
    with pytest.raises(ValueError, match="every prompt needs one pair"):
        depth.allocate([0, 0], pool, budget, 1.0)


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_closeness_by_hand():
    """Unit features at 0° and 60° (centre at 30°), and one alone at 180°; lengths do not matter."""
    half, long = [0.5, np.sqrt(0.75)], [7.0, 0.0]
    labels, closeness = depth.cluster([long, half, [-1e-3, 0.0]], 2, 0)
    assert labels[0] == labels[1] != labels[2]
    assert sorted(labels) in ([0, 0, 1], [0, 1, 1])
    assert closeness == pytest.approx([np.cos(np.pi / 6), np.cos(np.pi / 6), 1.0])
    assert depth.closeness_to_others([long, half, [-1e-3, 0.0]], labels) == pytest.approx(
        [0.5, 0.5, float("nan")], nan_ok=True
    )


def test_features_without_a_direction_get_no_cluster():
    rows = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    rows[3], rows[7, 2], rows[9, 0] = 0.0, np.nan, np.inf
    labels, closeness = depth.cluster(rows, 3, 1)
    lost = [3, 7, 9]
    assert (labels[lost] == -1).all() and np.isnan(closeness[lost]).all()
    rest = np.delete(np.arange(12), lost)
    assert set(labels[rest]) == {0, 1, 2} and np.isfinite(closeness[rest]).all()
    alone = depth.cluster(rows[rest], 3, 1)
    assert (alone[0] == labels[rest]).all() and (alone[1] == closeness[rest]).all()
    labels, closeness = depth.cluster(np.zeros((3, 4)), 2, 0)
    assert labels.tolist() == [-1] * 3 and np.isnan(closeness).all()
    assert [a.size for a in depth.cluster(np.zeros((0, 4)), 2, 0)] == [0, 0]


def test_closeness_is_the_cosine_to_the_mean_of_the_unit_features():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(60, 16)) + 3 * rng.normal(size=(4, 16))[rng.integers(0, 4, 60)]
    labels, closeness = depth.cluster(rows, 8, 5)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for i in range(60):
        centre = unit[labels == labels[i]].mean(axis=0)
        assert closeness[i] == pytest.approx(unit[i] @ centre / np.linalg.norm(centre))
        others = unit[(labels == labels[i]) & (np.arange(60) != i)].mean(axis=0)
        assert depth.closeness_to_others(rows, labels)[i] == pytest.approx(unit[i] @ others / np.linalg.norm(others))
    again = depth.cluster(rows, 8, 5)
    assert again[0].tobytes() == labels.tobytes() and again[1].tobytes() == closeness.tobytes()


def test_sizes_of_clusters():
    assert depth.sizes([1, 0, 1, -1, 1]) == pytest.approx([3, 1, 3, float("nan"), 3], nan_ok=True)


def test_without_the_pair_itself_closeness_says_nothing_of_the_size_of_its_cluster():
    """Of gradients that have nothing in common: to the centre 1/√m in a cluster of m, to the others 0."""
    rows = np.random.default_rng(4).normal(size=(96, 2048))
    labels, closeness = depth.cluster(rows, 10, 0)
    assert depth.rank_correlation(closeness, depth.sizes(labels)) < -0.8
    assert closeness == pytest.approx(depth.sizes(labels) ** -0.5, abs=0.15)
    assert abs(np.nanmean(depth.closeness_to_others(rows, labels))) < 0.05


def test_clusters_that_are_there_are_found():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 5, 80)
    rows = rng.normal(size=(5, 32))[truth] + 0.1 * rng.normal(size=(80, 32))
    labels, closeness = depth.cluster(rows, 5, 0)
    assert len({(t, label) for t, label in zip(truth, labels, strict=True)}) == 5
    assert closeness.min() > 0.9


def test_fewer_features_than_clusters_are_a_cluster_each():
    labels, closeness = depth.cluster([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], 7, 0)
    assert labels[0] == labels[1] != labels[2] and closeness == pytest.approx([1.0, 1.0, 1.0])
    assert depth.cluster([[1.0, 0.0], [-1.0, 0.0]], 1, 0)[1].tolist() == [0.0, 0.0]  # a centre without a direction


def test_what_cannot_be_clustered():
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        depth.cluster([1.0, 2.0], 1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        depth.cluster([[1.0]], 0, 0)


def test_rank_correlation_by_hand():
    """Ranks (0, 1, 2.5, 2.5) and (3, 2, 1, 0): sums of products −4.5, 4.5 and 5."""
    nan = float("nan")
    assert depth.rank_correlation([1, 2, 9, 9, nan], [8, 7, 6, 1, 3]) == pytest.approx(-4.5 / np.sqrt(4.5 * 5))
    assert depth.rank_correlation([1, 2, 3], [1, 4, 9]) == pytest.approx(1.0)
    assert np.isnan(depth.rank_correlation([1, 1], [1, 2])) and np.isnan(depth.rank_correlation([1, nan], [1, 2]))

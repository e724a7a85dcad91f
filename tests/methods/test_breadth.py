import numpy as np
import pytest

from selfplay.methods import breadth


def test_quotas_follow_the_sizes_by_largest_remainder():
    """Of 10 = 5 + 3 + 2, six: shares 3, 1.8, 1.2 → 3, 1, 1 and the one left to the remainder .8."""
    assert breadth.quotas([5, 3, 2], 6).tolist() == [3, 2, 1]
    assert breadth.quotas([2, 2, 2], 4).tolist() == [2, 1, 1]  # equal remainders, equal sizes: the first
    assert breadth.quotas([3, 9, 3, 9], 6).tolist() == [1, 2, 1, 2]  # shares .75, 2.25, .75, 2.25


def test_every_cluster_keeps_one_and_the_others_pay_in_proportion():
    """Shares of 8 among 90 + 60 + 5 + 5: 4.5, 3, .25, .25. The small get 1 each; of the other 6: 3.6 and 2.4."""
    assert breadth.quotas([90, 60, 5, 5], 8).tolist() == [4, 2, 1, 1]
    assert breadth.quotas([100, 1, 1], 3).tolist() == [1, 1, 1]
    assert breadth.quotas([4, 1], 5).tolist() == [4, 1]
    assert breadth.quotas([7], 3).tolist() == [3]


def test_quotas_always_fit():
    rng = np.random.default_rng(0)
    for _ in range(500):
        sizes = rng.integers(1, rng.integers(2, 60), rng.integers(1, 12))
        count = int(rng.integers(len(sizes), sizes.sum() + 1))
        found = breadth.quotas(sizes, count)
        assert found.sum() == count
        assert (found >= 1).all() and (found <= sizes).all()


def test_the_nearest_to_each_centre_are_kept():
    """Two clusters on a line: 0, 1, 2, 3 and 9 around 3 and 100, 101, 105 around 102. Of eight four: shares 2.5 and 1.5,
    and of equal remainders the larger cluster's comes first: 3 and 1."""
    x = np.array([[0.0], [100], [9], [1], [101], [2], [105], [3]])
    kept, labels, distance = breadth.representatives(x, 4, clusters=2, seed=3)
    near, far = labels[0], labels[1]
    assert labels.tolist() == [near, far, near, near, far, near, far, near]
    assert distance.tolist() == pytest.approx([3, 2, 6, 2, 1, 1, 3, 0])
    assert kept.tolist() == [3, 4, 5, 7]  # 1, 101, 2, 3


def test_redundant_prompts_lose_their_copies_first():
    """Ninety near-copies of one prompt and ten of others: whatever is asked, every group is heard."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(0, 0.01, (90, 8)), 10 * np.eye(8)[:5], 10 * np.eye(8)[:5] + 0.01])
    kept, labels, _ = breadth.representatives(x, 20, clusters=6)
    assert len(kept) == 20 and len(set(labels)) == 6
    assert {labels[i] for i in kept} == set(labels)
    assert breadth.evenness(labels) < 0.4


def test_the_number_of_clusters():
    x = np.random.default_rng(2).normal(size=(49, 3))
    assert len(set(breadth.representatives(x, 20)[1])) == 20  # one for each that is kept
    assert len(set(breadth.representatives(x, 20, clusters=7)[1])) == 7
    assert len(set(breadth.representatives(x, 4, clusters=7)[1])) == 4  # each cluster keeps one
    assert len(set(breadth.representatives(np.repeat(x[:3], 5, 0), 9, clusters=8)[1])) == 3  # only three are different
    kept, _, _ = breadth.representatives(x, 49)
    assert kept.tolist() == list(range(49))
    assert breadth.representatives(x[:1], 1)[0].tolist() == [0]


def test_representatives_cover_a_draw_better_than_chance():
    """Mean distance of a prompt to the nearest one that is kept, where half of the draw is copies with a little noise."""
    for trial in range(5):
        rng = np.random.default_rng(trial)
        x = rng.normal(size=(200, 8))
        x[100:] = x[rng.integers(0, 20, 100)] + rng.normal(0, 0.05, (100, 8))

        def uncovered(kept, x=x):
            return np.linalg.norm(x[:, None] - x[kept], axis=2).min(1).mean()

        assert uncovered(breadth.representatives(x, 100, seed=trial)[0]) < 0.5 * uncovered(rng.permutation(200)[:100])


def test_the_same_seed_the_same_choice():
    x = np.random.default_rng(3).normal(size=(200, 16))
    first, again = (breadth.representatives(x, 50, seed=2**63 + 1) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_what_cannot_be_compressed():
    with pytest.raises(ValueError, match="5 representatives of embeddings with shape"):
        breadth.representatives(np.zeros((4, 2)), 5)
    with pytest.raises(ValueError, match="1 of 3 embeddings are not finite"):
        breadth.representatives([[0.0, 1], [np.nan, 0], [1, 1]], 2)


def test_evenness_by_hand():
    """Sizes 1, 1, 2: entropy 2 · ¼ ln 4 + ½ ln 2 = 1.5 ln 2, over ln 3."""
    assert breadth.evenness([0, 1, 2, 2]) == pytest.approx(1.5 * np.log(2) / np.log(3))
    assert breadth.evenness([0, 0, 1, 1]) == 1.0
    assert breadth.evenness([0, 0]) == 1.0

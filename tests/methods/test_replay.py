"""Which pairs of earlier rounds are trained on again, and how a reference follows."""

import numpy as np
import torch

from selfplay.methods.moving_average import follow
from selfplay.methods.replay import draw


def test_a_draw_is_seeded_without_repetition_and_every_row_is_as_likely():
    found = draw([3, 0, 5], 4, 7)
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in draw([3, 0, 5], 4, 7)]
    assert sum(map(len, found)) == 4 and len(found[1]) == 0
    assert all((np.diff(rows) > 0).all() for rows in found)
    counts = np.zeros(8)
    for seed in range(4000):
        first, _, last = draw([3, 0, 5], 2, seed)
        counts[first] += 1
        counts[3 + last] += 1
    assert abs(counts / 4000 - 0.25).max() < 0.03  # 2 of 8 rows


def test_a_draw_of_more_than_there_are_takes_all():
    assert [rows.tolist() for rows in draw([2, 1], 9, 0)] == [[0, 1], [0]]
    assert draw([], 9, 0) == []


def test_a_reference_moves_by_the_share_of_the_way():
    """.4 of (1, 2) and .6 of (3, −2): (2.2, −.4), in float32 whatever the weights are kept in."""
    moved = follow(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0], dtype=torch.bfloat16), 0.6)
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.tensor([2.2, -0.4]))

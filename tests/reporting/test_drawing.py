import matplotlib.figure
import pytest

from selfplay.reporting.drawing import beyond


def test_a_limit_that_the_data_come_near_is_in_view_and_one_far_away_is_not_drawn():
    """Length ratios from .98 to 1.15, whose view ends at .95 and 1.2: the gate allows 1 / 1.25 to 1.25."""
    ax = matplotlib.figure.Figure().subplots()
    ax.plot([1, 2], [0.98, 1.15])
    ax.set_ylim(0.95, 1.2)
    beyond(ax, [1.25, 1 / 1.25, 9.0])
    low, high = ax.get_ylim()
    assert low == 0.95 and 1.25 < high < 1.3  # .8 is more than half the view away
    assert [line.get_ydata()[0] for line in ax.lines[1:]] == [pytest.approx(1.25)]

"""experiments/front_page.py: README's table is made from the committed metrics, by sound steps."""

import importlib.util
import sys

import numpy
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
spec = importlib.util.spec_from_file_location("front_page", ROOT / "experiments" / "front_page.py")
front_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(front_page)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 3, 2], [1, 2.5, 2.5]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 4, 3, 2, 9], [1, 3, 3, 3, 9]),
        ([5], [5]),
    ],
)
def test_falling_neighbours_are_averaged(values, expected):
    assert front_page.rising(values) == pytest.approx(expected)


def test_rising_is_the_closest_sequence_that_does_not_fall():
    """Against all sequences on a grid: none that does not fall has a smaller squared distance.

    Guards against a running maximum, which makes every lucky seed count for good.
    """
    values = [0.2, 0.6, 0.4, 0.5]
    grid = numpy.linspace(0, 1, 21)
    best = min(
        sum((x - v) ** 2 for x, v in zip((a, b, c, d), values))
        for a in grid
        for b in grid[grid >= a]
        for c in grid[grid >= b]
        for d in grid[grid >= c]
    )
    ours = sum((x - v) ** 2 for x, v in zip(front_page.rising(values), values))
    assert ours <= best + 1e-12 and ours > 0


def test_tokens_are_read_off_between_two_budgets():
    """By a line: .8 lies half way between .7 at 100 and .9 at 200."""
    assert front_page.tokens_to([100, 200], [0.7, 0.9], 0.8) == pytest.approx(150)
    assert front_page.tokens_to([100, 200], [0.8, 0.9], 0.8) == 100
    assert front_page.tokens_to([100, 200], [0.7, 0.79], 0.8) is None
    # One lucky budget does not count: .85 and .65 are averaged to .75.
    reached = front_page.tokens_to([100, 200, 300, 400], [0.7, 0.85, 0.65, 0.85], 0.8)
    assert reached == pytest.approx(350)


def test_the_table_of_the_front_page_is_what_the_metrics_say():
    """Guards against a figure that was typed, and against one that was not updated."""
    readme = (ROOT / "README.md").read_text()
    for line in front_page.table():
        assert line in readme
    factor, low, high = front_page.to_target()["factor"]
    assert f"{factor:.1f} times the tokens ({front_page.interval(low, high, 1)})" in readme.replace(
        "\n", " "
    )

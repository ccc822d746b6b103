"""The figures of task_report.py, slips.py and tree_baseline.py in experiments/, by hand."""

import math
import pathlib
import sys
import types

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import diagnose
import slips
import task_report
import tree_baseline


def test_tokens_to_an_accuracy_lie_on_a_line():
    """Guards against the first evaluation above the target, which is up to ten iterations late."""
    curve = [(0, 0.0), (100, 0.4), (300, 0.5), (400, 0.45)]
    assert task_report.tokens_to(curve, 0.0) == 0
    assert task_report.tokens_to(curve, 0.2) == pytest.approx(50)
    assert task_report.tokens_to(curve, 0.45) == pytest.approx(200)
    assert task_report.tokens_to(curve, 0.6) is None
    # The last accuracy that both reach is the lower of their highest ones.
    slower = [(0, 0.0), (1000, 0.4)]
    assert task_report.tokens_ratio(curve, slower) == (0.4, pytest.approx(100), pytest.approx(1000))


def test_a_curve_is_smoothed_over_its_neighbours():
    """Guards against rows without an evaluation, and a window that wraps around."""
    rows = [{"model_tokens": 0, "eval_accuracy": 0.0}, {"model_tokens": 1}]
    rows += [{"model_tokens": 2, "eval_accuracy": 0.3}, {"model_tokens": 4, "eval_accuracy": 0.9}]
    assert task_report.curve_of(rows) == [
        (0, pytest.approx(0.15)),
        (2, pytest.approx(0.4)),
        (4, pytest.approx(0.6)),
    ]


def test_the_interval_of_a_ratio_by_hand():
    """ln 2, ln 4, ln 8 have mean ln 4 and deviation ln 2: 4 times or over 2^(4.303/sqrt 3)."""
    mean, low, high = task_report.mean_ratio([2.0, 4.0, 8.0])
    factor = 2 ** (4.303 / math.sqrt(3))
    assert (mean, low, high) == pytest.approx((4.0, 4.0 / factor, 4.0 * factor))
    assert math.isnan(task_report.mean_ratio([2.0])[1])


def test_a_leaf_has_a_label_after_its_last_parting():
    """Problem 0: right 5 6 7, wrong 5 6 8 and wrong 5 9 9; problem 1: wrong alone.  Prompt of two.

    Guards against labels on a prefix that right and wrong leaves share, and off by one.
    """
    rollouts = types.SimpleNamespace(
        tokens=torch.tensor([[1, 2, 5, 6, 7], [1, 2, 5, 6, 8], [1, 2, 5, 9, 9], [1, 2, 3, 3, 3]]),
        problem=torch.tensor([0, 0, 0, 1]),
        mask=torch.tensor([[False, True, True, True]] * 4),
        extra={"right": torch.tensor([True, False, False, False])},
    )
    pairs = slips.pairs_of(rollouts)
    assert pairs == [(0, 1, 3), (0, 2, 2)]  # column t is about the token at t + 1
    assert slips.labelled(rollouts, pairs).tolist() == [
        [False, False, False, True],
        [False, False, False, True],
        [False, False, True, True],
        [False, False, False, False],
    ]


def test_the_share_of_pairs_won():
    """Ties count half."""
    assert diagnose.wins(torch.tensor([1.0, -1.0, 0.0, 2.0])) == pytest.approx(0.625)


def test_the_value_of_a_prefix_is_that_of_the_leaves_below():
    """Leaves 5 6, 5 7 and 8 of one problem, weights .5 .25 .25, rewards 1 -1 0; another problem.

    Below the prompt: .5 - .25 = .25.  Below 5: .25 / .75 = 1/3.  Guards against a mean over leaves
    of another problem with the same prompt, and against unweighted leaves.
    """
    rollouts = types.SimpleNamespace(
        tokens=torch.tensor([[1, 2, 5, 6], [1, 2, 5, 7], [1, 2, 8, 0], [1, 2, 5, 6]]),
        problem=torch.tensor([0, 0, 0, 1]),
        prompt_length=torch.tensor([2, 2, 2, 2]),
        length=torch.tensor([4, 4, 3, 4]),
        values=torch.zeros(4, 3),
    )
    values = tree_baseline.tree_values(
        torch.tensor([1.0, -1.0, 0.0, -1.0]), torch.tensor([0.5, 0.25, 0.25, 1.0]), rollouts
    )
    expected = [[0, 0.25, 1 / 3], [0, 0.25, 1 / 3], [0, 0.25, 0], [0, -1, -1]]
    assert torch.allclose(values, torch.tensor(expected))

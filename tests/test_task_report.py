"""Figures of experiments/ by hand: task_report, slips, tree_baseline and wrong_steps."""

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
import wrong_steps


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


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        ("12*30=360 12*8=96 360+96=556", "a sum with a carry"),  # 60 + 96
        ("12*30=360 12*8=36 360+36=396", "a product"),
        ("12*30=360 12*1=12 360+12=472", "a sum without a carry"),
        ("12*30=360 12*8=96 360+96=456", "no step: the plan, or a number that was copied"),
        ("12*30=350 12*8=96 350+96=546", "a product"),  # the sum is wrong too, but later
        ("", "no steps were written"),
    ],
)
def test_the_first_wrong_step(steps, kind):
    """Guards against the last wrong step, and against 9 + 1 in different places as a carry."""
    assert wrong_steps.first_wrong(f"<think>{steps}</think><answer>0</answer>") == kind


def test_a_carry_is_one_of_the_same_place():
    """Of all pairs below 100 by the digits' sums; a carry may itself make the next one."""
    for x in range(100):
        for y in range(100):
            by_digits = sum(map(int, str(x))) + sum(map(int, str(y))) != sum(map(int, str(x + y)))
            assert wrong_steps.carries(x, y) == by_digits

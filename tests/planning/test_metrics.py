"""Metrics against values worked out by hand from the docstring's formulas."""

from __future__ import annotations

import numpy as np
import pytest
from plans import hand_plan, tiny_cost

from hbp.plan import imbalance
from hbp.planning.lower_bound import lower_bound
from hbp.planning.metrics import drift, measure


def test_metrics_of_a_hand_made_plan() -> None:
    cost = tiny_cost(4)
    plan = hand_plan(
        [
            (0, 0, 0, 2, 100, 0.5, [60, 20]),  # a rank: 40 tokens, (3600 + 400) / 2 = 2000
            (0, 0, 2, 1, 50, 0.25, [20, 10]),  # 30 tokens, 500
            # rank 3 idles
            (0, 1, 0, 1, 50, 0.125, [50]),  # 50 tokens, 2500
            (0, 1, 1, 1, 50, 0.125, [50]),
            (0, 1, 2, 1, 50, 0.125, [50]),
            (0, 1, 3, 1, 50, 0.125, [50]),
            (1, 0, 0, 4, 200, 1.0, [160]),
        ],
        world=4,
        step_overhead_s=cost.cluster.step_overhead_s,
    )
    metrics = measure(plan, cost)
    assert metrics.pr == pytest.approx(1 - 470 / 550)
    assert metrics.dbr == pytest.approx(((0 + 0 + 10 + 40) / (40 * 4) + 0 + 0) / 3)
    assert metrics.abr == pytest.approx(((0 + 0 + 1500 + 2000) / (2000 * 4) + 0 + 0) / 3)
    assert metrics.cr == pytest.approx((80 + 160) / 470)
    assert metrics.ave_tokens == pytest.approx(470 / 2)
    assert metrics.predicted_s == pytest.approx(0.5 + 0.125 + 1.0 + 2 * cost.cluster.step_overhead_s)
    # No global batch is on record: the plan's own two steps are those it was asked for.
    assert metrics.efficiency == pytest.approx(lower_bound(plan.lengths, cost, steps=2) / metrics.predicted_s)


def test_a_perfect_micro_step_and_a_lone_rank() -> None:
    ones = np.ones(4)
    assert imbalance(ones * 7, ones, np.zeros(4, int), 4) == 0
    assert imbalance(np.array([7.0]), np.array([1.0]), np.zeros(1, int), 4) == pytest.approx(3 / 4)
    assert imbalance(np.array([7.0]), np.array([4.0]), np.zeros(1, int), 4) == pytest.approx(0)


@pytest.mark.parametrize(
    ("step", "offsets", "lengths", "expected"),
    [
        ([0, 1], [0, 2, 3], [4, 4, 8], 0.5),  # each step of one kind, the data half and half
        ([0, 1], [0, 2, 4], [4, 8, 4, 8], 0.0),
        ([0, 0], [0, 2, 3], [4, 4, 8], 0.0),  # one step is the data
        ([0, 1], [0, 1, 2], [5, 7], 0.0),  # of one octave
        ([0, 1], [0, 1, 2], [4, 12], 0.5 * (0.75 + 0.25)),  # off by 3/4 and 1/4
    ],
)
def test_drift_by_hand(step: list[int], offsets: list[int], lengths: list[int], expected: float) -> None:
    found = drift(np.array(step), np.array(offsets), np.array(lengths, np.int32), max(step) + 1)
    assert found == pytest.approx(expected)

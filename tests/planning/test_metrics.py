"""Metrics against values worked out by hand from the docstring's formulas, and a lower bound by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import TINY, hand_plan, tiny_cost

from hbp.planning.metrics import imbalance, lower_bound_seconds, measure


def test_metrics_of_a_hand_made_plan() -> None:
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
    )
    cost = tiny_cost(4)
    metrics = measure(plan, cost)
    assert metrics.pr == pytest.approx(1 - 470 / 550)
    assert metrics.dbr == pytest.approx(((0 + 0 + 10 + 40) / (40 * 4) + 0 + 0) / 3)
    assert metrics.abr == pytest.approx(((0 + 0 + 1500 + 2000) / (2000 * 4) + 0 + 0) / 3)
    assert metrics.cr == pytest.approx((80 + 160) / 470)
    assert metrics.ave_tokens == pytest.approx(470 / 2)
    assert metrics.predicted_s == pytest.approx(0.5 + 0.125 + 1.0 + 2 * cost.cluster.step_overhead_s)
    assert metrics.efficiency == pytest.approx(lower_bound_seconds(cost, plan.lengths) / metrics.predicted_s)


def test_a_perfect_micro_step_and_a_lone_rank() -> None:
    ones = np.ones(4)
    assert imbalance(ones * 7, ones, np.zeros(4, int), 4) == 0
    assert imbalance(np.array([7.0]), np.array([1.0]), np.zeros(1, int), 4) == pytest.approx(3 / 4)
    assert imbalance(np.array([7.0]), np.array([4.0]), np.zeros(1, int), 4) == pytest.approx(0)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.sampled_from([None, 1000, 2000]))
@settings(max_examples=50, deadline=None)
def test_lower_bound_is_every_sample_at_its_own_cheapest(lengths: list[int], tokens: int | None) -> None:
    cost = tiny_cost(8, tokens)
    total = 0.0
    for length in lengths:
        work = cost.work(np.array([length]))
        options = []
        for degree in (1, 2, 4, 8):
            fitting = [
                k for k in range(TINY.n_layers + 1) if cost.bytes(length, degree, k) <= cost.cluster.memory_bytes
            ]
            if fitting:
                options.append(degree * float(cost.seconds(degree, fitting[0]).marginal(work)[0]))
        total += min(options)
    assert lower_bound_seconds(cost, np.array(lengths)) == pytest.approx(total / 8)

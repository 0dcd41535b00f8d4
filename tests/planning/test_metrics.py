"""Metrics against values worked out by hand from the docstring's formulas, and a lower bound by its definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import hand_plan, tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.plan import imbalance
from hbp.planning.metrics import lower_bound_seconds, measure, rank_seconds
from hbp.planning.planner import STRATEGIES, make_plan


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
    assert metrics.efficiency == pytest.approx(lower_bound_seconds(cost, plan.lengths, 2) / metrics.predicted_s)


def test_a_perfect_micro_step_and_a_lone_rank() -> None:
    ones = np.ones(4)
    assert imbalance(ones * 7, ones, np.zeros(4, int), 4) == 0
    assert imbalance(np.array([7.0]), np.array([1.0]), np.zeros(1, int), 4) == pytest.approx(3 / 4)
    assert imbalance(np.array([7.0]), np.array([4.0]), np.zeros(1, int), 4) == pytest.approx(0)


def reference_bound(cost: CostModel, lengths: list[int], x: float) -> float:
    """The docstring's bound at one x, document by document and setting by setting."""
    total = 0.0
    for length in lengths:
        work = cost.work(np.array([length]))
        charges = []
        for degree in cost.degrees():
            for k, most in enumerate(cost.longest_packs(degree)):
                if most >= length:
                    spent, share = cost.seconds(degree, k), length / most
                    busy = spent.fixed * share + float(spent.marginal(work)[0])
                    charges.append(degree * ((1 - x * spent.overlap) * busy + x * spent.fsdp * share))
        total += min(charges)
    return total


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=12), st.sampled_from([None, 1000, 2000]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_lower_bound_is_every_sample_at_its_own_cheapest(
    lengths: list[int], tokens: int | None, slow_network: bool
) -> None:
    cost = tiny_cost(8, tokens)
    if slow_network:
        cluster = dataclasses.replace(cost.cluster, fsdp_overlap=0.7, link_bytes_per_s=1e7)
        cost = dataclasses.replace(cost, cluster=cluster)
    found = rank_seconds(cost, np.bincount(lengths))
    best = max(reference_bound(cost, lengths, x) for x in np.linspace(0, 1, 201))
    assert found >= reference_bound(cost, lengths, 0.0) * (1 - 1e-9)
    assert found == pytest.approx(best, rel=5e-3)
    assert lower_bound_seconds(cost, np.array(lengths)) >= found / 8 * (1 - 1e-9)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(sorted(STRATEGIES)),
    st.floats(0, 1),
    st.sampled_from([1e6, 1e8, 1e12]),
)
@settings(max_examples=150, deadline=None)
def test_no_plan_beats_the_bound(
    lengths: list[int], world: int, strategy: str, overlap: float, link_bytes_per_s: float
) -> None:
    cost = tiny_cost(world, 3000)
    cluster = dataclasses.replace(cost.cluster, fsdp_overlap=overlap, link_bytes_per_s=link_bytes_per_s)
    cost = dataclasses.replace(cost, cluster=cluster)
    plan = make_plan(np.array(lengths), cost, strategy=strategy, global_batch_tokens=4000, max_length=3000)
    assert lower_bound_seconds(cost, plan.lengths) <= lower_bound_seconds(cost, plan.lengths, limit=3000)
    assert lower_bound_seconds(cost, plan.lengths, limit=3000) <= float(plan.micro_step_seconds().sum()) * (1 + 1e-6)


def test_efficiency_is_judged_within_the_packing_length_that_the_user_allows() -> None:
    """FSDP's traffic hides behind long packs; who forbids them has another best plan."""
    cost = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-ethernet"], 32)
    lengths = generate("short-32k", 20_000, 0)
    free, limited = (make_plan(lengths, cost, max_length=limit).info.metrics for limit in (None, 16_384))
    assert limited["predicted_s"] > 1.5 * free["predicted_s"]
    assert limited["efficiency"] > 0.95 and free["efficiency"] > 0.95

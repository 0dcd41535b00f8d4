"""The lower bound by its definition, and that no plan of any strategy beats it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.planning.lower_bound import lower_bound, rank_seconds
from hbp.planning.planner import STRATEGIES, make_plan


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
@cases(50)
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
    assert lower_bound(np.array(lengths), cost) >= found / 8 * (1 - 1e-9)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.sampled_from([1, 2, 8]),
    st.sampled_from(sorted(STRATEGIES)),
    st.floats(0, 1),
    st.sampled_from([1e6, 1e8, 1e12]),
)
@cases(150)
def test_no_plan_beats_the_bound(
    lengths: list[int], world: int, strategy: str, overlap: float, link_bytes_per_s: float
) -> None:
    cost = tiny_cost(world, 3000)
    cluster = dataclasses.replace(cost.cluster, fsdp_overlap=overlap, link_bytes_per_s=link_bytes_per_s)
    cost = dataclasses.replace(cost, cluster=cluster)
    plan = make_plan(np.array(lengths), cost, strategy=strategy, global_batch_tokens=4000, max_length=3000)
    assert lower_bound(plan.lengths, cost) <= lower_bound(plan.lengths, cost, max_length=3000)
    assert lower_bound(plan.lengths, cost, max_length=3000) <= float(plan.micro_step_seconds().sum()) * (1 + 1e-6)


def test_efficiency_is_judged_within_the_packing_length_that_the_user_allows() -> None:
    """FSDP's traffic hides behind long packs; who forbids them has another best plan."""
    cost = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-ethernet"], 32)
    lengths = generate("short-32k", 20_000, 0)
    free, limited = (make_plan(lengths, cost, max_length=limit).info.metrics for limit in (None, 16_384))
    assert limited["predicted_s"] > 1.5 * free["predicted_s"]
    assert limited["efficiency"] > 0.95 and free["efficiency"] > 0.95

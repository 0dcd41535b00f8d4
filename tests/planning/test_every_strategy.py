"""Whatever lengths, world, memory and options: a plan that holds, the same each time, or one line that says why not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import cases
from hypothesis import example, given
from hypothesis import strategies as st
from plans import can_fit, tiny_cost

from hbp.errors import HbpError
from hbp.plan import Plan, validate
from hbp.planning.planner import STRATEGIES, make_plan

WORLDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 64, 96, 256, 1024, 4096)
MOST = 3000

short = st.integers(1, 8)
usual = st.integers(1, MOST)
lengths = st.one_of(
    st.lists(usual, min_size=1, max_size=60),
    st.lists(short, min_size=1, max_size=200),
    st.lists(st.one_of(short, usual), min_size=1, max_size=80),
    st.builds(lambda length, count: [length] * count, usual, st.integers(1, 300)),
    st.builds(lambda most, few, count: [most] + [few] * count, usual, short, st.integers(0, 300)),
    st.builds(lambda end: list(range(1, end + 1)), st.integers(1, 200)),
)
options = st.fixed_dictionaries(
    {
        "max_length": st.one_of(st.none(), st.integers(1, 2 * MOST)),
        "global_batch_tokens": st.one_of(st.none(), st.integers(1, 10_000), st.sampled_from([10**6, 10**9])),
        "short_steps": st.one_of(st.none(), st.integers(0, 5), st.just(10**6)),
        "windows": st.one_of(st.none(), st.integers(1, 5), st.just(1000)),
        "seed": st.integers(0, 3),
    }
)
NONE = {"max_length": None, "global_batch_tokens": None, "short_steps": None, "windows": None, "seed": 0}


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(lengths, st.sampled_from(WORLDS), st.one_of(st.none(), st.integers(1, MOST)), options)
@cases(25)
@example([1], 2, None, NONE | {"max_length": 1})  # a group of no tokens: half of a pack of one
@example([1, 2, 3, 4, 5], 1, None, NONE | {"global_batch_tokens": 1, "windows": 1000})  # a pack left empty by even fit
def test_plan_holds(
    strategy: str, found: list[int], world: int, memory_tokens: int | None, asked: dict[str, Any]
) -> None:
    data, cost = np.array(found, np.int32), tiny_cost(world, memory_tokens)
    limit = asked["max_length"]
    kept = data if limit is None else data[data <= limit]
    if not len(kept) or not can_fit(cost, int(kept.max())):
        with pytest.raises(HbpError) as caught:
            make_plan(data, cost, strategy=strategy, **asked)
        assert "\n" not in str(caught.value)
        return
    plan = make_plan(data, cost, strategy=strategy, **asked)
    validate(plan)
    assert {sample for sample, _ in plan.info.dropped} == set(np.flatnonzero(data > (limit or math.inf)).tolist())
    np.testing.assert_array_equal(plan.lengths, data[plan.sample_ids])
    for group in plan.info.groups:
        fewest = cost.fewest_gc_layers(group.capacity, group.sp_degree)
        assert group.capacity >= 1
        assert fewest is not None and fewest <= group.gc_layers <= cost.model.n_layers
    in_range(plan)
    same(plan, make_plan(data, cost, strategy=strategy, **asked))


def in_range(plan: Plan) -> None:
    """Every figure of a plan is one that its definition allows."""
    metrics, rounding = plan.info.metrics, 1e-6
    for name in ("pr", "dbr", "abr"):
        assert -rounding <= metrics[name] < 1, name
    assert 0 <= metrics["cr"] <= 1
    assert 0 < metrics["efficiency"] <= 1
    assert 0 < metrics["predicted_s"] < math.inf
    assert metrics["ave_tokens"] == pytest.approx(plan.info.n_tokens / plan.n_steps)
    details = plan.info.details
    assert -rounding <= details["time_imbalance"] < 1
    assert -rounding <= details["drift"] <= 1
    assert -rounding <= details.get("travel", 0.0) <= 1
    assert 0 <= details.get("speed_given_up", 0.0) <= 1


def same(one: Plan, other: Plan) -> None:
    """Two plans are the same in every column and figure."""
    assert one.info == other.info
    for name in ("step", "micro_step", "rank_start", "sp_degree", "gc_layers", "capacity", "predicted_s"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
    for name in ("sample_offsets", "sample_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)

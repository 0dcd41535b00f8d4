"""The FlexSP-style peer makes whole, valid plans, and its dealing keeps to the bound of longest first."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.plan import Group, validate

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


sys.path.insert(0, str(BENCHMARKS))
FLEXSP, BY_HAND = importlib.import_module("flexsp"), importlib.import_module("by_hand")


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=80),
    world=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1000, 20_000),
)
def test_plans_are_valid(lengths: list[int], world: int, batch: int) -> None:
    cost, static = tiny_cost(world, 2000), Group(2000, min(world, 2), 4)
    plan = BY_HAND.plan_by_hand("flexsp", FLEXSP.flexsp, np.array(lengths, np.int32), cost, static, batch, 2000)
    validate(plan)
    assert len(plan.sample_ids) == len(lengths)
    assert (plan.tokens() <= 2000 // static.sp_degree * plan.sp_degree).all()
    assert plan.info.metrics["predicted_s"] > 0


@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (2, 2), (4, 4), (8, 10), (16, 36)])
def test_every_tiling_is_tried(ranks: int, count: int) -> None:
    degrees = [1 << i for i in range(ranks.bit_length())]
    tilings = list(FLEXSP._tilings(ranks, tuple(range(len(degrees))), degrees))
    assert len(tilings) == len({tuple(t) for t in tilings}) == count, "partitions of the ranks into powers of two"
    for tiling in tilings:
        assert sum(degrees[i] for i in tiling) == ranks
        assert sorted(tiling, reverse=True) == tiling, "falling degrees keep groups aligned"


def test_many_ranks_are_tiled_by_two_degrees() -> None:
    degrees = [1, 2, 4, 8]
    for tiling in FLEXSP._tilings(64, (0, 1, 2, 3), degrees):
        assert sum(degrees[i] for i in tiling) == 64
        assert len(set(tiling)) <= 2


@settings(deadline=None, max_examples=30)
@given(seconds=st.lists(st.floats(0.1, 10), min_size=1, max_size=6), groups=st.integers(1, 3))
def test_dealing_is_within_four_thirds_of_the_best(seconds: list[float], groups: int) -> None:
    """Graham's bound for longest processing time first."""
    work = np.sort(np.array(seconds))[::-1][None, :]
    slowest, group_of = FLEXSP._deal(
        np.ones(len(seconds), np.int64),
        np.ascontiguousarray(work),
        np.zeros(groups, np.int64),
        np.zeros(1),
        np.array([100]),
        np.inf,
    )
    best = min(
        np.bincount(choice, weights=work[0], minlength=groups).max()
        for choice in itertools.product(range(groups), repeat=len(seconds))
    )
    assert slowest == pytest.approx(np.bincount(group_of, weights=work[0], minlength=groups).max())
    assert best - 1e-9 <= slowest <= 4 / 3 * best + 1e-9

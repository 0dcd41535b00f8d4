"""The two sides of a pair are always in one pack, side by side; nothing else about the plan's contract changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.cost.cluster import load_cluster
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.plan import Plan, hash_lengths, validate
from hbp.planning.pairs import plan_with_pairs
from hbp.planning.planner import STRATEGIES, make_plan

COST = CostModel(load_model_spec("llama-3.1-8b"), load_cluster("h100-nvlink"), 8)


def data(units: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([length for unit in units for length in unit], np.int32)
    pair = np.array([len(unit) == 2 and side == 0 for unit in units for side in range(len(unit))])
    return lengths, pair


def check(plan: Plan, lengths: np.ndarray, pair: np.ndarray) -> None:
    validate(plan)
    assert plan.info.n_samples == len(lengths) and plan.info.lengths_sha256 == hash_lengths(lengths)
    np.testing.assert_array_equal(plan.lengths, lengths[plan.sample_ids])
    dropped = {sample for sample, _ in plan.info.dropped}
    for row in range(plan.n_packs):
        ids, own = plan.samples(row)
        for at, sample in enumerate(ids.tolist()):
            if pair[sample]:
                assert ids[at + 1] == sample + 1
        work = COST.work(own, np.array([0, len(own)]))
        seconds = COST.seconds(int(plan.sp_degree[row]), int(plan.gc_layers[row])).of(work)[0]
        assert plan.predicted_s[row] == pytest.approx(seconds, rel=1e-5)
    for sample in np.flatnonzero(pair).tolist():
        assert (sample in dropped) == (sample + 1 in dropped)
    assert sorted([*plan.sample_ids.tolist(), *dropped]) == list(range(len(lengths)))


length = st.integers(1, 60_000)
unit = st.one_of(st.tuples(length, length), st.tuples(length))


@given(st.lists(unit, min_size=1, max_size=20), st.sampled_from(sorted(STRATEGIES)), st.sampled_from([None, 50_000]))
@settings(max_examples=20, deadline=None)
def test_pairs_stay_together_under_every_strategy(
    units: list[tuple[int, ...]], strategy: str, max_length: int | None
) -> None:
    lengths, pair = data(units)
    if max_length and min(map(sum, units)) > max_length:
        return  # nothing to plan
    check(plan_with_pairs(lengths, pair, COST, strategy=strategy, max_length=max_length), lengths, pair)


def test_without_pairs_the_plan_is_the_planners_own() -> None:
    lengths = np.array([100, 2000, 300] * 20, np.int32)
    for pair in (None, np.zeros(60, bool)):
        plan, own = plan_with_pairs(lengths, pair, COST), make_plan(lengths, COST)
        assert plan.info == own.info
        np.testing.assert_array_equal(plan.sample_ids, own.sample_ids)


def test_pairs_cost_little_balance() -> None:
    """Long and short pairs of unlike sides, against planning the sides apart."""
    rng = np.random.default_rng(0)
    sides = np.clip(rng.lognormal(6.5, 1.2, (4000, 2)), 16, 32_768).astype(int)
    lengths, pair = data([tuple(s) for s in sides.tolist()])
    together, apart = plan_with_pairs(lengths, pair, COST), make_plan(lengths, COST)
    check(together, lengths, pair)
    assert together.info.metrics["efficiency"] > apart.info.metrics["efficiency"] - 0.01
    assert together.info.settings["pairs"] == 4000
    assert together.info.cluster == apart.info.cluster

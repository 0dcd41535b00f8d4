"""The tokens of an optimizer step mean the same to every strategy."""

from __future__ import annotations

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.plan import Group, Plan, batch_not_kept, close, validate, wanted_steps
from hbp.planning.paper.steps import cut_evenly, share_out
from hbp.planning.planner import STRATEGIES, make_plan

sizes = st.lists(st.integers(1, 100), min_size=1, max_size=60)


@given(sizes, st.integers(1, 80))
@cases(100)
def test_cuts_are_as_many_as_can_be_and_nearest_to_equal(tokens: list[int], n_steps: int) -> None:
    step = cut_evenly(np.array(tokens), n_steps)
    n = min(n_steps, len(tokens))
    assert np.unique(step).tolist() == list(range(n))
    assert (np.diff(step) >= 0).all()
    part, largest = sum(tokens) / n, max(tokens)
    if largest <= part:  # then no cut is forced, and none is further off than half a micro-step
        ends = np.cumsum(np.bincount(step, tokens))
        assert (np.abs(ends - part * np.arange(1, n + 1)) <= largest / 2 + 1e-6).all()


def test_cut_of_a_case_by_hand() -> None:
    """60 tokens in three: cuts nearest to 20 and 40 lie after 25 and after 38."""
    assert cut_evenly(np.array([10, 15, 13, 5, 17]), 3).tolist() == [0, 0, 1, 2, 2]
    assert cut_evenly(np.array([90, 1, 1]), 3).tolist() == [0, 1, 2]  # one is larger than its part


@given(st.lists(st.tuples(st.floats(1, 1e6), st.integers(1, 30)), min_size=1, max_size=5), st.integers(1, 100))
@cases(100)
def test_groups_share_the_steps(groups: list[tuple[float, int]], n_steps: int) -> None:
    tokens, most = zip(*groups, strict=True)
    found = share_out(n_steps, tokens, most)
    assert all(1 <= own <= limit for own, limit in zip(found, most, strict=True))
    assert sum(found) == max(len(groups), min(n_steps, sum(most)))


def test_a_share_follows_the_tokens() -> None:
    assert share_out(10, [300.0, 700.0], [50, 50]) == [3, 7]
    assert share_out(10, [300.0, 700.0], [50, 4]) == [6, 4]  # no more steps than micro-steps


def largest_micro_step(plan: Plan) -> int:
    return int(np.bincount(plan.micro_step_index(), plan.tokens()).max())


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(st.integers(0, 99), st.integers(40, 400), st.sampled_from([1, 2, 4, 8]), st.integers(500, 20_000))
@cases(8)
def test_every_strategy_takes_the_steps_of_the_global_batch(
    strategy: str, seed: int, count: int, world: int, batch: int
) -> None:
    lengths = np.clip(np.random.default_rng(seed).lognormal(4, 1, count), 4, 1000).astype(np.int32)
    plan = make_plan(lengths, tiny_cost(world), strategy=strategy, global_batch_tokens=batch, seed=seed)
    validate(plan)
    asked = lengths.sum() / batch
    micro_steps = int(plan.micro_step_index()[-1]) + 1
    if largest_micro_step(plan) <= batch:
        assert abs(plan.n_steps - asked) <= max(1, 0.02 * asked)
    elif close(plan.n_steps, wanted_steps(lengths.sum(), batch)):
        assert plan.n_steps <= micro_steps
    else:
        assert f"asked {batch:,}" in str(batch_not_kept(plan))
        assert plan.info.details["steps_off"] != 0


def test_ours_and_naive_packing_take_as_many_steps_where_one_micro_step_is_larger() -> None:
    """Two ranks with a sample of nearly twice the global batch: as many steps, and the plan says what one holds."""
    lengths = np.append(np.full(400, 100), 4400).astype(np.int32)
    plans = [
        make_plan(lengths, tiny_cost(2), strategy=name, global_batch_tokens=2400, static=static)
        for name, static in (("hbp-mixed", None), ("hbp", None), ("concat", Group(4400, 2, 0)))
    ]
    assert plans[0].n_steps == 18  # 44,400 / 2,400 = 18.5, of which Python takes the even one
    assert plans[0].info.details["largest_step_tokens"] >= 4400
    said = str(batch_not_kept(plans[0]))
    assert said.startswith("steps hold up to ") and "asked 2,400: one micro-step of 2 GPUs holds " in said
    assert plans[2].n_steps == 12  # packs of 4,400 leave no more micro-steps
    assert str(batch_not_kept(plans[2])).startswith("12 steps of 3,700 tokens, asked 2,400 (18 steps): one micro-step")
    assert plans[2].info.details["steps_off"] == pytest.approx(12 / 18 - 1)
    assert batch_not_kept(make_plan(lengths, tiny_cost(2), global_batch_tokens=20_000)) is None
    assert batch_not_kept(make_plan(lengths, tiny_cost(2))) is None  # nothing was asked

"""`plan.order`: what each promises of the steps, and what it costs over the fastest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.config import Config, PlanConfig
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.errors import HbpError
from hbp.plan import Plan, validate, wanted_steps
from hbp.plan_info import DEFAULT_ORDER, ORDERS
from hbp.planning.elsewhere import plan_elsewhere
from hbp.planning.kernels import shuffled
from hbp.planning.one_setting import one_setting_plan
from hbp.planning.ordered.orders import ORDERED, PRICE
from hbp.planning.planner import make_plan

BATCH = 2**21
COST = CostModel.of("llama-3.1-8b", "h100-nvlink", 32)
LENGTHS = generate("mix-128k", 6000, 0)
SMALL = st.lists(st.one_of(st.integers(1, 20), st.integers(1, 1500)), min_size=1, max_size=60)
ASKED = st.fixed_dictionaries(
    {
        "global_batch_tokens": st.one_of(st.none(), st.integers(1, 10_000)),
        "max_length": st.one_of(st.none(), st.integers(1000, 3000)),
        "short_steps": st.one_of(st.none(), st.integers(0, 5)),
        "seed": st.integers(0, 3),
    }
)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    found = {o: make_plan(LENGTHS, COST, order=o, global_batch_tokens=BATCH, short_steps=0) for o in ORDERS}
    for plan in found.values():
        validate(plan)
    return found


def test_every_order_is_named_once() -> None:
    assert tuple(ORDERED) == ORDERS
    assert PlanConfig.model_fields["order"].annotation.__args__ == ORDERS  # type: ignore[union-attr]
    assert Config.model_validate({"model": {"path": "x"}}).plan.order == "balanced"  # docs/quality.md


@pytest.mark.parametrize("order", ["balanced", "random"])
@given(SMALL, st.sampled_from([1, 2, 3, 4, 8, 12, 64]), st.sampled_from([None, 1500]), ASKED)
@cases(25)
def test_promises_hold_of_any_lengths(
    order: str, found: list[int], world: int, memory_tokens: int | None, asked: dict[str, Any]
) -> None:
    """Every sample once, micro-steps that tile, the same again; the price stated is the price, and within its bound."""
    data, cost = np.array(found, np.int32), tiny_cost(world, memory_tokens)
    kept = data[data <= (asked["max_length"] or data.max())]
    if not len(kept):
        return
    plan = make_plan(data, cost, order=order, **asked)
    validate(plan)
    np.testing.assert_array_equal(plan.lengths, data[plan.sample_ids])
    again = make_plan(data, cost, order=order, **asked)
    assert again.info == plan.info
    assert again.sample_ids.tolist() == plan.sample_ids.tolist()
    assert again.step.tolist() == plan.step.tolist()
    assert plan.info.settings["order"] == order
    fastest = make_plan(data, cost, order="fastest", **asked)
    price = plan.info.metrics["predicted_s"] / fastest.info.metrics["predicted_s"] - 1
    assert plan.info.details["price"] == pytest.approx(price, abs=1e-5)
    if order == "balanced":
        assert price <= PRICE + 1e-6
        assert plan.info.details["drift"] <= fastest.info.details["drift"] + 1e-9


def test_the_fastest_is_what_no_order_gives(plans: dict[str, Plan]) -> None:
    plain = make_plan(LENGTHS, COST, global_batch_tokens=BATCH, short_steps=0)
    default = plans[DEFAULT_ORDER]
    assert plain.sample_ids.tolist() == default.sample_ids.tolist()
    assert plain.info.metrics == default.info.metrics
    assert "order" not in plans["fastest"].info.settings


def test_orders_keep_the_number_of_steps(plans: dict[str, Plan]) -> None:
    wanted = wanted_steps(float(LENGTHS.sum()), BATCH)
    assert {plan.n_steps for plan in plans.values()} == {wanted}
    tokens = np.bincount(plans["random"].step, plans["random"].tokens())
    assert np.abs(tokens - BATCH).max() <= LENGTHS.max()


def test_balanced_steps_are_nearer_to_the_data_than_the_fastest(plans: dict[str, Plan]) -> None:
    details = {name: plan.info.details for name, plan in plans.items()}
    assert details["balanced"]["drift"] < 0.6 * details["fastest"]["drift"]
    assert details["balanced"]["price"] <= PRICE


def test_random_steps_are_as_far_from_the_data_as_random_packs() -> None:
    asked = {"global_batch_tokens": BATCH // 4, "short_steps": 0}
    packs = make_plan(LENGTHS, COST, strategy="isf", **asked)
    plan = make_plan(LENGTHS, COST, order="random", **asked)
    assert plan.info.details["drift"] == pytest.approx(packs.info.details["drift"], rel=0.15)
    assert plan.info.details["price"] < 0.1
    assert plan.info.metrics["predicted_s"] < packs.info.metrics["predicted_s"]


def test_random_steps_follow_the_shuffle_alone() -> None:
    """Whatever the lengths, and however sorted: the n-th sample of the shuffle comes no later than the next."""
    for lengths in (np.sort(LENGTHS), -np.sort(-LENGTHS), LENGTHS):
        plan = make_plan(lengths, COST, order="random", global_batch_tokens=BATCH, short_steps=0, seed=3)
        step = np.empty(len(lengths), np.int64)
        step[plan.sample_ids] = np.repeat(plan.step, np.diff(plan.sample_offsets))
        assert np.diff(step[shuffled(len(lengths), np.random.default_rng(3))]).min() >= 0
        assert plan.info.details["travel"] < 1 / plan.n_steps


def test_the_curriculum_takes_its_short_samples_from_the_whole_shuffle() -> None:
    """The steps after it are like the later ones; were its samples the shuffle's first, they would hold long ones."""
    plan = make_plan(LENGTHS, COST, order="random", global_batch_tokens=BATCH // 4, short_steps=4)
    documents = np.bincount(plan.step, np.diff(plan.sample_offsets), plan.n_steps)
    after = np.array_split(documents[4:], 4)
    assert after[0].mean() > 0.8 * np.concatenate(after[1:]).mean()


@pytest.mark.parametrize("order", ["balanced", "random"])
def test_the_curriculum_comes_on_top(order: str) -> None:
    plan = make_plan(LENGTHS, COST, order=order, global_batch_tokens=BATCH, short_steps=2)
    long = np.repeat(plan.step, np.diff(plan.sample_offsets))[plan.lengths > 11_000]
    assert long.min() == 2
    tokens = np.bincount(plan.step, plan.tokens())
    assert tokens[:2].min() > 0.9 * BATCH
    assert plan.info.settings["short_steps"] == 2


def test_another_seed_is_another_epoch(plans: dict[str, Plan]) -> None:
    for order in ("balanced", "random"):
        other = make_plan(LENGTHS, COST, order=order, global_batch_tokens=BATCH, short_steps=0, seed=1)
        assert other.sample_ids.tolist() != plans[order].sample_ids.tolist()


def test_the_same_order_elsewhere(plans: dict[str, Plan]) -> None:
    again = plan_elsewhere(plans["random"], 32)
    assert again.sample_ids.tolist() == plans["random"].sample_ids.tolist()
    assert plan_elsewhere(plans["balanced"], 16).info.settings["order"] == "balanced"


def test_unknown_orders_and_those_of_several_settings_are_refused() -> None:
    with pytest.raises(HbpError, match="no order 'balance'"):
        make_plan(LENGTHS, COST, order="balance")
    with pytest.raises(HbpError, match="leave --order out"):
        one_setting_plan(LENGTHS, COST, order="random")


@pytest.mark.parametrize("order", ORDERS)
def test_a_small_global_batch_is_no_slower_than_with_one_setting(order: str) -> None:
    """2,000 tokens a GPU and step, where micro-steps of alike packs are of other sizes than a step."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(20, 600, 900), rng.integers(3000, 9000, 12)]).astype(np.int32)
    rng.shuffle(lengths)
    cost = CostModel.of("llama-3.1-8b", "h100-nvlink", 8)
    ours = make_plan(lengths, cost, order=order, global_batch_tokens=16_000)
    validate(ours)
    static = [make_plan(lengths, cost, strategy=name, global_batch_tokens=16_000) for name in ("concat", "bfd", "isf")]
    assert {plan.n_steps for plan in static} == {ours.n_steps}
    assert ours.info.metrics["predicted_s"] < min(plan.info.metrics["predicted_s"] for plan in static)

"""What sets each baseline apart, and Karmarkar–Karp against the optimum of tiny cases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.plan import Group, Plan
from hbp.planning.baselines import ISF_FULL, karmarkar_karp, tile_mixed
from hbp.planning.kernels import best_fit_decreasing, first_fit
from hbp.planning.packs import Packs
from hbp.planning.planner import make_plan

LENGTHS = np.clip(np.random.default_rng(3).lognormal(5, 1, 1200), 16, 1024).astype(np.int32)
STATIC = Group(1024, 1, 0)


def made(strategy: str, world: int = 1, **options: object) -> Plan:
    return make_plan(LENGTHS, tiny_cost(world), strategy=strategy, **options)


def packs(plan: Plan) -> list[list[int]]:
    return [plan.samples(row)[0].tolist() for row in range(plan.n_packs)]


def micro_steps(plan: Plan) -> list[list[int]]:
    """Rows of each micro-step."""
    index = plan.micro_step_index()
    return [np.flatnonzero(index == i).tolist() for i in range(int(index[-1]) + 1)]


@pytest.mark.parametrize("strategy", ["concat", "ffd", "bfd", "isf", "sorted", "lb"])
def test_one_setting_for_the_whole_run(strategy: str) -> None:
    plan = make_plan(LENGTHS, tiny_cost(8, 700), strategy=strategy)
    assert len(plan.info.groups) == 1
    assert {*plan.sp_degree.tolist()} == {plan.info.groups[0].sp_degree}
    assert {*plan.gc_layers.tolist()} == {plan.info.groups[0].gc_layers}
    given_one = made(strategy, 4, static=Group(2048, 2, 3))
    assert given_one.info.groups == (Group(2048, 2, 3),)


def test_concat_closes_a_pack_only_when_the_next_sample_does_not_fit() -> None:
    plan = made("concat", static=STATIC)
    order = [sample for pack in packs(plan) for sample in pack]
    assert order != sorted(order)
    for pack, following in pairwise(packs(plan)):
        assert LENGTHS[pack].sum() + LENGTHS[following[0]] > 1024


@pytest.mark.parametrize(
    ("strategy", "pack"),
    [
        ("ffd", lambda falling: first_fit(falling, 1024)),
        ("bfd", lambda falling: best_fit_decreasing(falling, 1024, np.random.default_rng(0))),
    ],
)
def test_decreasing_fits_are_of_the_whole_set_and_in_random_order(
    strategy: str, pack: Callable[[np.ndarray], np.ndarray]
) -> None:
    falling = np.sort(LENGTHS)[::-1]
    want = np.bincount(pack(falling), weights=falling)
    plan = made(strategy, static=STATIC)
    assert sorted(plan.tokens().tolist()) == sorted(want.tolist())
    longest = np.array([LENGTHS[pack].max() for pack in packs(plan)])
    assert 0.3 < (np.diff(longest) > 0).mean() + (np.diff(longest) == 0).mean() / 2 < 0.7


def test_isf_keeps_packs_that_are_nearly_full() -> None:
    plan, naive = made("isf", static=STATIC), made("concat", static=STATIC)
    full = plan.tokens() >= ISF_FULL * 1024
    assert full.mean() > 0.9
    assert (naive.tokens() >= ISF_FULL * 1024).mean() < 0.5
    assert plan.info.metrics["pr"] < naive.info.metrics["pr"] / 2


def test_sorted_batches_hold_neighbours_of_one_sample_each() -> None:
    plan = made("sorted", 7, static=STATIC)
    assert plan.n_packs == len(LENGTHS)
    spans = [sorted(plan.tokens()[rows].tolist()) for rows in micro_steps(plan)]
    assert [len(span) for span in spans] == [7] * (1200 // 7) + [1200 % 7]
    assert spans != sorted(spans)
    for low, high in pairwise(sorted(spans)):
        assert low[-1] <= high[0]
    assert max(spans[-1]) == LENGTHS[np.argsort(LENGTHS)][1200 % 7 - 1]  # the rest is the shortest


def test_lb_balances_each_batch_of_random_samples() -> None:
    batch = 16 * 1024
    plan, given_order = made("lb", 8, static=STATIC, global_batch_tokens=batch), made("bfd", 8, static=STATIC)
    held = np.bincount(plan.step, weights=plan.tokens())
    assert (np.abs(held[:-1] - batch) < 1024).all()
    seconds = plan.predicted_s.astype(float)
    spread = np.mean([1 - seconds[rows].mean() / seconds[rows].max() for rows in micro_steps(plan)])
    other = given_order.predicted_s.astype(float)
    waits = np.mean([1 - other[rows].mean() / other[rows].max() for rows in micro_steps(given_order)])
    assert spread < 0.6 * waits
    means = [
        LENGTHS[np.concatenate([plan.samples(r)[0] for r in np.flatnonzero(plan.step == s)])].mean() for s in (0, 1)
    ]
    assert all(0.7 < mean / LENGTHS.mean() < 1.4 for mean in means)


def test_lb_takes_more_micro_steps_when_a_part_is_over_capacity() -> None:
    lengths = np.array([60, 60, 60, 20])  # 200 tokens fill two packs of 100, but three 60s do not
    plan = make_plan(lengths, tiny_cost(1), strategy="lb", static=Group(100, 1, 0), global_batch_tokens=200)
    assert (plan.n_steps, plan.tokens().max() <= 100) == (1, True)
    assert plan.micro_step.tolist() == [*range(plan.n_packs)]
    assert plan.n_packs >= 3


def test_dcp_takes_the_degree_from_the_length_alone_and_mixes_degrees() -> None:
    plan = made("dcp", 8, static=Group(1024, 8, 0))
    assert [(g.capacity, g.sp_degree) for g in plan.info.groups] == [(128, 1), (256, 2), (512, 4), (1024, 8)]
    assert (plan.capacity == 128 * plan.sp_degree).all()
    for row, pack in enumerate(packs(plan)):
        want = np.select([LENGTHS[pack] <= 128, LENGTHS[pack] <= 256, LENGTHS[pack] <= 512], [1, 2, 4], 8)
        assert (want == plan.sp_degree[row]).all()
    assert any(len({*plan.sp_degree[rows].tolist()}) > 1 for rows in micro_steps(plan))
    assert plan.info.metrics["cr"] > 0


# Karmarkar–Karp


def sums(seconds: list[float], k: int) -> np.ndarray:
    part = karmarkar_karp(np.array(seconds), k)
    assert len(part) == len(seconds)
    assert 0 <= part.min() <= part.max() < k
    return np.bincount(part, weights=seconds, minlength=k)


def test_largest_differencing_by_hand() -> None:
    assert sorted(sums([8, 7, 6, 5, 4], 2)) == [14, 16]
    assert sorted(sums([5.0] * 6, 3)) == [10, 10, 10]
    assert sorted(sums([3, 2], 4)) == [0, 0, 2, 3]
    assert sums([3.5], 1).tolist() == [3.5]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 4))
@cases(80)
def test_largest_differencing_is_within_its_proven_bound(seconds: list[int], k: int) -> None:
    """Michiels, Korst, Aarts, van Leeuwen: the largest part is at most 4/3 − 1/(3k) of the optimum's."""
    best = sum(seconds)
    for choice in product(range(k), repeat=len(seconds) - 1):
        loads = [0] * k
        for part, value in zip((0, *choice), seconds, strict=True):
            loads[part] += value
        best = min(best, max(loads))
    assert best <= sums(list(map(float, seconds)), k).max() <= (4 / 3 - 1 / (3 * k)) * best + 1e-9


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=20))
@cases(30)
def test_as_many_parts_as_samples_leave_each_alone(seconds: list[float]) -> None:
    """Else `lb` might add micro-steps for ever."""
    assert len(set(karmarkar_karp(np.array(seconds), len(seconds)).tolist())) == len(seconds)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=40),
    st.sampled_from([8, 16, 24]),
)
@cases(100)
def test_mixed_degrees_tile_without_holes(rows: list[tuple[int, int, int]], world: int) -> None:
    kinds = sorted({step for _, step, _ in rows})
    lengths = np.array([length for _, _, length in rows])
    step = np.array([kinds.index(s) for _, s, _ in rows])
    groups = [Group(50 * 2**i, 2**i, 0) for i in range(4)]
    packs = Packs(np.arange(len(rows) + 1), np.arange(len(rows)), np.array([g for g, _, _ in rows]))
    schedule = tile_mixed(packs, step, groups, lambda p: p.sum(lengths.astype(np.float64) ** 2), world)
    assert sorted(schedule.packs.sample_ids.tolist()) == list(range(len(rows)))
    assert schedule.step.tolist() == sorted(step[schedule.packs.sample_ids].tolist())
    places = list(zip(schedule.step.tolist(), schedule.micro_step.tolist(), schedule.rank_start.tolist(), strict=True))
    at: dict[tuple[int, int], int] = {}
    previous = None
    for place, group, sample in zip(places, schedule.packs.group, schedule.packs.sample_ids, strict=True):
        degree = groups[group].sp_degree
        assert place[2] == at.get(place[:2], 0)  # no hole before it
        assert place[2] % degree == 0
        at[place[:2]] = place[2] + degree
        assert at[place[:2]] <= world
        key = (place[0], -degree, -int(lengths[sample]))
        assert previous is None or previous <= key  # highest degree first, then by falling cost
        previous = key
    for s in range(len(kinds)):
        ends = [at[key] for key in sorted(at) if key[0] == s]
        assert all(end == world for end in ends[:-1])  # these degrees all divide the world

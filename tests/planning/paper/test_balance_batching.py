"""Balance batching: micro-steps of like cost, tails dealt anew."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from hbp.plan import Group, imbalance
from hbp.planning.packs import Int, Packs, Schedule, packs_of
from hbp.planning.paper.packing import _deal_tail, balance_batches, micro_steps_per_step


def squares(lengths: Int):
    """The paper's cost: sum of squared lengths."""
    return lambda packs: packs.sum(lengths.astype(np.float64) ** 2)


def alone(lengths: Int, group: int = 0) -> Packs:
    return packs_of(np.arange(len(lengths)), np.arange(len(lengths)), group)


def places(schedule: Schedule) -> list[tuple[int, int, int]]:
    return list(zip(schedule.step.tolist(), schedule.micro_step.tolist(), schedule.rank_start.tolist(), strict=True))


def abr(schedule: Schedule, lengths: Int, degree: int, world: int) -> float:
    order = np.lexsort((schedule.rank_start, schedule.micro_step, schedule.step))
    _, index = np.unique(np.stack([schedule.step, schedule.micro_step]), axis=1, return_inverse=True)
    cost = squares(lengths)(schedule.packs)[order] / degree
    return imbalance(cost, np.full(len(order), float(degree)), index[order], world)


@pytest.mark.parametrize(
    ("group", "world", "batch", "count"),
    [
        (Group(100, 1, 0), 4, 400, 1),
        (Group(100, 1, 0), 4, 1, 1),
        (Group(100, 2, 0), 4, 400, 2),
        (Group(100, 4, 0), 4, 400, 4),
        (Group(100, 1, 0), 4, 1100, 3),
    ],
)
def test_accumulation_comes_nearest_to_the_global_batch(group: Group, world: int, batch: int, count: int) -> None:
    assert micro_steps_per_step(group, world, batch) == count


@pytest.mark.parametrize("degree", [1, 2])
def test_balanced_micro_steps_beat_the_given_order(degree: int) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 800)
    group = Group(1000, degree, 0)
    sides = {
        by_cost: balance_batches(
            alone(lengths), squares(lengths), [group], lengths, 8, 16000, np.random.default_rng(1), by_cost=by_cost
        )
        for by_cost in (True, False)
    }
    assert abr(sides[True], lengths, degree, 8) < 0.05 < 0.4 < abr(sides[False], lengths, degree, 8)
    assert sides[False].packs.sample_ids.tolist() == list(range(800))  # the order given stays
    assert places(sides[False]) == sorted(places(sides[False]))
    by_tokens = np.bincount(sides[True].step, lengths[sides[True].packs.sample_ids])
    assert len(by_tokens) == round(lengths.sum() / 16000)
    assert (np.abs(by_tokens - 16000) < 8 // degree * 1000 + 500).all()  # to within a micro-step
    counted = balance_batches(
        alone(lengths), squares(lengths), [group], lengths, 8, 16000, np.random.default_rng(1), counted=True
    )
    assert set(np.bincount(counted.step).tolist()) == {16}  # as if full: 1,000 tokens each, whatever the degree


def test_balanced_micro_steps_are_dealt_to_steps_at_random() -> None:
    lengths = np.arange(1, 401)
    schedule = balance_batches(
        alone(lengths), squares(lengths), [Group(400, 1, 0)], lengths, 4, 8000, np.random.default_rng(0)
    )
    means = [lengths[schedule.packs.sample_ids[schedule.step == s]].mean() for s in range(int(schedule.step.max()) + 1)]
    assert len(means) == 10  # 80,200 tokens
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_tail_is_dealt_over_all_ranks() -> None:
    """One pack of four samples on four ranks: a sample a rank."""
    lengths = np.array([10, 10, 10, 10])
    packs = packs_of(np.zeros(4, np.int64), np.arange(4))
    schedule = balance_batches(packs, squares(lengths), [Group(40, 1, 0)], lengths, 4, 160, np.random.default_rng(0))
    assert np.diff(schedule.packs.offsets).tolist() == [1, 1, 1, 1]
    assert sorted(places(schedule)) == [(0, 0, rank) for rank in range(4)]


def test_tail_goes_costliest_first_to_the_least_loaded() -> None:
    lengths = np.array([8, 7, 6, 5, 4])
    packs = packs_of(np.zeros(5, np.int64), np.arange(5))
    schedule = balance_batches(
        packs, lambda p: p.sum(lengths.astype(float)), [Group(30, 1, 0)], lengths, 2, 60, np.random.default_rng(0)
    )
    assert sorted(schedule.packs.sum(lengths).tolist()) == [13, 17]  # 8+5+4, 7+6


def test_tail_that_fits_only_as_it_was_packed_stays() -> None:
    """5, 5, 4, 3 go to two packs of ten by falling length, and then the last 3 fits neither."""
    lengths = np.array([4, 3, 3, 5, 5])
    packs = packs_of(np.array([0, 0, 0, 1, 1]), np.arange(5))
    schedule = balance_batches(packs, squares(lengths), [Group(10, 1, 0)], lengths, 3, 20, np.random.default_rng(0))
    assert schedule.packs.sum(lengths).max() <= 10
    tail = _deal_tail(packs, squares(lengths), 10, lengths, 2)
    assert tail.sample_ids.tolist() == packs.sample_ids.tolist()
    assert tail.offsets.tolist() == [0, 3, 5]


def test_fewer_samples_than_ranks_leave_the_others_idle() -> None:
    lengths = np.array([9, 3])
    schedule = balance_batches(
        alone(lengths), squares(lengths), [Group(10, 2, 0)], lengths, 8, 40, np.random.default_rng(0)
    )
    assert sorted(places(schedule)) == [(0, 0, 0), (0, 0, 2)]


def test_groups_do_not_share_a_step() -> None:
    lengths = np.full(60, 10)
    packs = Packs(np.arange(61), np.arange(60), np.arange(60) % 3)
    groups = [Group(10, 1, 0), Group(20, 2, 0), Group(40, 4, 0)]
    schedule = balance_batches(packs, squares(lengths), groups, lengths, 4, 40, np.random.default_rng(0))
    kinds: dict[int, set[int]] = {}
    for step, group in zip(schedule.step.tolist(), schedule.packs.group.tolist(), strict=True):
        kinds.setdefault(step, set()).add(group)
    assert sorted(kinds) == list(range(len(kinds)))
    assert all(len(kind) == 1 for kind in kinds.values())
    assert Counter(next(iter(kind)) for kind in kinds.values()) == {0: 5, 1: 5, 2: 5}  # 200 tokens each


def test_no_packs_make_an_empty_schedule() -> None:
    nothing = np.zeros(0, np.int64)
    packs = Packs(np.zeros(1, np.int64), nothing, nothing)
    schedule = balance_batches(packs, squares(nothing), [Group(10, 1, 0)], nothing, 4, 40, np.random.default_rng(0))
    assert len(schedule.packs) == len(schedule.step) == 0

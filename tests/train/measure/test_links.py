"""Every collective of training is measured, on groups of every degree, and all ranks agree on the seconds."""

from __future__ import annotations

from workers import CPU, run_ranks

from hbp.cost.fit import Collective
from hbp.train.measure.links import SIZES, measure_collectives


def measured(rank: int, world: int) -> list[Collective]:
    return measure_collectives({1, 2, 4}, CPU)


def test_on_four_ranks() -> None:
    first, *others = run_ranks(measured, 4)
    assert all(other == first for other in others)
    kinds = {("all_to_all", 2), ("all_to_all", 4), ("all_gather", 4), ("reduce_scatter", 4)}
    assert {(c.kind, c.ranks) for c in first} == kinds
    assert len(first) == len(kinds) * len(SIZES["cpu"])
    for collective in first:
        assert collective.seconds > 0
        assert any(0.9 * size <= collective.received_bytes <= size for size in SIZES["cpu"])


def alone(rank: int, world: int) -> list[Collective]:
    return measure_collectives({1}, CPU)


def test_one_rank_has_nothing_to_measure() -> None:
    assert run_ranks(alone, 1) == [[]]

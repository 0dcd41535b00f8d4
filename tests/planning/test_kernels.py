"""Packing kernels against plain Python: the same bins, every sample once, and close to the optimum of tiny cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.planning.kernels import (
    CACHED,
    _dealt,
    best_fit_decreasing,
    by_falling_length,
    first_fit,
    greedy_fill,
    next_fit,
    shuffled,
)
from hbp.planning.packs import Int

Packer = Callable[[Int, int], Int]


def bfd(lengths: Int, capacity: int) -> Int:
    return best_fit_decreasing(lengths, capacity, np.random.default_rng(0))


PACKERS: dict[str, Packer] = {"bfd": bfd, "first_fit": first_fit, "next_fit": next_fit}

ADVERSARIAL: dict[str, tuple[list[int], int]] = {
    "all equal": ([7] * 100, 50),
    "all equal, dividing": ([8] * 100, 64),
    "all longest": ([64] * 50, 64),
    "all ones": ([1] * 300, 64),
    "just over half": ([33] * 40 + [31] * 40, 64),
    "powers of two ±1": ([2**k + e for k in range(2, 16) for e in (-1, 0, 1)] * 3, 2**15 + 1),
    "bitmap words": ([63, 64, 65, 127, 128, 129, 4095, 4096, 4097] * 5, 64**3),
    "four levels": ([64**3 - 1, 64**3, 64**3 + 1, 1, 2] * 4, 64**3 * 2 + 1),
    "empty": ([], 64),
    "one sample": ([5], 64),
    "one full sample": ([64], 64),
    "capacity one": ([1, 1, 1], 1),
}


def reference(lengths: list[int], capacity: int, kind: str) -> list[int]:
    """Bin of each sample in the order given, one at a time, by looking at every open bin."""
    rooms: list[int] = []
    bins = []
    for length in lengths:
        fitting = [i for i, room in enumerate(rooms) if room >= length and (kind != "next" or i == len(rooms) - 1)]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        here = min(fitting, key=lambda i: rooms[i]) if kind == "best" else fitting[0]
        rooms[here] -= length
        bins.append(here)
    return bins


def loads(bin_of: Int, lengths: Int, capacity: int) -> list[int]:
    """Falling loads of the bins; that each sample has one and none is too full or empty is checked on the way."""
    assert bin_of.dtype == np.int64
    assert len(bin_of) == len(lengths)
    if not len(lengths):
        return []
    assert bin_of.min() == 0
    sums = np.bincount(bin_of, weights=lengths).astype(int)
    assert 0 < sums.min() <= sums.max() <= capacity
    return sorted(sums.tolist(), reverse=True)


def optimum(lengths: list[int], capacity: int) -> int:
    """Fewest bins, by trying everything."""
    best = len(lengths)

    def place(i: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for j in {room: j for j, room in enumerate(rooms) if room >= lengths[i]}.values():
            place(i + 1, (*rooms[:j], rooms[j] - lengths[i], *rooms[j + 1 :]))
        place(i + 1, (*rooms, capacity - lengths[i]))

    place(0, ())
    return best


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 200) | st.sampled_from([63, 64, 65, 4096, 4097, 70_000, 300_000]))
    length = st.integers(1, capacity) | st.integers(1, min(10, capacity))
    return draw(st.lists(length, max_size=60)), capacity


def check_against_reference(lengths: list[int], capacity: int) -> None:
    array = np.array(lengths, np.int32)
    for packer, kind in ((first_fit, "first"), (next_fit, "next")):
        assert packer(array, capacity).tolist() == reference(lengths, capacity, kind)
        loads(packer(array, capacity), array, capacity)
    falling = sorted(lengths, reverse=True)
    want = loads(np.array(reference(falling, capacity, "best"), np.int64), np.array(falling, np.int32), capacity)
    assert loads(bfd(array, capacity), array, capacity) == want


@given(lengths_and_capacity())
@cases(150)
def test_packers_equal_their_definitions(case: tuple[list[int], int]) -> None:
    check_against_reference(*case)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_sets(name: str) -> None:
    check_against_reference(*ADVERSARIAL[name])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9))
@cases(60)
def test_bins_are_close_to_the_fewest(lengths: list[int]) -> None:
    array = np.array(lengths)
    fewest = optimum(sorted(lengths, reverse=True), 20)
    assert fewest <= len(loads(bfd(array, 20), array, 20)) <= 11 / 9 * fewest + 1
    for packer in PACKERS.values():
        assert fewest <= len(loads(packer(array, 20), array, 20)) <= 2 * fewest


def test_best_fit_decreasing_fills_a_large_set_and_does_not_depend_on_dtype() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(6, 1, 50_000), 16, 8192).astype(np.int32)
    sums = loads(bfd(lengths, 32768), lengths, 32768)
    assert len(sums) == -(-int(lengths.sum()) // 32768)
    for dtype in (np.uint16, np.int64):
        np.testing.assert_array_equal(bfd(lengths.astype(dtype), 32768), bfd(lengths, 32768))


def test_falling_order_is_random_among_equals() -> None:
    lengths = np.array([3, 9, 3, 9, 3, 1] * 20, np.uint16)
    orders = [by_falling_length(lengths, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(lengths)))
        assert (np.diff(lengths[order].astype(int)) <= 0).all()
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    assert orders[0][:40].tolist() != sorted(orders[0][:40].tolist())


def fill_reference(room: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """(pack, length) of every placed sample: for each pack in turn the longest that fits, until none does."""
    left, placed = sorted(lengths, reverse=True), []
    for pack, free in enumerate(room):
        while fitting := [length for length in left if length <= free]:
            left.remove(fitting[0])
            free -= fitting[0]
            placed.append((pack, fitting[0]))
    return placed


@given(
    st.lists(st.integers(0, 150) | st.sampled_from([0, 64, 4096, 300_000]), max_size=15),
    st.lists(st.integers(1, 40) | st.sampled_from([63, 64, 65, 4095, 4097, 70_000]), max_size=50),
    st.integers(0, 3),
)
@cases(150)
def test_greedy_fill_takes_the_longest_that_fit_pack_by_pack(room: list[int], lengths: list[int], seed: int) -> None:
    array = np.array(lengths, np.int32)
    into = greedy_fill(np.array(room, np.int64), array, np.random.default_rng(seed))
    assert len(into) == len(lengths)
    got = Counter((pack, length) for pack, length in zip(into.tolist(), lengths, strict=True) if pack >= 0)
    assert got == Counter(fill_reference(room, lengths))


def test_greedy_fill_draws_among_equal_samples() -> None:
    lengths = np.full(200, 10, np.int32)
    taken = [set(np.flatnonzero(greedy_fill(np.array([100]), lengths, np.random.default_rng(s)) == 0)) for s in (0, 1)]
    assert len(taken[0]) == len(taken[1]) == 10
    assert taken[0] != taken[1]


@pytest.mark.parametrize("n", [0, 1, CACHED, CACHED + 1, 3 * CACHED])
def test_a_shuffle_holds_every_number_once_and_its_seed_decides(n: int) -> None:
    order, again, other = (shuffled(n, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, again)
    if n > 1:
        assert (order != other).any()
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_every_order_of_a_shuffle_in_buckets_is_as_likely() -> None:
    """Chi-square over the 24 orders of four numbers: 23 degrees of freedom, above 49.7 once in a thousand times."""
    rng, runs = np.random.default_rng(0), 12_000
    found = Counter(
        tuple(_dealt(rng.integers(0, 2, 4, np.uint8), np.empty(4, np.int32), rng).tolist()) for _ in range(runs)
    )
    assert len(found) == 24
    assert sum((count - runs / 24) ** 2 / (runs / 24) for count in found.values()) < 49.7

"""Even fit: every sample once, no pack over its room, and packs alike in tokens and in attention cost."""

from __future__ import annotations

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.planning.kernels import best_fit_into
from hbp.planning.mixed.even_fit import even_deal, even_fit, fill_evenly
from hbp.planning.packs import Int

ADVERSARIAL: dict[str, tuple[list[int], list[int]]] = {
    # lengths, capacities
    "all equal": ([8] * 64, [64] * 8),
    "all equal, not dividing": ([7] * 64, [64] * 8),
    "all longest": ([64] * 8, [64] * 8),
    "more longest than packs": ([64] * 9, [64] * 8),
    "one giant": ([64] + [1] * 448, [64] * 8),
    "powers of two ± 1": ([2**k + e for k in range(2, 9) for e in (-1, 0, 1)] * 4, [257] * 16),
    "one sample": ([5], [64] * 4),
    "one sample too long": ([65], [64] * 4),
    "no samples": ([], [64] * 4),
    "no packs": ([3, 4], []),
    "a short last micro-step": ([9] * 40, [64] * 4 + [30] * 4),
}


def histogram(lengths: list[int] | Int) -> Int:
    return np.bincount(np.asarray(lengths, np.int64), minlength=1).astype(np.int64)


def check(lengths: list[int] | Int, room: Int, slots: int) -> tuple[Int, Int, Int]:
    """Pack, length and room left; that nothing is lost, overfull or left out without need is checked on the way."""
    counts, room_before = histogram(lengths), room.copy()
    pack_of, taken, left = even_fit(counts, room, slots)
    np.testing.assert_array_equal(room, room_before)
    assert sorted([*taken.tolist(), *np.repeat(np.arange(len(counts)), counts).tolist()]) == sorted(lengths)
    loads = np.bincount(pack_of, weights=taken, minlength=len(room))
    np.testing.assert_array_equal(room - loads, left)
    assert (left >= 0).all()
    if counts.any() and len(room):
        assert np.flatnonzero(counts).min() > left.max()
    return pack_of, taken, left


@given(
    lengths=st.lists(st.integers(1, 20) | st.integers(1, 300), max_size=120),
    room=st.lists(st.integers(1, 300), max_size=12),
    slots=st.sampled_from([1, 2, 4]),
)
@cases(150)
def test_every_sample_has_one_place_or_fits_no_room(lengths: list[int], room: list[int], slots: int) -> None:
    check(lengths, np.array(sorted(room, reverse=True), np.int64), slots)


@pytest.mark.parametrize(("lengths", "room"), ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_sets(lengths: list[int], room: list[int]) -> None:
    check(lengths, np.array(room, np.int64), 4)


def spread(pack_of: Int, taken: Int, packs: int) -> float:
    """Standard deviation of the packs' sums of squares over their mean."""
    squares = np.bincount(pack_of, weights=taken.astype(np.float64) ** 2, minlength=packs)
    return float(squares.std() / squares.mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("longest", "share"), [(400, 0.5), (4000, 1.0)])
def test_packs_are_more_alike_than_those_of_best_fit(seed: int, longest: int, share: float) -> None:
    """Where single documents outweigh a mean pack, these set the spread of both."""
    capacity = 4096
    lengths = np.clip(np.random.default_rng(seed).lognormal(5.0, 1.0, 4000), 1, longest).astype(np.int64)
    packs = int(lengths.sum()) // capacity + 1
    room = np.full(packs, capacity)
    even = check(lengths, room, 4)
    best_of, best_taken, _ = best_fit_into(histogram(lengths), room, 0, 0)
    assert spread(even[0], even[1], packs) < share * spread(best_of, best_taken, packs)


def test_packs_beside_one_giant_are_alike() -> None:
    """The giant outweighs any share: its pack gets the fewest squares besides, the others share evenly."""
    lengths = np.array([1000] + [50] * 300 + [5] * 400)
    room = np.full(18, 1024)
    pack_of, taken, _ = check(lengths, room, 1)
    squares = np.bincount(pack_of, weights=taken.astype(np.float64) ** 2, minlength=18)
    giant = int(pack_of[taken == 1000][0])
    others = np.delete(squares, giant)
    assert squares[giant] > 20 * others.max()
    assert others.max() - others.min() <= 2 * 50**2


def test_packs_of_less_room_get_less_attention() -> None:
    lengths = np.array([10] * 600)
    room = np.array([1000] * 4 + [500] * 4)
    pack_of, taken, left = check(lengths, room, 4)
    squares = np.bincount(pack_of, weights=taken.astype(np.float64) ** 2, minlength=8)
    assert left.max() == 0
    np.testing.assert_allclose(squares[:4].mean(), 2 * squares[4:].mean())


def test_a_pack_with_little_room_waits_for_what_fits_it() -> None:
    """A 50 does not fit beside a 60; the 30s do, and it is these packs that lack them, not those of the 50s."""
    lengths = np.array([90, 60, 60, 60, 50, 50, 30, 30, 30, *[1] * 140])
    pack_of, taken, _ = check(lengths, np.full(6, 100), 4)
    assert sorted(pack_of[taken == 30].tolist()) == sorted(pack_of[taken == 60].tolist())


@given(
    own=st.lists(st.integers(50, 300), min_size=1, max_size=12),
    below=st.lists(st.integers(1, 49), max_size=120),
    lack=st.floats(0, 3e4),
    slots=st.sampled_from([1, 2, 4]),
)
@cases(150)
def test_dealt_and_filled(own: list[int], below: list[int], lack: float, slots: int) -> None:
    """Every own sample has a place where there is a pack for each; then no pack has room for any sample left over."""
    left, room = histogram(own), np.full(len(own), 300)
    pack_of, taken, room = even_deal(left, room, slots)
    assert not left.any()
    assert sorted(taken.tolist()) == sorted(own)
    np.testing.assert_array_equal(300 - np.bincount(pack_of, taken, len(own)), room)
    counts, before = histogram(below), room.copy()
    into, filled = fill_evenly(counts, room, np.full(len(own), lack))
    assert sorted([*filled.tolist(), *np.repeat(np.arange(len(counts)), counts).tolist()]) == sorted(below)
    np.testing.assert_array_equal(before - np.bincount(into, filled, len(own)), room)
    assert (room >= 0).all()
    assert not counts[: room.max() + 1].any()


def test_what_a_pack_lacks_is_made_up_by_longer_samples() -> None:
    counts = histogram([40] * 10 + [20] * 10 + [2] * 2000)
    into, filled = fill_evenly(counts, np.full(3, 100), np.array([3600.0, 450.0, 0.0]))
    assert sorted(filled[into == 0].tolist(), reverse=True)[:3] == [40, 40, 20]
    assert sorted(filled[into == 1].tolist(), reverse=True)[:2] == [20, 2]
    assert set(filled[into == 2].tolist()) == {2}

"""Packing kernels: put integer lengths into bins of a fixed capacity, fast.

The two that plans are made of, :func:`best_fit_decreasing` and :func:`greedy_fill`, use that lengths are small
integers: bins (or samples) of equal size sit in one list, and a bitmap of three levels of 64-bit words over the sizes
answers "smallest size from x up" and "largest size up to x" in a handful of bit operations. Equal samples are placed as
many at a time as fit, which is what best fit does with them one by one. So a whole data set is packed in one pass,
O(samples) with small constants, at the quality of whole-set best fit decreasing (no batch of 1,000 rows, no tree).

First fit, next fit and Karmarkar–Karp are here for the baselines.

Legend: ``N`` samples, ``B`` bins (packs), ``L`` the longest length. A *histogram* ``counts`` ``[L + 1]`` stands for
samples that differ in nothing but their length: ``counts[l]`` of them have ``l`` tokens.

Cost: sorting aside, about 1e7 samples a second on one core. Memory: 24 bytes a sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.planning.packs import Int, Lengths, numbered

ONE = np.uint64(1)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
BUCKETS = 256
CACHED = 1 << 16
"""Numbers that are shuffled as fast without buckets."""


@njit(cache=True, inline="always")
def _lowest(word: np.uint64) -> int:
    """Index of the lowest set bit of a word that is not zero."""
    n = 0  # bits below it, found by halves: 32 empty ones are shifted out, then 16, …
    for shift in (32, 16, 8, 4, 2, 1):
        if word & ((ONE << np.uint64(shift)) - ONE) == 0:
            word >>= np.uint64(shift)
            n += shift
    return n


@njit(cache=True, inline="always")
def _highest(word: np.uint64) -> int:
    """Index of the highest set bit of a word that is not zero."""
    n = 0  # as in _lowest, from above: as long as there is something in the upper half, it is looked at alone
    for shift in (32, 16, 8, 4, 2, 1):
        if word >> np.uint64(shift) != 0:
            word >>= np.uint64(shift)
            n += shift
    return n


@njit(cache=True)
def _new_bitmap(size: int) -> npt.NDArray[np.uint64]:
    """A set of values 0..size-1 (size up to 64^4): row ``i`` has a bit for each word of row ``i - 1`` that is not zero.

    Row 0 has a bit for each value: value ``v`` is bit ``v & 63`` of word ``v >> 6``. The word is a value of the
    next row, so the same two steps climb (``>> 6``) and descend (``<< 6 | bit``) from row to row.
    """
    words = (size >> 6) + 1  # of row 0; the rows above need fewer, and have as many
    return np.zeros((4, words), np.uint64)


@njit(cache=True)
def _mark(bitmap: npt.NDArray[np.uint64], value: int) -> None:
    """Put a value in; its words above are no longer empty."""
    for level in range(4):
        bitmap[level, value >> 6] |= ONE << np.uint64(value & 63)
        value >>= 6


@njit(cache=True)
def _clear(bitmap: npt.NDArray[np.uint64], value: int) -> None:
    """Take a value out."""
    for level in range(4):
        bitmap[level, value >> 6] &= ~(ONE << np.uint64(value & 63))
        if bitmap[level, value >> 6] != 0:  # others are in this word, so the rows above stay
            return
        value >>= 6


@njit(cache=True)
def _next_up(bitmap: npt.NDArray[np.uint64], value: int) -> int:
    """Smallest marked value >= value, or -1."""
    for level in range(4):
        index = value >> 6
        if index >= bitmap.shape[1]:
            return -1
        word = bitmap[level, index] & (ALL << np.uint64(value & 63))  # bits from the value on
        if word != 0:
            value = (index << 6) | _lowest(word)
            for down in range(level - 1, -1, -1):  # the lowest value of that word, and of that one's word, …
                value = (value << 6) | _lowest(bitmap[down, value])
            return value
        value = index + 1  # none in this word: a row up, which of the words after it is not empty?
    return -1


@njit(cache=True)
def _next_down(bitmap: npt.NDArray[np.uint64], value: int) -> int:
    """Largest marked value <= value, or -1."""
    for level in range(4):
        if value < 0:
            return -1
        index = value >> 6
        word = bitmap[level, index] & (ALL >> np.uint64(63 - (value & 63)))  # bits up to the value
        if word != 0:
            value = (index << 6) | _highest(word)
            for down in range(level - 1, -1, -1):
                value = (value << 6) | _highest(bitmap[down, value])
            return value
        value = index - 1
    return -1


@njit(cache=True)
def best_fit_into(counts: Int, room: Int, capacity: int, most_bins: int) -> tuple[Int, Int, Int]:
    """Best fit decreasing of a histogram into bins of which some may exist already.

    Args:
        counts: ``counts[l]`` samples have length ``l``; what is placed is taken out.
        room: tokens left in the bins that exist.
        capacity: of a new bin; no length may exceed it if bins may be opened.
        most_bins: how many there may be in all; with no more than exist, what fits none of them stays in `counts`.

    Returns:
        Bin and length of each sample placed, in order of falling length, and the room left in every bin.
    """
    total = counts.sum()
    bin_of, taken = np.empty(total, np.int64), np.empty(total, np.int64)  # [N], the first `placed` of them in use
    bins, placed = len(room), 0
    rooms = np.empty(max(bins, min(most_bins, bins + total)), np.int64)  # [B] tokens left, the first `bins` in use
    rooms[:bins] = room
    # Bins with the same room are a stack: first[r] is its top, or -1, and next_bin[b] the one below b. The bitmap holds
    # every r whose stack is not empty, so the fullest bin with room for x is on the stack of the next value from x up.
    # Full bins (room 0) are on none.
    next_bin = np.empty(len(rooms), np.int64)
    largest = max(capacity, room.max() if bins else 0)
    first = np.full(largest + 1, -1, np.int64)
    bitmap = _new_bitmap(largest + 1)
    for b in range(bins - 1, -1, -1):  # backwards, so that of equal bins the first is on top
        if room[b]:
            if first[room[b]] < 0:
                _mark(bitmap, room[b])
            next_bin[b] = first[room[b]]
            first[room[b]] = b
    for length in range(len(counts) - 1, 0, -1):
        left = counts[length]
        while left:
            space = _next_up(bitmap, length)
            if space < 0:  # no bin has room: open one, if there may be more
                if bins == len(rooms):
                    break
                here, space = bins, capacity
                bins += 1
            else:  # off its stack
                here = first[space]
                first[space] = next_bin[here]
                if first[space] < 0:
                    _clear(bitmap, space)
            many = min(left, space // length)  # after one it is still the fullest with room, so it takes them all
            bin_of[placed : placed + many] = here
            taken[placed : placed + many] = length
            placed += many
            left -= many
            space -= many * length
            rooms[here] = space
            if space:  # onto the stack of the room that it has now
                if first[space] < 0:
                    _mark(bitmap, space)
                next_bin[here] = first[space]
                first[space] = here
        counts[length] = left
    return bin_of[:placed], taken[:placed], rooms[:bins]


@njit(cache=True)
def greedy_fill_into(room: Int, counts: Int) -> tuple[Int, Int]:
    """For each pack in turn the longest samples that fit; returns the pack and the length of each placed sample.

    What is placed is taken out of the histogram `counts`, and its tokens out of `room`.
    """
    total = counts.sum()
    pack = np.empty(total, np.int64)
    taken = np.empty(total, np.int64)
    longest = len(counts) - 1
    bitmap = _new_bitmap(longest + 1)  # lengths of which there are samples left
    for length in range(1, longest + 1):
        if counts[length]:
            _mark(bitmap, length)
    placed = 0
    for p in range(len(room)):
        free = room[p]
        while free > 0:
            length = _next_down(bitmap, min(free, longest))
            if length < 0:
                break
            many = min(counts[length], free // length)
            pack[placed : placed + many] = p
            taken[placed : placed + many] = length
            placed += many
            free -= many * length
            counts[length] -= many
            if counts[length] == 0:
                _clear(bitmap, length)
        room[p] = free
    return pack[:placed], taken[:placed]


@njit(cache=True)
def first_fit(lengths: Lengths, capacity: int) -> Int:
    """Bin of each sample by first fit in the order given; the bin is found in a tree of maxima."""
    n = len(lengths)
    # A heap-shaped tree: node 1 is the root, 2i and 2i + 1 are below i, bin b is leaf `leaves + b`. Each node holds the
    # most room of any bin below it, so the first bin with room is found by going left wherever the left has enough.
    leaves = 1
    while leaves < n:
        leaves *= 2
    tree = np.full(2 * leaves, capacity, np.int64)
    bin_of = np.empty(n, np.int64)
    for i in range(n):
        node = 1
        while node < leaves:
            node *= 2
            if tree[node] < lengths[i]:  # not to the left, so to the right: the parent had room
                node += 1
        bin_of[i] = node - leaves
        tree[node] -= lengths[i]
        node //= 2
        while node:
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
            node //= 2
    return bin_of


@njit(cache=True)
def next_fit(lengths: Lengths, capacity: int) -> Int:
    """Bin of each sample by next fit in the order given: greedy concatenation."""
    bin_of = np.empty(len(lengths), np.int64)
    here, room = 0, capacity
    for i in range(len(lengths)):
        if lengths[i] > room:
            here += 1
            room = capacity
        room -= lengths[i]
        bin_of[i] = here
    return bin_of


@njit(cache=True)
def count_lengths(lengths: Lengths, longest: int) -> Int:
    """How many samples have each length 0..longest; numpy's bincount without its copies."""
    counts = np.zeros(longest + 1, np.int64)
    for length in lengths:
        counts[length] += 1
    return counts


@njit(cache=True)
def counting_sort(values: Int, lengths: Lengths, longest: int) -> Int:
    """`values` in order of rising `lengths` (none over `longest`), stable; no comparison, two passes."""
    at = np.zeros(longest + 2, np.int64)  # at[l]: first how many are shorter than l, then where the next l goes
    for length in lengths:
        at[length + 1] += 1
    for length in range(longest + 1):
        at[length + 1] += at[length]
    result = np.empty_like(values)
    for i in range(len(values)):
        result[at[lengths[i]]] = values[i]
        at[lengths[i]] += 1
    return result


def shuffled(n: int, rng: np.random.Generator) -> Int:
    """0..n−1 in random order."""
    order = numbered(n)
    if n > CACHED:
        return _dealt(rng.integers(0, BUCKETS, n, np.uint8), order, rng)
    rng.shuffle(order)
    return order


@njit(cache=True)
def _dealt(bucket: npt.NDArray[np.uint8], order: Int, rng: np.random.Generator) -> Int:
    """Numbers dealt to their random buckets and shuffled there, into `order`: any order of all is as likely as another
    (C. R. Rao, 1961). A bucket stays in the processor's cache; a shuffle of the whole waits for memory at every number.
    """
    ends = np.zeros(BUCKETS, np.int64)
    for b in bucket:
        ends[b] += 1
    ends = np.cumsum(ends)
    at = ends.copy()  # bucket b is order[at[b] : ends[b]], filled from its end, until at[b] is where it begins
    for i in range(len(bucket)):
        at[bucket[i]] -= 1
        order[at[bucket[i]]] = i
    for begin, end in zip(at, ends):  # noqa: B905 (numba's zip has no strict)
        for i in range(end - 1, begin, -1):  # Fisher and Yates
            j = begin + int(rng.random() * (i + 1 - begin))
            order[i], order[j] = order[j], order[i]
    return order


def by_rising_length(lengths: Lengths, rng: np.random.Generator) -> Int:
    """Indices in order of rising length, equal lengths in random order (so that which of them meet is random)."""
    order = shuffled(len(lengths), rng)
    return counting_sort(order, lengths[order], int(lengths.max(initial=0)))


def by_falling_length(lengths: Lengths, rng: np.random.Generator) -> Int:
    """:func:`by_rising_length`, the other way round."""
    return by_rising_length(lengths, rng)[::-1]


def best_fit_decreasing(lengths: Lengths, capacity: int, rng: np.random.Generator) -> Int:
    """Bin of each sample by best fit in order of falling length, int64 ``[N]``. No length may exceed the capacity."""
    order = by_falling_length(lengths, rng)
    counts = count_lengths(lengths, int(lengths.max(initial=0)))
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[order], _, _ = best_fit_into(counts, np.empty(0, np.int64), capacity, len(lengths))
    return bin_of


def greedy_fill(room: Int, lengths: Lengths, rng: np.random.Generator) -> Int:
    """Fill the room left in packs, in order, with the longest samples that fit (GreedyFill of the paper's Algorithm 2).

    Args:
        room: tokens left in each pack ``[P]``.
        lengths: samples to draw from ``[N]``.
        rng: decides which of several samples of one length is taken.

    Returns:
        Pack of each sample, -1 where it was not taken, int64 ``[N]``.
    """
    counts = count_lengths(lengths, int(lengths.max(initial=0)))
    order = by_rising_length(lengths, rng)  # samples of length l start at starts[l]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    pack, taken = greedy_fill_into(room.astype(np.int64), counts)
    by_length = np.argsort(taken, kind="stable")
    taken_sorted = taken[by_length]
    rank = np.arange(len(taken)) - np.searchsorted(taken_sorted, taken_sorted)  # the how many-th taken of its length
    result = np.full(len(lengths), -1, np.int64)
    result[order[starts[taken_sorted] + rank]] = pack[by_length]
    return result

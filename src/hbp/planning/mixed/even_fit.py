"""Even fit: packs that are alike in tokens *and* in attention cost.

Best fit decreasing puts long documents together, so its packs, all equally full, range from one kind to the other, and
ranks finish together only if packs are sorted by cost and a micro-step takes neighbours. That needs many packs, and
makes every micro-step of one kind. Even fit makes the packs themselves alike, so that any of them may stand beside any
other:

1. *Sand*, the shortest samples, an eighth of the tokens, is put aside: its attention cost is next to nothing.
2. The others, longest first, each go to the pack that lacks most of its share of attention cost, the sum of squared
   lengths (longest processing time first, R. L. Graham, 1969), if it has room. All shares are alike, but for documents
   that alone outweigh one: the packs that these begin are taken `slots` at a time, as a micro-step will take them, and
   all of those have the share of the costliest, since they will wait for it anyway.
   A pack with less room than that waits until the samples are short enough.
3. The sand, and what found no room, goes where it fits best (:func:`hbp.planning.kernels.best_fit_into`), which fills
   the packs to their last token.

:func:`even_deal` and :func:`fill_evenly` do the same for long samples and the shorter ones that fill their packs.

What it trades: packs that a very long document begins stay costlier than the others; sorting by cost afterwards brings
them together. Complexity: O(samples · log packs).

Legend: ``N`` samples placed, ``P`` packs, ``counts[l]`` samples of length ``l``, ``lack`` ``[P]`` squared length that
each pack is still due.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.planning.kernels import best_fit_into, greedy_fill_into
from hbp.planning.packs import Int

SAND_SHARE = 1 / 8
Float = npt.NDArray[np.float64]


@njit(cache=True)
def even_fit(counts: Int, room: Int, slots: int) -> tuple[Int, Int, Int]:
    """Place a histogram of lengths into packs.

    Args:
        counts: ``counts[l]`` samples have length ``l``; what is placed is taken out, what fits nowhere stays.
        room: capacity of each pack ``[P]``, falling; a pack of less capacity is due less attention cost.
        slots: packs of a micro-step.

    Returns:
        Pack and length of each sample placed, and the room left in each pack.
    """
    room, lack = room.copy(), _shares(counts, room, slots)
    pack_of, taken = _deal(counts, room, lack, _sand(counts) + 1, False)
    into, lengths, room = best_fit_into(counts, room, 0, 0)
    return np.concatenate((pack_of, into)), np.concatenate((taken, lengths)), room


@njit(cache=True)
def even_deal(counts: Int, room: Int, slots: int) -> tuple[Int, Int, Int]:
    """:func:`even_fit` of samples that are all long: none is kept back for the gaps.

    Args:
        counts: histogram of the samples to place; what finds no room stays in it.
        room: capacity of each pack ``[P]``, falling.
        slots: packs of a micro-step.

    Returns:
        Pack and length of each sample placed, and the room left in each pack.
    """
    room, lack = room.copy(), _shares(counts, room, slots)
    pack_of, taken = _deal(counts, room, lack, 1, False)
    into, lengths, room = best_fit_into(counts, room, 0, 0)
    return np.concatenate((pack_of, into)), np.concatenate((taken, lengths)), room


@njit(cache=True)
def fill_evenly(counts: Int, room: Int, lack: Float) -> tuple[Int, Int]:
    """Fill packs to their last token, and to the attention cost that each lacks.

    The longest samples that do not exceed what a pack lacks come first, the pack that lacks most before the others;
    then the short ones, up to the length below which half of the tokens are.

    Args:
        counts: histogram to draw from; what is placed is taken out.
        room: tokens left in each pack ``[P]``; what is placed is taken off.
        lack: sum of squared lengths that each pack is to be given ``[P]``.

    Returns:
        Pack and length of each sample placed.
    """
    long_of, long = _deal(counts, room, lack.copy(), 1, True)
    short_of, short = greedy_fill_into(room, counts[: _plenty(counts, room) + 1])
    last_of, last = greedy_fill_into(room, counts)
    return np.concatenate((long_of, short_of, last_of)), np.concatenate((long, short, last))


@njit(cache=True)
def densities(counts: Int, room: Int) -> tuple[float, float]:
    """Squared length per token of what fills so much room: of the short samples, and of the longest that fit."""
    _, longest = greedy_fill_into(room.copy(), counts.copy())
    dense = 0.0
    for length in longest:
        dense += float(length) * length
    tokens, squares = 0.0, 0.0
    for length in range(_plenty(counts, room) + 1):
        tokens += float(counts[length]) * length
        squares += float(counts[length]) * length * length
    return squares / max(tokens, 1.0), dense / max(1.0, float(longest.sum()))


@njit(cache=True)
def _deal(counts: Int, room: Int, lack: Float, shortest: int, spare: bool) -> tuple[Int, Int]:
    """Longest first, each sample to the pack that lacks most and has room; with `spare` none beyond what is lacking."""
    most = min(counts[shortest:].sum(), room.sum() // shortest)
    pack_of, taken = np.empty(most, np.int64), np.empty(most, np.int64)  # [N], the first `placed` in use
    # heap[:size]: packs with room, the one that lacks most first; one sorted by falling lack is a heap already.
    # Lengths fall, so a pack that is too full for this one may have room again once they are down to what it has left:
    # until then it is off the heap, on the stack waiting[its room], linked by after[].
    heap, size, placed = np.argsort(-lack, kind="mergesort"), len(room), 0
    waiting = np.full(
        len(counts), -1
    )  # of each length, the first pack that has just so much room left and waits for it
    after = np.empty(len(room), np.int64)  # the one that waits behind it
    for length in range(len(counts) - 1, shortest - 1, -1):
        left, square = counts[length], float(length) * length
        pack = waiting[length]
        while pack >= 0:  # these have room for just one of this length: back on the heap
            heap[size] = pack
            size += 1
            _sift_up(heap, size - 1, lack)
            pack = after[pack]
        while left and size:
            pack = heap[0]
            if room[pack] < length:
                after[pack], waiting[room[pack]] = waiting[room[pack]], pack
                size -= 1
                heap[0] = heap[size]
            elif spare and lack[pack] < square:  # nor does any other pack lack so much
                break
            else:
                pack_of[placed], taken[placed] = pack, length
                placed += 1
                left -= 1
                room[pack] -= length
                lack[pack] -= square
            _sift_down(heap, size, lack)  # the first entry is another pack, or lacks less than it did
        counts[length] = left
    return pack_of[:placed], taken[:placed]


@njit(cache=True)
def _sift_up(heap: Int, at: int, lack: Float) -> None:
    """Restore the heap after an entry was added."""
    while at and lack[heap[at]] > lack[heap[(at - 1) // 2]]:
        heap[at], heap[(at - 1) // 2] = heap[(at - 1) // 2], heap[at]
        at = (at - 1) // 2


@njit(cache=True)
def _sand(counts: Int) -> int:
    """The longest of the shortest samples that hold :data:`SAND_SHARE` of the tokens."""
    tokens = 0
    for length in range(len(counts)):
        tokens += counts[length] * length
    sand, below = 0, 0
    while sand + 1 < len(counts) and below + counts[sand + 1] * (sand + 1) <= tokens * SAND_SHARE:
        sand += 1
        below += counts[sand] * sand
    return sand


@njit(cache=True)
def _shares(counts: Int, room: Int, slots: int) -> Float:
    """Attention cost due to each pack: alike per token of capacity, but what the longest documents force."""
    packs = len(room)
    # The longest documents begin a pack each: the i-th longest that of pack i. Sorted by time, packs are taken `slots`
    # at a time, and all of a micro-step wait for its first, whose document forces them: forced[p] is that one's square.
    forced = np.zeros(packs)
    at, total = 0, 0.0  # packs that a document begins; squares of all samples
    for length in range(len(counts) - 1, 0, -1):
        square = float(length) * length
        total += counts[length] * square
        end = min(packs, at + counts[length])
        for pack in range(at, end):
            forced[pack] = square if pack % slots == 0 else forced[pack - 1]
        at = end
    while at < packs and at % slots:  # packs without a document of their own wait no less
        forced[at] = forced[at - 1]
        at += 1
    # What the forced packs take is not to be shared any more. With the rest the common level falls, so the next pack
    # may be above it too; forced[] falls, so one pass from the front finds all of them.
    tokens = float(room.sum())
    begin = 0  # packs before this one are forced above the common level
    while begin < packs and tokens > 0 and forced[begin] > total / tokens * room[begin]:
        total -= forced[begin]
        tokens -= room[begin]
        begin += 1
    shares = forced
    for pack in range(begin, packs):
        shares[pack] = max(0.0, total / tokens * room[pack]) if tokens > 0 else 0.0
    return shares


@njit(cache=True)
def _sift_down(heap: Int, size: int, lack: Float) -> None:
    """Restore the heap after its first entry changed."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and lack[heap[child + 1]] > lack[heap[child]]:
            child += 1
        if lack[heap[at]] >= lack[heap[child]]:
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child


@njit(cache=True)
def _plenty(counts: Int, room: Int) -> int:
    """The length up to which samples hold half of the tokens; the longest of all unless these are plenty for `room`."""
    tokens = 0
    for length in range(len(counts)):
        tokens += counts[length] * length
    if 4 * room.sum() > tokens:
        return len(counts) - 1
    at, below = 0, 0
    while at + 1 < len(counts) and 2 * below < tokens:
        at += 1
        below += counts[at] * at
    return at

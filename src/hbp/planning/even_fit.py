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
3. The sand, and what found no room, goes where it fits best (:func:`hbp.planning.fill.best_fit_into`), which fills the
   packs to their last token.

What it trades: packs that a very long document begins stay costlier than the others; sorting by cost afterwards brings
them together. Complexity: O(samples · log packs).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.planning.fill import best_fit_into
from hbp.planning.packs import Int

SAND_SHARE = 1 / 8


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
    total = counts.sum()
    pack_of, taken = np.empty(total, np.int64), np.empty(total, np.int64)
    room, lack = room.copy(), _shares(counts, room, slots)
    sand = _sand(counts)
    heap, size, placed = np.argsort(-lack, kind="mergesort"), len(room), 0
    for length in range(len(counts) - 1, sand, -1):
        left = counts[length]
        while left and size:
            pack = heap[0]
            if room[pack] < length:
                size -= 1
                heap[0] = heap[size]
            else:
                pack_of[placed], taken[placed] = pack, length
                placed += 1
                left -= 1
                room[pack] -= length
                lack[pack] -= float(length) * length
            _sift_down(heap, size, lack)
        counts[length] = left
    into, lengths, room = best_fit_into(counts, room, 0, 0)
    last = placed + len(into)
    pack_of[placed:last], taken[placed:last] = into, lengths
    return pack_of[:last], taken[:last], room


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
def _shares(counts: Int, room: Int, slots: int) -> npt.NDArray[np.float64]:
    """Attention cost due to each pack: alike per token of capacity, but what the longest documents force."""
    packs = len(room)
    forced = np.zeros(packs)  # square of the longest document of the micro-step that a pack will be in
    at, total = 0, 0.0
    for length in range(len(counts) - 1, 0, -1):
        square = float(length) * length
        total += counts[length] * square
        end = min(packs, at + counts[length])
        for pack in range(at, end):
            forced[pack] = square if pack % slots == 0 else forced[pack - 1]
        at = end
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
def _sift_down(heap: Int, size: int, lack: npt.NDArray[np.float64]) -> None:
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

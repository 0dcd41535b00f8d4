"""The samples of one optimizer step → micro-steps of packs of any degrees that finish together.

A step that holds the data's own mix has a few long samples and many short ones, so its micro-steps mix degrees: a long
sample on several ranks beside packs of short ones that take as long. This is scheduling of moldable jobs, done shelf by
shelf (E. Coffman et al., 1980; J. Turek et al., 1992), a shelf being a micro-step of a target time:

1. Longest first, a sample opens a pack of the lowest degree at which it alone takes no longer than the target and fits
   memory, as long as ranks are left, or joins the pack that it fills best.
2. What is short against the target then goes, longest first, to the pack that would finish first, as long as that
   takes no longer than the target either (longest processing time first, R. L. Graham, 1969). A pack that grows
   recomputes as many layers as it has to.
3. What fits no more is left to the next shelf.

Targets tried: what the longest sample takes at each degree, an even share of all that is left, what FSDP's traffic
hides, and the time of packs full to a few numbers of recomputed layers; each also a little longer. The shelf with the
most work for its time is kept, once as it is and once with a premium on being the last one (:data:`PREMIUMS`), and of
the two sequences the faster.

What it trades: nothing waits for another step, so a step of few samples is not perfectly balanced. Complexity:
O(samples · log packs) a target and micro-step.

Legend: ``n`` samples of the step, ``P`` packs, ``D`` degrees, ``K`` numbers of recomputed layers.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.cost.predict import CostModel
from hbp.planning.packs import Int

Float = npt.NDArray[np.float64]
SLACKS = np.array([1.0, 1.05, 1.12, 1.25])
"""Targets are lengthened by so much: room for what fills up."""
NEAR = 1.01
"""Targets no further apart are as good as one."""
PREMIUMS = np.array([1.0, 1.06])
"""On a shelf that holds all that is left: it saves the overhead of another."""
FEW = 12
"""Micro-steps of a step up to which that matters."""
SHORT = 1 / 16
"""Samples that alone take such a share of the target are poured in rather than placed one by one."""


class StepCosts:
    """What packs of every degree and number of recomputed layers take, as arrays that kernels read."""

    def __init__(self, cost: CostModel, longest: int, limit: int | None) -> None:
        """Args: cost: of the run; longest: sample, tokens; limit: the user's, of the tokens of a pack."""
        degrees = [d for d in cost.degrees() if cost.fewest_gc_layers(1, d) is not None]
        layers = range(cost.model.n_layers + 1)
        spent = [[cost.seconds(d, k) for k in layers] for d in degrees]
        self.degrees = np.array(degrees, np.int64)
        self.parts: Float = np.array(
            [[(s.fixed, s.per_document, s.per_token, s.per_pair) for s in row] for row in spent]
        )
        """Seconds: fixed, and by document, token and pair ``[D, K, 4]``."""
        most = np.inf if limit is None else float(limit)
        rooms = np.minimum(np.array([cost.longest_packs(d) for d in degrees]), most)
        self.rooms = np.minimum(rooms, float(np.iinfo(np.int32).max)).astype(np.int64)
        """Most tokens of a pack ``[D, K]``."""
        self.traffic = np.array([spent[0][0].fsdp, spent[0][0].overlap])
        self.pairs: Float = cost.model.attention_pairs(np.arange(longest + 1)).astype(np.float64)
        self.world = cost.world_size
        self.weight = self._weight(longest)
        """Rank-seconds that a sample takes at its cheapest, by length; infinite where none fits."""

    def _weight(self, longest: int) -> Float:
        length, least = np.arange(longest + 1), np.full(longest + 1, np.inf)
        for degree, parts, rooms in zip(self.degrees, self.parts, self.rooms, strict=True):
            fewest = np.minimum(np.searchsorted(rooms, length), parts.shape[0] - 1)
            _, document, token, pair = parts[fewest].T
            own = degree * (document + token * length + pair * self.pairs)
            least = np.minimum(least, np.where(length <= rooms[-1], own, np.inf))
        return least

    def pack(self, lengths: Int) -> tuple[Int, Int, Int]:
        """Packs of samples in order of falling length.

        Returns:
            Pack of each sample ``[n]``; of each pack, numbered from 0, its micro-step and SP degree ``[P]``.
        """
        pack_of, micro, degree = pack_step(
            lengths, self.pairs, self.weight, self.parts, self.rooms, self.degrees, self.world, self.traffic
        )
        return pack_of, micro, self.degrees[degree]


@njit(cache=True)
def _busy(parts: Float, rooms: Int, documents: float, tokens: int, pairs: float) -> float:
    """Seconds of a pack of one degree without FSDP's traffic, as few layers recomputed as fit; infinite if none do."""
    if tokens > rooms[-1]:
        return np.inf
    k = np.searchsorted(rooms, tokens)
    return parts[k, 0] + parts[k, 1] * documents + parts[k, 2] * tokens + parts[k, 3] * pairs


@njit(cache=True)
def _with_traffic(busy: float, traffic: Float) -> float:
    return busy + max(0.0, traffic[0] - traffic[1] * busy)


@njit(cache=True)
def pack_step(
    lengths: Int, pairs_of: Float, weight: Float, parts: Float, rooms: Int, degrees: Int, world: int, traffic: Float
) -> tuple[Int, Int, Int]:
    """As :meth:`StepCosts.pack`, with the index of each pack's degree."""
    n = len(lengths)
    best_s = np.inf
    best_of, best_micro, best_degree = np.empty(n, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
    for premium in PREMIUMS:
        left, total, packs = np.arange(n), 0.0, 0
        pack_of = np.empty(n, np.int64)
        micro, degree = np.empty(n, np.int64), np.empty(n, np.int64)  # a pack holds a sample or more
        shelf = 0
        while len(left):
            seconds, into, kinds = _best_shelf(
                lengths[left], premium, pairs_of, weight, parts, rooms, degrees, world, traffic
            )
            total += seconds
            micro[packs : packs + len(kinds)] = shelf
            degree[packs : packs + len(kinds)] = kinds
            pack_of[left] = into + packs  # those that are left get another number later
            left = left[into < 0]
            packs += len(kinds)
            shelf += 1
        if total < best_s:
            best_s, best_of, best_micro, best_degree = total, pack_of, micro[:packs].copy(), degree[:packs].copy()
        if shelf > FEW:
            break
    return best_of, best_micro, best_degree


@njit(cache=True)
def _best_shelf(
    lengths: Int,
    premium: float,
    pairs_of: Float,
    weight: Float,
    parts: Float,
    rooms: Int,
    degrees: Int,
    world: int,
    traffic: Float,
) -> tuple[float, Int, Int]:
    """The micro-step that does the most of this work for its time, the longest sample in any case.

    Returns:
        Its seconds; pack of each sample, -1 where it is left; degree index of each pack.
    """
    total, tokens = 0.0, 0.0
    for length in lengths:
        total += weight[length]
        tokens += length
    hidden = traffic[0] / traffic[1] if traffic[1] > 0.0 else traffic[0]
    targets = _targets(lengths[0], total, tokens, len(lengths), pairs_of, parts, rooms, world, hidden)
    best, best_s = -1.0, 0.0
    best_of, best_kinds = np.empty(0, np.int64), np.empty(0, np.int64)
    for target in targets:
        slowest, into, kinds = _fill(lengths, target, pairs_of, parts, rooms, degrees, world)
        done = 0.0
        for i in range(len(lengths)):
            if into[i] >= 0:
                done += weight[lengths[i]]
        seconds = _with_traffic(slowest, traffic)
        value = done / seconds
        if done >= total * (1 - 1e-12):
            value *= premium
        if value > best:
            best, best_s, best_of, best_kinds = value, seconds, into, kinds
    return best_s, best_of, best_kinds


@njit(cache=True)
def _targets(
    longest: int,
    total: float,
    tokens: float,
    n: int,
    pairs_of: Float,
    parts: Float,
    rooms: Int,
    world: int,
    hidden: float,
) -> Float:
    """Seconds worth trying for a shelf that holds a sample of `longest` tokens; rising, never none.

    A micro-step waits for FSDP's traffic however little it computes, so all that is `hidden` behind that is as good as
    an even share: lower degrees, and fewer micro-steps.
    """
    found, least = [0.0], np.inf
    even = parts[0, 0, 0] + total / world
    bases, most = [even, even / 2, hidden], max(even, hidden)
    for g in range(len(parts)):
        alone = _busy(parts[g], rooms[g], 1.0, longest, pairs_of[longest])
        if alone < np.inf:
            bases.append(alone)
            least = min(least, alone)
    for k in range(0, parts.shape[1] // 2 + 1, max(1, parts.shape[1] // 4)):
        bases.append(_busy(parts[0], rooms[0], n * rooms[0, k] / tokens, rooms[0, k], 0.0) * 1.02)  # noqa: PERF401
    for base in bases:
        for slack in SLACKS:
            if least <= base * slack <= max(least, most) * SLACKS[-1]:
                found.append(base * slack)  # noqa: PERF401 (numba)
    found[0] = least
    rising = np.unique(np.array(found))
    kept = 1
    for target in rising[1:]:
        if target > rising[kept - 1] * NEAR:
            rising[kept] = target
            kept += 1
    return rising[:kept]


@njit(cache=True)
def _fill(
    lengths: Int, target: float, pairs_of: Float, parts: Float, rooms: Int, degrees: Int, world: int
) -> tuple[float, Int, Int]:
    """Fill a micro-step up to a target time; the longest sample has to fit it at some degree.

    Returns:
        Seconds of the slowest pack; pack of each sample, -1 where it is left; degree index of each pack.
    """
    documents, tokens = np.zeros(world), np.zeros(world, np.int64)
    pairs, busy = np.zeros(world), np.zeros(world)
    kinds, into = np.empty(world, np.int64), np.full(len(lengths), -1)
    packs, used, i = 0, 0, 0
    while i < len(lengths):
        length, pair = lengths[i], pairs_of[lengths[i]]
        if _busy(parts[0], rooms[0], 1.0, length, pair) <= target * SHORT:  # and so are all after it
            more = (world - used) // degrees[0]
            kinds[packs : packs + more] = 0
            packs += more
            break
        best, latest = -1, 0.0
        for p in range(packs):
            g = kinds[p]
            if busy[p] + parts[g, 0, 2] * length + parts[g, 0, 3] * pair > target:
                continue  # too full for it even with nothing recomputed
            then = _busy(parts[g], rooms[g], documents[p] + 1, tokens[p] + length, pairs[p] + pair)
            if latest < then <= target:
                best, latest = p, then
        need = 0
        while need < len(degrees) and _busy(parts[need], rooms[need], 1.0, length, pair) > target:
            need += 1
        if need < len(degrees) and used + degrees[need] <= world and (best < 0 or need < kinds[best]):
            best = packs
            packs += 1
            used += degrees[need]
            kinds[best] = need
            latest = _busy(parts[need], rooms[need], 1.0, length, pair)
        if best >= 0:
            into[i] = best
            documents[best] += 1
            tokens[best] += length
            pairs[best] += pair
            busy[best] = latest
        i += 1
    heap, size = np.argsort(busy[:packs]), packs
    while i < len(lengths) and size:
        length, pair = lengths[i], pairs_of[lengths[i]]
        p = heap[0]
        g = kinds[p]
        then = _busy(parts[g], rooms[g], documents[p] + 1, tokens[p] + length, pairs[p] + pair)
        if then <= target:
            into[i] = p
            documents[p] += 1
            tokens[p] += length
            pairs[p] += pair
            busy[p] = then
        elif tokens[p] + length > rooms[g, -1]:  # no memory for it: others may have some
            size -= 1
            heap[0] = heap[size]
            _sift_down(heap, size, busy)
            continue
        _sift_down(heap, size, busy)
        i += 1  # where the first to finish has no time for it, shorter ones may still fit
    holds = documents[:packs] > 0
    number = np.cumsum(holds) - 1  # without the packs that nothing came to
    for i in range(len(lengths)):
        if into[i] >= 0:
            into[i] = number[into[i]]
    return busy[:packs].max(), into, kinds[:packs][holds]


@njit(cache=True)
def _sift_down(heap: Int, size: int, key: Float) -> None:
    """Restore the heap, least key first, after its first entry changed."""
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and key[heap[child + 1]] < key[heap[child]]:
            child += 1
        if key[heap[at]] <= key[heap[child]]:
            return
        heap[at], heap[child] = heap[child], heap[at]
        at = child

"""A window of samples → packs whose micro-steps balance: the heart of the `hbp-mixed` strategy.

Samples of one length are alike to a planner, so it works on the histogram of lengths; which sample goes where is drawn
at the end. From the longest group down:

1. A group's own samples are packed by best fit decreasing. Empty packs round their number up to whole micro-steps, as
   long as shorter samples suffice to fill them, so no rank idles.
2. The room left is filled with samples of the shorter groups, longest first (GreedyFill, paper, Algorithm 2).
3. The shortest group gets all that is left, by :func:`hbp.planning.even_fit.even_fit`. What does not fill a whole
   micro-step waits for the next window; in the last window it becomes a micro-step of its own, of as many tokens a rank
   as it takes, a group in its own right.
4. The packs of a group, all full, differ in time by their attention cost alone. Sorted by predicted seconds and cut
   into micro-steps, neighbours in attention cost are neighbours in time: one order balances both.
5. Packs that fill no micro-step (long groups with too few short samples to round them up) wait for the next window; in
   the last one they are laid side by side, degrees mixed within a micro-step, the slowest first.

Complexity: O(samples · log packs), a few passes over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group
from hbp.planning.even_fit import even_fit
from hbp.planning.fill import best_fit_into, greedy_fill_into
from hbp.planning.packs import Int

Float = npt.NDArray[np.float64]
TAIL_SLACK = 5e-5
"""Room of the last micro-step over what it must hold, as a share of the window: lets packs of whole samples close."""


@dataclass(frozen=True)
class Packed:
    """Packs of a window and their place in its micro-steps. ``P`` packs, ``N`` samples placed."""

    groups: tuple[Group, ...]
    """Those given, and a shorter one where the last micro-step needed it."""
    pack_of: Int  # [N]
    taken: Int  # [N] length of each sample placed
    group: Int  # [P] index into groups
    micro_step: Int  # [P] from 0
    rank_start: Int  # [P]
    seconds: Float  # [P] predicted


@dataclass
class _Open:
    """Packs of one group before they have a place."""

    group: int
    pack_of: Int
    taken: Int
    count: int
    seconds: Float = field(default_factory=lambda: np.zeros(0))


class PackCosts:
    """Predicted seconds of packs from the lengths in them, by a table over lengths."""

    def __init__(self, cost: CostModel, longest: int) -> None:
        self.cost = cost
        self._pairs = cost.model.attention_pairs(np.arange(longest + 1))

    def seconds(self, group: Group, pack_of: Int, taken: Int, count: int) -> Float:
        """Seconds of each of `count` packs of a group, of which ``pack_of[i]`` holds a sample of ``taken[i]``."""
        spent = self.cost.seconds(group.sp_degree, group.gc_layers)
        return spent.of(Work(*_sums(pack_of, taken, count, self._pairs)))


@njit(cache=True)
def _sums(pack_of: Int, taken: Int, count: int, pairs_of: Float) -> tuple[Float, Float, Float]:
    documents, tokens, pairs = np.zeros(count), np.zeros(count), np.zeros(count)
    for i in range(len(pack_of)):
        documents[pack_of[i]] += 1
        tokens[pack_of[i]] += taken[i]
        pairs[pack_of[i]] += pairs_of[taken[i]]
    return documents, tokens, pairs


def pack_histogram(
    counts: Int,
    groups: Sequence[Group],
    costs: PackCosts,
    world_size: int,
    rng: np.random.Generator,
    *,
    last: bool,
) -> Packed:
    """Pack a histogram of lengths into whole micro-steps.

    Args:
        counts: ``counts[l]`` samples have length ``l``, none over the last group's capacity; what is placed is taken
            out, so that what stays waits for the next window.
        groups: in order of rising capacity.
        costs: predicts packs.
        world_size: ranks of a micro-step.
        rng: decides which lengths wait.
        last: place everything.
    """
    lows = np.array([0, *(group.capacity for group in groups)])
    lengths = np.arange(len(counts))
    every: list[_Open] = []
    bottom = int(np.searchsorted(lows[1:], lengths[counts > 0].min(initial=len(counts) - 1)))
    for index in range(len(groups) - 1, bottom, -1):
        own = _slice(counts, lows[index], lows[index + 1])
        if own.any():
            counts[lows[index] + 1 : lows[index + 1] + 1] = 0
            below = counts[: lows[index] + 1]
            every.append(_pack_and_fill(index, groups[index], own, below, world_size // groups[index].sp_degree))
    made, extended = _pack_the_rest(bottom, tuple(groups), counts, world_size, rng, last)
    every += made
    for part in every:
        part.seconds = costs.seconds(extended[part.group], part.pack_of, part.taken, part.count)
    return _place(every, extended, counts, world_size, last)


def _slice(counts: Int, above: int, up_to: int) -> Int:
    """The histogram of lengths in (above, up_to] alone."""
    own = np.zeros_like(counts)
    own[above + 1 : up_to + 1] = counts[above + 1 : up_to + 1]
    return own


def _pack_and_fill(index: int, group: Group, own: Int, below: Int, slots: int) -> _Open:
    total = int(own.sum())
    pack_of, taken, room = best_fit_into(own, np.empty(0, np.int64), group.capacity, total)
    more = -len(room) % slots
    if int(below @ np.arange(len(below))) >= int(room.sum()) + more * group.capacity:
        room = np.concatenate([room, np.full(more, group.capacity)])
    into, fill = greedy_fill_into(room, below)
    used = np.unique(np.concatenate([pack_of, into]), return_inverse=True)
    return _Open(index, used[1], np.concatenate([taken, fill]), len(used[0]))


def _pack_the_rest(
    index: int, groups: tuple[Group, ...], counts: Int, world: int, rng: np.random.Generator, last: bool
) -> tuple[list[_Open], tuple[Group, ...]]:
    """All samples left, in packs of the shortest group that they need; whole micro-steps unless this is the last."""
    group = groups[index]
    slots, capacity = world // group.sp_degree, group.capacity
    lengths = np.arange(len(counts))
    tokens = int(counts @ lengths)
    if not tokens:
        return [], groups
    big = -(-int(counts[capacity // 2 + 1 :].sum()) // slots)  # no two of these share a pack
    if not last:
        whole = max(tokens // (slots * capacity), big - 1)
        if not whole:
            return [], groups
        waiting = rng.binomial(counts, max(0.0, 1 - whole * slots * capacity / tokens))
        counts -= waiting
        pack_of, taken, room = even_fit(counts, np.full(whole * slots, capacity), slots)
        counts += waiting
        return [_Open(index, pack_of, taken, whole * slots)], groups
    whole, rest = divmod(tokens, slots * capacity)
    whole = max(whole, big - 1)
    rest = max(0, tokens - whole * slots * capacity)
    tail = int(max(rest / slots, tokens / max(int(counts.sum()), 1)) + TAIL_SLACK * whole * capacity) + 1
    while True:
        tail = min(tail, capacity)
        room = np.concatenate([np.full(whole * slots, capacity), np.full(slots, tail)])
        left = counts.copy()
        pack_of, taken, _ = even_fit(left, room, slots)
        if not left.any():
            break
        if tail == capacity:
            whole, tail = whole + 1, 0
        over = int(left @ lengths)
        tail += max(over // slots, tail // 50, 1) + (
            int(lengths[left > 0].max()) if tail < lengths[left > 0].max() else 0
        )
    counts[:] = 0
    return _with_tail(index, groups, pack_of, taken, whole * slots, tail)


def _with_tail(
    index: int, groups: tuple[Group, ...], pack_of: Int, taken: Int, n_whole: int, tail: int
) -> tuple[list[_Open], tuple[Group, ...]]:
    """Packs from number `n_whole` on belong to a group of their own, of capacity `tail`."""
    group = groups[index]
    parts = []
    for own, here in ((group, pack_of < n_whole), (Group(tail, group.sp_degree, group.gc_layers), pack_of >= n_whole)):
        if not here.any():
            continue
        used, renamed = np.unique(pack_of[here], return_inverse=True)
        if own not in groups:
            groups = (*groups, own)
        parts.append(_Open(groups.index(own), renamed, taken[here], len(used)))
    return parts, groups


def _place(every: Sequence[_Open], groups: tuple[Group, ...], counts: Int, world: int, last: bool) -> Packed:
    """Cut each group's packs, slowest first, into micro-steps; what fills none waits or is laid out mixed."""
    pack_of, taken, group, micro, start, seconds = [], [], [], [], [], []
    n_packs = n_micro = 0
    rest: list[tuple[_Open, Int]] = []
    for part in every:
        degree = groups[part.group].sp_degree
        slots = world // degree
        order = np.argsort(-part.seconds, kind="stable")
        whole = part.count // slots * slots
        rank = np.empty(part.count, np.int64)
        rank[order] = np.arange(part.count)
        kept = rank[part.pack_of] < whole
        if whole < part.count:
            rest.append((part, order[whole:]))
        pack_of.append(n_packs + rank[part.pack_of[kept]])
        taken.append(part.taken[kept])
        at = np.arange(whole)
        group.append(np.full(whole, part.group))
        micro.append(n_micro + at // slots)
        start.append(at % slots * degree)
        seconds.append(part.seconds[order[:whole]])
        n_packs += whole
        n_micro += whole // slots
    if last and rest:
        left_group = np.concatenate([np.full(len(packs), part.group) for part, packs in rest])
        left_seconds = np.concatenate([part.seconds[packs] for part, packs in rest])
        degree = np.array([g.sp_degree for g in groups])[left_group]
        side, first = tile_by_seconds(left_seconds, degree, world)
        base = n_packs
        for part, packs in rest:
            number = np.full(part.count, -1)
            number[packs] = base + np.arange(len(packs))
            here = number[part.pack_of] >= 0
            pack_of.append(number[part.pack_of[here]])
            taken.append(part.taken[here])
            base += len(packs)
        group.append(left_group)
        micro.append(n_micro + side)
        start.append(first)
        seconds.append(left_seconds)
    else:
        for part, packs in rest:
            waits = np.isin(part.pack_of, packs)
            counts += np.bincount(part.taken[waits], minlength=len(counts))
    empty = [np.zeros(0, np.int64)]
    return Packed(
        groups,
        pack_of=np.concatenate(empty + pack_of),
        taken=np.concatenate(empty + taken),
        group=np.concatenate(empty + group),
        micro_step=np.concatenate(empty + micro),
        rank_start=np.concatenate(empty + start),
        seconds=np.concatenate([np.zeros(0), *seconds]),
    )


def tile_by_seconds(seconds: Float, degree: Int, world: int) -> tuple[Int, Int]:
    """Lay packs of any degrees side by side: micro-step and first rank of each.

    A micro-step takes the slowest pack left, then again and again the slowest that its free ranks hold. Powers of two,
    highest degree first, keep every group aligned.
    """
    micro, start = np.empty(len(seconds), np.int64), np.empty(len(seconds), np.int64)
    order = np.argsort(-seconds, kind="stable")
    queues = {int(d): [int(p) for p in order[degree[order] == d]][::-1] for d in np.unique(degree)}
    step = 0
    while any(queues.values()):
        free, side = world, []
        while True:
            fitting = [d for d, queue in queues.items() if queue and d <= free]
            if not fitting:
                break
            d = max(fitting, key=lambda d: seconds[queues[d][-1]])
            side.append(queues[d].pop())
            free -= d
        at = 0
        for pack in sorted(side, key=lambda p: -degree[p]):
            micro[pack], start[pack] = step, at
            at += int(degree[pack])
        step += 1
    return micro, start

"""A window of samples → packs whose micro-steps balance: the heart of the `hbp-mixed` strategy.

Samples of one length are alike to a planner, so it works on the histogram of lengths; which sample goes where is drawn
at the end. From the longest group down:

1. Groups of one SP degree are packed together. Best fit decreasing of their own samples says how many packs they need;
   the next group's packs, or empty ones, round each group's up to whole micro-steps, as long as shorter samples suffice
   to fill them, so no rank idles.
2. The room left is filled with samples of the shorter groups, longest first (GreedyFill, paper, Algorithm 2). Where
   there are so few micro-steps that the packs of one still differ by more than :data:`WAITS`, their own samples are
   dealt evenly instead (:func:`hbp.planning.mixed.even_fit.even_deal`), a pack that would wait takes a larger
   capacity, with as many more layers recomputed, and the filling makes up for what is missing
   (:func:`hbp.planning.mixed.even_fit.fill_evenly`), so that all finish with the slowest.
3. The shortest group gets all that is left, by :func:`hbp.planning.mixed.even_fit.even_fit`. What does not fill a whole
   micro-step waits for the next window; in the last window it becomes a micro-step of its own, of as many tokens a rank
   as it takes, a group in its own right; or several share it, where FSDP's traffic would not hide behind one alone.
   Where packs are much longer than their samples need, samples that outweigh a mean pack go to the next group if that
   is faster.
4. The packs of a group, all full, differ in time by their attention cost alone. Sorted by predicted seconds and cut
   into micro-steps, neighbours in attention cost are neighbours in time: one order balances both.
5. Packs that fill no micro-step (long groups with too few short samples to round them up) wait for the next window; in
   the last one they are laid side by side, degrees mixed within a micro-step, the slowest first.

Complexity: O(samples · log packs), a few passes over them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group
from hbp.planning.kernels import best_fit_into, greedy_fill_into
from hbp.planning.mixed.even_fit import even_deal, even_fit, fill_evenly
from hbp.planning.mixed.finish_together import finish_together
from hbp.planning.packs import Int

Float = npt.NDArray[np.float64]
LEVELS = 16
"""Between two groups of one degree packs may have capacities in so many steps of recomputed layers."""
CAPACITY_UNIT = 64
WAITS = 1e-3
"""Share of the time spent waiting up to which sorting packs balances well enough."""
UNEVEN = 1e-4
"""Share of the time that more than one short micro-step at the end have to save."""
STEPS_UP = 100
"""Short micro-steps that do not hold what is left get longer by such a part, all together."""
TAIL_SLACK = 5e-5
"""Room of the last micro-step over what it must hold, as a share of the window: lets packs of whole samples close."""


@dataclass(frozen=True)
class Packed:
    """Packs of a window and their place in its micro-steps. ``P`` packs, ``N`` samples placed."""

    groups: tuple[Group, ...]
    """Those given, capacities between them (:func:`_levels`), and a shorter one where the last micro-step needed it."""
    pack_of: Int  # [N]
    taken: Int  # [N] length of each sample placed
    group: Int  # [P] index into groups
    micro_step: Int  # [P] from 0
    rank_start: Int  # [P]
    seconds: Float  # [P] predicted


@dataclass
class _Open:
    """Packs of one group before they have a place."""

    group: Int  # [count] of each pack, all of one degree
    pack_of: Int
    taken: Int
    seconds: Float = field(default_factory=lambda: np.zeros(0))

    @property
    def count(self) -> int:
        return len(self.group)


class PackCosts:
    """The cost model, and a table over lengths of what samples weigh."""

    def __init__(self, cost: CostModel, longest: int) -> None:
        self.cost = cost
        self.pairs = cost.model.attention_pairs(np.arange(longest + 1))

    def work(self, pack_of: Int, taken: Int, count: int) -> Work:
        """What each of `count` packs contains, of which ``pack_of[i]`` holds a sample of ``taken[i]``."""
        return Work(*_sums(pack_of, taken, count, self.pairs))


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
    bottom = int(np.searchsorted(lows[1:], np.arange(len(counts))[counts > 0].min(initial=len(counts) - 1)))
    light = 2 * _even_length(counts[: groups[bottom].capacity + 1])
    if bottom == len(groups) - 1 or 2 * light > groups[bottom].capacity:
        return _pack(counts, groups, costs, world_size, rng, bottom, lows, last)
    # Packs as long as a slow network wants them, longer than their samples need: the longest of these, each costlier
    # than a mean pack, may be better off with the next group.
    tried = []
    for home in (groups[bottom].capacity, light):
        left, draws = counts.copy(), copy.deepcopy(rng)
        lows[bottom + 1] = home
        packed = _pack(left, groups, costs, world_size, draws, bottom, lows, last)
        tried.append((_seconds_per_token(packed), left, draws, packed))
    _, left, draws, packed = min(tried, key=lambda way: way[0])
    counts[:], rng.bit_generator.state = left, draws.bit_generator.state
    return packed


def _even_length(counts: Int) -> int:
    """The longest sample that alone weighs no more than a pack of this capacity that holds its share of all."""
    lengths = np.arange(len(counts), dtype=np.float64)
    tokens, squares = np.cumsum(counts * lengths), np.cumsum(counts * lengths**2)
    share = squares / np.maximum(tokens, 1.0) * (len(counts) - 1)
    return int(np.flatnonzero(lengths**2 <= share).max(initial=0))


def _seconds_per_token(packed: Packed) -> float:
    """Of all micro-steps; infinite if nothing was placed."""
    slowest = np.zeros(int(packed.micro_step.max(initial=-1)) + 1)
    np.maximum.at(slowest, packed.micro_step, packed.seconds)
    return float(slowest.sum() / packed.taken.sum()) if len(packed.taken) else np.inf


def _pack(
    counts: Int,
    groups: Sequence[Group],
    costs: PackCosts,
    world: int,
    rng: np.random.Generator,
    bottom: int,
    lows: Int,
    last: bool,
) -> Packed:
    """:func:`pack_histogram` where group ``i`` is home of samples over ``lows[i]`` tokens, `bottom` the shortest."""
    every: list[_Open] = []
    extended = (*groups, *_levels(groups, costs.cost))
    top = len(groups) - 1
    while top > bottom:
        alike = [top]
        while alike[-1] - 1 > bottom and groups[alike[-1] - 1].sp_degree == groups[top].sp_degree:
            alike.append(alike[-1] - 1)
        top = alike[-1] - 1
        if counts[lows[alike[-1]] + 1 :].any():
            every.append(_pack_and_fill(alike, groups, extended, counts, costs, world, lows))
    made, extended = _pack_the_rest(bottom, extended, counts, world, rng, costs.cost, last)
    every += made
    for part in every:
        if not len(part.seconds):
            part.seconds = _seconds(part, extended, costs)
    return _place(every, extended, counts, world, last)


def _levels(groups: Sequence[Group], cost: CostModel) -> list[Group]:
    """The longest packs of numbers of recomputed layers between those of two groups of one degree."""
    levels = []
    step = max(1, cost.model.n_layers // LEVELS)
    for small, large in itertools.pairwise(groups):
        if small.sp_degree == large.sp_degree:
            longest = cost.longest_packs(small.sp_degree)
            for gc_layers in range(small.gc_layers + step, large.gc_layers, step):
                capacity = int(longest[gc_layers]) // CAPACITY_UNIT * CAPACITY_UNIT
                if small.capacity < capacity < large.capacity:
                    levels.append(Group(capacity, small.sp_degree, gc_layers))
    return levels


def _seconds(part: _Open, groups: Sequence[Group], costs: PackCosts) -> Float:
    """Predicted, of each pack."""
    work, seconds = costs.work(part.pack_of, part.taken, part.count), np.empty(part.count)
    for index in np.unique(part.group):
        here = part.group == index
        group = groups[index]
        seconds[here] = costs.cost.seconds(group.sp_degree, group.gc_layers).of(work[here])
    return seconds


def _slice(counts: Int, above: int, up_to: int) -> Int:
    """The histogram of lengths in (above, up_to] alone."""
    own = np.zeros_like(counts)
    own[above + 1 : up_to + 1] = counts[above + 1 : up_to + 1]
    return own


def _pack_and_fill(
    alike: Sequence[int],
    groups: Sequence[Group],
    every: Sequence[Group],
    counts: Int,
    costs: PackCosts,
    world: int,
    lows: Int,
) -> _Open:
    """Packs of the groups of one degree, filled with shorter samples.

    Args:
        alike: the groups, largest first, as index into `every`.
        groups: all that were given.
        every: those, and the capacities between them.
        counts: samples left; what is placed is taken out.
        costs: predicts packs.
        world: ranks.
        lows: of each group, the length over which samples are at home there.
    """
    degree, low = groups[alike[0]].sp_degree, int(lows[alike[-1]])
    slots = world // degree
    lengths, capacities = np.arange(len(counts)), np.array([g.capacity for g in every])
    left = int(counts @ lengths)
    pack_of, taken, group, room = (np.empty(0, np.int64) for _ in range(4))
    for index in alike:
        own = _slice(counts, int(lows[index]), groups[index].capacity)
        left -= int(own @ lengths)
        into, placed, room = best_fit_into(own, room, groups[index].capacity, len(room) + int(own.sum()))
        pack_of, taken = np.concatenate([pack_of, into]), np.concatenate([taken, placed])
        more = -len(room) % slots
        if left >= int(room.sum()) + more * groups[index].capacity:
            room = np.concatenate([room, np.full(more, groups[index].capacity)])
        group = np.concatenate([group, np.full(len(room) - len(group), index)])
    own, below = _slice(counts, low, len(counts) - 1), counts[: low + 1]
    counts[low + 1 :] = 0
    spare = below.copy()
    into, placed = greedy_fill_into(room.copy(), spare)
    sorted_alone = _open(group, np.concatenate([pack_of, into]), np.concatenate([taken, placed]))
    sorted_alone.seconds = _seconds(sorted_alone, groups, costs)
    if _waiting(sorted_alone.seconds, slots) <= WAITS:
        below[:] = spare
        return sorted_alone
    even_of, evenly, even_room = even_deal(own, capacities[group], slots)
    if not own.any():
        pack_of, taken, room = even_of, evenly, even_room
    # A user's global batch bounds the micro-steps of all groups but the last, so these bound what packs may grow to.
    most = max(world // g.sp_degree * g.capacity for g in groups[:-1]) // slots
    levels = [i for i, g in enumerate(every) if g.sp_degree == degree and low < g.capacity <= capacities[alike[0]]]
    levels.sort(key=lambda i: -every[i].capacity)
    group, lack = finish_together(group, pack_of, taken, below, levels, every, costs, slots, most)
    room = capacities[group] - np.bincount(pack_of, taken, len(group)).astype(np.int64)
    into, placed = fill_evenly(below, room, lack)
    return _open(group, np.concatenate([pack_of, into]), np.concatenate([taken, placed]))


def _waiting(seconds: Float, slots: int) -> float:
    """Share of the time that ranks wait for the slowest pack of their micro-step if packs are sorted by time."""
    ordered = -np.sort(-seconds)
    slowest = np.repeat(ordered[::slots], slots)[: len(ordered)]
    return float(1 - ordered.sum() / slowest.sum())


def _open(group: Int, pack_of: Int, taken: Int) -> _Open:
    """The packs that hold something."""
    used, pack_of = _without_empty(pack_of, len(group))
    return _Open(group[used], pack_of, taken)


def _without_empty(pack_of: Int, count: int) -> tuple[Int, Int]:
    """Which of `count` packs hold something, and the pack of each sample if only these are numbered."""
    holds = np.bincount(pack_of, minlength=count) > 0
    return np.flatnonzero(holds), (np.cumsum(holds) - 1)[pack_of]


def _pack_the_rest(
    index: int,
    groups: tuple[Group, ...],
    counts: Int,
    world: int,
    rng: np.random.Generator,
    cost: CostModel,
    last: bool,
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
        return [_Open(np.full(whole * slots, index), pack_of, taken)], groups
    whole = max(tokens // (slots * capacity), big - 1)
    short = _short_micro_steps(group, counts, whole + 1, slots, cost)
    whole += 1 - short
    rest = max(0, tokens - whole * slots * capacity) / (short * slots)
    tail = int(max(rest, tokens / max(int(counts.sum()), 1)) + TAIL_SLACK * whole * capacity / short) + 1
    while True:
        tail = min(tail, capacity)
        room = np.concatenate([np.full(whole * slots, capacity), np.full(short * slots, tail)])
        left = counts.copy()
        pack_of, taken, _ = even_fit(left, room, slots)
        if not left.any():
            break
        if tail == capacity:
            whole, short, tail = whole + short, 1, 0
        over = int(left @ lengths)
        tail += max(over // (short * slots), tail // (STEPS_UP * short), 1) + (
            int(lengths[left > 0].max()) if tail < lengths[left > 0].max() else 0
        )
    counts[:] = 0
    gc_layers = cost.fewest_gc_layers(tail, group.sp_degree)
    assert gc_layers is not None
    return _with_tail(index, groups, pack_of, taken, whole * slots, Group(tail, group.sp_degree, gc_layers))


def _short_micro_steps(group: Group, counts: Int, most: int, slots: int, cost: CostModel) -> int:
    """How many micro-steps share what fills no whole one, so that the run takes least time.

    One, of what is left, unless FSDP's traffic would have too little to hide behind there: then the packs of more than
    one are a little shorter.

    Args:
        group: of the packs.
        counts: histogram of what they are to hold.
        most: micro-steps in all.
        slots: packs of a micro-step.
        cost: of the run.
    """
    n = np.arange(1, most + 1)
    values = np.flatnonzero(counts)
    tokens = float(counts @ np.arange(len(counts)))
    tail = np.maximum(1.0, (tokens - (most - n) * slots * float(group.capacity)) / (n * slots))
    share = tail / tokens
    work, weights = cost.work(values), counts[values].astype(np.float64)
    full = float(group.capacity) / tokens
    spent = cost.seconds(group.sp_degree, group.gc_layers)

    def of(part: Float) -> Float:
        return spent.of(Work(part * weights.sum(), part * tokens, part * float(work.pairs @ weights)))

    seconds = (most - n) * of(np.full(most, full)) + n * of(share)
    longer = np.cumsum(counts[::-1])[::-1]  # samples of at least each length
    fits = (
        longer[np.minimum(tail.astype(np.int64) + 1, len(counts) - 1)] * (tail + 1 < len(counts)) <= (most - n) * slots
    )
    fits[0] = True
    seconds[~fits] = np.inf
    return int(np.argmax(seconds <= seconds.min() * (1 + UNEVEN))) + 1


def _with_tail(
    index: int, groups: tuple[Group, ...], pack_of: Int, taken: Int, n_whole: int, tail: Group
) -> tuple[list[_Open], tuple[Group, ...]]:
    """Packs from number `n_whole` on belong to `tail`."""
    parts = []
    for own, here in ((groups[index], pack_of < n_whole), (tail, pack_of >= n_whole)):
        if not here.any():
            continue
        used, renamed = _without_empty(pack_of[here], 0)
        if own not in groups:
            groups = (*groups, own)
        parts.append(_Open(np.full(len(used), groups.index(own)), renamed, taken[here]))
    return parts, groups


def _place(every: Sequence[_Open], groups: tuple[Group, ...], counts: Int, world: int, last: bool) -> Packed:
    """Cut each group's packs, slowest first, into micro-steps; what fills none waits or is laid out mixed."""
    pack_of, taken, group, micro, start, seconds = [], [], [], [], [], []
    n_packs = n_micro = 0
    rest: list[tuple[_Open, Int]] = []
    for part in every:
        degree = groups[int(part.group[0])].sp_degree
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
        group.append(part.group[order[:whole]])
        micro.append(n_micro + at // slots)
        start.append(at % slots * degree)
        seconds.append(part.seconds[order[:whole]])
        n_packs += whole
        n_micro += whole // slots
    if last and rest:
        left_group = np.concatenate([part.group[packs] for part, packs in rest])
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

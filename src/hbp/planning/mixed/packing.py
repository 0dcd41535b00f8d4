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
from dataclasses import replace

import numpy as np

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.planning.kernels import best_fit_into, greedy_fill_into
from hbp.planning.mixed.even_fit import even_deal, fill_evenly
from hbp.planning.mixed.finish_together import finish_together
from hbp.planning.mixed.open_packs import Given, OpenPacks, Packed, place
from hbp.planning.mixed.tail import pack_the_rest
from hbp.planning.packs import Float, Int, PackCosts

LEVELS = 16
"""Between two groups of one degree packs may have capacities in so many steps of recomputed layers."""
CAPACITY_UNIT = 64
WAITS = 1e-3
"""Share of the time spent waiting up to which sorting packs balances well enough."""


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
    groups = tuple(groups)
    every = (*groups, *_levels(groups, costs.cost))
    lows = np.array([0, *(group.capacity for group in groups)])
    some = counts > 0
    bottom = int(np.searchsorted(lows[1:], int(some.argmax()) if some.any() else len(counts) - 1))  # of the shortest
    given = Given(groups, every, lows, bottom, costs, world_size)
    light = 2 * _even_length(counts[: groups[bottom].capacity + 1])
    if bottom == len(groups) - 1 or 2 * light > groups[bottom].capacity:
        return _pack(given, counts, rng, last=last)
    # Packs as long as a slow network wants them, longer than their samples need: the longest of these, each costlier
    # than a mean pack, may be better off with the next group.
    tried = []
    for home in (groups[bottom].capacity, light):
        left, draws = counts.copy(), copy.deepcopy(rng)
        lows = np.concatenate([lows[: bottom + 1], [home], lows[bottom + 2 :]])
        packed = _pack(replace(given, lows=lows), left, draws, last=last)
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


def _pack(given: Given, counts: Int, rng: np.random.Generator, *, last: bool) -> Packed:
    """:func:`pack_histogram` where the groups' homes are decided."""
    parts: list[OpenPacks] = []
    top = len(given.groups) - 1
    while top > given.bottom:
        alike = [top]  # groups of one degree, largest first
        while alike[-1] - 1 > given.bottom and given.groups[alike[-1] - 1].sp_degree == given.groups[top].sp_degree:
            alike.append(alike[-1] - 1)
        top = alike[-1] - 1
        if counts[given.lows[alike[-1]] + 1 :].any():
            parts.append(_pack_and_fill(given, alike, counts))
    made, groups = pack_the_rest(given, counts, rng, last=last)
    return place([*parts, *made], groups, counts, given.world, last=last)


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


def _slice(counts: Int, above: int, up_to: int) -> Int:
    """The histogram of lengths in (above, up_to] alone."""
    own = np.zeros_like(counts)
    own[above + 1 : up_to + 1] = counts[above + 1 : up_to + 1]
    return own


def _pack_and_fill(given: Given, alike: Sequence[int], counts: Int) -> OpenPacks:
    """Packs of the groups of one degree, filled with shorter samples.

    Args:
        given: of the window.
        alike: the groups, largest first.
        counts: samples left; what is placed is taken out.
    """
    low, slots = int(given.lows[alike[-1]]), given.slots(alike[0])
    group, pack_of, taken, room = _own_packs(given, alike, counts)
    own, below = _slice(counts, low, len(counts) - 1), counts[: low + 1]
    counts[low + 1 :] = 0
    spare = below.copy()
    into, placed = greedy_fill_into(room.copy(), spare)
    sorted_alone = OpenPacks.of(
        given.every, group, np.concatenate([pack_of, into]), np.concatenate([taken, placed]), given.costs
    )
    if _waiting(sorted_alone.seconds, slots) <= WAITS:
        below[:] = spare
        return sorted_alone
    capacities = np.array([g.capacity for g in given.every])
    even_of, evenly, _ = even_deal(own, capacities[group], slots)
    if not own.any():  # all had room, so they stay where they were dealt
        pack_of, taken = even_of, evenly
    group, lack = finish_together(given, alike, group, pack_of, taken, below)
    room = capacities[group] - np.bincount(pack_of, taken, len(group)).astype(np.int64)
    into, placed = fill_evenly(below, room, lack)
    return OpenPacks.of(
        given.every, group, np.concatenate([pack_of, into]), np.concatenate([taken, placed]), given.costs
    )


def _own_packs(given: Given, alike: Sequence[int], counts: Int) -> tuple[Int, Int, Int, Int]:
    """Packs of the groups' own samples alone, best fit, rounded up to whole micro-steps as long as these can be filled.

    Longest group first; the samples of the next one fill what is open before they open packs of their own, so that
    groups share the micro-step at their boundary.

    Returns:
        Group of each pack; pack and length of each sample; room left in each pack.
    """
    slots, lengths = given.slots(alike[0]), np.arange(len(counts))
    shorter = int(counts @ lengths)  # tokens of samples that are at home further down
    group, pack_of, taken, room = (np.empty(0, np.int64) for _ in range(4))
    for index in alike:
        capacity = given.groups[index].capacity
        own = _slice(counts, int(given.lows[index]), capacity)
        shorter -= int(own @ lengths)
        into, placed, room = best_fit_into(own, room, capacity, len(room) + int(own.sum()))
        pack_of, taken = np.concatenate([pack_of, into]), np.concatenate([taken, placed])
        empty = -len(room) % slots  # packs that the last micro-step lacks
        if shorter >= int(room.sum()) + empty * capacity:
            room = np.concatenate([room, np.full(empty, capacity)])
        group = np.concatenate([group, np.full(len(room) - len(group), index)])
    return group, pack_of, taken, room


def _waiting(seconds: Float, slots: int) -> float:
    """Share of the time that ranks wait for the slowest pack of their micro-step if packs are sorted by time."""
    ordered = -np.sort(-seconds)
    slowest = np.repeat(ordered[::slots], slots)[: len(ordered)]
    return float(1 - ordered.sum() / slowest.sum())

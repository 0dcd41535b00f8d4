"""Few long packs of one SP degree, so filled that those of a micro-step finish together.

Complexity: packs × capacities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbp.cost.predict import Work
from hbp.planning.mixed.even_fit import densities
from hbp.planning.mixed.open_packs import Given
from hbp.planning.packs import Float, Int


def finish_together(
    given: Given, alike: Sequence[int], group: Int, pack_of: Int, taken: Int, below: Int
) -> tuple[Int, Float]:
    """What packs are to hold so that those of a micro-step finish together: groups, and squared lengths to fill in.

    A pack that would wait for the slowest of its micro-step takes the largest capacity with which it still finishes by
    then: it fills, and recomputes, the time that it would wait. What it lacks even so is made up by longer samples.

    Args:
        given: of the window.
        alike: groups of the packs, largest first, all of one degree.
        group: of each pack, index into ``given.every`` ``[P]``.
        pack_of: of each of their own samples ``[N]``.
        taken: its length ``[N]``.
        below: histogram of the samples to fill them with.
    """
    groups, slots, here = given.every, given.slots(alike[0]), np.arange(len(group))
    levels = _levels(given, alike)
    capacities = np.array([groups[index].capacity for index in levels])
    at = np.array([levels.index(index) if index in levels else -1 for index in range(len(groups))])[group]
    # A user's global batch bounds the micro-steps of all groups but the last, so these bound what packs may grow to.
    most = max(given.world // g.sp_degree * g.capacity for g in given.groups[:-1]) // slots
    work = given.costs.work(pack_of, taken, len(group))
    documents, tokens, pairs = work.documents, work.tokens, work.pairs
    squares = taken.astype(np.float64)
    per_pair = float(squares @ squares / max(1.0, pairs.sum()))
    room = (capacities[at] - tokens).astype(np.int64)
    short, dense = (density / per_pair for density in densities(below, room))  # pairs per token of the filling
    # busy[l, p]: what pack p would take at level l, filled with short samples; infinite where it may not have it.
    busy, pair_seconds = np.empty((len(levels), len(group))), np.empty(len(levels))
    for level, index in enumerate(levels):  # all of one degree: FSDP's traffic changes no order among them
        spent = given.costs.cost.seconds(groups[index].sp_degree, groups[index].gc_layers)
        free = capacities[level] - tokens
        fits = (free >= 0) & ((capacities[level] <= most) | (at == level))
        busy[level] = np.where(fits, spent.compute(Work(documents, tokens + free, pairs + free * short)), np.inf)
        pair_seconds[level] = spent.per_pair
    order = np.argsort(-busy[at, here], kind="stable")
    slowest = _of_micro_step(np.maximum, busy[at, here], order, slots)
    raised = np.minimum(at, np.argmax(busy <= slowest * (1 + 1e-12), axis=0))
    if (capacities[raised] - tokens).sum() <= below @ np.arange(len(below)):
        at = raised
    # Where all packs of a micro-step can be filled with long samples and still be alike, they are: cheapest there.
    reached = busy[at, here] + (capacities[at] - tokens) * max(0.0, dense - short) * pair_seconds[at]
    level_with = np.maximum(slowest, _of_micro_step(np.minimum, reached, order, slots))
    return np.array(levels)[at], (level_with - busy[at, here]) / pair_seconds[at] * per_pair


def _levels(given: Given, alike: Sequence[int]) -> list[int]:
    """Groups and capacities between them that packs of this degree may have, largest first."""
    low, high = int(given.lows[alike[-1]]), given.groups[alike[0]].capacity
    degree = given.groups[alike[0]].sp_degree
    found = [i for i, g in enumerate(given.every) if g.sp_degree == degree and low < g.capacity <= high]
    return sorted(found, key=lambda i: -given.every[i].capacity)


def _of_micro_step(pick: np.ufunc, values: Float, order: Int, slots: int) -> Float:
    """For each pack the largest (or least) value of its micro-step, `order` cut at every `slots` packs."""
    begins = np.arange(0, len(order), slots)
    result = np.empty(len(order))
    result[order] = np.repeat(pick.reduceat(values[order], begins), slots)[: len(order)]
    return result

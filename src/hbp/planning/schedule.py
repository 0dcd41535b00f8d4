"""Packs → optimizer steps whose ranks finish together.

Under FSDP every micro-step is a barrier: its ranks gather and reduce each layer together, so it lasts as long as its
slowest pack. Balance batching (paper, Algorithm 2) therefore sorts the packs of a group by cost and cuts the sorted
list into micro-steps, so that the ranks of one hold packs of like cost. The cost is the predicted time; the paper's sum
of squared lengths leaves out the linear part.

What that trades: the packs of a micro-step resemble each other. Micro-steps are therefore dealt to optimizer steps at
random, and steps are ordered by the curriculum.

A group's last micro-step may lack packs. Its samples are dealt anew over all its ranks (longest processing time first),
so that no rank idles as long as there are samples.

Legend: ``P`` packs, ``slots`` SP groups that fit the world side by side. Complexity: a sort of the packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.planning.packs import Int, Lengths, Packs, join, packs_of

PackCost = Callable[[Packs], np.ndarray]
"""Predicted seconds of each pack."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Packs with their place in the run, each array ``[P]``."""

    packs: Packs
    step: Int
    micro_step: Int
    rank_start: Int


def predicted_seconds(cost: CostModel, lengths: Lengths, groups: Sequence[Group]) -> PackCost:
    """Predicted seconds of packs of these groups."""

    def seconds(packs: Packs) -> np.ndarray:
        work = cost.work(lengths[packs.sample_ids], packs.offsets)
        result = np.empty(len(packs))
        for index in np.unique(packs.group):
            here = packs.group == index
            group = groups[index]
            result[here] = cost.seconds(group.sp_degree, group.gc_layers).of(work[here])
        return result

    return seconds


def in_order(schedule: Schedule) -> Schedule:
    """Packs in order of step, micro-step and first rank, as a plan's rows are."""
    order = np.lexsort((schedule.rank_start, schedule.micro_step, schedule.step))
    columns = (schedule.step, schedule.micro_step, schedule.rank_start)
    return Schedule(schedule.packs.take(order), *(column[order] for column in columns))


def micro_steps_per_step(group: Group, world_size: int, global_batch_tokens: int) -> int:
    """Gradient accumulation that brings a step of full packs nearest to the global batch."""
    tokens = world_size // group.sp_degree * group.capacity
    return max(1, round(global_batch_tokens / tokens))


def balance_batches(
    packs: Packs,
    cost: PackCost,
    groups: Sequence[Group],
    lengths: Lengths,
    world_size: int,
    global_batch_tokens: int,
    rng: np.random.Generator,
    *,
    by_cost: bool = True,
) -> Schedule:
    """Cut each group's packs into micro-steps of like cost, and deal these to steps of one group each.

    Args:
        packs: from a packer; those of one group need not be adjacent.
        cost: predicted seconds of packs.
        groups: that ``packs.group`` indexes.
        lengths: of the whole data set.
        world_size: ranks.
        global_batch_tokens: tokens that a step should hold.
        rng: deals micro-steps to steps.
        by_cost: False keeps the packs in the order given, as trainers without balancing do.

    Returns:
        Steps numbered group by group; :mod:`hbp.planning.paper.curriculum` orders them.
    """
    parts, steps, micros, starts = [], [], [], []
    first_step = 0
    for index in np.unique(packs.group):
        group = groups[index]
        slots = world_size // group.sp_degree
        own = packs.take(np.flatnonzero(packs.group == index))
        if by_cost:
            own = own.take(np.argsort(-cost(own), kind="stable"))
        full = len(own) // slots * slots
        if full < len(own):
            tail = _deal_tail(own.take(np.arange(full, len(own))), cost, group.capacity, lengths, slots)
            own = join([own.take(np.arange(full)), tail])
        batch = np.arange(len(own)) // slots
        n_batches = int(batch[-1]) + 1
        per_step = micro_steps_per_step(group, world_size, global_batch_tokens)
        place = rng.permutation(n_batches) if by_cost else np.arange(n_batches)
        parts.append(own)
        steps.append(first_step + place[batch] // per_step)
        micros.append(place[batch] % per_step)
        starts.append(np.arange(len(own)) % slots * group.sp_degree)
        first_step += (n_batches - 1) // per_step + 1
    empty = [np.zeros(0, np.int64)]
    return Schedule(join(parts), *(np.concatenate(empty + x) for x in (steps, micros, starts)))


def _deal_tail(packs: Packs, cost: PackCost, capacity: int, lengths: Lengths, slots: int) -> Packs:
    """Deal the samples of too few packs over all slots, costliest first to the least loaded slot with room."""
    ids = packs.sample_ids
    alone = Packs(np.arange(len(ids) + 1), ids, np.full(len(ids), packs.group[0]))
    seconds = cost(alone)
    load = [(0.0, slot) for slot in range(slots)]
    room = np.full(slots, capacity)
    slot_of = np.empty(len(ids), np.int64)
    for sample in np.argsort(-seconds, kind="stable"):
        passed = []
        while load and room[load[0][1]] < lengths[ids[sample]]:
            passed.append(heapq.heappop(load))
        if not load:  # the samples fit fewer packs but not these: keep the packs as they are
            return packs
        busy, slot = heapq.heappop(load)
        slot_of[sample] = slot
        room[slot] -= lengths[ids[sample]]
        for entry in [*passed, (busy + seconds[sample], slot)]:
            heapq.heappush(load, entry)
    _, slot_of = np.unique(slot_of, return_inverse=True)  # fewer samples than slots leave no gap
    return packs_of(slot_of, ids, int(packs.group[0]))


def tile_mixed(packs: Packs, step: Int, groups: Sequence[Group], cost: PackCost, world_size: int) -> Schedule:
    """Lay the packs of each step out in micro-steps that mix degrees: highest degree first, then by falling cost.

    Degrees are powers of two, so laying them out in falling order keeps every group aligned and leaves no hole but at
    the end of a micro-step that the next, larger run of ranks does not fit.
    """
    degree = np.array([group.sp_degree for group in groups])[packs.group]
    order = np.lexsort((-cost(packs), -degree, step))
    packs, step, degree = packs.take(order), step[order], degree[order]
    micro, start = np.empty(len(packs), np.int64), np.empty(len(packs), np.int64)
    at, here, now = 0, 0, -1
    for i in range(len(packs)):
        if step[i] != now:
            at, here, now = 0, 0, step[i]
        if at + degree[i] > world_size:
            at, here = 0, here + 1
        micro[i], start[i] = here, at
        at += degree[i]
    return Schedule(packs, step, micro, start)

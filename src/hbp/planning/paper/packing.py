"""Algorithm 2: hierarchical packing, GreedyFill and balance batching (paper, Section 4.2, Appendices E and J).

1. A sample goes to the smallest group that holds it.
2. From the largest group down, the group's own samples are packed to its length by whole-set best fit decreasing.
3. The room left is filled with samples of the smaller groups, longest first, which are taken out there.
4. Balance batching: under FSDP every micro-step is a barrier (its ranks gather and reduce each layer together), so it
   lasts as long as its slowest pack. The packs of a group are sorted by cost and the sorted list is cut into
   micro-steps, so that the ranks of one hold packs of like cost. The cost is the predicted time; the paper's sum of
   squared lengths leaves out the linear part.
5. A group's last micro-step may lack packs. Its samples are dealt anew over all its ranks (longest processing time
   first), so that no rank idles as long as there are samples.

The paper packs with iterative sampling and filtering; best fit decreasing is faster and leaves 0.00-0.04 % of padding
where that leaves 0.1-14 % (measured on the same sets). What it trades: none of the samples' own order survives, which
the schedule makes up for: the packs of a micro-step resemble each other, so micro-steps are dealt to optimizer steps
at random, and steps are ordered by the curriculum.

Legend: ``slots`` SP groups that fit the world side by side. Complexity: that of :mod:`hbp.planning.kernels`, once a
group, and a sort of the packs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from hbp.plan import Group, close, wanted_steps
from hbp.planning.kernels import best_fit_decreasing, greedy_fill
from hbp.planning.packs import Float, Int, Lengths, PackCost, Packs, Schedule, join, packs_of
from hbp.planning.paper.steps import cut_evenly, share_out


def hierarchical_packs(lengths: Lengths, sample_ids: Int, groups: Sequence[Group], rng: np.random.Generator) -> Packs:
    """Pack samples into groups.

    Args:
        lengths: of the whole data set, tokens ``[N]``.
        sample_ids: which of them to pack; none longer than the last group.
        groups: in order of rising capacity.
        rng: breaks ties between samples of equal length.

    Returns:
        Packs whose ``group`` indexes `groups`; every sample once, none over its capacity.
    """
    capacities = np.array([group.capacity for group in groups])
    home = np.searchsorted(capacities, lengths[sample_ids])
    waiting = np.ones(len(sample_ids), bool)
    parts = []
    for index in range(len(groups) - 1, -1, -1):
        own = np.flatnonzero(waiting & (home == index))
        if not len(own):
            continue
        ids = sample_ids[own]
        packs = packs_of(best_fit_decreasing(lengths[ids], groups[index].capacity, rng), ids, index)
        waiting[own] = False
        shorter = np.flatnonzero(waiting)
        if index and len(shorter):
            room = groups[index].capacity - packs.sum(lengths.astype(np.int64))
            into = greedy_fill(room, lengths[sample_ids[shorter]], rng)
            chosen = shorter[into >= 0]
            packs = _add(packs, into[into >= 0], sample_ids[chosen], index)
            waiting[chosen] = False
        parts.append(packs)
    return join(parts)


def _add(packs: Packs, into: Int, ids: Int, group: int) -> Packs:
    """Packs with further samples, each put into the pack that `into` names."""
    pack_of = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return packs_of(np.concatenate([pack_of, into]), np.concatenate([packs.sample_ids, ids]), group, n_packs=len(packs))


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
    counted: bool = False,
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
        counted: steps of as many micro-steps as full packs would take, however full they are.

    Returns:
        Steps numbered group by group; :mod:`hbp.planning.paper.curriculum` orders them.
    """
    parts, micros, starts, tokens = [], [], [], []
    per_step = []
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
        place = rng.permutation(n_batches) if by_cost else np.arange(n_batches)
        parts.append(own)
        micros.append(place[batch])
        starts.append(np.arange(len(own)) % slots * group.sp_degree)
        tokens.append(np.bincount(place[batch], own.sum(lengths.astype(np.int64)), n_batches).astype(np.float64))
        per_step.append(micro_steps_per_step(group, world_size, global_batch_tokens))
    steps, first_step = [], 0
    for i, of_micro in enumerate(_steps_of_groups(tokens, per_step, global_batch_tokens, counted)):
        steps.append(first_step + of_micro[micros[i]])
        micros[i] = micros[i] - np.searchsorted(of_micro, of_micro)[micros[i]]
        first_step += int(of_micro[-1]) + 1
    empty = [np.zeros(0, np.int64)]
    return Schedule(join(parts), *(np.concatenate(empty + x) for x in (steps, micros, starts)))


def _steps_of_groups(tokens: Sequence[Float], per_step: Sequence[int], batch: int, counted: bool) -> list[Int]:
    """Step of each micro-step of each group, from 0 in each: by count where that comes near the batch, else by tokens.

    Args:
        tokens: of each group's micro-steps in order.
        per_step: micro-steps of a step of full packs, of each group.
        batch: tokens of a step.
        counted: by count in any case.
    """
    by_count = [np.arange(len(own)) // each for own, each in zip(tokens, per_step, strict=True)]
    totals = [float(own.sum()) for own in tokens]
    wanted = wanted_steps(sum(totals), batch)
    if counted or close(sum(int(steps[-1]) + 1 for steps in by_count), wanted):
        return by_count
    shares = share_out(wanted, totals, [len(own) for own in tokens])
    return [cut_evenly(own, share) for own, share in zip(tokens, shares, strict=True)]


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

"""What users have today, each from its published description, over the same plan file and the same cost model.

All but `dcp` have one packing length, one static SP degree and one number of recomputed layers for the whole run, the
fastest that fits memory for the longest length. So they differ from each other only in packing and order.

- `concat`: random order, greedy concatenation (next fit): naive packing.
- `ffd`, `bfd`: first/best fit decreasing over the whole set (TRL, NeMo, LLaMA-Factory), packs in random order.
- `isf`: iterative sampling and filtering (OmniBal, https://arxiv.org/abs/2407.20761): pack a random order by next fit,
  keep the packs that are nearly full, sample the rest again.
- `sorted`: LongAlign's sorted batching (https://arxiv.org/abs/2401.18058): no packing; a micro-step holds samples of
  neighbouring length, one a group; micro-steps in random order.
- `lb`: load balancing (verl): each global batch of random samples is partitioned over ranks by largest differencing
  (Karmarkar–Karp) on predicted time; more micro-steps are taken while a partition exceeds the token capacity.
- `dcp`: dynamic context parallelism (Megatron-Core): the degree of a sample from its length alone, by a limit of tokens
  a rank; within each global batch samples of one degree are packed to its length and degrees mix in a micro-step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hbp.plan import Group, wanted_steps
from hbp.planning.kernels import best_fit_decreasing, by_falling_length, first_fit, next_fit
from hbp.planning.packs import Int, Lengths, PackCost, Packs, Schedule, join, packs_of
from hbp.planning.paper.packing import balance_batches
from hbp.planning.paper.steps import cut_evenly
from hbp.planning.settings import Choice, Wanted, every_degree, every_length, least_seconds
from hbp.planning.strategy import Outcome, Problem, Strategy

ISF_PASSES = 50
ISF_FULL = 0.99


def _in_given_order(problem: Problem, packs: Packs) -> Outcome:
    groups = (problem.static,)
    schedule = balance_batches(
        packs,
        problem.pack_cost(groups),
        groups,
        problem.lengths,
        problem.world_size,
        problem.global_batch_tokens,
        problem.rng,
        by_cost=False,
        counted=not problem.batch_given,
    )
    return Outcome(schedule, groups)


def concat(problem: Problem) -> Outcome:
    """Naive packing: random order, greedy concatenation."""
    ids = problem.rng.permutation(problem.sample_ids)
    return _in_given_order(problem, packs_of(next_fit(problem.lengths[ids], problem.static.capacity), ids))


def ffd(problem: Problem) -> Outcome:
    """First fit decreasing over the whole set, packs in random order."""
    ids = problem.sample_ids[by_falling_length(problem.lengths[problem.sample_ids], problem.rng)]
    packs = packs_of(first_fit(problem.lengths[ids], problem.static.capacity), ids)
    return _in_given_order(problem, packs.take(problem.rng.permutation(len(packs))))


def bfd(problem: Problem) -> Outcome:
    """Best fit decreasing over the whole set, packs in random order."""
    ids = problem.sample_ids
    bins = best_fit_decreasing(problem.lengths[ids], problem.static.capacity, problem.rng)
    packs = packs_of(bins, ids)
    return _in_given_order(problem, packs.take(problem.rng.permutation(len(packs))))


def isf(problem: Problem) -> Outcome:
    """Iterative sampling and filtering."""
    left, kept, capacity = problem.sample_ids, [], problem.static.capacity
    for last in [False] * (ISF_PASSES - 1) + [True]:
        left = problem.rng.permutation(left)
        packs = packs_of(next_fit(problem.lengths[left], capacity), left)
        full = packs.sum(problem.lengths.astype(np.int64)) >= (0 if last else ISF_FULL * capacity)
        kept.append(packs.take(np.flatnonzero(full)))
        left = packs.take(np.flatnonzero(~full)).sample_ids
        if not len(left):
            break
    packs = join(kept)
    return _in_given_order(problem, packs.take(problem.rng.permutation(len(packs))))


def sorted_batches(problem: Problem) -> Outcome:
    """LongAlign's sorted batching, one sample a group and micro-step."""
    ids = problem.sample_ids[by_falling_length(problem.lengths[problem.sample_ids], problem.rng)]
    slots = problem.world_size // problem.static.sp_degree
    n_batches = -(-len(ids) // slots)
    whole = len(ids) // slots  # the batch that is not full, if any, stays last
    order = np.concatenate([problem.rng.permutation(whole), np.arange(whole, n_batches)])
    index = (order[:, None] * slots + np.arange(slots)).ravel()
    ids = ids[index[index < len(ids)]]
    return _in_given_order(problem, packs_of(np.arange(len(ids)), ids))


def lb(problem: Problem) -> Outcome:
    """Per-step partitioning by Karmarkar–Karp on predicted time."""
    ids, static = problem.rng.permutation(problem.sample_ids), problem.static
    lengths, groups = problem.lengths, (static,)
    pack_cost = problem.pack_cost(groups)
    slots = problem.world_size // static.sp_degree
    marginal = problem.cost.seconds(static.sp_degree, static.gc_layers).marginal
    parts, steps, micros, starts = [], [], [], []
    for step, batch in enumerate(_random_batches(ids, lengths, problem.global_batch_tokens)):
        seconds = marginal(problem.cost.work(lengths[batch]))
        n_micro = max(1, -(-int(lengths[batch].sum()) // (slots * static.capacity)))
        while True:
            slot_of = karmarkar_karp(seconds, slots * n_micro)
            if np.bincount(slot_of, weights=lengths[batch]).max() <= static.capacity:
                break
            n_micro += 1
        _, slot_of = np.unique(slot_of, return_inverse=True)
        packs = packs_of(slot_of, batch)
        packs = packs.take(np.argsort(-pack_cost(packs), kind="stable"))
        parts.append(packs)
        steps.append(np.full(len(packs), step))
        micros.append(np.arange(len(packs)) // slots)
        starts.append(np.arange(len(packs)) % slots * static.sp_degree)
    return Outcome(Schedule(join(parts), *(np.concatenate(x) for x in (steps, micros, starts))), groups)


def _random_batches(ids: Int, lengths: Lengths, tokens: int) -> list[Int]:
    """Cut samples, in order, into batches of about so many tokens."""
    batch = cut_evenly(lengths[ids], wanted_steps(float(lengths[ids].sum(dtype=np.int64)), tokens))
    return np.split(ids, np.flatnonzero(np.diff(batch)) + 1)


def karmarkar_karp(seconds: np.ndarray, k: int) -> Int:
    """Partition samples into `k` parts of like sum by the largest differencing method; the part of each sample."""
    # A node is (−spread, tie, sums falling, members by part); merging pairs the largest part with the smallest.
    heap = [
        (-float(s), i, [float(s)] + [0.0] * (k - 1), [[i]] + [[] for _ in range(k - 1)]) for i, s in enumerate(seconds)
    ]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, sums_a, parts_a = heapq.heappop(heap)
        _, _, sums_b, parts_b = heapq.heappop(heap)
        sums = [a + b for a, b in zip(sums_a, reversed(sums_b), strict=True)]
        parts = [a + b for a, b in zip(parts_a, reversed(parts_b), strict=True)]
        order = sorted(range(k), key=lambda j: -sums[j])
        sums, parts = [sums[j] for j in order], [parts[j] for j in order]
        heapq.heappush(heap, (sums[-1] - sums[0], tie, sums, parts))
    part_of = np.empty(len(seconds), np.int64)
    for number, members in enumerate(heap[0][3]):
        part_of[members] = number
    return part_of


def dcp(problem: Problem) -> Outcome:
    """Dynamic context parallelism: degree from length alone, degrees mixed within a micro-step."""
    static, cost, lengths = problem.static, problem.cost, problem.lengths
    per_rank = static.capacity / static.sp_degree
    degrees = (d for d in cost.degrees() if d <= static.sp_degree and int(per_rank * d))  # of packs that hold a token
    groups = tuple(Group(int(per_rank * d), d, static.gc_layers) for d in degrees)
    limits = np.array([group.capacity for group in groups])
    ids = problem.rng.permutation(problem.sample_ids)
    parts, steps = [], []
    for step, batch in enumerate(_random_batches(ids, lengths, problem.global_batch_tokens)):
        home = np.searchsorted(limits, lengths[batch])
        for index in np.unique(home):
            own = batch[home == index]
            bins = best_fit_decreasing(lengths[own], groups[index].capacity, problem.rng)
            parts.append(packs_of(bins, own, int(index)))
            steps.append(np.full(len(parts[-1]), step))
    schedule = tile_mixed(join(parts), np.concatenate(steps), groups, problem.pack_cost(groups), problem.world_size)
    return Outcome(schedule, groups)


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


def _dcp_settings(wanted: Wanted) -> list[Choice]:
    """Every length and degree, promised what it takes at best: where no sample communicates."""
    total, found = wanted.total(), []
    for choice in every_length(wanted):
        alone = Group(math.ceil(choice.group.capacity / choice.group.sp_degree), 1, choice.group.gc_layers)
        found.append(replace(choice, seconds=least_seconds(wanted.cost, [alone], total)))
    return found


BASELINES = (
    Strategy("concat", "random order, greedy concatenation, one setting: naive packing", concat),
    Strategy("ffd", "first fit decreasing over the whole set, packs in random order", ffd),
    Strategy("bfd", "best fit decreasing over the whole set, packs in random order", bfd),
    Strategy("isf", "iterative sampling and filtering, as OmniBal packs", isf),
    Strategy("sorted", "LongAlign's sorted batching, a sample a rank", sorted_batches, every_degree),
    Strategy("lb", "each step's samples dealt evenly by predicted time, as verl does", lb, slow_above=100_000),
    Strategy("dcp", "a sample's SP degree by its length, as Megatron-Core does", dcp, _dcp_settings),
)

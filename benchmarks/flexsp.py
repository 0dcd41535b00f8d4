"""FlexSP-style solving: each global batch's samples are assigned to sequence-parallel groups of mixed degrees.

After Wang et al., "FlexSP: Accelerating Large Language Model Training via Flexible Sequence Parallelism"
(https://arxiv.org/abs/2412.01523): the batch is sorted by length and cut into micro-batches of like token count; for
each the degrees of the groups that tile the cluster and the group of every sample are chosen together so that the
slowest group finishes soonest, within memory. They solve an integer program, 5 to 15 s of it a batch; here every tiling
of the cluster by powers of two (beyond 32 ranks: by at most two different ones) is tried, with the samples dealt
longest first to the group that would finish first. Recomputation is one static setting, as theirs, and every setting
that fits is planned (:func:`by_hand.plan_by_hand` keeps the fastest).

Trade-off: nothing is known of other batches, so what does not balance within a batch stays unbalanced.
Complexity: tilings × samples × groups for each micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.planning.packs import Schedule, join, packs_of

MORE_MICRO_BATCHES = 2
"""Tried beyond the fewest that memory asks for."""
EVERY_TILING_UP_TO = 32
"""Ranks."""

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]
Lengths = npt.NDArray[np.int32]


def flexsp(
    lengths: Lengths, cost: CostModel, static: Group, batch_tokens: int, rng: np.random.Generator
) -> tuple[Schedule, tuple[Group, ...]]:
    """Solve every global batch of randomly ordered samples.

    Args:
        lengths: of all samples, tokens ``[N]``.
        cost: predicts the run.
        static: its tokens a rank are every degree's limit, its recomputed layers are every group's.
        batch_tokens: tokens of a global batch.
        rng: orders the samples.

    Returns:
        The schedule and the groups that it uses, one a degree.
    """
    world = cost.world_size
    per_rank = static.capacity // static.sp_degree
    degrees = cost.degrees()
    groups = tuple(Group(per_rank * d, d, static.gc_layers) for d in degrees)
    seconds = [cost.seconds(d, static.gc_layers) for d in degrees]
    fixed = np.array([s.fixed for s in seconds])
    tilings = [np.array(t) for t in _tilings(world, tuple(range(len(degrees))), degrees)]
    capacity = np.array([group.capacity for group in groups])
    parts, steps, micros, starts = [], [], [], []
    ids = rng.permutation(len(lengths))
    ends = np.cumsum(lengths[ids], dtype=np.int64)
    batches = np.split(ids, np.flatnonzero(np.diff((ends - 1) // batch_tokens)) + 1)
    for step, batch in enumerate(batches):
        batch = batch[np.argsort(-lengths[batch], kind="stable")]
        marginal = np.array([s.marginal(cost.work(lengths[batch])) for s in seconds])
        best, least = None, np.inf
        n_micro, tried = max(1, -(-int(lengths[batch].sum()) // (per_rank * world))), 0
        while best is None or tried <= MORE_MICRO_BATCHES:
            solved = _solve(lengths[batch].astype(np.int64), marginal, n_micro, tilings, fixed, capacity)
            if solved is not None:
                busy = np.array([s for s, *_ in solved])
                fsdp = np.maximum(0.0, seconds[0].fsdp - seconds[0].overlap * busy)
                if (total := float((busy + fsdp).sum())) < least:
                    best, least = solved, total
                tried += 1
            n_micro += 1
        for micro, (_, chunk, tiling, group_of) in enumerate(best):
            width = np.array(degrees)[tiling]
            begin = np.cumsum(width) - width
            for index in np.unique(group_of):
                packs = packs_of(
                    np.zeros(int((group_of == index).sum()), np.int64),
                    batch[chunk][group_of == index],
                    int(tiling[index]),
                )
                parts.append(packs)
                steps.append(step)
                micros.append(micro)
                starts.append(begin[index])
    return Schedule(join(parts), np.array(steps), np.array(micros), np.array(starts)), groups


def _tilings(ranks: int, indices: tuple[int, ...], degrees: list[int]) -> Iterator[list[int]]:
    """Degree indices, falling, of every way to tile the ranks."""
    if ranks > EVERY_TILING_UP_TO:
        for high in indices:
            yield [high] * (ranks // degrees[high])
            for low in range(high):
                for count in range(1, ranks // degrees[high]):
                    yield [high] * count + [low] * ((ranks - count * degrees[high]) // degrees[low])
        return
    if not ranks:
        yield []
    for high in reversed(indices):
        if degrees[high] <= ranks:
            for rest in _tilings(ranks - degrees[high], tuple(i for i in indices if i <= high), degrees):
                yield [high, *rest]


def _solve(
    lengths: Int, marginal: Float, n_micro: int, tilings: list[Int], fixed: Float, capacity: Int
) -> list[tuple[float, slice, Int, Int]] | None:
    """Seconds, samples, tiling and group of each sample, for each micro-batch; None if one does not fit."""
    ends = np.cumsum(lengths)
    chunk = np.minimum((ends - lengths // 2) * n_micro // ends[-1], n_micro - 1)
    cuts = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(lengths)]
    solved = []
    for a, b in itertools.pairwise(cuts):
        best: tuple[float, slice, Int, Int] | None = None
        for tiling in tilings:
            limit = best[0] if best else np.inf
            seconds, group_of = _deal(lengths[a:b], marginal[:, a:b], tiling, fixed, capacity, limit)
            if seconds < limit:
                best = seconds, slice(a, b), tiling, group_of
        if best is None:
            return None
        solved.append(best)
    return solved


@njit(cache=True)
def _deal(lengths: Int, marginal: Float, tiling: Int, fixed: Float, capacity: Int, limit: float) -> tuple[float, Int]:
    """Deal samples, longest first, to the group that would finish first; infinity where one finds no room."""
    busy, room = fixed[tiling], capacity[tiling]
    group_of = np.empty(len(lengths), np.int64)
    slowest = 0.0
    for i in range(len(lengths)):
        best, end = -1, np.inf
        for g in range(len(tiling)):
            if room[g] >= lengths[i] and busy[g] + marginal[tiling[g], i] < end:
                best, end = g, busy[g] + marginal[tiling[g], i]
        if best < 0 or end >= limit:
            return np.inf, group_of
        group_of[i] = best
        busy[best] = end
        room[best] -= lengths[i]
        slowest = max(slowest, end)
    return slowest, group_of

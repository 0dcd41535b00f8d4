"""Packs as flat arrays: which samples each holds, which group runs it, what it is predicted to take, and its place.

Legend: ``P`` packs, ``N`` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group

Int = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.integer]
Float = npt.NDArray[np.float64]


def numbered(n: int) -> Int:
    """0..n−1, in int32 where that can count them: half the memory of a large data set."""
    kind: Any = np.int32 if n < 2**31 else np.int64
    return np.arange(n, dtype=kind)


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack ``p`` holds ``sample_ids[offsets[p]:offsets[p + 1]]``."""

    offsets: Int  # [P + 1]
    sample_ids: Int  # [N]
    group: Int  # [P] index into the plan's groups

    def __len__(self) -> int:
        return len(self.group)

    def take(self, order: npt.NDArray[np.integer]) -> Packs:
        """These packs in another order (or some of them)."""
        counts = np.diff(self.offsets)[order]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        source = np.repeat(self.offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Packs(offsets, self.sample_ids[source], self.group[order])

    def sum(self, per_sample: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sum of a per-sample quantity over each pack, ``[P]``."""
        total: npt.NDArray[Any] = np.concatenate(
            [np.zeros(1, per_sample.dtype), np.cumsum(per_sample[self.sample_ids])]
        )
        sums: npt.NDArray[Any] = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return sums


def packs_of(pack_of_sample: Int, sample_ids: Int, group: int = 0, n_packs: int | None = None) -> Packs:
    """Packs from the number of the pack of each sample; samples keep their order within a pack."""
    count = int(pack_of_sample.max()) + 1 if n_packs is None and len(pack_of_sample) else n_packs or 0
    sizes = np.bincount(pack_of_sample, minlength=count)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int64)
    order = np.argsort(pack_of_sample, kind="stable")
    return Packs(offsets, sample_ids[order], np.full(count, group, np.int64))


def join(parts: Sequence[Packs]) -> Packs:
    """All packs of all parts, in order."""
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
    return Packs(
        np.cumsum(counts),
        np.concatenate([np.zeros(0, np.int64), *(part.sample_ids for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.group for part in parts)]),
    )


@dataclass(frozen=True, eq=False)
class Schedule:
    """Packs with their place in the run, each array ``[P]``."""

    packs: Packs
    step: Int
    micro_step: Int
    rank_start: Int


def in_order(schedule: Schedule) -> Schedule:
    """Packs in order of step, micro-step and first rank, as a plan's rows are."""
    order = np.lexsort((schedule.rank_start, schedule.micro_step, schedule.step))
    columns = (schedule.step, schedule.micro_step, schedule.rank_start)
    return Schedule(schedule.packs.take(order), *(column[order] for column in columns))


PackCost = Callable[[Packs], Float]
"""Predicted seconds of each pack."""


def predicted_seconds(cost: CostModel, lengths: Lengths, groups: Sequence[Group]) -> PackCost:
    """Predicted seconds of packs of these groups."""

    def seconds(packs: Packs) -> Float:
        work = cost.work(lengths[packs.sample_ids], packs.offsets)
        result = np.empty(len(packs))
        for index in np.unique(packs.group):
            here = packs.group == index
            group = groups[index]
            result[here] = cost.seconds(group.sp_degree, group.gc_layers).of(work[here])
        return result

    return seconds


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

"""Algorithm 1: choose the packing groups (paper, Section 4.1, Appendices F and I).

Stage 1: for every candidate length and SP degree take the fewest recomputed layers that fit memory, predict the time,
keep the fastest degree (FindBestSpCkpt). Candidates are halves of ``l_max``, the longest, which is always kept, and the
longest packs of each degree that recompute nothing. Stage 2 removes needless communication: a group of length ``l`` at
degree ``s`` gives each rank ``l / s`` tokens, so samples up to that length need no SP at all: with the best length
``l_best`` come ``l_best / s_best`` and ``l_max / s_max``.

The paper compares lengths by the time of packs with equal tokens, which it measures. Packs of different lengths hold
different documents, though, and short documents are cheap wherever they are packed. So here each ``l_best`` is judged
by the predicted time of the whole data set under the groups that come with it (:func:`group_seconds`: each sample in
its smallest group, ranks evenly loaded but for a sample that outlasts the rest), and a group that saves nothing is
left out.

Complexity: a sort of the lengths, then (candidates × degrees) predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.packs import Lengths

N_HALVINGS = 6
SHORTEST_CANDIDATE = 256
CANDIDATE_UNIT = 64
"""Candidates from the memory budget are multiples of it."""


@dataclass(frozen=True)
class Choice:
    """A group and what its samples are predicted to take."""

    group: Group
    seconds: float


class SortedSamples:
    """Samples in order of length, with running sums, so that those of a range of lengths cost two searches."""

    def __init__(self, cost: CostModel, lengths: Lengths) -> None:
        self.lengths = np.sort(lengths)
        work = cost.work(self.lengths)
        self._work = work
        self._sums = [np.concatenate([[0.0], np.cumsum(x)]) for x in (work.documents, work.tokens, work.pairs)]

    def between(self, above: int, up_to: int) -> tuple[Work, Work]:
        """The work of all samples of length in (above, up_to] together, and of the longest of them; zero if none."""
        a, b = np.searchsorted(self.lengths, [above, up_to], side="right")
        total = Work(*(x[b : b + 1] - x[a : a + 1] for x in self._sums))
        return total, self._work[b - 1 : b] if b > a else total


def longest_capacity(lengths: Lengths, max_length: int | None) -> int:
    """Packing length of the largest group: the user's limit, or the longest sample rounded up."""
    if max_length is not None:
        return max_length
    longest = int(lengths.max())
    unit = 1024 if longest > 8192 else 64
    return math.ceil(longest / unit) * unit


def group_seconds(cost: CostModel, group: Group, total: Work, longest: Work) -> float:
    """Predicted seconds of samples packed full into one group and spread evenly over the ranks.

    Args:
        cost: of the run.
        group: that runs them.
        total: work of all the samples, each field ``[1]``.
        longest: of the longest one, which one rank (or SP group) has to run.
    """
    spent, slots = cost.seconds(group.sp_degree, group.gc_layers), cost.world_size // group.sp_degree
    micro_steps = max(1, math.ceil(float(total.tokens[0]) / (slots * group.capacity)))
    even = micro_steps * spent.fixed + float(spent.marginal(total)[0]) / slots
    busy = max(even, spent.fixed + float(spent.marginal(longest)[0]))
    return busy + max(0.0, micro_steps * spent.fsdp - spent.overlap * busy)


def settings_that_fit(cost: CostModel, capacity: int, total: Work, longest: Work) -> list[Choice]:
    """Every SP degree that can run a packing length, each with the fewest recomputed layers that fit memory."""
    choices = []
    for degree in cost.degrees():
        gc_layers = cost.fewest_gc_layers(capacity, degree)
        if gc_layers is not None:
            group = Group(capacity, degree, gc_layers)
            choices.append(Choice(group, group_seconds(cost, group, total, longest)))
    return choices


def longest_settings(cost: CostModel, lengths: Lengths, capacity: int) -> list[Choice]:
    """:func:`settings_that_fit` for all samples in packs of the longest length, the fastest first.

    Raises:
        HbpError: none fits, at any degree, even with every layer recomputed.
    """
    choices = settings_that_fit(cost, capacity, *SortedSamples(cost, lengths).between(0, capacity))
    if not choices:
        degree, gib = cost.degrees()[-1], 2.0**30
        least = cost.bytes(capacity, degree, cost.model.n_layers) / gib
        raise HbpError(
            f"a pack of {capacity} tokens needs {least:.2f} GiB a device at SP degree {degree} with every layer "
            f"recomputed, over the budget of {cost.cluster.memory_bytes / gib:.2f} GiB; use more devices, a larger "
            "memory budget, or a shorter --max-length"
        )
    return sorted(choices, key=lambda c: c.seconds)


def choose_groups(cost: CostModel, lengths: Lengths, longest: int) -> tuple[Group, ...]:
    """The groups of Algorithm 1 in order of rising capacity; the last has capacity `longest`.

    Raises:
        HbpError: packs of `longest` tokens do not fit memory.
    """
    samples = SortedSamples(cost, lengths)
    longest_settings(cost, lengths, longest)  # or nothing fits
    every = [_groups_with(cost, samples, longest, l_best) for l_best in [longest, *_candidates(cost, longest)]]
    return tuple(choice.group for choice in min(every, key=_seconds))


def _candidates(cost: CostModel, longest: int) -> list[int]:
    halves = [math.ceil(longest / 2**i) for i in range(1, N_HALVINGS)]
    without_gc = [int(cost.longest_packs(degree)[0]) // CANDIDATE_UNIT * CANDIDATE_UNIT for degree in cost.degrees()]
    return sorted({length for length in (*halves, *without_gc) if SHORTEST_CANDIDATE <= length < longest})


def _groups_with(cost: CostModel, samples: SortedSamples, longest: int, l_best: int) -> list[Choice]:
    """Stage 2 for one best length, without the groups that save nothing."""
    firsts = _best_settings(cost, samples, {l_best, longest})
    wanted = {longest, *(c.group.capacity for c in firsts)}
    wanted |= {c.group.capacity // c.group.sp_degree for c in firsts}
    chosen = _best_settings(cost, samples, wanted)
    for capacity in sorted(wanted - {longest}):
        fewer = _best_settings(cost, samples, wanted - {capacity})
        if _seconds(fewer) <= _seconds(chosen):
            wanted, chosen = wanted - {capacity}, fewer
    return chosen


def _best_settings(cost: CostModel, samples: SortedSamples, capacities: set[int]) -> list[Choice]:
    """FindBestSpCkpt for each capacity and the samples that no smaller one holds; where nothing fits, no group."""
    best: list[Choice] = []
    above = 0
    for capacity in sorted(capacities):
        choices = settings_that_fit(cost, capacity, *samples.between(above, capacity))
        if choices:
            best.append(min(choices, key=lambda c: c.seconds))
            above = capacity
    return best


def _seconds(choices: Iterable[Choice]) -> float:
    return sum(choice.seconds for choice in choices)

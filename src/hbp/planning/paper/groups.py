"""Algorithm 1: choose the packing groups (paper, Section 4.1, Appendices F and I).

Stage 1: for every candidate length (the longest, ``l_max``, and its halves) take the SP degree, with the fewest
recomputed layers that fit memory, whose packs take the least time (FindBestSpCkpt). The paper measures; here the time
is predicted, for packs full of the data's own documents, and the memory per recomputed layer is the cost model's, whose
slope is fitted to measured points. ``l_best`` is the length with the least time at equal tokens.

Stage 2 removes needless communication: a group of length ``l`` at degree ``s`` gives each rank ``l / s`` tokens, so
samples up to that length need no SP at all. The groups are ``l_best / s_best``, ``l_best``, ``l_max / s_max`` (unless
it is shorter than ``l_best``, whose range it would cut) and ``l_max``, without repeats.

:mod:`hbp.planning.mixed.groups` is our own choice. Complexity: one count of the lengths, then (candidates × degrees)
predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.kernels import count_lengths
from hbp.planning.packs import Int, Lengths

N_PUBLISHED = 5
"""The paper's candidates for 128K: 8K, 16K, 32K, 64K, 128K."""


@dataclass(frozen=True)
class Choice:
    """A group and what its samples are predicted to take."""

    group: Group
    seconds: float


class SamplesByLength:
    """Samples in order of length with running sums, so that those of a range of lengths cost two searches.

    Kept by the lengths that occur, not by sample: a hundred million samples are a few thousand lengths.
    """

    def __init__(self, cost: CostModel, lengths: Lengths) -> None:
        counts = count_lengths(lengths, int(lengths.max(initial=0)))
        self.lengths = np.flatnonzero(counts)
        self.counts = counts[self.lengths]
        work = cost.work(self.lengths)
        self.pairs_of = work.pairs
        """Of one sample of each length."""
        self._work = work
        self.documents, self.tokens, self.pairs = (
            np.concatenate([[0.0], np.cumsum(x * self.counts)]) for x in (work.documents, work.tokens, work.pairs)
        )

    def up_to(self, length: npt.NDArray[np.integer] | int) -> Int:
        """Index into the running sums for all samples of at most so many tokens."""
        return np.asarray(np.searchsorted(self.lengths, length, side="right"))

    def between(self, above: int, up_to: int) -> tuple[Work, Work]:
        """The work of all samples of length in (above, up_to] together, and of the longest of them; zero if none."""
        a, b = int(self.up_to(above)), int(self.up_to(up_to))
        total = Work(*(x[b : b + 1] - x[a : a + 1] for x in (self.documents, self.tokens, self.pairs)))
        return total, self._work[b - 1 : b] if b > a else total


def longest_capacity(lengths: Lengths, max_length: int | None) -> int:
    """Packing length of the largest group: the user's limit, or the longest sample rounded up."""
    if max_length is not None:
        return max_length
    longest = int(lengths.max())
    unit = 1024 if longest > 8192 else 64
    return math.ceil(longest / unit) * unit


def fitting_capacity(cost: CostModel, lengths: Lengths, max_length: int | None) -> int:
    """:func:`longest_capacity`; where packs of that length fit memory at no setting, what the longest sample needs."""
    longest = int(lengths.max())
    for capacity in (longest_capacity(lengths, max_length), longest_capacity(lengths, None)):
        if any(cost.fewest_gc_layers(capacity, degree) is not None for degree in cost.degrees()):
            return capacity
    return longest


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
    choices = settings_that_fit(cost, capacity, *SamplesByLength(cost, lengths).between(0, capacity))
    if not choices:
        degree, gib = cost.degrees()[-1], 2.0**30
        least = cost.bytes(capacity, degree, cost.model.n_layers) / gib
        most = int(max(cost.longest_packs(degree)[-1] for degree in cost.degrees()))
        raise HbpError(
            f"a pack of {capacity} tokens needs {least:.2f} GiB a device at SP degree {degree} with every layer "
            f"recomputed, over the budget of {cost.cluster.memory_bytes / gib:.2f} GiB; use more GPUs, a cluster with "
            f"more memory, or " + (f"--max-length {most} at most" if most >= 1 else "a smaller model")
        )
    return sorted(choices, key=lambda c: c.seconds)


@dataclass(frozen=True)
class Candidate:
    """A packing length at its best setting."""

    group: Group
    seconds_per_token: float
    """Of all ranks together, packs full of the data's own documents."""


def best_setting(cost: CostModel, samples: SamplesByLength, capacity: int) -> Candidate | None:
    """FindBestSpCkpt: the degree, with the fewest recomputed layers that fit, whose packs take least time a token.

    None if a pack of this length fits memory at no degree.
    """
    total, _ = samples.between(0, capacity)
    share = capacity / max(float(total.tokens[0]), 1.0)
    pack = Work(*(np.array([float(x[0]) * share]) for x in (total.documents, total.tokens, total.pairs)))
    candidates = []
    for degree in cost.degrees():
        gc_layers = cost.fewest_gc_layers(capacity, degree)
        if gc_layers is not None:
            seconds = float(cost.seconds(degree, gc_layers).of(pack)[0])
            candidates.append(Candidate(Group(capacity, degree, gc_layers), seconds * degree / capacity))
    return min(candidates, key=lambda c: c.seconds_per_token, default=None)


def published_candidates(cost: CostModel, lengths: Lengths, longest: int) -> list[Candidate]:
    """Stage 1: the best setting of `longest` and of its halves, rising, of those that fit memory."""
    samples = SamplesByLength(cost, lengths)
    capacities = sorted({math.ceil(longest / 2**i) for i in range(N_PUBLISHED)})
    found = (best_setting(cost, samples, capacity) for capacity in capacities if capacity >= int(samples.lengths[0]))
    return [candidate for candidate in found if candidate is not None]


def published_groups(cost: CostModel, lengths: Lengths, longest: int) -> tuple[Group, ...]:
    """The groups of Algorithm 1 in order of rising capacity; the last has capacity `longest`.

    Raises:
        HbpError: packs of `longest` tokens do not fit memory.
    """
    longest_settings(cost, lengths, longest)  # or nothing fits
    candidates = published_candidates(cost, lengths, longest)
    last = candidates[-1].group
    best = min(candidates, key=lambda c: c.seconds_per_token).group
    groups = {group.capacity: group for group in (best, last)}
    for whole in (best, last):
        alone = whole.capacity // whole.sp_degree  # what a rank of this group holds needs no SP
        gc_layers = cost.fewest_gc_layers(alone, 1)
        if (
            gc_layers is not None
            and alone >= 1
            and alone not in groups
            and not (whole is last and alone < best.capacity)
        ):
            groups[alone] = Group(alone, 1, gc_layers)
    return tuple(groups[capacity] for capacity in sorted(groups))

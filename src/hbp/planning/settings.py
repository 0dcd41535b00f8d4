"""Settings: which packing lengths, SP degrees and recomputed layers fit memory, and which of them a strategy may take.

A strategy with one static setting may have the longest sample's packing length at every SP degree that fits memory
(:func:`every_degree`); where the user set no limit its doublings too, since short samples run faster in longer packs
where FSDP's traffic or launches weigh (:func:`every_length`). A strategy that finds its own groups needs only one that
fits (:func:`fastest_degree`). Each strategy says which (:class:`hbp.planning.strategy.Strategy`).

Every choice comes with seconds that no plan of it can beat (packs full to the last token, ranks that finish together),
so planning may stop at the first choice that promises no more than the best plan so far.

Complexity: one count of the lengths, then a prediction a length and degree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.kernels import count_lengths
from hbp.planning.packs import Int, Lengths

LONGEST_PACK = int(np.iinfo(np.int32).max)
"""As the plan file counts tokens."""


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
    """The degree, with the fewest recomputed layers that fit, whose packs take least time a token.

    FindBestSpCkpt of the paper's Algorithm 1. None if a pack of this length fits memory at no degree.
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


@dataclass(frozen=True)
class Wanted:
    """What settings are looked for."""

    cost: CostModel
    lengths: Lengths
    """Of the samples to plan, none over `longest`."""
    longest: int
    """The shortest packing length."""
    longer: bool
    """Whether its doublings may be taken too."""
    batch: int | None
    """Tokens of an optimizer step that the user asked for, which no micro-step of longer packs may exceed."""

    def total(self) -> Work:
        """Of all samples together."""
        return SamplesByLength(self.cost, self.lengths).between(0, self.longest)[0]


def fastest_degree(wanted: Wanted) -> list[Choice]:
    """The degree that runs packs of the longest length fastest.

    Raises:
        HbpError: as :func:`longest_settings`, here and below.
    """
    return every_degree(wanted)[:1]


def every_degree(wanted: Wanted) -> list[Choice]:
    """Packs of the longest length at every degree that fits memory."""
    return longest_settings(wanted.cost, wanted.lengths, wanted.longest)


def every_length(wanted: Wanted) -> list[Choice]:
    """:func:`every_degree`, and where longer packs are allowed these too."""
    longer = _doublings(wanted.cost, wanted.lengths, wanted.longest, wanted.batch) if wanted.longer else []
    return every_degree(wanted) + longer


def _doublings(cost: CostModel, lengths: Lengths, longest: int, batch: int | None) -> list[Choice]:
    """Settings of twice, four times, … the longest length that fit memory and the global batch.

    None of which half the length would already hold all samples in one micro-step.
    """
    total, longest_work = SamplesByLength(cost, lengths).between(0, longest)
    found: list[Choice] = []
    capacity = 2 * longest
    while capacity <= LONGEST_PACK:
        here = [
            choice
            for choice in settings_that_fit(cost, capacity, total, longest_work)
            if micro_step_tokens(cost, choice.group) < 2 * float(total.tokens[0])
            and (batch is None or micro_step_tokens(cost, choice.group) <= batch)
        ]
        if not here:
            break
        found += here
        capacity *= 2
    return found


def least_seconds(cost: CostModel, groups: Sequence[Group], total: Work) -> float:
    """Seconds that no plan in which these groups share the samples can beat: the least of each part of the cost."""
    spent = [(group.sp_degree, cost.seconds(group.sp_degree, group.gc_layers)) for group in groups]
    micro_steps = float(total.tokens[0]) / max(micro_step_tokens(cost, group) for group in groups)
    busy = micro_steps * min(s.fixed for _, s in spent) + sum(
        min(d * getattr(s, f"per_{part}") for d, s in spent) * float(amount[0]) / cost.world_size
        for part, amount in (("document", total.documents), ("token", total.tokens), ("pair", total.pairs))
    )
    return busy + max(0.0, micro_steps * spent[0][1].fsdp - spent[0][1].overlap * busy)


def micro_step_tokens(cost: CostModel, group: Group) -> int:
    """Tokens of one micro-step of full packs."""
    return cost.world_size // group.sp_degree * group.capacity

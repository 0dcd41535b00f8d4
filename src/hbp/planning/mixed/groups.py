"""Our own choice of groups: the lengths, degrees and recomputed layers that run *this* data set fastest.

Algorithm 1 (:mod:`hbp.planning.paper.groups`) tries one best length. Here any set of candidate groups may be taken: the
candidates are the longest packs of each SP degree under each number of recomputed layers (a pack any longer needs one
layer more), and halves of the longest length. If a group takes the samples between the next smaller group's capacity
and its own, the predicted time of a set is a sum over its groups, so the best set is a shortest path through the
candidates, found exactly by dynamic programming.

What a group of capacity ``b`` that follows one of capacity ``a`` is predicted to take:

- packs: its tokens ÷ ``b``, at least one for each sample over ``b / 2`` (no two of those share a pack), and whole
  micro-steps;
- the room that its own samples leave is filled with shorter ones, which pay this group's price and are taken off the
  shortest group's bill;
- samples that alone outweigh a mean pack (*heads*) have one each, the other packs share what is left evenly; each kind
  hides as much of FSDP's traffic as it can;
- what sorting leaves: ranks wait for the costliest pack of a micro-step; over all heads that comes to half the distance
  between the costliest pack and an even one.

Samples that need no SP get none (but as fill): the shortest group is one of degree 1 wherever memory allows it, and no
group of degree 1 follows one of a higher degree, whose samples would communicate for nothing. A group that saves less
than :data:`GROUP_SAVES` of the whole is not worth having and is left out.

If the shorter samples do not suffice to fill the longer packs, these stay unfilled and nothing is taken off any bill.
What such a sum cannot see (which packs hide FSDP's traffic, how evenly they come out) the second step looks at: both
sets, and the paper's where its groups are candidates too, are planned for real on a sample of the lengths, with as many
micro-steps as the run will have, and the best one is improved by local search: another capacity, another degree, one
group fewer, as long as that is faster and the lower bound is not near.

Complexity: candidates² × degrees, then at most :data:`MOST_TRIALS` plans of a sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group
from hbp.planning.lower_bound import rank_seconds
from hbp.planning.mixed.packing import pack_histogram
from hbp.planning.packs import Int, Lengths, PackCosts
from hbp.planning.paper.groups import published_groups
from hbp.planning.settings import SamplesByLength

N_HALVINGS = 6
SHORTEST_CANDIDATE = 256
CANDIDATE_UNIT = 64
"""Candidates from the memory budget are multiples of it."""
GC_STEPS = 16
"""Recomputed layers are tried in so many steps."""
GROUP_SAVES = 2e-4
IMPROVES = 5e-4
UNUSED = 1e-6
NEAR = 1.02
"""Groups within so much of the lower bound are not worth improving."""
TRIAL_SAMPLES, TRIAL_WORLD, MOST_TRIALS = 150_000, 16, 20
CHEAP_SAMPLES = 60_000
"""So many samples are planned for more ranks: where micro-steps are few, it matters how many packs one takes."""
Float = npt.NDArray[np.float64]


def candidate_capacities(cost: CostModel, longest: int, limit: int | None) -> list[int]:
    """Packing lengths worth trying, rising: `longest` among them, none over `limit` (None: what memory holds)."""
    most = limit or max(longest, int(cost.longest_packs(1)[-1]))
    found = {math.ceil(longest / 2**i) for i in range(1, N_HALVINGS)}
    step = max(1, cost.model.n_layers // GC_STEPS)
    for degree in cost.degrees():
        for tokens in cost.longest_packs(degree)[::step]:
            found.add(int(min(tokens, most)) // CANDIDATE_UNIT * CANDIDATE_UNIT)
    return sorted({longest} | {c for c in found if SHORTEST_CANDIDATE <= c <= most})


def search_groups(
    cost: CostModel, lengths: Lengths, longest: int, limit: int | None, batch: int | None = None
) -> tuple[Group, ...]:
    """The groups to plan with, in order of rising capacity; the last one holds `longest`.

    Args:
        cost: of the run.
        lengths: of the samples to plan, none over `longest`.
        longest: of the last group at least; some setting must fit it.
        limit: no packing length may exceed it; None: what memory holds.
        batch: tokens of an optimizer step that a micro-step should not exceed. Where packs of `longest` exceed it at
            any degree, they get the highest, which exceeds it least.
    """
    options = {c: _settings(cost, c) for c in candidate_capacities(cost, longest, limit)}
    if batch is not None:
        world = cost.world_size
        small = {c: [g for g in groups if world // g.sp_degree * c <= batch] for c, groups in options.items()}
        small[longest] = small[longest] or options[longest][-1:]
        options = small
    options = {c: groups for c, groups in options.items() if groups}
    samples = SamplesByLength(cost, lengths)
    alone = any(g.sp_degree == 1 and c >= samples.lengths[0] for c, groups in options.items() for g in groups)
    starts = {best_groups(cost, samples, longest, options, alone=alone, filled=filled) for filled in (True, False)}
    published = published_groups(cost, lengths, longest)
    if _communicates_if_needed(published, alone) and all(
        group in options.get(group.capacity, []) for group in published
    ):
        starts.add(published)
    trial = Trial(cost, samples, max(g.sp_degree for groups in starts for g in groups))
    best = min(sorted(starts), key=trial.price)
    improved = trial.price(best) > NEAR * trial.least
    while improved:
        improved = False
        for other in _neighbours(best, options, longest, alone):
            if max(g.sp_degree for g in other) > trial.world_size:
                continue
            if trial.left and trial.price(other) < trial.price(best) * (1 - IMPROVES):
                best, improved = other, True
                break
    return best


class Trial:
    """Predicted seconds of sets of groups, by planning a sample of the lengths; remembers what it has seen."""

    def __init__(self, cost: CostModel, samples: SamplesByLength, highest_degree: int) -> None:
        total = int(samples.counts.sum())
        cheap = 2 ** int(math.log2(max(1.0, cost.world_size * CHEAP_SAMPLES / total)))
        self.world_size = min(cost.world_size, max(TRIAL_WORLD, 2 * highest_degree, cheap))
        drawn = min(TRIAL_SAMPLES, math.ceil(total * self.world_size / cost.world_size))
        # Every so many-th sample in order of length: rare lengths are there as often as they should be.
        up_to = np.floor(np.cumsum(samples.counts) / total * drawn + 0.5).astype(np.int64)
        self.counts = np.zeros(int(samples.lengths[-1]) + 1, np.int64)
        self.counts[samples.lengths] = np.diff(up_to, prepend=0)
        self.costs = PackCosts(cost, len(self.counts) - 1)
        self.least = rank_seconds(cost, self.counts) / self.world_size
        self.known: dict[tuple[Group, ...], float] = {}

    @property
    def left(self) -> int:
        """How many more sets may be tried."""
        return MOST_TRIALS - len(self.known)

    def price(self, groups: tuple[Group, ...]) -> float:
        """Seconds of the sample's micro-steps, and the toll of each group."""
        return self.seconds(groups) * (1 + GROUP_SAVES * len(groups))

    def seconds(self, groups: tuple[Group, ...]) -> float:
        """Seconds of the sample's micro-steps."""
        if groups not in self.known:
            rng = np.random.default_rng(0)
            packed = pack_histogram(self.counts.copy(), groups, self.costs, self.world_size, rng, last=True)
            slowest = np.zeros(int(packed.micro_step.max()) + 1)
            np.maximum.at(slowest, packed.micro_step, packed.seconds)
            self.known[groups] = float(slowest.sum())
        return self.known[groups]


def _neighbours(
    groups: tuple[Group, ...], options: dict[int, list[Group]], longest: int, alone: bool
) -> Iterator[tuple[Group, ...]]:
    """Sets that differ in one group, and are still in order, hold `longest` and (`alone`) begin without SP."""
    capacities = sorted(options)
    for i, group in enumerate(groups):
        at = capacities.index(group.capacity)
        near = [at + step for step in (1, -1, 2, -2, 4, -4) if 0 <= at + step < len(capacities)]
        others = [
            *(g for g in options[group.capacity] if g.sp_degree in (group.sp_degree // 2, group.sp_degree * 2)),
            *(g for n in near for g in options[capacities[n]] if g.sp_degree == group.sp_degree),
        ]
        for other in [None, *others]:
            changed = (*groups[:i], *((other,) if other else ()), *groups[i + 1 :])
            rising = all(a.capacity < b.capacity for a, b in itertools.pairwise(changed))
            if changed and rising and changed[-1].capacity >= longest and _communicates_if_needed(changed, alone):
                yield changed


def _communicates_if_needed(groups: tuple[Group, ...], alone: bool) -> bool:
    """Whether groups of degree 1 come first (`alone`: and there is one), so that no sample has needless SP."""
    needed = [group.sp_degree > 1 for group in groups]
    return needed == sorted(needed) and not (alone and needed[0])


def best_groups(
    cost: CostModel,
    samples: SamplesByLength,
    longest: int,
    options: dict[int, list[Group]],
    *,
    alone: bool,
    filled: bool,
) -> tuple[Group, ...]:
    """The set of groups with the least sum of predicted times (module docstring).

    Args:
        cost: of the run.
        samples: to plan.
        longest: the last group holds it.
        options: settings of every candidate capacity.
        alone: the shortest group must be of degree 1.
        filled: whether shorter samples suffice to fill the longer packs (module docstring).
    """
    capacities = np.array(sorted(options))
    price = min(_price(cost, group) for groups in options.values() for group in groups) if filled else 0.0
    after = [
        [_seconds_after(cost, group, samples, capacities, j, price, filled) for group in options[capacity]]
        for j, capacity in enumerate(capacities.tolist())
    ]
    total, _ = _shortest_path(capacities.tolist(), options, after, longest, alone, 0.0)
    return _shortest_path(capacities.tolist(), options, after, longest, alone, GROUP_SAVES * total)[1]


def _shortest_path(
    capacities: list[int],
    options: dict[int, list[Group]],
    after: list[list[Float]],
    longest: int,
    alone: bool,
    toll: float,
) -> tuple[float, tuple[Group, ...]]:
    """The cheapest way to hold all samples if each group costs its predicted seconds and `toll`.

    No group of degree 1 follows one that communicates; with `alone` the first must be of degree 1.
    """
    none: tuple[float, tuple[Group, ...]] = (math.inf, ())
    # The best up to no capacity, the first, …
    every: list[tuple[float, tuple[Group, ...]]] = [(0.0, ())]
    degree_1: list[tuple[float, tuple[Group, ...]]] = [(0.0, ())]  # of those without SP
    for capacity, seconds_of_groups in zip(capacities, after, strict=True):
        ways: list[tuple[float, tuple[Group, ...]]] = []
        for group, seconds in zip(options[capacity], seconds_of_groups, strict=True):
            best = degree_1 if group.sp_degree == 1 else every
            total = np.array([spent for spent, _ in best]) + seconds + toll
            if alone and group.sp_degree > 1:
                total[0] = np.inf
            i = int(np.argmin(total))
            ways.append((float(total[i]), (*best[i][1], group)))
        every.append(min(ways, key=lambda way: way[0]))
        degree_1.append(min((way for way in ways if way[1][-1].sp_degree == 1), key=lambda way: way[0], default=none))
    return min((way for way, c in zip(every[1:], capacities, strict=True) if c >= longest), key=lambda way: way[0])


def _settings(cost: CostModel, capacity: int) -> list[Group]:
    """The fewest recomputed layers at every degree that can hold a pack."""
    fewest = ((degree, cost.fewest_gc_layers(capacity, degree)) for degree in cost.degrees())
    return [Group(capacity, degree, k) for degree, k in fewest if k is not None]


def _price(cost: CostModel, group: Group) -> float:
    """Rank-seconds a token of full packs, attention apart."""
    spent = cost.seconds(group.sp_degree, group.gc_layers)
    work = Work(np.zeros(1), np.array([float(group.capacity)]), np.zeros(1))
    return float(spent.of(work)[0]) * group.sp_degree / group.capacity


def _seconds_after(
    cost: CostModel, group: Group, samples: SamplesByLength, capacities: Int, j: int, price: float, filled: bool
) -> Float:
    """Predicted seconds of group `j` if it follows no group, the first, … the one before it, float64 ``[j + 1]``.

    Every array below has one entry for each group that may come before, which decides where the own samples begin.
    """
    spent, slots = cost.seconds(group.sp_degree, group.gc_layers), cost.world_size // group.sp_degree
    first = np.concatenate([[0], samples.up_to(capacities[:j])])  # the own samples are lengths first … last − 1
    last = int(samples.up_to(group.capacity))
    n, tokens, pairs = (x[last] - x[first] for x in (samples.documents, samples.tokens, samples.pairs))
    packs = _packs_needed(group, samples, first, last, tokens, float(slots) if filled else 1.0)
    fill = np.maximum(packs * float(group.capacity) - tokens, 0.0) if filled else np.zeros(j + 1)
    heads, of_head, of_other = _heads(samples, first, last, pairs, packs)

    # Packs: all hold the same tokens; heads and others differ in pairs, and each hides what it can of FSDP's traffic.
    alike = spent.fixed + (spent.per_document * n + spent.per_token * (tokens + fill)) / packs
    seconds = np.zeros(j + 1)
    for count, per_pack in ((heads, of_head), (packs - heads, of_other)):
        busy = alike + spent.per_pair * per_pack
        seconds += count / slots * (busy + np.maximum(0.0, spent.fsdp - spent.overlap * busy))
    # Waiting that sorting leaves: over all heads half the distance between the costliest pack and an even one.
    costliest = samples.pairs_of[last - 1] if last else 0.0
    seconds += spent.per_pair * np.where(heads > 0, np.maximum(0.0, costliest - of_other) / 2, 0.0)
    seconds *= np.maximum(1.0, slots / packs)  # whole micro-steps: ranks without a pack wait too
    saved = fill * price / cost.world_size  # what fills this group's packs is taken off the shortest group's bill
    # Between settings of a group that no sample needs yet, the one that would run its longest pack with least effort.
    longest = float(spent.of(cost.work(np.array([group.capacity])))[0]) / slots
    return np.where(n > 0, seconds - saved, 0.0) + longest * UNUSED


def _packs_needed(
    group: Group, samples: SamplesByLength, first: Int, last: int, tokens: Float, at_least: float
) -> Float:
    """Packs of samples ``first … last − 1``: as their tokens ask, and one for each over half a pack (no two share)."""
    half = np.maximum(first, samples.up_to(group.capacity // 2))
    over_half = samples.documents[last] - samples.documents[half]
    return np.maximum(np.maximum(tokens / float(group.capacity), over_half), at_least)


def _heads(samples: SamplesByLength, first: Int, last: int, pairs: Float, packs: Float) -> tuple[Float, Float, Float]:
    """Samples that alone outweigh a mean pack, which have one each: how many; pairs of such a pack, and of the others.

    The other packs share evenly what pairs are left.
    """
    head = np.clip(np.searchsorted(samples.pairs_of, pairs / packs, side="right"), first, last)
    heads = np.minimum(samples.documents[last] - samples.documents[head], packs)
    of_head = np.where(heads > 0, (samples.pairs[last] - samples.pairs[head]) / np.maximum(heads, 1), 0.0)
    of_other = np.maximum(0.0, pairs - heads * of_head) / np.maximum(packs - heads, 1.0)
    return heads, of_head, of_other

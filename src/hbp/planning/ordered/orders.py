"""`plan.order`: how much of the speed is given up for optimizer steps that hold the data's own mix.

``fastest``: micro-steps of packs that are alike, dealt to steps as they come (:mod:`hbp.planning.mixed.windows`). With
a global batch of one or two micro-steps, a step is of one kind. Where the global batch asked for is so small that such
steps are far from the bound (:data:`EFFICIENT`), steps that are packed apart, as below, are tried too.

``random``: a step holds what a shuffle puts there, as with naive packing; only inside the step are samples free to be
packed, at the degrees and in the micro-steps that finish soonest.

``balanced``: the plan whose steps are nearest to the data's own mix among those of these that are at most
:data:`PRICE` slower than the fastest of all; of plans that are as near as each other the fastest:

- samples are dealt to steps by length and each step is packed apart (:mod:`hbp.planning.ordered.draw`,
  :mod:`hbp.planning.ordered.step_packing`). The long samples of a step are of like length, for steps of several
  micro-steps, or as different as they come, which suits steps of one micro-step: both are tried;
- micro-steps as ``fastest`` deals them;
- micro-steps of long packs as ``fastest`` makes them, which cost nothing, are dealt evenly over the steps, and so are
  all other samples as the steps have room for them.

The curriculum comes on top of any: its steps hold samples that are at home in groups of the lowest degree.

Complexity: as many plans as are compared, each a pass over the samples for each target time of a micro-step.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hbp.plan import Group, close, wanted_steps
from hbp.planning.kernels import counting_sort, shuffled
from hbp.planning.lower_bound import lower_bound
from hbp.planning.mixed.packing import pack_histogram
from hbp.planning.mixed.windows import windowed_schedule
from hbp.planning.ordered.draw import cut_shuffle, deal_evenly
from hbp.planning.ordered.lay_out import Laid, Worth, joined, outcome_of, pack_steps, travel, worth
from hbp.planning.ordered.step_packing import StepCosts
from hbp.planning.packs import Int, PackCosts
from hbp.planning.paper.curriculum import default_short_steps
from hbp.planning.strategy import Outcome, Problem

GOLDEN = (5**0.5 - 1) / 2
PRICE = 0.05
"""Share of the fastest plan's predicted time that `balanced` may take longer."""
AS_NEAR = 0.01
"""Drift by which one plan has to be nearer to the data's mix than another for that to be worth seconds."""
EFFICIENT = 0.95
"""Share of the best possible speed from which `fastest` is taken as it is."""
ALIKE = 1 / 2
"""Of a rank's tokens of a step: samples over this are dealt in company of like length."""


@dataclass(frozen=True)
class Drawn:
    """The samples to plan, in random order, and how many steps there are. Samples are numbered among those to plan."""

    shuffle: Int  # [N]
    early: Int
    """Those of the curriculum's steps, in the shuffle's order."""
    rest: Int
    early_steps: int
    rest_steps: int
    short_steps: int
    """Of the curriculum as asked for."""


def draw(problem: Problem, groups: Sequence[Group]) -> Drawn:
    """Shuffle, and set aside what the curriculum begins with."""
    own, batch = problem.own_lengths, problem.global_batch_tokens
    shuffle = shuffled(len(own), problem.rng)
    total = int(own.sum(dtype=np.int64))
    n_steps = wanted_steps(total, batch)
    asked = default_short_steps(n_steps) if problem.short_steps is None else problem.short_steps
    lowest = min(group.sp_degree for group in groups)
    short = own[shuffle] <= max(group.capacity for group in groups if group.sp_degree == lowest)
    early = np.zeros(len(shuffle), bool)
    if asked and not short.all():
        # From all over the shuffle (multiples of the golden ratio, modulo 1, are even on every stretch): were they its
        # first, the steps after the curriculum would hold long samples alone.
        at = np.flatnonzero(short)
        at = at[np.argsort(np.arange(len(at)) * GOLDEN % 1, kind="stable")]
        early[at[np.cumsum(own[shuffle[at]], dtype=np.int64) <= asked * batch]] = True
    tokens = int(own[shuffle][early].sum(dtype=np.int64))
    early_steps = min(n_steps - 1, round(tokens / batch))
    if early_steps < 1:
        early[:] = False
    early_steps = max(0, early_steps)
    return Drawn(shuffle, shuffle[early], shuffle[~early], early_steps, n_steps - early_steps, asked)


def fastest(problem: Problem, groups: Sequence[Group]) -> Outcome:
    """The least predicted time (module docstring)."""
    windowed = _windowed(problem, groups)
    if _is_settled(problem) or _is_efficient(problem, known := worth(problem, windowed)):
        return windowed
    drawn, kept = _kept(problem, groups, known, windowed)
    _, best = min(kept, key=lambda one: one[0].seconds)
    return best if best is windowed else _detailed(best, travel(problem, best, drawn.shuffle))


def _is_settled(problem: Problem) -> bool:
    """Whether steps are as large as alike packs want them, or these were asked for."""
    return not problem.batch_given or problem.windows is not None


def _is_efficient(problem: Problem, known: Worth) -> bool:
    bound = lower_bound(problem.own_lengths, problem.cost, steps=known.n_steps, max_length=problem.longest)
    return bound >= EFFICIENT * known.seconds


def random(problem: Problem, groups: Sequence[Group]) -> Outcome:
    """The shuffle cut into steps, each packed apart."""
    quickest = worth(problem, fastest(_again(problem), groups)).seconds
    drawn, own = draw(problem, groups), problem.own_lengths
    step = np.empty(len(own), np.int64)
    step[drawn.early] = cut_shuffle(own[drawn.early], drawn.early_steps)
    step[drawn.rest] = cut_shuffle(own[drawn.rest], drawn.rest_steps) + drawn.early_steps
    laid = pack_steps(own, step, StepCosts(problem.cost, int(own.max()), problem.longest))
    outcome = outcome_of(problem, laid, groups, drawn.short_steps)
    return _detailed(
        outcome,
        {**travel(problem, outcome, drawn.shuffle), **_price(worth(problem, outcome).seconds, quickest)},
    )


def balanced(problem: Problem, groups: Sequence[Group]) -> Outcome:
    """The least drift at a price of :data:`PRICE` at most (module docstring)."""
    windowed = _windowed(problem, groups)
    known = worth(problem, windowed)
    drawn, kept = _kept(problem, groups, known, windowed)
    taken = _is_settled(problem) or _is_efficient(problem, known)  # by `fastest`
    quickest = known if taken else min((own for own, _ in kept), key=lambda own: own.seconds)
    found = [(own, outcome) for own, outcome in kept if own.seconds <= quickest.seconds * (1 + PRICE)]
    near = min(min(own.drift for own, _ in found) + AS_NEAR, quickest.drift)
    own, best = min((one for one in found if one[0].drift <= near), key=lambda one: one[0].seconds)
    if best is windowed:
        return _detailed(best, {"price": own.seconds / quickest.seconds - 1})
    return _detailed(best, {**travel(problem, best, drawn.shuffle), **_price(own.seconds, quickest.seconds)})


def _kept(
    problem: Problem, groups: Sequence[Group], known: Worth, windowed: Outcome
) -> tuple[Drawn, list[tuple[Worth, Outcome]]]:
    """Of this plan and all that are made step by step, those with as many steps as they should have."""
    drawn, wanted = draw(problem, groups), wanted_steps(_tokens(problem), problem.global_batch_tokens)
    each = [(worth(problem, outcome), outcome) for outcome in _candidates(problem, groups, drawn)]
    kept = [(own, outcome) for own, outcome in each if close(own.n_steps, wanted) or own.n_steps == known.n_steps]
    return drawn, [(known, windowed), *kept]


def _tokens(problem: Problem) -> int:
    return int(problem.own_lengths.sum(dtype=np.int64))


def _again(problem: Problem) -> Problem:
    """The same problem, for a plan that draws nothing from this one's random choices."""
    return replace(problem, rng=copy.deepcopy(problem.rng))


def _windowed(problem: Problem, groups: Sequence[Group]) -> Outcome:
    return windowed_schedule(_again(problem), groups)


def _price(seconds: float, quickest: float) -> dict[str, float]:
    return {"price": seconds / quickest - 1, "speed_given_up": max(0.0, 1 - quickest / seconds)}


def _detailed(outcome: Outcome, more: Mapping[str, float]) -> Outcome:
    return replace(outcome, details={**outcome.details, **more})


def _candidates(problem: Problem, groups: Sequence[Group], drawn: Drawn) -> Iterator[Outcome]:
    """Plans whose steps are dealt evenly."""
    costs = StepCosts(problem.cost, int(problem.own_lengths.max()), problem.longest)
    alike = ALIKE * problem.global_batch_tokens / problem.world_size
    for long_groups, over in (((), alike), ((), np.inf), (groups, alike)):
        yield outcome_of(problem, _dealt(problem, long_groups, over, drawn, costs), groups, drawn.short_steps)


def _dealt(problem: Problem, groups: Sequence[Group], alike: float, drawn: Drawn, costs: StepCosts) -> Laid:
    """Micro-steps of long packs of these groups dealt to steps, and the other samples as the steps have room for them.

    With no groups there are none of these micro-steps.
    """
    own, rng = problem.own_lengths, copy.deepcopy(problem.rng)
    parts: list[tuple[Int, Laid]] = []
    batch, others = float(problem.global_batch_tokens), drawn.rest
    if drawn.early_steps:
        step = deal_evenly(own[drawn.early], np.full(drawn.early_steps, batch), alike, rng)
        parts.append((drawn.early, pack_steps(own[drawn.early], step, costs)))
    room = np.full(drawn.rest_steps, own[drawn.rest].sum(dtype=np.int64) / drawn.rest_steps)
    if groups:
        samples, laid = _long_micro_steps(problem, groups, drawn, rng)
        if len(samples):
            parts.append((samples, laid))
            others = np.setdiff1d(drawn.rest, samples, assume_unique=True)
            room -= np.bincount(laid.step[laid.pack_of] - drawn.early_steps, own[samples], len(room))
    if len(others):
        step = deal_evenly(own[others], np.maximum(room, 0.0), alike, rng) + drawn.early_steps
        parts.append((others, pack_steps(own[others], step, costs)))
    return joined(parts, len(own))


def _long_micro_steps(
    problem: Problem, groups: Sequence[Group], drawn: Drawn, rng: np.random.Generator
) -> tuple[Int, Laid]:
    """Of a plan of all samples but the curriculum's: the micro-steps that hold more than its shortest packs.

    Returns:
        Their samples, and their packs with the steps that they are dealt to.
    """
    own, none = problem.own_lengths, np.zeros(0, np.int64)
    rest = drawn.rest.astype(np.int64)
    lengths = own[rest]
    counts = np.bincount(lengths)
    costs = PackCosts(problem.cost, len(counts) - 1)
    packed = pack_histogram(counts.copy(), groups, costs, problem.world_size, rng, last=True)
    bottom = next(group for group in groups if group.capacity >= int(lengths.min()))
    shortest = [g.sp_degree == bottom.sp_degree and g.capacity <= bottom.capacity for g in packed.groups]
    long = np.zeros(int(packed.micro_step.max()) + 1, bool)
    long[packed.micro_step[~np.array(shortest)[packed.group]]] = True
    if not long.any():
        return none, Laid(none, none, none, none, none, none)
    # Samples of a length are alike: the random order that they come in decides which of them is where.
    by_length = counting_sort(rest, lengths, len(counts) - 1)
    placed = np.argsort(packed.taken, kind="stable")
    sample = np.empty(len(placed), np.int64)
    sample[placed] = by_length
    mine = long[packed.micro_step[packed.pack_of]]
    keep = long[packed.micro_step]
    number = np.cumsum(keep) - 1
    micro = (np.cumsum(long) - 1)[packed.micro_step[keep]]
    pack_of = number[packed.pack_of[mine]]
    step, place = _deal_micro_steps(micro[pack_of], packed.taken[mine], drawn.rest_steps, rng)
    settings = np.array([(g.sp_degree, g.gc_layers, g.capacity) for g in packed.groups])[packed.group[keep]]
    return sample[mine], Laid(pack_of, step[micro] + drawn.early_steps, place[micro], *settings.T)


def _deal_micro_steps(micro: Int, lengths: Int, n_steps: int, rng: np.random.Generator) -> tuple[Int, Int]:
    """Step of each micro-step and its place there: those of the longest samples first, to the step of fewest tokens.

    Args:
        micro: micro-step of each sample ``[N]``.
        lengths: of each ``[N]``.
        n_steps: to deal to.
        rng: which of two equal steps is first.
    """
    tokens, documents = np.bincount(micro, lengths), np.bincount(micro)
    step, place = np.empty((2, len(tokens)), np.int64)
    heap = [(0.0, int(tie), s, 0) for s, tie in enumerate(rng.permutation(n_steps))]
    heapq.heapify(heap)
    for m in np.argsort(-(tokens / documents), kind="stable").tolist():
        filled, tie, s, held = heapq.heappop(heap)
        step[m], place[m] = s, held
        heapq.heappush(heap, (filled + float(tokens[m]), tie, s, held + 1))
    return step, place


ORDERED: Mapping[str, Callable[[Problem, Sequence[Group]], Outcome]] = {
    "fastest": fastest,
    "balanced": balanced,
    "random": random,
}
"""By the name of the setting (:data:`hbp.plan_info.ORDERS`)."""

"""Which packing lengths and degrees a strategy is planned at before the fastest plan is kept.

A strategy with one static setting may have the longest sample's packing length at every SP degree that fits memory;
where the user set no limit its doublings too, since short samples run faster in longer packs where FSDP's traffic or
launches weigh. `hbp` may have each of these lengths as the longest one of Algorithm 1.

Every choice comes with seconds that no plan of it can beat (packs full to the last token, ranks that finish together),
so planning may stop at the first choice that promises no more than the best plan so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group
from hbp.planning.packs import Lengths
from hbp.planning.paper.groups import (
    Choice,
    SamplesByLength,
    longest_settings,
    published_groups,
    settings_that_fit,
)

LONGEST_PACK = int(np.iinfo(np.int32).max)
"""As the plan file counts tokens."""


def settings_to_try(
    strategy: str, cost: CostModel, lengths: Lengths, longest: int, *, longer: bool, batch: int | None
) -> list[Choice]:
    """Settings for a strategy, the most promising first, with the least seconds that a plan of each may take.

    Args:
        strategy: a key of ``STRATEGIES``.
        cost: of the run.
        lengths: of the samples to plan, none over `longest`.
        longest: the shortest packing length.
        longer: whether its doublings may be taken too.
        batch: tokens of an optimizer step that the user asked for, which no micro-step of longer packs may exceed.

    Raises:
        HbpError: packs of `longest` tokens fit memory at no degree.
    """
    choices = longest_settings(cost, lengths, longest)
    if strategy == "hbp-mixed":  # finds its own
        return choices[:1]
    if longer and strategy != "sorted":  # it has one sample a pack
        choices += _doublings(cost, lengths, longest, batch)
    total, _ = SamplesByLength(cost, lengths).between(0, longest)
    if strategy == "hbp":  # the degree is its own choice
        choices = _lengths_of_algorithm_1(cost, lengths, longest, choices, batch)
    if strategy == "dcp":  # at best no sample communicates
        alone = [Group(c.group.capacity // c.group.sp_degree, 1, c.group.gc_layers) for c in choices]
        choices = [
            replace(c, seconds=_least_seconds(cost, [group], total)) for c, group in zip(choices, alone, strict=True)
        ]
    return sorted(choices, key=lambda choice: choice.seconds)


def _lengths_of_algorithm_1(
    cost: CostModel, lengths: Lengths, longest: int, choices: list[Choice], batch: int | None
) -> list[Choice]:
    """Longest lengths that Algorithm 1 has samples for; of longer ones it takes a half or a quarter, no more."""
    total, most = SamplesByLength(cost, lengths).between(0, longest)[0], int(lengths.max())
    found: dict[int, Choice] = {}
    for choice in choices:
        groups = published_groups(cost, lengths, choice.group.capacity)
        used = len(groups) == 1 or groups[-2].capacity < most
        fits = batch is None or max(_micro_step(cost, group) for group in groups) <= batch
        if choice.group.capacity == longest or (used and fits):
            found.setdefault(choice.group.capacity, replace(choice, seconds=_least_seconds(cost, groups, total)))
    return list(found.values())


def _least_seconds(cost: CostModel, groups: Sequence[Group], total: Work) -> float:
    """Seconds that no plan in which these groups share the samples can beat: the least of each part of the cost."""
    spent = [(group.sp_degree, cost.seconds(group.sp_degree, group.gc_layers)) for group in groups]
    micro_steps = float(total.tokens[0]) / max(_micro_step(cost, group) for group in groups)
    busy = micro_steps * min(s.fixed for _, s in spent) + sum(
        min(d * getattr(s, f"per_{part}") for d, s in spent) * float(amount[0]) / cost.world_size
        for part, amount in (("document", total.documents), ("token", total.tokens), ("pair", total.pairs))
    )
    return busy + max(0.0, micro_steps * spent[0][1].fsdp - spent[0][1].overlap * busy)


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
            if _micro_step(cost, choice.group) < 2 * float(total.tokens[0])
            and (batch is None or _micro_step(cost, choice.group) <= batch)
        ]
        if not here:
            break
        found += here
        capacity *= 2
    return found


def _micro_step(cost: CostModel, group: Group) -> int:
    """Tokens of one micro-step of full packs."""
    return cost.world_size // group.sp_degree * group.capacity

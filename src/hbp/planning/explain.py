"""Why a plan has the groups it has: what `hbp plan --explain` prints.

For each group: which samples are at home there and what share of the predicted time it runs; what other SP degrees
would need (recomputed layers) at this length, and what the run would take with them; and what it would take without the
group, its samples going to the next longer one. Where a strategy searches its groups, the run is planned with each of
these changes, on a sample, as the search does (:class:`hbp.planning.mixed.groups.Trial`), for the next degrees up and
down. That of other strategies is the time of packs that are full and evenly spread, which is what Algorithm 1 goes by.

Complexity: three plans of a sample for each group; or groups × degrees predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hbp.cost.predict import CostModel
from hbp.plan import Group, Plan
from hbp.planning.mixed.groups import Trial
from hbp.planning.packs import Lengths
from hbp.planning.planner import STRATEGIES
from hbp.planning.settings import SamplesByLength, group_seconds
from hbp.progress import Progress

Price = Callable[[tuple[Group, ...]], float]
"""Seconds of the run with these groups."""


@dataclass(frozen=True)
class Setting:
    """One SP degree at a group's length."""

    sp_degree: int
    gc_layers: int | None
    """Fewest recomputed layers that fit; None if not even all do."""
    slower: float | None
    """Time of the run over that with the group's own degree, less 1; None where nothing fits."""


@dataclass(frozen=True)
class Reason:
    """Why a group is there and runs as it does. Samples and tokens are counted at their home."""

    group: Group
    home: bool
    """False where it was made for what filled none of the groups, of whatever length."""
    above: int
    """Its own samples are longer than this."""
    samples: int
    tokens_share: float
    time_share: float
    """Of the plan's predicted rank-seconds, all packs of the group."""
    micro_steps: int
    settings: tuple[Setting, ...]
    without: float | None
    """How much longer the run would take without the group, as a share; None for the longest, and for no home."""

    def __str__(self) -> str:
        g, others = self.group, []
        for s in self.settings:
            if s.gc_layers is None or s.slower is None:
                others.append(f"SP {s.sp_degree} does not fit memory")
            else:
                others.append(f"SP {s.sp_degree} / GC {s.gc_layers} {s.slower:+.2%}")
        name = f"{g.capacity:,} / SP {g.sp_degree} / GC {g.gc_layers}"
        if not self.home:
            micro_steps = "the last micro-step" if self.micro_steps == 1 else f"{self.micro_steps:,} micro-steps"
            return f"{name}: {micro_steps}, of what was left; {self.time_share:.1%} of the time"
        text = (
            f"{name}: home of {self.samples:,} samples of "
            f"{self.above + 1:,} to {g.capacity:,} tokens ({self.tokens_share:.1%} of tokens); "
            f"{self.time_share:.1%} of the time"
        )
        text += f"; the run with {', '.join(others)}" if others else ""
        if self.without is not None:
            text += f"; the run without this group {self.without:+.2%}"
        return text


def explain(plan: Plan, cost: CostModel, lengths: Lengths) -> list[Reason]:
    """One reason a group, in order of rising capacity; none of a plan in another order than `fastest`.

    Args:
        plan: made for `lengths` by `cost`.
        cost: predicts.
        lengths: of the whole data set.
    """
    if "order" in plan.info.settings:  # packs are made step by step; groups only list what came of it
        return []
    groups, index = sorted(plan.info.groups), plan.micro_step_index()
    samples = SamplesByLength(cost, lengths[lengths <= groups[-1].capacity])
    busy = plan.predicted_s.astype(np.float64) * plan.sp_degree
    homes = _homes(groups, [Group(**group) for group in plan.info.settings.get("extra_groups", ())])
    strategy = STRATEGIES.get(plan.info.strategy)
    tried = strategy is not None and strategy.finds_groups
    price: Price = partial(_run_seconds, cost, samples)
    if tried:
        price = Trial(cost, samples, min(cost.world_size, 2 * max(group.sp_degree for group in homes))).seconds
    whole = price(tuple(homes))
    reasons, above = [], 0
    with Progress("explain", len(groups)) as progress:
        for group in groups:
            home = group in homes
            own, _ = samples.between(above, group.capacity) if home else samples.between(0, 0)
            mine = (plan.capacity == group.capacity) & (plan.sp_degree == group.sp_degree)
            mine &= plan.gc_layers == group.gc_layers
            others = tuple(other for other in homes if other != group)
            fewer = price(others) if home and group != homes[-1] else None
            degrees = [d for d in cost.degrees() if not tried or d in (group.sp_degree // 2, group.sp_degree * 2)]
            reasons.append(
                Reason(
                    group,
                    home,
                    above,
                    int(own.documents[0]),
                    float(own.tokens[0] / samples.tokens[-1]),
                    float(busy[mine].sum() / busy.sum()),
                    len(np.unique(index[mine])),
                    _settings(cost, price, homes, group, degrees) if home else (),
                    None if fewer is None else fewer / whole - 1,
                )
            )
            above = group.capacity if home else above
            progress.advance(f"{group.capacity:,} tokens")
    return reasons


def _homes(groups: Sequence[Group], extra: Sequence[Group]) -> list[Group]:
    """Groups that samples are at home in: all but extra ones that are a shorter form of another group of the plan."""

    def shorter(group: Group) -> bool:
        alike = (other for other in groups if other not in extra and other.capacity > group.capacity)
        return (group.sp_degree, group.gc_layers) in {(other.sp_degree, other.gc_layers) for other in alike}

    return [group for group in groups if group not in extra or not shorter(group)]


def _settings(
    cost: CostModel, price: Price, homes: Sequence[Group], group: Group, degrees: Sequence[int]
) -> tuple[Setting, ...]:
    """What other degrees need and what the run takes with each."""
    found, whole, at = [], price(tuple(homes)), homes.index(group)
    for degree in degrees:
        if degree == group.sp_degree:
            continue
        gc_layers = cost.fewest_gc_layers(group.capacity, degree)
        slower = None
        if gc_layers is not None:
            changed = (*homes[:at], Group(group.capacity, degree, gc_layers), *homes[at + 1 :])
            slower = price(changed) / whole - 1
        found.append(Setting(degree, gc_layers, slower))
    return tuple(found)


def _run_seconds(cost: CostModel, samples: SamplesByLength, groups: Sequence[Group]) -> float:
    total, above = 0.0, 0
    for group in groups:
        work, longest = samples.between(above, group.capacity)
        if work.tokens[0]:
            total += group_seconds(cost, group, work, longest)
        above = group.capacity
    return total

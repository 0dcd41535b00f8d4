"""Why a plan has the groups it has: what `hbp plan --explain` prints.

For each group: which samples are at home there and what share of the predicted time it runs; what each SP degree would
need (recomputed layers) and cost at this length, on packs full of those samples; and what the run would take without
the group, its samples going to the next longer one. Figures are predictions of full, evenly spread packs.

Complexity: groups × degrees predictions after one count of the lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group, Plan
from hbp.planning.groups import SamplesByLength, group_seconds
from hbp.planning.packs import Lengths


@dataclass(frozen=True)
class Setting:
    """One SP degree at a group's length."""

    sp_degree: int
    gc_layers: int | None
    """Fewest recomputed layers that fit; None if not even all do."""
    slower: float | None
    """Time over that of the group's own degree, less 1; None where nothing fits."""


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
            if s.sp_degree == g.sp_degree:
                continue
            if s.gc_layers is None or s.slower is None:
                others.append(f"SP {s.sp_degree} does not fit memory")
            else:
                others.append(f"SP {s.sp_degree} / GC {s.gc_layers} {s.slower:+.1%}")
        name = f"{g.capacity:,} / SP {g.sp_degree} / GC {g.gc_layers}"
        if not self.home:
            micro_steps = "the last micro-step" if self.micro_steps == 1 else f"{self.micro_steps:,} micro-steps"
            return f"{name}: {micro_steps}, of what was left; {self.time_share:.1%} of the time"
        text = (
            f"{name}: home of {self.samples:,} samples of "
            f"{self.above + 1:,} to {g.capacity:,} tokens ({self.tokens_share:.1%} of tokens); "
            f"{self.time_share:.1%} of the time"
        )
        text += f"; time with {', '.join(others)}" if others else ""
        if self.without is not None:
            text += f"; without this group {self.without:+.2%}"
        return text


def explain(plan: Plan, cost: CostModel, lengths: Lengths) -> list[Reason]:
    """One reason a group, in order of rising capacity.

    Args:
        plan: made for `lengths` by `cost`.
        cost: predicts.
        lengths: of the whole data set.
    """
    groups, index = sorted(plan.info.groups), plan.micro_step_index()
    samples = SamplesByLength(cost, lengths[lengths <= groups[-1].capacity])
    busy = plan.predicted_s.astype(np.float64) * plan.sp_degree
    homes = _homes(groups, [Group(**group) for group in plan.info.settings.get("extra_groups", ())])
    whole = _run_seconds(cost, samples, homes)
    reasons, above = [], 0
    for group in groups:
        home = group in homes
        own, _ = samples.between(above, group.capacity) if home else samples.between(0, 0)
        mine = (plan.capacity == group.capacity) & (plan.sp_degree == group.sp_degree)
        mine &= plan.gc_layers == group.gc_layers
        others = [other for other in homes if other != group]
        fewer = _run_seconds(cost, samples, others) if home and group != homes[-1] else None
        reasons.append(
            Reason(
                group,
                home,
                above,
                int(own.documents[0]),
                float(own.tokens[0] / samples.tokens[-1]),
                float(busy[mine].sum() / busy.sum()),
                len(np.unique(index[mine])),
                _settings(cost, group, own),
                None if fewer is None else fewer / whole - 1,
            )
        )
        above = group.capacity if home else above
    return reasons


def _homes(groups: Sequence[Group], extra: Sequence[Group]) -> list[Group]:
    """Groups that samples are at home in: all but extra ones that are a shorter form of another group of the plan."""

    def shorter(group: Group) -> bool:
        alike = (other for other in groups if other not in extra and other.capacity > group.capacity)
        return (group.sp_degree, group.gc_layers) in {(other.sp_degree, other.gc_layers) for other in alike}

    return [group for group in groups if group not in extra or not shorter(group)]


def _settings(cost: CostModel, group: Group, own: Work) -> tuple[Setting, ...]:
    share = group.capacity / max(float(own.tokens[0]), 1.0)
    if own.tokens[0]:
        pack = Work(own.documents * share, own.tokens * share, own.pairs * share)
    else:
        pack = cost.work(np.array([group.capacity]))
    fewest = {degree: cost.fewest_gc_layers(group.capacity, degree) for degree in cost.degrees()}
    rank_seconds = {d: float(cost.seconds(d, k).of(pack)[0]) * d for d, k in fewest.items() if k is not None}
    chosen = float(cost.seconds(group.sp_degree, group.gc_layers).of(pack)[0]) * group.sp_degree
    return tuple(Setting(d, k, rank_seconds[d] / chosen - 1 if k is not None else None) for d, k in fewest.items())


def _run_seconds(cost: CostModel, samples: SamplesByLength, groups: Sequence[Group]) -> float:
    total, above = 0.0, 0
    for group in groups:
        work, longest = samples.between(above, group.capacity)
        if work.tokens[0]:
            total += group_seconds(cost, group, work, longest)
        above = group.capacity
    return total

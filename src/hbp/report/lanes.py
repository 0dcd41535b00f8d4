"""A strategy's micro-steps on some ranks, as a plan predicts them or a run measured them: what the timelines draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.plan import Group, Plan
from hbp.run_log import StepRecord
from hbp.simulator import Timeline, timeline

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lane:
    """``R`` ranks and ``M`` micro-steps drawn, from the start of the run."""

    title: str
    begin_s: Float  # [R, M]
    busy_s: Float  # [R, M]
    wall_s: Float  # [R, M] busy and waiting
    group: Int  # [R, M] index into the groups that the page numbers, -1 idle
    end_s: float
    """When the whole run ends, drawn or not."""


def all_groups(plans: Sequence[Plan]) -> list[Group]:
    """The groups of several plans, each once, in their order: what a page numbers."""
    return list(dict.fromkeys(group for plan in plans for group in plan.groups_of_rows()[0]))


def number_of_rows(plan: Plan, groups: Sequence[Group]) -> Int:
    """Which of the page's groups each row of a plan is of, int64 ``[P]``."""
    own, index = plan.groups_of_rows()
    return np.array([groups.index(group) for group in own], np.int64)[index]


def predicted(plan: Plan, title: str, groups: Sequence[Group], ranks: int, micro_steps: int, end_s: float) -> Lane:
    """The first ranks and micro-steps of a plan, as it is simulated."""
    played = timeline(plan, 0, micro_steps, range(min(ranks, plan.info.world_size)))
    shape = played.row.shape
    begin, wall = np.broadcast_to(played.begin_s, shape), np.broadcast_to(played.wall_s, shape)
    return Lane(title, begin, np.broadcast_to(played.busy_s(), shape), wall, _groups(plan, played, groups), end_s)


def measured(
    plan: Plan, title: str, groups: Sequence[Group], ranks: int, micro_steps: int, log: Sequence[StepRecord]
) -> Lane:
    """The same of a run, from the lines of its log; of as many micro-steps as it has rank by rank.

    Raises:
        ValueError: it has none.
    """
    ranks = min(ranks, plan.info.world_size)
    logged = [step for step in log if step.rank_wall_s]
    walls = [np.array(step.rank_wall_s, np.float64)[:ranks] for step in logged]
    begins = [step.started_s + np.cumsum(wall, axis=1) - wall for step, wall in zip(logged, walls, strict=True)]
    busy = [np.array(step.rank_busy_s, np.float64)[:ranks] for step in logged]
    begin_s, busy_s, wall_s = (np.concatenate(x, axis=1)[:, :micro_steps] for x in (begins, busy, walls))
    played = timeline(plan, 0, begin_s.shape[1], range(ranks))
    end_s = log[-1].started_s + log[-1].seconds
    return Lane(title, begin_s, busy_s, wall_s, _groups(plan, played, groups), end_s)


def _groups(plan: Plan, played: Timeline, groups: Sequence[Group]) -> Int:
    number = number_of_rows(plan, groups)
    return np.where(played.row >= 0, number[np.maximum(played.row, 0)], -1)


def shared_waiting(log: Sequence[StepRecord]) -> float | None:
    """Share of the logged micro-steps' time in which no rank at all worked; None where nothing is logged rank by rank.

    Ranks wait for the slowest, which works: so on a machine that runs nothing else this is a few per cent (exchanges,
    clocks). More of it means that another program had the processors.
    """
    waited = walls = 0.0
    for step in log:
        if step.rank_wall_s:
            wall, busy = (np.array(seconds, np.float64) for seconds in (step.rank_wall_s, step.rank_busy_s))
            waited += float((wall - busy).min(axis=0).sum())
            walls += float(wall.max(axis=0).sum())
    return waited / walls if walls else None

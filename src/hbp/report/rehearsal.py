"""What `hbp rehearse` measured of a plan, on the plan's page: its ranks' time, measured beside predicted, and memory.

Reads the file that the command keeps (``rehearsal.json``); what measured it is not known here. The timelines show the
rehearsed micro-steps one after another as if the run had no others, compute alone: what the network adds is predicted
and stands in the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError
from hbp.plan import Group, Plan
from hbp.report import figures
from hbp.report.figures import Mark
from hbp.report.lanes import Float, Lane, number_of_rows

FILE_NAME = "rehearsal.json"
DRAWN_RANKS = 32
GIB = 2.0**30


@dataclass(frozen=True, eq=False)
class RehearsedPlan:
    """Cells ``[R]``: one rank in one micro-step each."""

    plan: Plan
    data: Mapping[str, Any]
    micro: npt.NDArray[np.int64]  # [R] counted over the rehearsed ones, in the plan's order
    rank: npt.NDArray[np.int64]  # [R]
    row: npt.NDArray[np.int64]  # [R] of the plan, -1 idle
    measured_s: Float  # [R] NaN where memory ran out
    predicted_s: Float  # [R]


def find_rehearsals(plans: Sequence[tuple[Path, Plan]], file: Path | None = None) -> list[RehearsedPlan]:
    """The rehearsals of some plans: those in a file, or each plan's own beside it.

    Args:
        plans: with the folders that hold them.
        file: that `hbp rehearse --out` wrote; None: ``rehearsal.json`` of each folder that has one of this very plan.

    Raises:
        HbpError: the file cannot be read, or holds a rehearsal of none of the plans.
    """
    if file is not None:
        data = _read(file)
        every = data.get("plans", [data])
        mine = [(plan, one) for _, plan in plans for one in every if one.get("plan_fingerprint") == plan.fingerprint()]
        if not mine:
            raise HbpError(f"{file} holds no rehearsal of this plan; make one with `hbp rehearse {plans[0][0]}`")
        return [_rehearsed(plan, one) for plan, one in mine]
    kept = [(plan, _read(folder / FILE_NAME)) for folder, plan in plans if (folder / FILE_NAME).is_file()]
    return [_rehearsed(plan, one) for plan, one in kept if one.get("plan_fingerprint") == plan.fingerprint()]


def _read(file: Path) -> Any:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise HbpError(f"cannot read the rehearsal {file} ({error}); make it again with `hbp rehearse`") from None
    if not isinstance(data, dict):
        raise HbpError(f"{file} is no rehearsal; make it again with `hbp rehearse`")
    return data


def _rehearsed(plan: Plan, data: Mapping[str, Any]) -> RehearsedPlan:
    rows = data["rows"]
    step, micro_step, rank = (np.array([row[name] for row in rows]) for name in ("step", "micro_step", "rank"))
    _, micro = np.unique(np.stack([step, micro_step], axis=1), axis=0, return_inverse=True)
    key = plan.step.astype(np.int64) << 16 | plan.micro_step
    row_of = [
        _row_of(plan, np.flatnonzero(key == (int(s) << 16 | int(m))), int(r))
        for s, m, r in zip(step, micro_step, rank, strict=True)
    ]
    seconds = [math.nan if row["measured_s"] is None else row["measured_s"] for row in rows]
    predicted = np.array([row["predicted_s"] for row in rows], np.float64)
    return RehearsedPlan(plan, data, micro.ravel(), rank, np.array(row_of), np.array(seconds), predicted)


def _row_of(plan: Plan, rows: npt.NDArray[np.int64], rank: int) -> int:
    """Which of a micro-step's rows a rank runs; -1 for none."""
    first = plan.rank_start[rows]
    mine = rows[(first <= rank) & (rank < first + plan.sp_degree[rows])]
    return int(mine[0]) if len(mine) else -1


def rehearsal_numbers(found: RehearsedPlan) -> dict[str, Any]:
    """For the page, and for ``report.json``."""
    data, plan = found.data, found.plan
    budget, peak = data["memory_budget_bytes"], data["peak_bytes"]
    names = (
        "device", "world_size", "micro_steps", "of_micro_steps", "all_ranks", "step_s", "step_s_interval",
        "predicted_step_s", "communication_step_s", "idle_share", "predicted_idle_share", "noise",
    )  # fmt: skip
    return {
        "strategy": plan.info.strategy,
        **{name: data[name] for name in names},
        "peak_bytes": peak,
        "memory_budget_bytes": budget,
        "fits": peak is not None and peak <= budget,
    }


def rehearsal_lanes(found: RehearsedPlan, groups: Sequence[Group]) -> list[Lane]:
    """The rehearsed micro-steps of the first ranks: measured, and the same as predicted."""
    name, n = found.plan.info.strategy, f"{found.data['micro_steps']} of {found.data['of_micro_steps']:,} micro-steps"
    measured, predicted = np.nan_to_num(found.measured_s), found.predicted_s
    return [
        _lane(found, f"{name}, measured compute: {n}", measured, groups),
        _lane(found, f"{name}, predicted compute of the same", predicted, groups),
    ]


def _lane(found: RehearsedPlan, title: str, seconds: Float, groups: Sequence[Group]) -> Lane:
    n_micro, ranks = int(found.micro.max()) + 1, min(DRAWN_RANKS, found.plan.info.world_size)
    longest = np.zeros(n_micro)
    np.maximum.at(longest, found.micro, seconds)
    begin = np.cumsum(longest) - longest
    shape, drawn = (ranks, n_micro), found.rank < ranks
    at = found.rank[drawn], found.micro[drawn]
    busy, wall, group = np.zeros(shape), np.zeros(shape), np.full(shape, -1)
    busy[at], wall[at] = seconds[drawn], longest[found.micro[drawn]]
    row = found.row[drawn]
    group[at] = np.where(row >= 0, number_of_rows(found.plan, groups)[np.maximum(row, 0)], -1)
    return Lane(title, np.tile(begin, (ranks, 1)), busy, wall, group, float(longest.sum()))


def rehearsal_pictures(every: Sequence[RehearsedPlan], groups: Sequence[Group]) -> dict[str, str]:
    """Timelines of all, and their scatters of seconds and of memory."""
    lanes = [lane for found in every for lane in rehearsal_lanes(found, groups)]
    drawn = {
        "rehearsed": figures.timelines(lanes, groups),
        "rehearsed_narrow": figures.timelines(lanes, groups, narrow=True),
    }
    seconds, memory = [], []
    for found in every:
        for row, at, measured, predicted in zip(
            found.data["rows"], found.row.tolist(), found.measured_s.tolist(), found.predicted_s.tolist(), strict=True
        ):
            if at < 0 or not measured > 0:  # idle, or out of memory
                continue
            kind = int(found.plan.sp_degree[at]), bool(found.plan.gc_layers[at])
            seconds.append(Mark(measured, max(predicted, 1e-9), *kind))
            memory.append(Mark(row["peak_bytes"] / GIB, row["predicted_bytes"] / GIB, *kind))
    if seconds:
        drawn["rehearsed_seconds"] = figures.scatter(seconds, "seconds of a rank's compute", "rehearsed-seconds")
        drawn["rehearsed_memory"] = figures.scatter(memory, "peak memory of a rank, GiB", "rehearsed-memory")
    return drawn

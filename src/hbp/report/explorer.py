"""The data behind the page's zoomable timelines: every drawn rank's micro-steps, cut into the parts of its time.

Plain data for ``explorer.js``, which draws it. A lane is one strategy, predicted or measured; ``R`` ranks and ``M``
micro-steps of it are drawn, as many as :data:`MOST_CELLS` allows, from the start of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.plan import Group, Plan
from hbp.report.figures import PART_COLOURS, group_name, kinds_of
from hbp.report.lanes import Lane, number_of_rows
from hbp.simulator import PART_NAMES, timeline

MOST_RANKS = 32
MOST_CELLS = 8_000
"""Ranks times micro-steps of a lane: about 400 KB of the page."""


def window(plan: Plan) -> tuple[int, int]:
    """Ranks and micro-steps of a plan that are drawn."""
    ranks = min(MOST_RANKS, plan.info.world_size)
    return ranks, min(MOST_CELLS // ranks, len(plan.micro_step_seconds()))


def predicted_lane(plan: Plan, title: str, groups: Sequence[Group]) -> dict[str, Any]:
    """What the simulator says of a plan.

    Args:
        plan: to be played.
        title: of the lane.
        groups: that the page numbers, all of the plan's among them.
    """
    ranks, count = window(plan)
    played = timeline(plan, 0, count, range(ranks))
    rows, where = np.unique(played.row, return_index=True)
    spent = np.array([seconds.ravel()[where] for seconds in played.parts.values()])  # [parts, rows]
    spent = spent.reshape(len(played.parts), len(rows))  # no parts: nothing is predicted to take time
    tokens, documents = plan.tokens(), np.diff(plan.sample_offsets)
    number = number_of_rows(plan, groups)
    packs = [
        [int(number[row]), int(tokens[row]), int(documents[row]), *_seconds(seconds)]
        for row, seconds in zip(rows.tolist(), spent.T, strict=True)
        if row >= 0
    ]
    idle = int((rows < 0).any())  # counted among the rows, has no pack
    return {
        "title": title,
        "begin": _seconds(played.begin_s),
        "wall": _seconds(played.wall_s),
        "step": plan.step[np.unique(plan.micro_step_index(), return_index=True)[1]][:count].tolist(),
        "cell": (np.searchsorted(rows, played.row) - idle).tolist(),
        "parts": list(played.parts),
        "packs": packs,
    }


def measured_lane(lane: Lane, steps: Sequence[int]) -> dict[str, Any]:
    """What a run logged: each rank's own work in each micro-step, the rest of which it waited.

    Args:
        lane: as drawn in the picture of the timelines.
        steps: optimizer step of each micro-step.
    """
    ranks, count = lane.busy_s.shape
    cell = np.arange(ranks * count).reshape(ranks, count)
    return {
        "title": lane.title,
        "begin": [_seconds(begin) for begin in lane.begin_s],
        "wall": [_seconds(wall) for wall in lane.wall_s],
        "step": list(steps)[:count],
        "cell": cell.tolist(),
        "parts": ["unsplit"],
        "packs": [
            [int(group), None, None, *_seconds(np.array([busy]))]
            for group, busy in zip(lane.group.ravel(), lane.busy_s.ravel(), strict=True)
        ],
    }


def explorer_data(lanes: Sequence[dict[str, Any]], groups: Sequence[Group]) -> dict[str, Any]:
    """All that ``explorer.js`` needs."""
    return {
        "lanes": list(lanes),
        "groups": [
            {"name": group_name(group), "kind": kind.name, "colour": kind.colour}
            for group, kind in zip(groups, kinds_of(groups), strict=True)
        ],
        "parts": {
            name: {"name": "work" if name == "unsplit" else PART_NAMES[name], "colour": colour}
            for name, colour in PART_COLOURS.items()
        },
    }


def _seconds(values: npt.NDArray[np.floating[Any]]) -> list[float]:
    """To a tenth of a per mille of what is seen: six significant digits."""
    return [float(f"{value:.6g}") for value in values.tolist()]

"""What the planner is held to, and the worst set of each kind of run: met or missed.

A value is written with as many digits as it takes to stand on its own side of the goal: .9696 is not .970.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
FAST = ("h100-nvlink",)
"""Clusters with NVLink inside a node and 400 Gb/s a GPU between; the others are slow networks."""


@dataclass(frozen=True)
class Goal:
    """A limit of one figure of a plan."""

    name: str
    key: str
    most: bool
    """Whether the limit is one from above."""
    small: float
    """At 100,000 samples, and at fewer."""
    large: float
    """At a million."""
    slow: float | None = None
    """On slow networks, where it differs."""

    def limit(self, row: Row) -> float:
        """Of a plan of these samples on this cluster."""
        if self.slow is not None and row["cluster"] not in FAST:
            return self.slow
        return self.large if row["samples"] > 100_000 else self.small

    def met(self, value: float, limit: float) -> bool:
        """Exactly, nothing rounded."""
        return value <= limit if self.most else value >= limit


GOALS = (
    Goal("padding", "padding", True, 5e-4, 1e-4),
    Goal("ABR", "abr", True, 0.02, 0.004),
    Goal("time imbalance", "time_imbalance", True, 0.02, 0.004),
    Goal("CR without need", "cr_needless", True, 0.0, 0.0),
    Goal("efficiency", "efficiency", False, 0.97, 0.97, 0.95),
    Goal("efficiency over the best baseline", "lead", False, 0.0, 0.0),
)


def with_lead(rows: Sequence[Row]) -> list[Row]:
    """Rows of `hbp-mixed`, and how far each is above the best baseline of its set and case, `hbp` among them."""
    place = ("set", "samples", "gpus", "cluster")
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["strategy"] != "hbp-mixed":
            at = tuple(row[key] for key in place)
            best[at] = max(best.get(at, 0.0), row["efficiency"])
    found = []
    for row in rows:
        at = tuple(row[key] for key in place)
        if row["strategy"] == "hbp-mixed":
            found.append({**row, "lead": row["efficiency"] - best[at]} if at in best else row)
    return found


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[Goal, Row, Row]]:
    """Of every goal in every case (samples, ranks, cluster): the case, and the row of the worst set."""
    ours = with_lead(rows)
    cases = dict.fromkeys((row["samples"], row["gpus"], row["cluster"]) for row in ours)
    for goal in GOALS:
        for case in cases:
            here = [r for r in ours if (r["samples"], r["gpus"], r["cluster"]) == case and goal.key in r]
            if here:
                worst = (max if goal.most else min)(here, key=lambda row: row[goal.key])
                yield goal, here[0], worst


def exact(value: float, limit: float) -> str:
    """The value in as few digits, four at least, as leave it on its side of the limit."""
    for digits in range(4, 17):
        text = f"{value:.{digits}f}"
        shown = float(text)
        if (shown > limit, shown < limit) == (value > limit, value < limit) or value == limit:
            return text
    return repr(value)

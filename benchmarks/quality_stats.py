"""Means over seeds with their confidence intervals, and differences to a reference seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
FIGURES = ("short_accuracy", "long_accuracy", "short_loss", "long_loss")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and where the true one lies with :data:`CONFIDENCE`, by Student's distribution."""

    mean: float
    half: float
    """Half of the interval's width; infinite for one value alone."""
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, one a seed."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(float(x.mean()), float("inf"), len(x))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(float(x.mean()), half, len(x))


def of_setting(rows: Sequence[Row], data: str, setting: str) -> dict[int, Row]:
    """The rows of a setting on a set, by seed."""
    return {row["seed"]: row for row in rows if (row["set"], row["setting"]) == (data, setting)}


def paired(rows: Sequence[Row], data: str, setting: str, reference: str, figure: str) -> Interval | None:
    """Difference of a figure to the reference's of the same seed, and so of the same samples; None without a pair."""
    mine, theirs = of_setting(rows, data, setting), of_setting(rows, data, reference)
    seeds = sorted(mine.keys() & theirs.keys())
    return interval([mine[s][figure] - theirs[s][figure] for s in seeds]) if seeds else None


def no_worse(difference: Interval, figure: str) -> bool:
    """Whether zero or better lies in the interval: more accuracy, less loss."""
    return difference.low <= 0 if figure.endswith("loss") else difference.high >= 0


def differences(rows: Sequence[Row], reference: str) -> list[Row]:
    """Every setting against the reference, by set and figure."""
    found = []
    for data, setting in dict.fromkeys((row["set"], row["setting"]) for row in rows):
        for figure in FIGURES if setting != reference else ():
            got = paired(rows, data, setting, reference, figure)
            if got is not None:
                found.append(
                    {
                        "set": data,
                        "setting": setting,
                        "against": reference,
                        "figure": figure,
                        "mean": got.mean,
                        "low": got.low if np.isfinite(got.half) else None,
                        "high": got.high if np.isfinite(got.half) else None,
                        "seeds": got.n,
                        "no_worse": no_worse(got, figure),
                    }
                )
    return found

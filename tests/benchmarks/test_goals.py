"""Goals are judged by the exact value of the worst set, and no rounding shows a miss as a hit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
GOALS = importlib.import_module("goals")


@pytest.mark.parametrize(
    ("value", "limit", "text"),
    [(0.9696, 0.97, "0.9696"), (0.96996, 0.97, "0.96996"), (0.97, 0.97, "0.9700"), (0.00004, 0.004, "0.0000")],
)
def test_digits_stay_on_their_side_of_the_goal(value: float, limit: float, text: str) -> None:
    assert GOALS.exact(value, limit) == text


def row(strategy: str, name: str, samples: int, cluster: str, efficiency: float, abr: float) -> dict[str, Any]:
    names = {"strategy": strategy, "set": name, "samples": samples, "gpus": 32, "cluster": cluster}
    return {**names, "efficiency": efficiency, "abr": abr}


def test_the_worst_set_is_judged_by_the_limit_of_its_samples_and_network() -> None:
    rows = [
        row("hbp-mixed", "a", 1_000_000, "h100-nvlink", 0.9696, 0.003),
        row("hbp-mixed", "b", 1_000_000, "h100-nvlink", 0.99, 0.005),
        row("hbp", "b", 1_000_000, "h100-nvlink", 0.995, 0.005),
        row("hbp-mixed", "a", 100_000, "h100-ethernet", 0.9696, 0.005),
    ]
    found = {
        (goal.name, case["samples"]): (worst["set"], goal.met(worst[goal.key], goal.limit(case)))
        for goal, case, worst in GOALS.verdicts(rows)
    }
    assert found[("efficiency", 1_000_000)] == ("a", False)
    assert found[("ABR", 1_000_000)] == ("b", False)
    assert found[("efficiency over the best baseline", 1_000_000)] == ("b", False)
    assert found[("efficiency", 100_000)] == ("a", True)
    assert found[("ABR", 100_000)] == ("a", True)
    assert ("padding", 100_000) not in found, "nothing measured, nothing judged"

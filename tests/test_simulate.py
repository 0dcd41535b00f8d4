"""Playing a plan: sums of maxima, by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from plans import hand_plan, tiny_cost

from hbp.planning.planner import make_plan
from hbp.simulate import DAY, simulate, step_seconds

ROWS = [
    (0, 0, 0, 2, 100, 0.5, [60, 30]),
    (0, 0, 2, 1, 50, 0.75, [40]),
    (0, 1, 0, 4, 200, 2.0, [170]),
    (1, 0, 0, 1, 50, 0.25, [50]),
    (1, 0, 3, 1, 50, 0.125, [25]),
    (2, 0, 0, 1, 50, 1.0, [50]),
]


@pytest.mark.parametrize("overhead", [0.0, 0.5])
def test_seconds_are_the_slowest_packs_and_the_steps_overhead(overhead: float) -> None:
    plan = hand_plan(ROWS, world=4, step_overhead_s=overhead)
    steps = [0.75 + 2.0 + overhead, 0.25 + overhead, 1.0 + overhead]
    np.testing.assert_allclose(step_seconds(plan), steps)
    result = simulate(plan)
    seconds = 4.0 + 3 * overhead
    busy = 0.5 * 2 + 0.75 + 2.0 * 4 + 0.25 + 0.125 + 1.0
    assert result.seconds == pytest.approx(seconds)
    assert (result.steps, result.micro_steps, result.packs, result.tokens) == (3, 4, 6, 425)
    assert result.tokens_per_s == pytest.approx(425 / seconds)
    assert result.device_days == pytest.approx(seconds * 4 / DAY)
    assert result.utilization == pytest.approx(busy / (seconds * 4))
    assert result.slowest_step_s == pytest.approx(max(steps))
    assert result.median_step_s == pytest.approx(sorted(steps)[1])
    assert result.to_json() == dataclasses.asdict(result)


def test_a_made_plan_takes_the_seconds_of_its_metrics() -> None:
    plan = make_plan(np.random.default_rng(0).integers(1, 2000, 300), tiny_cost(4, 1000))
    result = simulate(plan)
    assert result.seconds == pytest.approx(plan.info.metrics["predicted_s"])
    assert result.strategy == "hbp-mixed"
    assert 0 < result.utilization < 1

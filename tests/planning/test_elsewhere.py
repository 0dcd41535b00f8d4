"""Other hardware: the same samples and settings, planned anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from plans import hand_plan, tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.errors import HbpError
from hbp.plan import Group, validate
from hbp.planning.elsewhere import plan_elsewhere
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.simulator import simulate


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"max_length": 1000, "global_batch_tokens": 6000, "seed": 3},
        {"windows": 2, "short_steps": 1},
        {"static": Group(1500, 2, 4)},
    ],
    ids=lambda asked: "+".join(asked) or "defaults",
)
def test_same_hardware_gives_the_same_plan(strategy: str, asked: dict[str, Any]) -> None:
    lengths = np.random.default_rng(0).integers(1, 1500, 200)
    plan = make_plan(lengths, tiny_cost(4, 1000), strategy=strategy, **asked)
    assert bool(plan.info.dropped) == ("max_length" in asked)
    kept = np.sort(np.unique(plan.sample_ids))
    again = plan_elsewhere(plan, 4)
    assert simulate(again).seconds == simulate(plan).seconds
    np.testing.assert_array_equal(again.predicted_s, plan.predicted_s)
    np.testing.assert_array_equal(kept[again.sample_ids], plan.sample_ids)


def test_other_hardware_keeps_samples_and_batch() -> None:
    plan = make_plan(np.random.default_rng(0).integers(1, 1000, 200), tiny_cost(4, 1000), global_batch_tokens=8000)
    wider = plan_elsewhere(plan, 8, CLUSTERS["h100-nvlink"])
    validate(wider)
    assert wider.info.world_size == 8
    assert wider.info.cluster["name"] == "h100-nvlink"
    assert wider.info.n_tokens == plan.info.n_tokens
    assert wider.info.settings["global_batch_tokens"] == 8000
    assert plan_elsewhere(plan, 8, CLUSTERS["h100-nvlink"], 4000).info.settings["global_batch_tokens"] == 4000


def test_what_cannot_be_planned_anew_is_refused() -> None:
    with pytest.raises(HbpError, match="strategy 'hand'"):
        plan_elsewhere(hand_plan([(0, 0, 0, 1, 100, 0.5, [60, 30])], world=1), 2)
    plan = make_plan(np.arange(1, 50), tiny_cost(2))
    named = dataclasses.replace(plan, info=dataclasses.replace(plan.info, strategy="magic"))
    with pytest.raises(HbpError, match="strategy 'magic'"):
        plan_elsewhere(named, 2)
    for damage, says in (
        ({"cluster": {"name": "h100"}}, "does not say how to plan it anew"),  # another program's own words
        ({"cluster": {**plan.info.cluster, "dtype_bytes": 0}}, "cluster is damaged"),
        ({"settings": {"asked": "all"}}, "settings are damaged"),
        ({"settings": {"asked": {"static": {"a": 1}}}}, "settings are damaged"),
    ):
        damaged = dataclasses.replace(plan, info=dataclasses.replace(plan.info, **damage))
        with pytest.raises(HbpError, match=says):
            plan_elsewhere(damaged, 2)

"""Reasons for groups: whose home they are, what other degrees would cost, what the run would take without them."""

from __future__ import annotations

import numpy as np
import pytest

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.planning.explain import explain
from hbp.planning.mixed import groups as group_search
from hbp.planning.planner import make_plan

COST = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 8)


@pytest.mark.parametrize("strategy", ["hbp", "hbp-mixed", "concat"])
def test_every_group_has_a_reason(strategy: str) -> None:
    lengths = generate("mix-128k", 3000, 0)
    plan = make_plan(lengths, COST, strategy=strategy)
    reasons = explain(plan, COST, lengths)
    assert [reason.group for reason in reasons] == sorted(plan.info.groups)
    assert sum(reason.time_share for reason in reasons) == pytest.approx(1)
    homes = [r for r in reasons if r.home]
    assert sum(reason.samples for reason in reasons) == sum(reason.samples for reason in homes) == len(lengths)
    assert len(homes) == len(reasons) - (strategy == "hbp-mixed")  # whose last micro-step has a length of its own
    for reason in homes:
        mine = lengths[(lengths > reason.above) & (lengths <= reason.group.capacity)]
        assert reason.samples == len(mine)
        assert reason.tokens_share == pytest.approx(mine.sum() / lengths.sum())
        degrees = [setting.sp_degree for setting in reason.settings]
        near = [reason.group.sp_degree // 2, reason.group.sp_degree * 2] if strategy == "hbp-mixed" else COST.degrees()
        assert degrees == [d for d in near if d in COST.degrees() and d != reason.group.sp_degree]
        for setting in reason.settings:
            assert setting.gc_layers == COST.fewest_gc_layers(reason.group.capacity, setting.sp_degree)
        assert f"{reason.group.capacity:,} / SP {reason.group.sp_degree}" in str(reason)
    assert homes[-1].without is None
    assert np.isfinite([r.without for r in homes[:-1]]).all()
    assert all("the last micro-step, of what was left" in str(r) for r in reasons if not r.home)


def test_a_plan_of_one_micro_step_is_not_what_was_left() -> None:
    for lengths in (np.array([300, 200, 100]), np.array([300, 200, 100, 120_000])):
        reasons = explain(make_plan(lengths, COST), COST, lengths)
        assert all(reason.home and "home of" in str(reason) for reason in reasons)
        assert [reason.micro_steps for reason in reasons] == [1] * len(reasons)
        assert [reason.above for reason in reasons] == [0, *(reason.group.capacity for reason in reasons[:-1])]
        assert sum(reason.samples for reason in reasons) == len(lengths)


def test_reasons_speak_for_the_groups_that_were_searched() -> None:
    """Each change of one group makes the run longer, or shorter by no more than the search looks at."""
    cost = CostModel(load_model_spec("deepseek-v2-236b"), CLUSTERS["h100-nvlink"], 256)
    lengths = generate("tulu3-longcite", 20_000, 0)
    reasons = [r for r in explain(make_plan(lengths, cost), cost, lengths) if r.home]
    changes = [r.without for r in reasons[:-1]] + [
        s.slower for r in reasons for s in r.settings if s.slower is not None
    ]
    assert len(changes) > len(reasons)
    assert min(change for change in changes if change is not None) > -group_search.GROUP_SAVES - group_search.IMPROVES

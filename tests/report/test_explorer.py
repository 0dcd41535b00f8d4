"""The zoomable timelines' data: every pack's parts add up to it, every cell names the pack that its rank runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import hand_plan, tiny_cost

from hbp.plan import Group
from hbp.planning.planner import make_plan
from hbp.report import explorer
from hbp.report.explorer import explorer_data, measured_lane, predicted_lane, window
from hbp.report.figures import group_name, kinds_of
from hbp.report.lanes import Lane
from hbp.simulator import simulate


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    strategy=st.sampled_from(["concat", "dcp", "hbp"]),
)
def test_packs_of_a_lane_are_those_of_the_plan(lengths: list[int], strategy: str) -> None:
    plan = make_plan(np.array(lengths), tiny_cost(4, 1000), strategy=strategy, max_length=1000)
    groups = list(plan.info.groups)
    lane = predicted_lane(plan, "a lane", groups)
    assert len(lane["packs"]) == plan.n_packs, "short plans are drawn whole"
    assert len(lane["begin"]) == len(lane["wall"]) == len(lane["step"]) == simulate(plan).micro_steps
    cells = np.array(lane["cell"])
    micro = plan.micro_step_index()
    for row, (group, tokens, documents, *parts) in enumerate(lane["packs"]):
        assert groups[group].capacity == plan.capacity[row]
        assert groups[group].sp_degree == plan.sp_degree[row]
        assert tokens == plan.tokens()[row]
        assert documents == len(plan.samples(row)[0])
        assert sum(parts) == pytest.approx(float(plan.predicted_s[row]), rel=1e-4)
        ranks = np.arange(plan.sp_degree[row]) + plan.rank_start[row]
        assert (cells[ranks, micro[row]] == row).all()
    assert (cells >= 0).sum() == plan.sp_degree.sum(), "every other cell is idle"


def test_long_plans_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "MOST_CELLS", 8)
    plan = make_plan(np.full(40, 900), tiny_cost(4, 1000), strategy="concat", max_length=1000)
    ranks, count = window(plan)
    assert (ranks, count) == (4, 2)
    lane = predicted_lane(plan, "a lane", list(plan.info.groups))
    assert np.array(lane["cell"]).shape == (4, 2)


def test_idle_ranks_and_measured_lanes() -> None:
    plan = hand_plan([(0, 0, 0, 2, 100, 0.5, [60, 30]), (0, 1, 3, 1, 100, 0.25, [50])], world=4)
    groups = [Group(100, 2, 0), Group(100, 1, 0)]
    lane = predicted_lane(plan, "by hand", groups)
    assert lane["cell"] == [[0, -1], [0, -1], [-1, -1], [-1, 1]]
    assert lane["packs"] == [[0, 90, 2, 0.5], [1, 50, 1, 0.25]]
    busy = np.array([[0.5, 0.1], [0.4, 0.2]])
    measured = measured_lane(
        Lane("measured", np.zeros((2, 2)), busy, np.ones((2, 2)), np.array([[0, -1], [0, 1]]), 2.0), [0, 0, 1]
    )
    assert measured["step"] == [0, 0]
    assert [pack[0] for pack in measured["packs"]] == [0, -1, 0, 1]
    assert measured["packs"][measured["cell"][1][1]] == [1, None, None, 0.2]
    data = explorer_data([lane, measured], groups)
    assert [g["name"] for g in data["groups"]] == ["100 tokens · SP 2 · GC 0", "100 tokens · SP 1 · GC 0"]
    assert set(lane["parts"]) <= set(data["parts"])


def test_groups_beyond_the_colours_share_one_by_degree_and_recomputation():
    groups = [Group(100 * i, 1 + i % 2, max(0, i - 6)) for i in range(1, 13)]
    kinds = kinds_of(groups)
    assert len({kind.colour for kind in kinds}) == len(set(kinds)) == 4
    assert kinds[0] == kinds[2] != kinds[1]
    assert kinds[0].name == "100–500 tokens · SP 2 · GC 0"
    assert kinds[-1].name == "800–1,200 tokens · SP 1 · GC 2–6"
    assert [k.name for k in kinds_of(groups[:8])] == [group_name(g) for g in groups[:8]]

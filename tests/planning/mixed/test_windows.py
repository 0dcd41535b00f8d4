"""Windows over a shuffle: samples stay about where the shuffle put them, and steps hold the groups' mix."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from plans import tiny_cost

from hbp.data.length_sets import generate
from hbp.plan import Plan, validate
from hbp.planning.mixed.windows import default_windows
from hbp.planning.planner import make_plan

COST = tiny_cost(8, 1000)
LENGTHS = np.minimum(generate("mix-32k", 20_000, 0) // 16, 2000) + 1


def planned(windows: int | None, **options: object) -> Plan:
    return make_plan(LENGTHS, COST, windows=windows, short_steps=0, global_batch_tokens=40_000, **options)


@pytest.fixture(scope="module")
def plans() -> dict[int, Plan]:
    return {windows: planned(windows) for windows in (1, 4, 16)}


def test_more_windows_stay_closer_to_the_shuffle_and_are_slower(plans: dict[int, Plan]) -> None:
    for plan in plans.values():
        validate(plan)
    travel = [plans[w].info.details["travel"] for w in (1, 4, 16)]
    assert travel[0] > travel[1] > travel[2]
    for windows, found in zip((4, 16), travel[1:], strict=True):
        assert found < 1 / windows  # a sample stays in its window, or waits for the next
    seconds = [float(plans[w].micro_step_seconds().sum()) for w in (1, 4, 16)]
    assert seconds[0] <= seconds[1] <= seconds[2]
    given_up = plans[16].info.details["speed_given_up"]
    assert 0 < given_up < 0.1
    assert plans[1].info.details["speed_given_up"] == pytest.approx(0, abs=1e-3)


def test_the_default_gives_up_at_most_a_hundredth(monkeypatch: pytest.MonkeyPatch, plans: dict[int, Plan]) -> None:
    """With data enough for several windows; here they are made small enough for a small data set to have some."""
    monkeypatch.setattr("hbp.planning.mixed.windows.MICRO_STEPS_PER_WINDOW", 128)
    default = planned(None)
    assert default.info.settings["windows"] > 1
    loss = default.micro_step_seconds().sum() / plans[1].micro_step_seconds().sum() - 1
    assert loss < 0.01
    assert default.info.details["speed_given_up"] < 0.01


def test_windows_hold_a_thousand_micro_steps_of_the_shortest_group(plans: dict[int, Plan]) -> None:
    groups = sorted(plans[1].info.groups)
    tokens = COST.world_size // groups[0].sp_degree * groups[0].capacity
    assert default_windows(5 * 1024 * tokens, groups, COST.world_size) == 5
    assert default_windows(tokens, groups, COST.world_size) == 1


def test_steps_hold_the_groups_mix(plans: dict[int, Plan]) -> None:
    """No two steps differ in a group's micro-steps by more than the bound on both sides."""
    plan = plans[1]
    first = np.unique(plan.micro_step_index(), return_index=True)[1]
    kinds = Counter(plan.capacity[first].tolist())
    whole = [step for step in range(plan.n_steps) if (plan.tokens()[plan.step == step].sum()) > 30_000]
    for capacity, total in kinds.items():
        share = total / len(first)
        bound = 1 + share * max(0, len(kinds) - 2)
        for step in whole[:200]:
            rows = first[plan.step[first] == step]
            here = int((plan.capacity[rows] == capacity).sum())
            assert abs(here - share * len(rows)) <= 2 * bound


def test_the_curriculum_brings_short_groups_first() -> None:
    plan = make_plan(LENGTHS, COST, windows=1, short_steps=10, global_batch_tokens=40_000)
    assert plan.info.settings["short_steps"] == 10
    lowest = plan.sp_degree.min()
    assert (plan.sp_degree[plan.step < 9] == lowest).all()
    assert (plan.sp_degree > lowest).any()


def test_another_seed_is_another_epoch() -> None:
    first, second = planned(4, seed=0), planned(4, seed=1)
    assert first.sample_ids.tolist() != second.sample_ids.tolist()
    assert np.sort(first.sample_ids).tolist() == np.sort(second.sample_ids).tolist()

"""Playing a plan: sums of maxima, by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import hand_plan, tiny_cost

from hbp import simulator as simulate_module
from hbp.errors import HbpError
from hbp.plan import Plan
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.simulator import (
    DAY,
    PACK_PARTS,
    RANK_PARTS,
    detailed_json,
    rank_use,
    simulate,
    split_packs,
    step_seconds,
    timeline,
    write_timeline,
)

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


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    world=st.sampled_from([1, 2, 4, 8]),
    cluster=st.sampled_from(["cpu-local", "h100-nvlink"]),
)
def test_parts_add_up_on_every_rank(lengths: list[int], strategy: str, world: int, cluster: str) -> None:
    cost = tiny_cost(world, 1000, cluster=cluster)
    plan = make_plan(np.array(lengths), cost, strategy=strategy, max_length=1000)
    use, result = rank_use(plan), simulate(plan)
    assert set(use.parts) == set(RANK_PARTS)
    assert all((seconds >= 0).all() and seconds.shape == (world,) for seconds in use.parts.values())
    np.testing.assert_allclose(sum(use.parts.values()), result.seconds, rtol=1e-9)
    np.testing.assert_allclose(sum(split_packs(plan).values()), plan.predicted_s, rtol=1e-6)
    assert use.tokens.sum() == pytest.approx(sum(lengths))
    packs = result.seconds - use.parts["waiting"] - use.parts["optimizer"]
    assert packs.mean() / result.seconds == pytest.approx(result.utilization, abs=1e-6)
    assert use.peak_bytes is not None
    assert use.peak_bytes.max() <= cost.cluster.memory_bytes * (1 + 1e-9), "the plan promised to fit"


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 1000), min_size=5, max_size=60),
    strategy=st.sampled_from(["concat", "dcp", "hbp"]),
    first=st.integers(0, 10),
    count=st.integers(0, 10),
)
def test_a_window_is_a_piece_of_the_whole_timeline(lengths: list[int], strategy: str, first: int, count: int) -> None:
    plan = make_plan(np.array(lengths), tiny_cost(4, 1000), strategy=strategy, max_length=1000)
    whole = timeline(plan, 0, 10**6, range(4))
    micro_steps = simulate(plan).micro_steps
    assert whole.row.shape == (4, micro_steps)
    assert whole.begin_s[-1] + whole.wall_s[-1] + plan.info.cluster["step_overhead_s"] == pytest.approx(
        simulate(plan).seconds
    )
    assert (whole.begin_s[1:] >= (whole.begin_s + whole.wall_s)[:-1] - 1e-9).all()
    assert (whole.busy_s() <= whole.wall_s * (1 + 1e-6)).all()
    idle = whole.row < 0
    assert (whole.busy_s()[idle] == 0).all(), "a rank without a pack waits"
    first = min(first, micro_steps)
    window = timeline(plan, first, count, range(1, 3))
    piece = slice(first, first + count)
    np.testing.assert_array_equal(window.row, whole.row[1:3, piece])
    np.testing.assert_allclose(window.begin_s, whole.begin_s[piece])
    for name, seconds in window.parts.items():
        np.testing.assert_allclose(seconds, whole.parts[name][1:3, piece], rtol=1e-6, atol=1e-12)


def test_timeline_file_says_what_every_rank_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 200)
    plan = make_plan(lengths, tiny_cost(4, 1000), strategy="dcp", max_length=1000)
    use, path = rank_use(plan), tmp_path / "new" / "timeline.parquet"
    monkeypatch.setattr(simulate_module, "TIMELINE_ROWS", 12)  # several pieces
    assert write_timeline(plan, path, range(plan.n_steps), range(4)) == 4 * simulate(plan).micro_steps
    table = pq.read_table(path)
    rank = table["rank"].to_numpy()
    for name in ("linear", "attention", "alltoall", "waiting"):
        np.testing.assert_allclose(np.bincount(rank, table[name]), use.parts[name], rtol=1e-4, atol=1e-6)
    parts = sum(table[name].to_numpy() for name in (*PACK_PARTS, "waiting"))
    np.testing.assert_allclose(parts, table["wall_s"], rtol=1e-4)
    pack = table["pack"].to_numpy()
    ran = pack >= 0
    np.testing.assert_array_equal(table["step"].to_numpy()[ran], plan.step[pack[ran]])
    np.testing.assert_array_equal(table["micro_step"].to_numpy()[ran], plan.micro_step[pack[ran]])
    own = rank[ran] - plan.rank_start[pack[ran]]
    assert ((own >= 0) & (own < plan.sp_degree[pack[ran]])).all()
    assert write_timeline(plan, path, range(1, 2), range(2, 4)) == 2 * len(np.unique(plan.micro_step[plan.step == 1]))
    assert set(pq.read_table(path)["rank"].to_pylist()) == {2, 3}


def test_ranks_of_a_plan_without_a_cost_model() -> None:
    plan = hand_plan(ROWS, world=4, step_overhead_s=0.5)
    use = rank_use(plan)
    np.testing.assert_allclose(use.parts["unsplit"], [0.5 + 2 + 0.25 + 1, 0.5 + 2, 0.75 + 2, 2 + 0.125])
    np.testing.assert_allclose(use.parts["optimizer"], 1.5)
    np.testing.assert_allclose(use.parts["waiting"], 4.0 - use.parts["unsplit"])
    np.testing.assert_allclose(use.tokens, [45 + 42.5 + 50 + 50, 45 + 42.5, 40 + 42.5, 42.5 + 25])
    assert use.peak_bytes is None
    data = detailed_json(plan, price=2.0)
    assert data["cost"] == pytest.approx(simulate(plan).seconds * 4 / 3600 * 2.0)
    assert set(data["parts"]) == {"unsplit", "waiting", "optimizer"}
    assert data["ranks"]["tokens"] == use.tokens.tolist()
    assert "peak_bytes" not in data


def test_a_damaged_cost_model_is_one_line() -> None:
    plan = make_plan(np.arange(1, 50), tiny_cost(2))
    info = dataclasses.replace(plan.info, cluster={**plan.info.cluster, "link_bytes_per_s": "fast"})
    with pytest.raises(HbpError, match="link_bytes_per_s is 'fast'"):
        rank_use(dataclasses.replace(plan, info=info))


def test_timeline_of_few_ranks_takes_no_more_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are cut by the cells of all ranks, which are laid out, not by those that are written."""
    plan = make_plan(np.full(400, 1000), tiny_cost(8, 1000), strategy="concat", max_length=1000)
    laid_out = []
    split = simulate_module.split_packs

    def counted(plan: Plan, first: int, end: int) -> dict[str, Any]:
        laid_out.append(end - first)
        return split(plan, first, end)

    monkeypatch.setattr(simulate_module, "split_packs", counted)
    monkeypatch.setattr(simulate_module, "TIMELINE_ROWS", 16)
    write_timeline(plan, tmp_path / "timeline.parquet", range(plan.n_steps), range(1))
    assert len(laid_out) > 3 and max(laid_out) <= 16

"""Play a plan by its predicted seconds: what each rank does when, how long the run takes, what it costs.

Under FSDP a micro-step lasts as long as its slowest pack, on every rank. So a plan's timeline is a running sum of
maxima, what a rank did in it is a sum over its rows, and playing 10,000 steps on 1,024 ranks is a few array operations
(`benchmarks/simulator.py` times them). Rank-by-rank bars are made only for the window that is drawn.

A rank's time has these parts: those of :mod:`hbp.cost.parts` for the packs that it runs, waiting (for the slowest pack
of the micro-step, or for all of it where the plan leaves the rank idle) and the optimizer. They add up to the run's
seconds on every rank. The seconds of a pack are the plan's own (``predicted_s``); the cost model that the plan carries
says what they consist of. A plan that carries none, as one from another program may, has them all under ``unsplit``.

Legend: ``P`` packs (rows), ``W`` ranks of the world, ``R`` ranks drawn, ``M`` micro-steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.cost.parts import PARTS, pack_parts
from hbp.cost.predict import CostModel
from hbp.plan import Plan

Float = npt.NDArray[np.float64]

DAY = 86400.0
HOUR = 3600.0
PACK_PARTS = (*PARTS, "unsplit")
PART_NAMES = {
    "linear": "matrix products",
    "attention": "attention",
    "overhead": "launches",
    "recompute": "recomputation",
    "alltoall": "all-to-all",
    "fsdp": "FSDP traffic",
    "unsplit": "packs",
    "waiting": "waiting",
    "optimizer": "optimizer",
}
"""The parts of a rank's time and what tables and pictures call them."""
RANK_PARTS = tuple(PART_NAMES)
TIMELINE_ROWS = 1 << 18
"""Of a timeline file that are made at a time, of all ranks."""


@dataclass(frozen=True)
class Simulation:
    """What a plan is predicted to take."""

    strategy: str
    world_size: int
    steps: int
    micro_steps: int
    packs: int
    tokens: int
    seconds: float
    tokens_per_s: float
    device_days: float
    utilization: float
    """Share of rank-seconds spent in packs rather than waiting."""
    slowest_step_s: float
    median_step_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class RankUse:
    """What each rank spends its time on, and the most memory it needs."""

    parts: Mapping[str, Float]
    """Seconds of each of :data:`RANK_PARTS`, ``[W]``."""
    tokens: Float
    """``[W]``; a pack's tokens are shared evenly by the ranks of its group."""
    peak_bytes: Float | None
    """``[W]``; None where the plan carries no cost model."""

    def mean_parts(self) -> dict[str, float]:
        """Seconds of each part, mean over the ranks, parts that are nothing left out."""
        return {name: float(seconds.mean()) for name, seconds in self.parts.items() if seconds.any()}


@dataclass(frozen=True, eq=False)
class Timeline:
    """A window of micro-steps on some ranks."""

    begin_s: Float
    """When each micro-step begins, ``[M]``."""
    wall_s: Float
    """How long it lasts, ``[M]``."""
    parts: Mapping[str, Float]
    """Seconds of each of :data:`PACK_PARTS`, ``[R, M]``; what is left of ``wall_s`` is waiting."""
    row: npt.NDArray[np.int64]
    """The plan's row that each rank runs, ``[R, M]``; -1 where it idles."""

    def busy_s(self) -> Float:
        """Seconds in packs, ``[R, M]``."""
        return np.asarray(sum(self.parts.values()))


def plan_cost_model(plan: Plan) -> CostModel | None:
    """The cost model that a plan was made with; None if it carries none that we know.

    Raises:
        HbpError: it carries one that is damaged.
    """
    return CostModel.from_json(plan.info.model, plan.info.cluster, plan.info.world_size)


def step_seconds(plan: Plan) -> Float:
    """Predicted seconds of each optimizer step, the optimizer's own included."""
    weights = plan.micro_step_seconds().astype(np.float64)
    return np.bincount(plan.step[_first_rows(plan)], weights, plan.n_steps).astype(np.float64) + _optimizer_seconds(
        plan
    )


def simulate(plan: Plan) -> Simulation:
    """Predicted time, throughput and utilization of a plan on the cluster that it was made for."""
    steps = step_seconds(plan)
    seconds = float(steps.sum())
    world = plan.info.world_size
    busy = float((plan.predicted_s.astype(np.float64) * plan.sp_degree).sum())
    return Simulation(
        strategy=plan.info.strategy,
        world_size=world,
        steps=plan.n_steps,
        micro_steps=len(_first_rows(plan)),
        packs=plan.n_packs,
        tokens=plan.info.n_tokens,
        seconds=seconds,
        tokens_per_s=plan.info.n_tokens / seconds if seconds else 0.0,
        device_days=seconds * world / DAY,
        utilization=busy / (seconds * world) if seconds else 0.0,
        slowest_step_s=float(steps.max(initial=0.0)),
        median_step_s=float(np.median(steps)) if len(steps) else 0.0,
    )


def detailed_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """The simulation as plain data, with the parts of its time, of each rank's too, and with what it costs.

    Args:
        plan: to be played.
        price: of a device for an hour; None leaves ``cost`` out.
    """
    simulation, use = simulate(plan), rank_use(plan)
    data = simulation.to_json() | {"parts": use.mean_parts()}
    if price is not None:
        data["cost"] = simulation.device_days * DAY / HOUR * price
    ranks = {**{name: seconds for name, seconds in use.parts.items() if seconds.any()}, "tokens": use.tokens}
    if use.peak_bytes is not None:
        data["peak_bytes"] = float(use.peak_bytes.max())
        ranks["peak_bytes"] = use.peak_bytes
    return data | {"ranks": {name: values.tolist() for name, values in ranks.items()}}


def split_packs(plan: Plan, first: int = 0, end: int | None = None) -> dict[str, Float]:
    """Seconds of each of :data:`PACK_PARTS` of rows ``[first, end)``; for each row they add up to ``predicted_s``."""
    end = plan.n_packs if end is None else end
    cost, predicted = plan_cost_model(plan), plan.predicted_s[first:end].astype(np.float64)
    parts = {name: np.zeros(len(predicted)) for name in PACK_PARTS}
    if cost is None:
        return parts | {"unsplit": predicted}
    offsets = plan.sample_offsets[first : end + 1]
    work = cost.work(plan.lengths[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
    for degree, gc_layers, rows in _settings(plan.sp_degree[first:end], plan.gc_layers[first:end]):
        mine = pack_parts(cost, work[rows], degree, gc_layers)
        scale = predicted[rows] / np.maximum(sum(mine.values()), 1e-300)
        for name, seconds in mine.items():
            parts[name][rows] = seconds * scale
    return parts


def rank_use(plan: Plan) -> RankUse:
    """What each rank of a plan's world does with its time."""
    parts = {name: _sum_over_ranks(plan, seconds) for name, seconds in split_packs(plan).items()}
    # The slowest pack's float64 sum of parts may miss its float32 seconds in the last bit: no negative waiting.
    waiting = np.maximum(0.0, float(plan.micro_step_seconds().sum()) - np.asarray(sum(parts.values())))
    parts["waiting"] = waiting
    parts["optimizer"] = np.full(plan.info.world_size, plan.n_steps * _optimizer_seconds(plan))
    return RankUse(parts, _sum_over_ranks(plan, plan.tokens() / plan.sp_degree), _peak_bytes(plan))


def timeline(plan: Plan, first: int, count: int, ranks: range) -> Timeline:
    """Micro-steps ``[first, first + count)``, counted over the whole plan, on these ranks."""
    return _window(plan, _clock(plan), first, first + count, ranks)


@dataclass(frozen=True, eq=False)
class _Clock:
    """When the micro-steps of a plan run, and where their rows are."""

    row: npt.NDArray[np.int64]
    """First row of each, and one past the last, ``[M + 1]``."""
    begin_s: Float
    wall_s: Float


def _clock(plan: Plan) -> _Clock:
    first, walls = _first_rows(plan), plan.micro_step_seconds().astype(np.float64)
    begin = np.cumsum(walls) - walls + _optimizer_seconds(plan) * plan.step[first]
    return _Clock(np.append(first, plan.n_packs), begin, walls)


def _window(plan: Plan, clock: _Clock, first: int, end: int, ranks: range) -> Timeline:
    window = slice(first, min(end, len(clock.wall_s)))
    bounds = clock.row[window.start : window.stop + 1]
    a, b = (int(bounds[0]), int(bounds[-1])) if len(bounds) else (0, 0)
    micro = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    degree = plan.sp_degree[a:b].astype(np.int64)
    within = np.arange(degree.sum()) - np.repeat(np.cumsum(degree) - degree, degree)
    whole = np.full((plan.info.world_size, max(0, len(bounds) - 1)), -1, np.int64)
    rank = np.repeat(plan.rank_start[a:b], degree) + within
    whole[rank, np.repeat(micro, degree)] = np.repeat(np.arange(a, b), degree)
    row = whole[ranks.start : ranks.stop]
    parts = {}
    for name, seconds in split_packs(plan, a, b).items():
        if seconds.any():
            parts[name] = np.where(row >= 0, seconds[np.maximum(row - a, 0)], 0.0)
    return Timeline(clock.begin_s[window], clock.wall_s[window], parts, row)


def write_timeline(plan: Plan, path: Path, steps: range, ranks: range) -> int:
    """Write what each rank does in each micro-step as Parquet, a row for each; returns how many.

    Columns: ``step``, ``micro_step`` (of the step), ``rank``, ``pack`` (row of ``plan.parquet``, -1 where the rank
    idles), ``begin_s`` and ``wall_s`` of the micro-step, then the seconds of :data:`PACK_PARTS` and ``waiting``, which
    add up to ``wall_s``. Written a piece at a time, so that memory does not grow with the run.

    Args:
        plan: to be played.
        path: file to write.
        steps: optimizer steps to write.
        ranks: ranks to write.
    """
    clock = _clock(plan)
    step, numbers = plan.step[clock.row[:-1]], plan.micro_step[clock.row[:-1]]
    first, end = (int(i) for i in np.searchsorted(step, [steps.start, steps.stop]))
    size, written = max(1, TIMELINE_ROWS // plan.info.world_size), 0
    names = (*PACK_PARTS, "waiting")
    kinds = {"step": pa.int32(), "micro_step": pa.int16(), "rank": pa.int32(), "pack": pa.int64()}
    seconds = {name: pa.float64() if name == "begin_s" else pa.float32() for name in ("begin_s", "wall_s", *names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema({**kinds, **seconds}.items()), compression="zstd") as file:
        for at in range(first, end, size):
            played = _window(plan, clock, at, min(at + size, end), ranks)
            n, drawn = len(played.wall_s), len(played.row)
            waiting = np.maximum(0.0, played.wall_s - played.busy_s())
            cells = {name: played.parts.get(name, np.zeros((drawn, n))) for name in PACK_PARTS} | {"waiting": waiting}
            columns = {
                "step": np.repeat(step[at : at + n], drawn),
                "micro_step": np.repeat(numbers[at : at + n], drawn),
                "rank": np.tile(np.arange(ranks.start, ranks.start + drawn), n),
                "pack": played.row.T.ravel(),
                "begin_s": np.repeat(played.begin_s, drawn),
                "wall_s": np.repeat(played.wall_s, drawn),
                **{name: values.T.ravel() for name, values in cells.items()},
            }
            file.write_table(
                pa.table({name: pa.array(columns[name]).cast(kind) for name, kind in {**kinds, **seconds}.items()})
            )
            written += n * drawn
    return written


def _optimizer_seconds(plan: Plan) -> float:
    return float(plan.info.cluster.get("step_overhead_s", 0.0))


def _first_rows(plan: Plan) -> npt.NDArray[np.int64]:
    """Of each micro-step."""
    return np.flatnonzero(np.diff(plan.micro_step_index(), prepend=-1))


def _settings(
    degrees: npt.NDArray[np.integer], gc_layers: npt.NDArray[np.integer]
) -> list[tuple[int, int, npt.NDArray[np.int64]]]:
    """The (SP degree, recomputed layers) that rows use, each with its rows."""
    keys = degrees.astype(np.int64) << 16 | gc_layers
    return [(int(key >> 16), int(key & 0xFFFF), np.flatnonzero(keys == key)) for key in np.unique(keys)]


def _sum_over_ranks(plan: Plan, per_row: npt.NDArray[np.floating]) -> Float:
    """Sum of a quantity of each row over the rows that each rank runs, ``[W]``."""
    world = plan.info.world_size
    total = np.zeros(world)
    for degree in np.unique(plan.sp_degree):
        rows = plan.sp_degree == degree
        groups = np.bincount(plan.rank_start[rows] // degree, per_row[rows], -(-world // int(degree)))
        total += np.repeat(groups, degree)[:world]
    return total


def _peak_bytes(plan: Plan) -> Float | None:
    cost = plan_cost_model(plan)
    if cost is None:
        return None
    world, tokens = plan.info.world_size, plan.tokens()
    peak = np.full(world, cost.bytes(1, 1, 0))  # an idle rank runs a one-token pack
    for degree, gc_layers, rows in _settings(plan.sp_degree, plan.gc_layers):
        most = np.zeros(-(-world // degree), np.int64)
        np.maximum.at(most, plan.rank_start[rows] // degree, tokens[rows])
        values, where = np.unique(most, return_inverse=True)
        size = np.array([cost.bytes(int(n), degree, gc_layers) if n else 0.0 for n in values])
        peak = np.maximum(peak, np.repeat(size[where], degree)[:world])
    return peak

"""Fit the cost model's constants to measured micro-batches.

Predicted seconds are linear in the reciprocal rates and the overheads as long as no communication hides behind compute,
so a fit is one non-negative least squares problem, weighted to count relative errors. Its columns come from the cost
model itself: the seconds it predicts when one constant is 1 and the others are nothing. So there is no second copy of
the formulas to keep in step.

Memory has one scale (measured over modelled activation bytes) and one constant, taken so that no measured point is
predicted too small, because a budget is a promise.

Complexity: points × constants, nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hbp.cost.cluster import ClusterSpec
from hbp.cost.model_spec import ModelSpec
from hbp.cost.predict import CostModel

RATES = ("linear_flops_per_s", "attention_flops_per_s", "link_bytes_per_s")
OVERHEADS = ("layer_overhead_s", "document_overhead_s", "collective_latency_s")
SCALES = np.linspace(0.2, 3.0, 561)
"""Candidates for measured over modelled activation bytes."""
NEVER = 1e30
"""A rate so high that it costs nothing."""


@dataclass(frozen=True)
class Point:
    """One measured micro-batch: every SP group ran a pack of these documents at once."""

    lengths: tuple[int, ...]
    sp_degree: int
    gc_layers: int
    seconds: float
    peak_bytes: float


@dataclass(frozen=True)
class Fit:
    """A cluster with fitted constants and how well they predict."""

    cluster: ClusterSpec
    predicted_s: tuple[float, ...]
    predicted_bytes: tuple[float, ...]
    held_out_error: float
    """Median relative error of each point's seconds, predicted from a fit to the others."""


def fit_cluster(base: ClusterSpec, model: ModelSpec, world_size: int, points: Sequence[Point], device: str) -> Fit:
    """Replace a cluster's rates, overheads and memory constants by those that explain the points.

    Args:
        base: keeps its memory budget, topology and data types.
        model: that the points were measured with.
        world_size: ranks that ran them.
        points: at least one; constants that they do not exercise keep the base's values.
        device: name for the record.
    """
    features = _features(base, model, world_size, points)
    seconds = np.array([p.seconds for p in points])
    constants = _solve(features, seconds)
    used = features.max(axis=0) > 0
    cluster = dataclasses.replace(
        _with_memory(base, model, world_size, points),
        device=device,
        fsdp_overlap=0.0,
        origin=f"profiled on {device}",
        **_named(base, constants, used),
    )
    cost = CostModel(model, cluster, world_size)
    held_out = []
    for i in range(len(points)):
        others = np.arange(len(points)) != i
        if others.any():
            guess = features[i] @ _solve(features[others], seconds[others])
            held_out.append(abs(guess / seconds[i] - 1))
    return Fit(
        cluster,
        tuple(predict_point(cost, p) for p in points),
        tuple(cost.bytes(sum(p.lengths), p.sp_degree, p.gc_layers) for p in points),
        float(np.median(held_out)) if held_out else 0.0,
    )


def grid(
    cost: CostModel, lengths: npt.NDArray[np.integer], longest: int, rng: np.random.Generator
) -> list[tuple[tuple[int, ...], int, int]]:
    """What to measure: (document lengths, SP degree, recomputed layers) of a dozen or two packs, shortest first.

    Each degree gets packs of a sixteenth to a half of the longest length a rank, filled with documents of the data
    (linear part and overheads) or with a single one (attention), with no layer recomputed and with all of them.
    """
    points = []
    for degree in cost.degrees():
        for share in (16, 8, 4, 2):
            capacity = max(degree, longest * degree // share)
            documents = rng.permutation(lengths[lengths <= capacity])
            filled = documents[np.cumsum(documents) <= capacity].tolist() or [capacity]
            for pack in (filled, [min(capacity, longest)]):
                every = (0, cost.model.n_layers) if share >= 4 else (cost.model.n_layers,)
                points += [(tuple(pack), degree, gc_layers) for gc_layers in every]
    return sorted(points, key=lambda p: sum(p[0]) / p[1])


def predict_point(cost: CostModel, point: Point) -> float:
    """Seconds that the model predicts for a point."""
    lengths = np.array(point.lengths)
    work = cost.work(lengths, np.array([0, len(lengths)]))
    return float(cost.seconds(point.sp_degree, point.gc_layers).of(work)[0])


def _features(base: ClusterSpec, model: ModelSpec, world_size: int, points: Sequence[Point]) -> npt.NDArray[np.float64]:
    nothing: dict[str, Any] = {
        **dict.fromkeys(RATES, NEVER),
        **dict.fromkeys(OVERHEADS, 0.0),
        "node_bytes_per_s": NEVER,
        "fsdp_overlap": 0.0,
    }
    columns = []
    for name in (*RATES, *OVERHEADS):
        unit = dataclasses.replace(base, **{**nothing, name: 1.0})
        if name == "link_bytes_per_s":  # one machine: its ranks are neighbours
            unit = dataclasses.replace(unit, devices_per_node=max(world_size, 1))
        cost = CostModel(model, unit, world_size)
        columns.append([predict_point(cost, p) for p in points])
    features = np.array(columns).T
    features[features < 1e-6] = 0.0  # what is left of the rates that cost nothing
    return features


def _solve(features: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    scale = np.maximum(features.max(axis=0), 1e-300)
    solution, _ = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(solution / scale)


def _named(base: ClusterSpec, constants: npt.NDArray[np.float64], used: npt.NDArray[np.bool_]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value, seen in zip((*RATES, *OVERHEADS), constants, used, strict=True):
        if not seen:
            values[name] = getattr(base, name)
        elif name in RATES:
            values[name] = float(1 / value) if value > 0 else NEVER
        else:
            values[name] = float(value)
    values["node_bytes_per_s"] = max(base.node_bytes_per_s, values["link_bytes_per_s"])
    return values


def _with_memory(base: ClusterSpec, model: ModelSpec, world_size: int, points: Sequence[Point]) -> ClusterSpec:
    """The scale and constant that predict no point too small and, of those that do not, the least too large."""
    measured = np.array([p.peak_bytes for p in points])

    def predicted(scale: float) -> npt.NDArray[np.float64]:
        cluster = dataclasses.replace(base, activation_scale=scale, fixed_bytes=0.0)
        cost = CostModel(model, cluster, world_size)
        return np.array([cost.bytes(sum(p.lengths), p.sp_degree, p.gc_layers) for p in points])

    none, one = predicted(0.0), predicted(1.0)
    sizes = none + SCALES[:, None] * (one - none)  # [scales, points]
    fixed = np.maximum(0.0, (measured - sizes).max(axis=1))
    excess = ((sizes + fixed[:, None]) / measured).mean(axis=1)
    best = int(excess.argmin())
    return dataclasses.replace(base, activation_scale=float(SCALES[best]), fixed_bytes=float(fixed[best]))

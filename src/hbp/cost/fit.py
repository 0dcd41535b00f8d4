"""Fit the cost model's constants to measured micro-batches.

Predicted seconds are linear in the reciprocal rates and the overheads, but for the FSDP traffic that hides behind
compute: given which micro-batches hide theirs, a fit is one non-negative least squares problem, weighted to count
relative errors. Who hides it follows from the fit, so both are found in turn, for each of a few shares of compute that
can hide anything (``fsdp_overlap``), and the share that explains the points best is kept. What recomputing takes over
a forward pass (``recompute_scale``) multiplies the rates and is found like the overlap, from a few candidates. The
columns come from the cost model itself: the seconds it predicts when one constant is 1 and the others are nothing. So
there is no second copy of the formulas to keep in step.

Measured collectives are further rows: bytes over the link's rate plus its latency. They hold the link's constants where
the micro-batches barely depend on them, and they are all there is to say of degrees that the machine cannot run. What
stays within a node and what leaves it have a rate and a latency each.

A point may have run fewer layers than the model has. Its row is then that of the shorter model, so the constants come
out the same, and a model too large for the machine is fitted from stacks of a few of its layers.

Memory has one scale (measured over modelled activation bytes) and one constant: of those that predict no measured point
too small, the closest to all.

Complexity: (overlaps × scales + 9 points) × a few least squares problems of points × constants; the latter for the
held-out errors, which look for the overlap and the scale beside those of all points.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from hbp.cost.cluster import ClusterSpec
from hbp.cost.memory import moments
from hbp.cost.model_spec import ModelSpec
from hbp.cost.parts import NEVER
from hbp.cost.predict import CostModel

Float = npt.NDArray[np.float64]

RATES = ("linear_flops_per_s", "attention_flops_per_s", "link_bytes_per_s", "node_bytes_per_s")
OVERHEADS = ("layer_overhead_s", "document_overhead_s", "collective_latency_s", "node_latency_s")
CONSTANTS = (*RATES, *OVERHEADS)
OVERLAPS = tuple(i / 10 for i in range(11))
RECOMPUTE_SCALES = tuple(1 + i / 10 for i in range(11))
WORTH = 0.95
"""A larger overlap or scale must bring the squared error below this share of a smaller one's."""
SCALES = np.linspace(0.2, 3.0, 561)
"""Candidates for measured over modelled activation bytes."""


@dataclass(frozen=True)
class Point:
    """One measured micro-batch: every SP group ran a pack of these documents at once."""

    lengths: tuple[int, ...]
    sp_degree: int
    gc_layers: int
    seconds: float
    peak_bytes: float
    n_layers: int | None = None
    """Of the stack that ran; None for the whole model."""


@dataclass(frozen=True)
class Collective:
    """One measured collective of adjacent ranks, all of which ran it at once."""

    kind: str
    ranks: int
    received_bytes: float
    """By each rank, from the others."""
    seconds: float


@dataclass(frozen=True)
class Fit:
    """A cluster with fitted constants and how well they predict."""

    cluster: ClusterSpec
    predicted_s: tuple[float, ...]
    held_out_s: tuple[float, ...]
    """Each point's seconds, predicted from a fit to the others; empty for a single point."""
    predicted_bytes: tuple[float, ...]
    held_out_error: float
    """Median relative error of the held-out seconds."""


@dataclass(frozen=True)
class _Rows:
    """Seconds per unit of each constant. ``P`` points and collectives, ``C`` constants."""

    busy: Float  # [P, C] where recomputing a layer takes as long as its forward pass
    again: Float  # [P, C] more, for each 1 of the scale over that
    fsdp: Float  # [P, C] traffic that may hide behind it
    seconds: Float  # [P]

    def __getitem__(self, index: npt.NDArray[np.bool_]) -> _Rows:
        return _Rows(self.busy[index], self.again[index], self.fsdp[index], self.seconds[index])

    def predict(self, found: _Solution) -> Float:
        busy = (self.busy + (found.recompute_scale - 1) * self.again) @ found.constants
        return np.asarray(busy + np.maximum(0.0, self.fsdp @ found.constants - found.overlap * busy))


@dataclass(frozen=True)
class _Solution:
    """What explains rows."""

    constants: Float  # [C] reciprocals of the rates
    overlap: float
    recompute_scale: float


class _Apart(ClusterSpec):
    """Two kinds of links, each with a column of its own: what leaves a node waits for the network alone."""

    def link(self, ranks: int) -> float:
        within = ranks <= self.devices_per_node
        return self.link_bytes_per_s if within else self.node_bytes_per_s / self.devices_per_node

    def ring(self, ranks: int) -> float:
        return self.link_bytes_per_s if ranks <= self.devices_per_node else self.node_bytes_per_s


LINKS = ("link_bytes_per_s", "node_bytes_per_s", "collective_latency_s", "node_latency_s")


def fit_cluster(
    base: ClusterSpec,
    model: ModelSpec,
    world_size: int,
    points: Sequence[Point],
    device: str,
    collectives: Sequence[Collective] = (),
) -> Fit:
    """Replace a cluster's rates, overheads and memory constants by those that explain the points.

    Args:
        base: keeps its memory budget, topology and data types.
        model: that the points were measured with, whole.
        world_size: ranks that ran them, neighbours as far as the base has devices in a node.
        points: at least one; constants that nothing exercises keep the base's values.
        device: name for the record.
        collectives: measured on the same ranks.
    """
    rows = _rows(base, model, world_size, points, collectives)
    cluster = _explained(base, world_size, rows, [(model, points)], device)
    held_out = _held_out(rows, len(points))
    errors = np.abs(held_out / rows.seconds[: len(held_out)] - 1)
    cost = CostModel(model, cluster, world_size)
    return Fit(
        cluster,
        tuple(predict_point(cost, p) for p in points),
        tuple(held_out.tolist()),
        tuple(predict_bytes(cost, p) for p in points),
        float(np.median(errors)) if len(errors) else 0.0,
    )


def pooled_cluster(
    base: ClusterSpec, measured: Sequence[tuple[ModelSpec, Sequence[Point]]], world_size: int, device: str
) -> ClusterSpec:
    """As :func:`fit_cluster`, from the points of several models at once: one device, every shape measured on it.

    Args:
        base: keeps its memory budget, topology and data types.
        measured: models and their points, at least one; each point counts the same.
        world_size: ranks that ran them, neighbours as far as the base has devices in a node.
        device: name for the record.
    """
    each = [_rows(base, model, world_size, points, ()) for model, points in measured]
    rows = _Rows(*(np.concatenate([getattr(r, field.name) for r in each]) for field in dataclasses.fields(_Rows)))
    return _explained(base, world_size, rows, measured, device)


def _explained(
    base: ClusterSpec,
    world_size: int,
    rows: _Rows,
    measured: Sequence[tuple[ModelSpec, Sequence[Point]]],
    device: str,
) -> ClusterSpec:
    """The cluster whose constants explain the rows, and the measured peaks."""
    found = _solve(rows)
    used = (rows.busy + rows.fsdp).max(axis=0) > 0
    return dataclasses.replace(
        _with_memory(base, world_size, measured),
        device=device,
        fsdp_overlap=found.overlap if rows.fsdp.any() else base.fsdp_overlap,
        recompute_scale=found.recompute_scale if rows.again.any() else base.recompute_scale,
        origin=f"profiled on {device}",
        **_named(base, found.constants, used),
    )


def grid(
    cost: CostModel,
    lengths: npt.NDArray[np.integer],
    longest: int,
    rng: np.random.Generator,
    shares: Sequence[int] = (16, 8, 4, 2),
) -> list[tuple[tuple[int, ...], int, int]]:
    """What to measure: (document lengths, SP degree, recomputed layers) of a dozen or two packs, shortest first.

    Each degree gets packs of some shares of the longest length a rank, filled with documents of the data (linear part
    and overheads) or with a single one (attention), with no layer recomputed and with all of them; the longest packs,
    which take most memory, with all.
    """
    points = []
    for degree in cost.degrees():
        for share in shares:
            capacity = max(degree, longest * degree // share)
            documents = rng.permutation(lengths[lengths <= capacity])
            filled = documents[np.cumsum(documents) <= capacity].tolist() or [capacity]
            for pack in (filled, [min(capacity, longest)]):
                every = (0, cost.model.n_layers) if share >= 4 else (cost.model.n_layers,)
                points += [(tuple(pack), degree, gc_layers) for gc_layers in every]
    return sorted(points, key=lambda p: sum(p[0]) / p[1])


def predict_point(cost: CostModel, point: Point) -> float:
    """Seconds that the model predicts for a point."""
    busy, fsdp, overlap = _parts(_of_stack(cost, point), point)
    return busy + max(0.0, fsdp - overlap * busy)


def predict_bytes(cost: CostModel, point: Point) -> float:
    """Peak bytes that the model predicts for a point."""
    return _of_stack(cost, point).bytes(sum(point.lengths), point.sp_degree, point.gc_layers)


def predict_collective(cluster: ClusterSpec, collective: Collective) -> float:
    """Seconds that the model predicts for a collective."""
    rate = cluster.link if collective.kind == "all_to_all" else cluster.ring  # nodes share what they gather
    return collective.received_bytes / rate(collective.ranks) + cluster.latency(collective.ranks)


def _of_stack(cost: CostModel, point: Point) -> CostModel:
    if point.n_layers is None:
        return cost
    return dataclasses.replace(cost, model=cost.model.with_layers(point.n_layers))


def _parts(cost: CostModel, point: Point) -> tuple[float, float, float]:
    """Seconds of compute and of FSDP traffic, and the share of compute that can hide it."""
    lengths = np.array(point.lengths)
    spent = cost.seconds(point.sp_degree, point.gc_layers)
    return float(spent.compute(cost.work(lengths, np.array([0, len(lengths)])))[0]), spent.fsdp, spent.overlap


def _rows(
    base: ClusterSpec,
    model: ModelSpec,
    world_size: int,
    points: Sequence[Point],
    collectives: Sequence[Collective],
) -> _Rows:
    nothing: dict[str, Any] = {
        **dict.fromkeys(RATES, NEVER),
        **dict.fromkeys(OVERHEADS, 0.0),
    }
    busy, again, fsdp = [], [], []
    for name in CONSTANTS:
        once, twice = (_Apart(**{**vars(base), **nothing, name: 1.0, "recompute_scale": scale}) for scale in (1.0, 2.0))
        parts, more = (
            [_parts(_of_stack(CostModel(model, cluster, world_size), p), p) for p in points]
            for cluster in (once, twice)
        )
        sent = [predict_collective(once, c) if name in LINKS else 0.0 for c in collectives]
        busy.append([part[0] for part in parts] + sent)
        again.append([b[0] - a[0] for a, b in zip(parts, more, strict=True)] + [0.0] * len(collectives))
        fsdp.append([part[1] for part in parts] + [0.0] * len(collectives))
    seconds = [p.seconds for p in points] + [c.seconds for c in collectives]
    # What is left of the rates that cost nothing.
    tidy = [np.where(x < 1e-6, 0.0, x) for x in (np.array(each).T for each in (busy, again, fsdp))]
    return _Rows(tidy[0], tidy[1], tidy[2], np.array(seconds))


def _solve(rows: _Rows, near: _Solution | None = None) -> _Solution:
    """The constants, and the overlap and the scale of recomputation of the smallest error.

    Args:
        rows: to explain.
        near: of all but a row more; the overlap and the scale are looked for next to its own, if given.
    """
    overlaps = OVERLAPS if rows.fsdp.any() else OVERLAPS[:1]
    scales = RECOMPUTE_SCALES if rows.again.any() else RECOMPUTE_SCALES[:1]
    if near is not None:
        overlaps = _beside(overlaps, near.overlap)
        scales = _beside(scales, near.recompute_scale)
    best, error = _solve_at(rows, overlaps[0], scales[0])
    for overlap, scale in sorted(itertools.product(overlaps, scales), key=sum)[1:]:  # one may be taken for the other
        found, own = _solve_at(rows, overlap, scale)
        if own < WORTH * error:
            best, error = found, own
    return best


def _beside(candidates: tuple[float, ...], value: float) -> tuple[float, ...]:
    at = min(range(len(candidates)), key=lambda i: abs(candidates[i] - value))
    return candidates[max(0, at - 1) : at + 2]


def _solve_at(rows: _Rows, overlap: float, recompute_scale: float) -> tuple[_Solution, float]:
    """Constants for an overlap and a scale, and their squared relative error."""
    compute = rows.busy + (recompute_scale - 1) * rows.again
    shown: npt.NDArray[np.bool_] = np.asarray(rows.fsdp.any(axis=1))  # whose traffic is too long to hide
    for _ in range(len(OVERLAPS)):
        constants = _least_squares(compute * (1 - overlap * shown)[:, None] + rows.fsdp * shown[:, None], rows.seconds)
        now = rows.fsdp @ constants > overlap * (compute @ constants)
        if (now == shown).all():
            break
        shown = now
    found = _Solution(constants, overlap, recompute_scale)
    return found, float(np.square(rows.predict(found) / rows.seconds - 1).sum())


def _least_squares(features: Float, seconds: Float) -> Float:
    scale = np.maximum(features.max(axis=0), 1e-300)
    solution, _ = nnls(features / scale / seconds[:, None], np.ones(len(seconds)))
    return np.asarray(solution / scale)


def _held_out(rows: _Rows, n_points: int) -> Float:
    """Each point's seconds from a fit to all other rows, ``[P]``; empty where there are none."""
    predicted, whole = [], _solve(rows)
    for i in range(n_points):
        others = np.arange(len(rows.seconds)) != i
        if others.any():
            predicted.append(rows[~others].predict(_solve(rows[others], near=whole))[0])
    return np.array(predicted)


def _named(base: ClusterSpec, constants: Float, used: npt.NDArray[np.bool_]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value, seen in zip(CONSTANTS, constants, used, strict=True):
        if not seen:
            values[name] = getattr(base, name)
        elif name in RATES:
            values[name] = float(1 / value) if value > 0 else NEVER
        else:
            values[name] = float(value)
    seen_of = dict(zip(CONSTANTS, used, strict=True))
    if seen_of["node_bytes_per_s"] and not seen_of["link_bytes_per_s"]:  # one device a node
        values["link_bytes_per_s"] = max(values["link_bytes_per_s"], values["node_bytes_per_s"])
    return values


def _with_memory(
    base: ClusterSpec, world_size: int, measured: Sequence[tuple[ModelSpec, Sequence[Point]]]
) -> ClusterSpec:
    """Of the scales and constants that predict no point too small, those closest to all."""
    every = [(model, p) for model, points in measured for p in points]
    peaks = np.array([p.peak_bytes for _, p in every])

    def at(scale: float) -> Float:
        cluster = dataclasses.replace(base, activation_scale=scale, fixed_bytes=0.0)
        sizes = []
        for model, p in every:
            stack = _of_stack(CostModel(model, cluster, world_size), p).model
            tokens = sum(p.lengths) / p.sp_degree
            sizes.append([m.bytes(tokens) for m in moments(stack, cluster, world_size, p.sp_degree, p.gc_layers)])
        return np.array(sizes)  # [points, moments]

    none, one = at(0.0), at(1.0)
    sizes = (none + SCALES[:, None, None] * (one - none)).max(axis=2)  # [scales, points]
    fixed = np.maximum(0.0, (peaks - sizes).max(axis=1))
    distance = np.abs((sizes + fixed[:, None]) / peaks - 1).mean(axis=1)
    best = int(distance.argmin())
    return dataclasses.replace(base, activation_scale=float(SCALES[best]), fixed_bytes=float(fixed[best]))

"""A profile of a machine that is exactly as a cost model says, but for a few percent."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hbp.cost.cluster import CLUSTERS
from hbp.cost.fit import Collective, Fit, Point, fit_cluster, grid, predict_bytes, predict_point
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.cost.profile_file import profile_json

MODEL = dataclasses.replace(
    load_model_spec("llama-3.1-8b"),
    name="small",
    n_layers=4,
    hidden=256,
    heads=8,
    kv_heads=4,
    qk_head_dim=32,
    v_head_dim=32,
    intermediate=700,
    vocab=4096,
)
COLLECTIVES = (Collective("all_to_all", 2, 1e5, 1e-3), Collective("all_gather", 2, 1e6, 2e-3))


def make_profile(
    world_size: int = 2, height: int | None = None, devices_per_node: int = 1024, longest: int = 2048
) -> tuple[Fit, tuple[Point, ...], dict[str, Any]]:
    """The fit, its points and the contents of its file."""
    rng = np.random.default_rng(0)
    cluster = dataclasses.replace(CLUSTERS["cpu-local"], devices_per_node=devices_per_node)
    cost = CostModel(MODEL, cluster, world_size)
    lengths = np.clip(rng.lognormal(np.log(200), 1, 500), 16, longest).astype(int)
    points = []
    for pack, degree, gc_layers in grid(cost, lengths, longest, rng):
        point = Point(pack, degree, min(gc_layers, height or gc_layers), 0.0, 0.0, height)
        seconds = predict_point(cost, point) * rng.uniform(0.96, 1.04)
        points.append(dataclasses.replace(point, seconds=seconds, peak_bytes=predict_bytes(cost, point)))
    collectives = COLLECTIVES if world_size > 1 else ()
    fit = fit_cluster(cluster, MODEL, world_size, points, "a test's machine", collectives)
    return fit, tuple(points), profile_json(fit, MODEL, world_size, points, collectives, date="2026-11-24")

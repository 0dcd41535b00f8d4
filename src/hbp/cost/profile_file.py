"""The profile file: a fitted cluster with the raw points that it was fitted to.

A JSON object, usable wherever a cluster is asked for (`--cluster FILE`). Degrees are listed with predicted seconds and
what these rest on: packs of that degree that ran here, or this machine's links alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbp.cost.cluster import ClusterSpec, cluster_from_json
from hbp.cost.fit import Collective, Fit, Point, predict_collective, predict_point
from hbp.cost.model_spec import ModelSpec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError

LISTED_DEGREES = 64


@dataclass(frozen=True)
class Profile:
    """A profile file, read back."""

    cluster: ClusterSpec
    model: ModelSpec
    world_size: int
    points: tuple[Point, ...]
    collectives: tuple[Collective, ...]
    held_out_s: tuple[float, ...]
    data: Mapping[str, Any]
    """The whole file."""

    @property
    def cost(self) -> CostModel:
        """Of the machine that was measured."""
        return CostModel(self.model, self.cluster, self.world_size)


def profile_json(
    fit: Fit,
    model: ModelSpec,
    world_size: int,
    points: Sequence[Point],
    collectives: Sequence[Collective] = (),
    **more: Any,
) -> dict[str, Any]:
    """The contents of a profile file; `more` keys, such as a date, are written as they are."""
    held_out = fit.held_out_s or fit.predicted_s
    errors = [abs(held / point.seconds - 1) for held, point in zip(held_out, points, strict=True)]
    return {
        "device": fit.cluster.device,
        **more,
        "cluster": fit.cluster.to_json(),
        "model": model.to_json(),
        "world_size": world_size,
        "median_error": fit.held_out_error,
        "p90_error": float(np.quantile(errors, 0.9)),
        "degrees": _degrees(fit.cluster, model, world_size, points),
        "points": [
            {**dataclasses.asdict(point), "predicted_s": seconds, "held_out_s": held, "predicted_bytes": size}
            for point, seconds, held, size in zip(points, fit.predicted_s, held_out, fit.predicted_bytes, strict=True)
        ],
        "collectives": [
            {**dataclasses.asdict(c), "predicted_s": predict_collective(fit.cluster, c)} for c in collectives
        ],
    }


def _degrees(cluster: ClusterSpec, model: ModelSpec, world_size: int, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Predicted seconds of one document, of as many tokens as the largest pack measured, and what they rest on."""
    measured = {p.sp_degree for p in points}
    links = "measured collectives" if world_size > 1 else "the links of the cluster that was profiled over"
    rows = []
    for degree in (2**i for i in range(LISTED_DEGREES.bit_length())):
        cost = CostModel(model, cluster, max(degree, world_size))
        point = Point((max(sum(p.lengths) for p in points),), degree, model.n_layers, 0.0, 0.0)
        source = "predicted; degree measured" if degree in measured else f"predicted from {links}"
        if degree not in measured and degree > cluster.devices_per_node >= world_size:
            source += " and the cluster's links between nodes"
        rows.append(
            {"sp_degree": degree, "source": source, "tokens": point.lengths[0], "seconds": predict_point(cost, point)}
        )
    return rows


def read_profile(path: Path) -> Profile:
    """A profile file that :func:`profile_json` made.

    Raises:
        HbpError: no such file, or not a profile with its raw points.
    """
    try:
        data = json.loads(path.read_text())
        points = tuple(
            Point(
                tuple(p["lengths"]),
                *(p[key] for key in ("sp_degree", "gc_layers", "seconds", "peak_bytes", "n_layers")),
            )
            for p in data["points"]
        )
        collectives = tuple(
            Collective(c["kind"], c["ranks"], c["received_bytes"], c["seconds"]) for c in data["collectives"]
        )
        return Profile(
            cluster_from_json(data["cluster"]),
            ModelSpec.from_json(data["model"]),
            int(data["world_size"]),
            points,
            collectives,
            tuple(float(p["held_out_s"]) for p in data["points"]),
            data,
        )
    except OSError as error:
        raise HbpError(f"cannot read the profile {path} ({error.strerror}); write one with `hbp profile`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise HbpError(f"{path} is not a profile with its points ({error!r}); write one with `hbp profile`") from None

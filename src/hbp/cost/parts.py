"""What a pack's predicted seconds consist of, found by taking the cost model's constants away one kind after another.

The seconds that go when communication costs nothing are communication's, those that go when then no layer is recomputed
are recomputation's, and so on down to the matrix products. So the parts add up to the prediction whatever its formulas
are, and there is no second copy of these to keep in step (:mod:`hbp.cost.fit` finds its columns in the same way).

Complexity: seven predictions, each a few array sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from hbp.cost.cluster import ClusterSpec
from hbp.cost.predict import CostModel, Float, Work

PARTS = ("linear", "attention", "overhead", "recompute", "alltoall", "fsdp")
"""Matrix products; attention; launches and small kernels; all of these again in recomputed layers; all-to-all, latency
included; the FSDP traffic that does not hide behind the rest."""

NEVER = 1e30
"""A rate so high that it costs nothing."""

NO_COMMUNICATION: Mapping[str, Any] = {
    **{field.name: NEVER for field in dataclasses.fields(ClusterSpec) if field.name.endswith("_bytes_per_s")},
    **{field.name: 0.0 for field in dataclasses.fields(ClusterSpec) if field.name.endswith("_latency_s")},
}
NO_ATTENTION: Mapping[str, Any] = {"attention_flops_per_s": NEVER}
NO_LINEAR: Mapping[str, Any] = {"linear_flops_per_s": NEVER}


def pack_parts(cost: CostModel, work: Work, sp_degree: int, gc_layers: int) -> dict[str, Float]:
    """Seconds of each part of packs that run alone in their micro-step; the parts add up to the prediction.

    Args:
        cost: of the run.
        work: of the packs, each field ``[P]``.
        sp_degree: of all of them.
        gc_layers: recomputed layers of all of them.

    Returns:
        For each of :data:`PARTS` an array ``[P]``, no entry below 0.
    """
    whole = cost.seconds(sp_degree, gc_layers)
    total, busy = whole.of(work), whole.compute(work)

    def without(gc_layers: int, *removed: Mapping[str, Any]) -> Float:
        constants = {name: value for change in removed for name, value in change.items()}
        cheaper = dataclasses.replace(cost, cluster=dataclasses.replace(cost.cluster, **constants))
        return cheaper.seconds(sp_degree, gc_layers).compute(work)

    local = without(gc_layers, NO_COMMUNICATION)
    once = without(0, NO_COMMUNICATION)
    unattended = without(0, NO_COMMUNICATION, NO_ATTENTION)
    overhead = without(0, NO_COMMUNICATION, NO_ATTENTION, NO_LINEAR)
    parts = {
        "linear": unattended - overhead,
        "attention": once - unattended,
        "overhead": overhead,
        "recompute": local - once,
        "alltoall": busy - local,
        "fsdp": total - busy,
    }
    return {name: np.maximum(0.0, seconds) for name, seconds in parts.items()}  # rounding alone is below 0

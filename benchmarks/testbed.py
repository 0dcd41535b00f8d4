"""The paper's testbed: the cost model's H100 constants, corrected by its micro-benchmarks and by nothing else.

Tables 4, 18 and 19 of the paper give seconds of one iteration of LLaMA-3.1-8B on 32 GPUs for a packing length, SP
degree and number of recomputed layers. Read as 512K tokens an iteration (a pack of 128K on each of 4 groups of 8) and,
in Table 4, one document a pack, they differ from the built-in ``h100-nvlink`` by little more than a constant. So two
numbers are fitted to these sixteen: a slow-down of everything that the cost model knows, and seconds of every optimizer
step (taken to grow with the parameters that a GPU holds: it updates no others). The recomputed layers that Table 4
needed fit two more, of memory: a scale of the activations, and a constant of which larger models leave no room and are
spared (theirs are not published). The results of the paper (GPU-days, speed-ups, ratios) are not looked at.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

from hbp.cost.cluster import CLUSTERS, GIB, ClusterSpec
from hbp.cost.model_spec import ModelSpec, load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate

K = 1024
GPUS, TOKENS = 32, 512 * K
"""Ranks and tokens of an iteration."""
ONE_DOCUMENT = [  # Table 4: length, SP degree, recomputed layers, seconds
    (32, 2, 28, 4.45),
    (32, 4, 23, 4.35),
    (32, 8, 8, 4.12),
    (64, 4, 28, 6.3),
    (64, 8, 24, 6.2),
    (128, 8, 29, 10.2),
    (128, 16, 23, 10.5),
]
PACKED = [  # Tables 18 and 19
    (32, 2, 28, 3.01),
    (32, 4, 23, 2.95),
    (32, 8, 8, 2.82),
    (32, 16, 0, 3.60),
    (8, 2, 8, 2.69),
    (16, 1, 28, 2.65),
    (32, 8, 8, 2.83),
    (64, 4, 28, 3.01),
    (128, 8, 28, 3.05),
]
OUT_OF_MEMORY = [(64, 2), (128, 4)]
SHORT = 8192
"""Packed iterations hold samples up to this length: Tulu3 without its tail."""


def testbed(model: ModelSpec, gpus: int = GPUS, step_grows: bool = True) -> ClusterSpec:
    """The fitted cluster for a model on so many GPUs.

    Every GPU updates its share of the parameters, so a step of 236B on 256 GPUs takes 3.7 times the seconds of one of
    8B on 32. With `step_grows` false they are those of the 8B for all.
    """
    known = load_model_spec("llama-3.1-8b")
    slow, per_step = _fit_seconds(known)
    cluster = _fit_memory(known)
    held = model.parameters() / gpus / (known.parameters() / GPUS)
    fields: dict[str, Any] = {
        name: getattr(cluster, name) / slow
        for name in ("linear_flops_per_s", "attention_flops_per_s", "link_bytes_per_s", "node_bytes_per_s")
    }
    fields |= {name: getattr(cluster, name) * slow for name in ("layer_overhead_s", "collective_latency_s")}
    return dataclasses.replace(
        cluster,
        name="h100-paper",
        fixed_bytes=cluster.fixed_bytes if model.parameters() == known.parameters() else 0.0,
        step_overhead_s=per_step * (held if step_grows else 1.0),
        origin="h100-nvlink, corrected by Tables 4, 18 and 19 of arXiv 2503.07680",
        **fields,
    )


def iteration_rows() -> list[dict[str, Any]]:
    """Published and fitted seconds of the sixteen iterations."""
    model = load_model_spec("llama-3.1-8b")
    cost, built_in = CostModel(model, testbed(model), GPUS), CostModel(model, CLUSTERS["h100-nvlink"], GPUS)
    rows = []
    for table, points, packed in (("4", ONE_DOCUMENT, False), ("18/19", PACKED, True)):
        for length, degree, gc_layers, published in points:
            here, there = (
                _iteration(c, length * K, degree, gc_layers, packed) + c.cluster.step_overhead_s
                for c in (cost, built_in)
            )
            rows.append(
                {
                    "table": table,
                    "row": f"{length}K SP{degree} GC{gc_layers}",
                    "metric": "iteration_s",
                    "published": published,
                    "ours": here,
                    "built_in": there,
                }
            )
    for length, degree, gc_layers, _ in ONE_DOCUMENT:
        rows.append(
            {
                "table": "4",
                "row": f"{length}K SP{degree}",
                "metric": "gc_layers",
                "published": gc_layers,
                "ours": cost.fewest_gc_layers(length * K, degree),
                "built_in": built_in.fewest_gc_layers(length * K, degree),
            }
        )
    return rows


def _iteration(cost: CostModel, length: int, degree: int, gc_layers: int, packed: bool) -> float:
    """Seconds of the micro-steps that 512K tokens take."""
    documents = np.array([length])
    if packed:
        drawn = generate("tulu3-longcite", 4000, 0)
        drawn = drawn[drawn <= min(SHORT, length)]
        documents = drawn[np.cumsum(drawn) <= length]
    work = cost.work(documents, np.array([0, len(documents)]))
    micro_steps = TOKENS / (GPUS / degree * length)
    return micro_steps * float(cost.seconds(degree, gc_layers).of(work)[0])


@cache
def _fit_seconds(model: ModelSpec) -> tuple[float, float]:
    """Slow-down and seconds a step: least squares of relative errors."""
    cost = CostModel(model, CLUSTERS["h100-nvlink"], GPUS)
    points = [(p, False) for p in ONE_DOCUMENT] + [(p, True) for p in PACKED]
    published = np.array([p[3] for p, _ in points])
    ours = np.array([_iteration(cost, p[0] * K, p[1], p[2], packed) for p, packed in points])
    design = np.stack([ours, np.ones(len(ours))], axis=1) / published[:, None]
    (slow, per_step), *_ = np.linalg.lstsq(design, np.ones(len(ours)), rcond=None)
    return float(slow), float(per_step)


@cache
def _fit_memory(model: ModelSpec) -> ClusterSpec:
    """Activation scale and constant with which the fewest layers come nearest to the published ones."""
    best, least = CLUSTERS["h100-nvlink"], np.inf
    for scale in np.linspace(1.0, 3.0, 41):
        for fixed in np.linspace(0, 40, 41) * GIB:
            cluster = dataclasses.replace(
                CLUSTERS["h100-nvlink"], activation_scale=float(scale), fixed_bytes=float(fixed)
            )
            cost = CostModel(model, cluster, GPUS)
            wrong = 0.0
            for length, degree, gc_layers, _ in ONE_DOCUMENT:
                ours = cost.fewest_gc_layers(length * K, degree)
                wrong += abs((model.n_layers + 8 if ours is None else ours) - gc_layers)
            wrong += sum(8 for length, d in OUT_OF_MEMORY if cost.fewest_gc_layers(length * K, d) is not None)
            if wrong < least:
                best, least = cluster, wrong
    return best

"""Where the paper's 2.4× of DeepSeek-V2 236B on 256 GPUs (Table 5) may come from: the naive side at SP 4, 8 and 16.

Neither the SP degree, nor the global batch, nor how Megatron-LM spread the experts is published. So HBP and `hbp-mixed`
are set against ISF at each degree, on the same samples and the same tokens of a step, with each part of a rank's time,
and twice: with FSDP's traffic for all 236 billion parameters, as our own trainer has, and with none of it, as if every
GPU kept the experts that it runs. (Expert parallelism has an all-to-all of tokens instead, alike on both sides and left
out.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from testbed import K

from hbp.cost.cluster import ClusterSpec
from hbp.cost.model_spec import ModelSpec, load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.errors import HbpError
from hbp.plan import Group, Plan
from hbp.planning.planner import make_plan
from hbp.simulator import DAY, rank_use

MODEL, DATA = "deepseek-v2-236b", "tulu3-longcite"
GPUS, LENGTH, LOWEST = 256, 32 * K, 4
BATCH = GPUS // LOWEST * LENGTH
"""Tokens of a step: the world filled once with packs at the lowest degree."""
DEGREES = (4, 8, 16)
HIDES_ALL = 1e9
"""Share of compute behind which FSDP's traffic hides that leaves none."""
Row = dict[str, Any]


def without_fsdp(cluster: ClusterSpec) -> ClusterSpec:
    """The cluster, if FSDP's traffic took no time."""
    return dataclasses.replace(cluster, fsdp_overlap=HIDES_ALL)


def deepseek_rows(samples: int, clusters: dict[str, Callable[[ModelSpec], ClusterSpec]]) -> list[Row]:
    """A row for each cluster, with and without FSDP traffic, and each side.

    Returns:
        Rows with `cluster`, `fsdp`, `side`, `gpu_days_per_billion`, `micro_steps`, `abr`, `groups`, the `parts` of a
        mean rank's time as shares of the run, and for ours `speedup` over each degree's naive side.
    """
    lengths = generate(DATA, samples, seed=0)
    lengths, model = lengths[lengths <= LENGTH], load_model_spec(MODEL)
    rows: list[Row] = []
    for name, of in clusters.items():
        for fsdp in (True, False):
            cluster = of(model) if fsdp else without_fsdp(of(model))
            cost, where = CostModel(model, cluster, GPUS), {"cluster": name, "fsdp": fsdp}
            naive: dict[str, float] = {}
            for degree in DEGREES:
                gc_layers = cost.fewest_gc_layers(LENGTH, degree)
                if gc_layers is None:
                    raise HbpError(f"{MODEL} does not fit {GPUS} GPUs at {LENGTH} tokens and SP {degree}")
                static = Group(LENGTH, degree, gc_layers)
                plan = make_plan(lengths, cost, strategy="isf", static=static, global_batch_tokens=BATCH)
                rows.append({**where, "side": f"naive, SP{degree}", **_figures(plan)})
                naive[str(degree)] = plan.info.metrics["predicted_s"]
            for strategy in ("hbp", "hbp-mixed"):
                plan = make_plan(lengths, cost, strategy=strategy, max_length=LENGTH, global_batch_tokens=BATCH)
                speedup = {degree: seconds / plan.info.metrics["predicted_s"] for degree, seconds in naive.items()}
                rows.append({**where, "side": strategy, **_figures(plan), "speedup": speedup})
    return rows


def deepseek_table_5(deepseek: list[Row], tokens: float) -> list[Row]:
    """DeepSeek-V2's rows of Table 5: naive packs at the lowest degree, parameters moved by FSDP."""
    of = {(r["cluster"], r["side"]): r for r in deepseek if r["fsdp"]}
    rows = []
    sides = ((f"naive, SP{LOWEST}", "naive", 57.10), ("hbp", "HBP", 23.80), ("hbp-mixed", "hbp-mixed", None))
    days = {at: row["gpu_days_per_billion"] * tokens / 1e9 for at, row in of.items()}
    for side, name, published in sides:
        same = {
            "table": "5",
            "row": f"DeepSeek-V2 236B, 32K, 256 GPUs, {name}",
            "note": "expert parallelism not modelled",
        }
        same |= {"groups": of["testbed", side]["groups"], "data": "Tulu3 + LongCite"}
        ours, built_in = days["testbed", side], days["h100-nvlink", side]
        rows.append({**same, "metric": "gpu_days", "published": published, "ours": ours, "built_in": built_in})
        if name != "naive":
            faster = (of[cluster, side]["speedup"][str(LOWEST)] for cluster in ("testbed", "h100-nvlink"))
            gain = dict(zip(("ours", "built_in"), faster, strict=True))
            rows.append({**same, "metric": "speedup", "published": 57.1 / published if published else None, **gain})
    return rows


def _figures(plan: Plan) -> Row:
    metrics = plan.info.metrics
    parts = rank_use(plan).mean_parts()
    whole = sum(parts.values())
    return {
        "gpu_days_per_billion": metrics["predicted_s"] * GPUS / DAY / plan.info.n_tokens * 1e9,
        "steps": plan.n_steps,
        "micro_steps": len(plan.micro_step_seconds()),
        "abr": metrics["abr"],
        "parts": {name: seconds / whole for name, seconds in parts.items()},
        "groups": ", ".join(f"{g.capacity / K:.4g}K SP{g.sp_degree} GC{g.gc_layers}" for g in plan.info.groups),
    }

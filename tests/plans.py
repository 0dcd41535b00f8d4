"""Plans written by hand, and a tiny model on a cluster whose memory holds a given length. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.plan import Plan, PlanInfo, hash_lengths, validate

TINY = spec_from_config(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
)

Row = tuple[int, int, int, int, int, list[int]]
"""step, micro-step, first rank, SP degree, recomputed layers, sample ids"""
TimedRow = tuple[int, int, int, int, int, float, list[int]]
"""step, micro-step, first rank, SP degree, capacity, predicted seconds, lengths"""


def tiny_cost(world: int, tokens: int | None = None, cluster: str = "cpu-local") -> CostModel:
    """The tiny model; with `tokens`, memory for about so many a rank if every layer is recomputed."""
    cost = CostModel(TINY, CLUSTERS[cluster], world)
    if tokens is None:
        return cost
    room = cost.bytes(tokens, 1, TINY.n_layers)
    return dataclasses.replace(cost, cluster=dataclasses.replace(cost.cluster, memory_bytes=room))


def can_fit(cost: CostModel, tokens: int) -> bool:
    """Whether any degree and number of recomputed layers brings a pack within the budget."""
    settings = [(d, k) for d in cost.degrees() for k in range(cost.model.n_layers + 1)]
    return any(cost.bytes(tokens, *setting) <= cost.cluster.memory_bytes for setting in settings)


def hand_plan(rows: list[TimedRow], world: int, step_overhead_s: float = 0.0) -> Plan:
    """A plan of these rows, nothing recomputed; samples are numbered as they come."""
    step, micro, start, degree, capacity, seconds, packs = zip(*rows, strict=True)
    lengths = np.concatenate([np.array(pack, np.int32) for pack in packs])
    ids = np.split(np.arange(len(lengths)), np.cumsum([len(pack) for pack in packs])[:-1])
    plan = _plan(list(zip(step, micro, start, degree, [0] * len(rows), ids, strict=True)), lengths, world)
    info = dataclasses.replace(plan.info, cluster={"step_overhead_s": step_overhead_s})
    timed = {"capacity": np.array(capacity, np.int32), "predicted_s": np.array(seconds, np.float32)}
    plan = dataclasses.replace(plan, info=info, **timed)
    validate(plan)
    return plan


def plan_of(rows: list[Row], lengths: np.ndarray, world: int) -> Plan:
    """A plan of these rows, each as long as its samples and of one second; samples that no row names are dropped."""
    plan = _plan(rows, lengths, world)
    validate(plan)
    return plan


def _plan(rows: Sequence[tuple[Any, ...]], lengths: np.ndarray, world: int) -> Plan:
    step, micro, start, degree, gc, ids = zip(*rows, strict=True)
    sample_ids = np.concatenate([np.array(i, np.int64) for i in ids])
    dropped = sorted(set(range(len(lengths))) - set(sample_ids.tolist()))
    info = PlanInfo(
        strategy="hand",
        seed=0,
        world_size=world,
        groups=(),
        n_samples=len(lengths),
        n_tokens=int(lengths[sample_ids].sum()),
        lengths_sha256=hash_lengths(lengths),
        dropped=tuple((i, "left out") for i in dropped),
    )
    return Plan(
        info,
        step=np.array(step, np.int32),
        micro_step=np.array(micro, np.int16),
        rank_start=np.array(start, np.int32),
        sp_degree=np.array(degree, np.int16),
        gc_layers=np.array(gc, np.int16),
        capacity=np.array([max(1, lengths[i].sum()) for i in ids], np.int32),
        predicted_s=np.ones(len(rows), np.float32),
        sample_offsets=np.cumsum([0, *map(len, ids)]).astype(np.int64),
        sample_ids=sample_ids,
        lengths=lengths[sample_ids].astype(np.int32),
    )


def write_by_hand(folder: Path, **said: Any) -> Path:
    """A plan as another program writes it, with pyarrow and json alone; two steps on four ranks."""
    columns = {
        "step": [0, 0, 0, 0, 1, 1],
        "micro_step": [0, 0, 0, 1, 0, 0],
        "rank_start": [0, 2, 3, 0, 0, 1],
        "sp_degree": [2, 1, 1, 4, 1, 1],
        "gc_layers": [0, 0, 0, 0, 0, 0],
        "capacity": [100, 50, 50, 200, 50, 50],
        "sample_ids": [[0, 1], [2, 3], [4], [5, 6], [7], [8, 9, 10]],
        "lengths": [[60, 30], [40, 10], [45], [150, 20], [50], [25, 5, 7]],
        "predicted_s": [1.0, 1.0, 1.0, 2.0, 1.0, 1.0],
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / "plan.parquet")
    (folder / "plan.json").write_text(json.dumps({"schema_version": 1, "world_size": 4, **said}))
    return folder

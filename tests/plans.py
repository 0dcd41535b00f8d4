"""Helpers of the planning tests: a tiny model on a cluster whose memory holds a given length, plans written by hand."""

from __future__ import annotations

import dataclasses

import numpy as np

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

Row = tuple[int, int, int, int, int, float, list[int]]
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


def hand_plan(rows: list[Row], world: int, step_overhead_s: float = 0.0) -> Plan:
    """A plan of these rows; samples are numbered as they come."""
    step, micro, start, degree, capacity, seconds, packs = zip(*rows, strict=True)
    lengths = np.concatenate([np.array(pack, np.int32) for pack in packs])
    info = PlanInfo(
        strategy="hand",
        seed=0,
        world_size=world,
        groups=(),
        n_samples=len(lengths),
        n_tokens=int(lengths.sum()),
        lengths_sha256=hash_lengths(lengths),
        cluster={"step_overhead_s": step_overhead_s},
    )
    plan = Plan(
        info,
        step=np.array(step, np.int32),
        micro_step=np.array(micro, np.int16),
        rank_start=np.array(start, np.int32),
        sp_degree=np.array(degree, np.int16),
        gc_layers=np.zeros(len(rows), np.int16),
        capacity=np.array(capacity, np.int32),
        predicted_s=np.array(seconds, np.float32),
        sample_offsets=np.cumsum([0, *map(len, packs)]).astype(np.int64),
        sample_ids=np.arange(len(lengths)),
        lengths=lengths,
    )
    validate(plan)
    return plan

"""Plans that no strategy of the planner makes: from a schedule and its groups to a measured plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel
from hbp.plan import Group, Plan, PlanInfo, hash_lengths
from hbp.planning.metrics import measure
from hbp.planning.packs import Schedule, predicted_seconds
from hbp.planning.settings import longest_settings

Lengths = npt.NDArray[np.int32]
Made = tuple[Schedule, tuple[Group, ...]]
ByHand = Callable[[Lengths, CostModel, Group, int, np.random.Generator], Made]
"""From lengths, cost, the one static setting, tokens of a step, and chance."""


def plan_by_hand(
    name: str, make: ByHand, lengths: Lengths, cost: CostModel, static: Group | None, batch_tokens: int, longest: int
) -> Plan:
    """A measured plan; with `static` None the fastest of all static settings that fit."""
    settings = [static] if static else [choice.group for choice in longest_settings(cost, lengths, longest)]
    plans = []
    for setting in settings:
        made = make(lengths, cost, setting, batch_tokens, np.random.default_rng(0))
        plans.append(_plan(name, *made, lengths, cost, batch_tokens))
    return min(plans, key=lambda plan: plan.info.metrics["predicted_s"])


def _plan(
    name: str, schedule: Schedule, groups: tuple[Group, ...], lengths: Lengths, cost: CostModel, batch_tokens: int
) -> Plan:
    order = np.lexsort((schedule.rank_start, schedule.micro_step, schedule.step))
    packs = schedule.packs.take(order)
    column = {
        field: np.array([getattr(group, field) for group in groups])[packs.group]
        for field in ("capacity", "sp_degree", "gc_layers")
    }
    info = PlanInfo(
        strategy=name,
        seed=0,
        world_size=cost.world_size,
        groups=groups,
        n_samples=len(lengths),
        n_tokens=int(lengths.sum(dtype=np.int64)),
        lengths_sha256=hash_lengths(lengths),
        model=cost.model.to_json(),
        cluster=cost.cluster.to_json(),
        settings={"global_batch_tokens": batch_tokens},
    )
    plan = Plan(
        info,
        step=schedule.step[order].astype(np.int32),
        micro_step=schedule.micro_step[order].astype(np.int16),
        rank_start=schedule.rank_start[order].astype(np.int32),
        sp_degree=column["sp_degree"].astype(np.int16),
        gc_layers=column["gc_layers"].astype(np.int16),
        capacity=column["capacity"].astype(np.int32),
        predicted_s=predicted_seconds(cost, lengths, groups)(packs).astype(np.float32),
        sample_offsets=packs.offsets,
        sample_ids=packs.sample_ids,
        lengths=lengths[packs.sample_ids].astype(np.int32),
    )
    return replace(plan, info=replace(info, metrics=asdict(measure(plan, cost))))

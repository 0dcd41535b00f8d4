"""Preference pairs: a chosen and its rejected answer always in one pack, so that a DPO trainer can follow the plan.

A pair is planned as one sample of both lengths together, by whatever strategy, and each row then lists the two, chosen
first, one after the other. They are two documents still, so attention costs less than that of one document as long:
the planner works with attention faster by the data's own ratio of the two, which is right for the whole and off for a
pair whose sides differ more or less than most. So packs are predicted again from their documents, and those of one
setting change places within :data:`BLOCK` steps, the slowest to where the planner thought the slowest to be; a sort of
the packs. Against planning the sides apart (short pairs, 32 GPUs) that leaves 0.2 % of the 1.4 % lost without it, and
2.4 % of 6.0 % where 3 % of the pairs have sides of 4K to 64K drawn apart; with long prompts in common 3.1 %, since
both have to fit one pack.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel
from hbp.plan import Plan, hash_lengths
from hbp.planning.metrics import measure, measure_order
from hbp.planning.packs import Int, Lengths, Packs, numbered
from hbp.planning.planner import make_plan

BLOCK = 64
"""Steps within which packs change places: near enough for the order to stay as random as it was."""


def plan_with_pairs(lengths: Lengths, pair: npt.NDArray[np.bool_] | None, cost: CostModel, **options: Any) -> Plan:
    """Plan one epoch, each pair in one pack.

    Args:
        lengths: of every sample of the data set, tokens ``[N]``.
        pair: whether a sample is a chosen one, whose rejected one follows it ``[N]``; None: there are no pairs.
        cost: as for :func:`hbp.planning.planner.make_plan`.
        options: as for it.

    Returns:
        The plan of the samples, in whose rows a chosen sample is followed by its rejected one.

    Raises:
        HbpError: as it does.
    """
    if pair is None or not pair.any():
        return make_plan(lengths, cost, **options)
    first = np.flatnonzero(np.concatenate([[True], ~pair[:-1]]))  # of each unit
    units = np.add.reduceat(lengths, first, dtype=lengths.dtype)
    apart, together = (float(cost.model.attention_pairs(x).sum()) for x in (lengths, units))
    cluster = replace(cost.cluster, attention_flops_per_s=cost.cluster.attention_flops_per_s * together / apart)
    plan = make_plan(units, replace(cost, cluster=cluster), **options)
    return _of_samples(plan, lengths, first, np.diff(first, append=len(lengths)), cost, options.get("max_length"))


def _of_samples(plan: Plan, lengths: Lengths, first: Int, size: Int, cost: CostModel, longest: int | None) -> Plan:
    """The plan of units as one of their samples."""
    sizes = size[plan.sample_ids]
    begin = np.cumsum(sizes) - sizes
    sample_ids = np.repeat(first[plan.sample_ids] - begin, sizes) + np.arange(int(sizes.sum()))
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    offsets, in_plan = ends[plan.sample_offsets], lengths[sample_ids]
    work, seconds = cost.work(in_plan, offsets), np.empty(plan.n_packs, np.float32)
    settings = plan.sp_degree.astype(np.int64) << 16 | plan.gc_layers
    for setting in np.unique(settings).tolist():
        here = settings == setting
        seconds[here] = cost.seconds(setting >> 16, setting & 0xFFFF).of(work[here])
    dropped = tuple(
        (int(sample), f"its pair's {why}" if size[unit] > 1 else why)
        for unit, why in plan.info.dropped
        for sample in range(int(first[unit]), int(first[unit] + size[unit]))
    )
    info = replace(
        plan.info,
        n_samples=len(lengths),
        lengths_sha256=hash_lengths(lengths),
        dropped=dropped,
        cluster=cost.cluster.to_json(),
        settings={**plan.info.settings, "pairs": int((size > 1).sum())},
    )
    block = 1 if "order" in plan.info.settings else BLOCK  # what a step holds is what such an order is for
    where = (plan.capacity, plan.gc_layers, plan.sp_degree, plan.step // block)
    pack_at = np.empty(plan.n_packs, np.int64)  # which pack comes to each row
    pack_at[np.lexsort((plan.predicted_s, *where))] = np.lexsort((seconds, *where))
    packs = Packs(offsets.astype(np.int64), sample_ids, numbered(plan.n_packs)).take(pack_at)
    made = replace(
        plan,
        info=info,
        predicted_s=seconds[pack_at],
        sample_offsets=packs.offsets,
        sample_ids=packs.sample_ids.astype(np.int64),
        lengths=lengths[packs.sample_ids].astype(np.int32),
    )
    details = {**plan.info.details, **measure_order(made)}
    return replace(made, info=replace(info, metrics=asdict(measure(made, cost, longest)), details=details))

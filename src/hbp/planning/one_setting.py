"""Plans for trainers that run one SP degree and one number of recomputed layers, and as many micro-steps in every step.

Such a trainer reads packed rows in order (`hbp export`); what a plan can still give it is packs and ranks that finish
together. The packer is that of `hbp-mixed` with a single group (:mod:`hbp.planning.mixed.windows`); with equal
micro-steps its micro-steps, in their order, are cut into steps of one count, the last of which may hold fewer (an
export fills it up with packs without loss).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Group, Plan
from hbp.planning.metrics import measure, measure_order
from hbp.planning.mixed.windows import windowed_schedule
from hbp.planning.packs import Lengths
from hbp.planning.planner import FASTEST, STRATEGIES, make_plan, to_plan
from hbp.planning.strategy import Problem

BASELINES = ("bfd", "isf")
"""Tried beside our own packer"""


def one_setting_plan(
    lengths: Lengths,
    cost: CostModel,
    *,
    sp_degree: int | None = None,
    gc_layers: int | None = None,
    equal_micro_steps: bool = False,
    strategy: str = "hbp-mixed",
    seed: int = 0,
    max_length: int | None = None,
    global_batch_tokens: int | None = None,
    windows: int | None = None,
    **options: Any,
) -> Plan:
    """Plan one epoch with one setting; what is not given is chosen.

    Args:
        lengths: of every sample, tokens ``[N]``.
        cost: of the run.
        sp_degree: of every pack; None: the lowest at which the packing length fits memory.
        gc_layers: of every pack; None: the fewest with which it fits.
        equal_micro_steps: as many micro-steps in every step but the last.
        strategy: `hbp-mixed` (the fastest of ours and :data:`BASELINES`), or a baseline with one setting.
        seed: of every random choice.
        max_length: packing length; None: the longest sample.
        global_batch_tokens: tokens of an optimizer step; None: one micro-step.
        windows: as for :func:`~hbp.planning.planner.make_plan`, and so `options`.

    Raises:
        HbpError: a degree that the ranks cannot form, more layers than there are, or packs that do not fit memory.
    """
    if not len(lengths):
        raise HbpError("there are no samples to plan; give data with at least one")
    group = _group(cost, max_length or int(lengths.max()), sp_degree, gc_layers)
    options |= {"seed": seed, "global_batch_tokens": global_batch_tokens}
    how = STRATEGIES.get(strategy)
    if how is not None and how.finds_groups:  # it has this one instead
        if options.get("order") not in (None, FASTEST):
            raise HbpError(f"order {options['order']} needs packs of several settings; leave --order out")
        mixed = _mixed(lengths, cost, group, seed, global_batch_tokens, windows)
        found = [mixed, *(make_plan(lengths, cost, strategy=name, static=group, **options) for name in BASELINES)]
    else:
        found = [make_plan(lengths, cost, strategy=strategy, static=group, **options)]
    found = [plan for plan in found if _settings(plan) == {(group.sp_degree, group.gc_layers)}]
    if not found:
        raise HbpError(f"{strategy} has no plan of one setting; give --strategy hbp-mixed or bfd")
    plan = min(found, key=lambda plan: plan.info.metrics["predicted_s"])
    asked = {"sp": sp_degree, "gc": gc_layers, "equal_micro_steps": equal_micro_steps}
    plan = replace(plan, info=replace(plan.info, settings={**plan.info.settings, "one_setting": asked}))
    return with_equal_micro_steps(plan, cost) if equal_micro_steps else plan


def _settings(plan: Plan) -> set[tuple[int, int]]:
    """The SP degrees and recomputed layers that a plan uses together."""
    return {
        (int(key) >> 16, int(key) & 0xFFFF) for key in np.unique(plan.sp_degree.astype(np.int64) << 16 | plan.gc_layers)
    }


def _group(cost: CostModel, capacity: int, sp_degree: int | None, gc_layers: int | None) -> Group:
    degrees = cost.degrees()
    if sp_degree is not None and sp_degree not in degrees:
        raise HbpError(f"--sp {sp_degree}: {cost.world_size} GPUs form groups of {', '.join(map(str, degrees))}")
    layers = cost.model.n_layers
    if gc_layers is not None and not 0 <= gc_layers <= layers:
        raise HbpError(f"--gc {gc_layers}: the model has {layers} layers; give 0 to {layers}")
    for degree in degrees if sp_degree is None else [sp_degree]:
        fewest = cost.fewest_gc_layers(capacity, degree)
        if fewest is not None and (gc_layers is None or gc_layers >= fewest):
            return Group(capacity, degree, fewest if gc_layers is None else gc_layers)
    needed = {degree: cost.fewest_gc_layers(capacity, degree) for degree in degrees}
    fits = ", ".join(f"--sp {degree} --gc {fewest}" for degree, fewest in needed.items() if fewest is not None)
    raise HbpError(f"packs of {capacity} tokens do not fit memory so; give {fits or 'a lower --max-length'}")


def _mixed(lengths: Lengths, cost: CostModel, group: Group, seed: int, batch: int | None, windows: int | None) -> Plan:
    dropped = np.flatnonzero(lengths > group.capacity)
    if len(dropped) == len(lengths):
        raise HbpError(f"every sample is longer than {group.capacity} tokens; raise --max-length")
    problem = Problem(
        lengths=lengths,
        dropped=dropped,
        static=group,
        longest=group.capacity,
        cost=cost,
        global_batch_tokens=batch or cost.world_size // group.sp_degree * group.capacity,
        batch_given=batch is not None,
        short_steps=0,
        windows=windows,
        rng=np.random.default_rng(seed),
    )
    return to_plan(windowed_schedule(problem, [group]), problem, "hbp-mixed", seed)


def with_equal_micro_steps(plan: Plan, cost: CostModel) -> Plan:
    """The same micro-steps in the same order, cut into steps of one count, that which is nearest to the plan's mean."""
    index = plan.micro_step_index()
    total = int(index[-1]) + 1
    each = max(1, round(total / plan.n_steps))
    cut = replace(
        plan,
        step=(index // each).astype(np.int32),
        micro_step=(index % each).astype(np.int16),
    )
    metrics = asdict(measure(cut, cost, plan.info.settings.get("max_length")))
    settings = {**plan.info.settings, "micro_steps": each}
    details = {**plan.info.details, **measure_order(cut)}
    return replace(cut, info=replace(cut.info, metrics=metrics, settings=settings, details=details))

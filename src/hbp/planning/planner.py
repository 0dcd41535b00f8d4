"""The way from lengths to a plan: groups → packs → micro-steps → steps → rows.

A strategy turns a :class:`~hbp.planning.strategy.Problem` into scheduled packs and their groups
(:class:`~hbp.planning.strategy.Outcome`); everything around it (dropping what cannot fit, trying its settings,
predicting, measuring, writing the rows) is common to all, so that strategies differ only in what they decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from hbp.cost.predict import CostModel
from hbp.errors import HbpError, did_you_mean
from hbp.plan import Group, Plan, PlanInfo, hash_lengths
from hbp.plan_info import DEFAULT_ORDER, ORDERS
from hbp.planning.baselines import BASELINES
from hbp.planning.metrics import measure, measure_order
from hbp.planning.mixed.hbp_mixed import HBP_MIXED
from hbp.planning.packs import Int, Lengths, in_order
from hbp.planning.paper.hbp import HBP
from hbp.planning.settings import Choice, SamplesByLength, Wanted, best_setting, fitting_capacity
from hbp.planning.strategy import Outcome, Problem, Strategy

FASTEST = "fastest"
"""The order that a plan has which names none, as plans of earlier versions do."""
STEPS_OFF = 0.02
"""Share by which the number of steps may be off before another setting that keeps it is preferred to a faster one."""
MOST_MICRO_STEPS = int(np.iinfo(np.int16).max) + 1
"""Of one step, as the plan file counts them in int16."""

STRATEGIES: Mapping[str, Strategy] = {strategy.name: strategy for strategy in (*BASELINES, HBP, HBP_MIXED)}
"""By name, in the order in which they are listed and compared."""


def make_plan(
    lengths: Lengths,
    cost: CostModel,
    *,
    strategy: str = "hbp-mixed",
    seed: int = 0,
    max_length: int | None = None,
    global_batch_tokens: int | None = None,
    short_steps: int | None = None,
    order: str | None = None,
    windows: int | None = None,
    static: Group | None = None,
) -> Plan:
    """Plan one epoch.

    Args:
        lengths: of every sample of the data set, tokens ``[N]``.
        cost: predicts the user's model on the user's cluster at its world size.
        strategy: a key of :data:`STRATEGIES`.
        seed: of every random choice; the same input and seed give the same plan, another seed another epoch.
        max_length: longest packing length; longer samples are dropped, by name. None, or one that fits memory at no
            setting: the longest sample. With None, other strategies than `hbp-mixed` take whichever doubling of it is
            fastest; `hbp-mixed` has `max_length` as a limit only, and None for what memory holds.
        global_batch_tokens: tokens of an optimizer step. None: the world filled once with packs of the packing length,
            and for `hbp-mixed` at least one micro-step of the packs it finds best.
        short_steps: steps of the curriculum's first phase. None: 500 or a tenth of the run. Only ours have one.
        order: of `hbp-mixed`: `fastest`; `balanced`, steps as near to the data's mix as a stated price in speed allows
            (:data:`hbp.planning.ordered.orders.PRICE`); or `random`, steps of what a shuffle puts there. None:
            :data:`hbp.plan_info.DEFAULT_ORDER`.
        windows: of `hbp-mixed` in order `fastest`: pieces that the shuffled samples are planned in. More stay closer
            to the shuffle, fewer are faster. None: as many as cost at most a hundredth of the speed.
        static: setting of the strategies that have only one. None: the fastest of all that fit
            (:mod:`hbp.planning.settings`).

    Returns:
        The plan with its metrics; not yet validated (:func:`hbp.plan.write_plan` does).

    Raises:
        HbpError: no samples, an unknown strategy, or a longest sample that no setting fits into memory.
    """
    how = _checked(strategy, order)
    dropped = _too_long(lengths, static.capacity if static else max_length)
    own = np.delete(lengths, dropped) if len(dropped) else lengths
    if static:
        choices = [Choice(static, 0.0)]
    else:
        longest = fitting_capacity(cost, own, max_length)
        choices = how.settings(Wanted(cost, own, longest, max_length is None, global_batch_tokens))

    def planned(choice: Choice) -> Plan:
        problem = Problem(
            lengths=lengths,
            dropped=dropped,
            static=choice.group,
            longest=max_length,
            cost=cost,
            global_batch_tokens=global_batch_tokens or default_batch_tokens(cost, own, choice.group.capacity),
            batch_given=global_batch_tokens is not None,
            short_steps=short_steps,
            windows=windows,
            order=order or DEFAULT_ORDER,
            rng=np.random.default_rng(seed),
        )
        return to_plan(how.plan(problem), problem, strategy, seed)

    best = _fastest(choices, planned, batch_given=global_batch_tokens is not None)
    asked: dict[str, Any] = {
        "max_length": max_length,
        "global_batch_tokens": global_batch_tokens,
        "short_steps": short_steps,
        "windows": windows,
        "static": asdict(static) if static else None,
    }
    if order not in (None, FASTEST):
        asked["order"] = order
    return replace(best, info=replace(best.info, settings={**best.info.settings, "asked": asked}))


def _checked(strategy: str, order: str | None) -> Strategy:
    """The strategy of that name; refuses names that there are not."""
    if strategy not in STRATEGIES:
        raise HbpError(f"no strategy {strategy!r}: give one of {', '.join(STRATEGIES)}")
    if order is not None and order not in ORDERS:
        raise HbpError(f"no order {order!r}{did_you_mean(order, ORDERS)}: give one of {', '.join(ORDERS)}")
    return STRATEGIES[strategy]


def _fastest(choices: Sequence[Choice], planned: Callable[[Choice], Plan], *, batch_given: bool) -> Plan:
    """The fastest plan of those whose steps are as many as the global batch asks for, or of all if it is none's.

    Args:
        choices: settings, at least one.
        planned: plans with one of them.
        batch_given: whether there is a global batch that was asked for.
    """
    best: Plan | None = None
    least = (True, np.inf)
    for choice in sorted(choices, key=lambda choice: choice.seconds):
        if not least[0] and choice.seconds >= least[1]:
            break  # and so are all after it
        plan = planned(choice)
        not_kept = batch_given and abs(plan.info.details["steps_off"]) > STEPS_OFF
        if best is None or (not_kept, plan.info.metrics["predicted_s"]) < least:
            best, least = plan, (not_kept, plan.info.metrics["predicted_s"])
    assert best is not None
    return best


def _too_long(lengths: Lengths, limit: int | None) -> Int:
    """Samples over the limit; refuses lengths of which nothing is left to plan."""
    if not len(lengths):
        raise HbpError("there are no samples to plan; give data with at least one")
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1:
        raise HbpError(f"sample {int(lengths.argmin())} has {shortest} tokens; every length must be 1 or more")
    dropped = np.zeros(0, np.int64) if limit is None else np.flatnonzero(lengths > limit)
    if len(dropped) == len(lengths):
        raise HbpError(f"every sample is longer than {limit} tokens; raise --max-length to {longest}")
    return dropped


def default_batch_tokens(cost: CostModel, lengths: Lengths, longest: int) -> int:
    """The world filled once with packs of the longest length, at the degree where these take least effort."""
    best = best_setting(cost, SamplesByLength(cost, lengths), longest)
    assert best is not None
    return cost.world_size // best.group.sp_degree * longest


def to_plan(outcome: Outcome, problem: Problem, strategy: str, seed: int) -> Plan:
    """Rows and metrics of scheduled packs."""
    schedule, groups, cost, lengths = outcome.schedule, outcome.groups, problem.cost, problem.lengths
    most = int(schedule.micro_step.max()) + 1
    if most > MOST_MICRO_STEPS:
        raise HbpError(
            f"a step of {problem.global_batch_tokens} tokens takes {most} micro-steps, over the limit of "
            f"{MOST_MICRO_STEPS}; lower global_batch_tokens"
        )
    if outcome.known is None:
        schedule = in_order(schedule)
        seconds: np.ndarray = problem.pack_cost(groups)(schedule.packs)
        in_plan = lengths[schedule.packs.sample_ids]
    else:
        seconds, in_plan = outcome.known
    packs = schedule.packs

    def column(name: str, kind: type) -> np.ndarray:
        return np.array([getattr(group, name) for group in groups], kind)[packs.group]

    info = PlanInfo(
        strategy=strategy,
        seed=seed,
        world_size=problem.world_size,
        groups=tuple(sorted(groups[i] for i in np.unique(packs.group))),
        n_samples=len(lengths),
        n_tokens=int(in_plan.sum(dtype=np.int64)),
        lengths_sha256=hash_lengths(lengths),
        dropped=tuple(
            (int(i), f"{int(lengths[i])} tokens, longer than the longest group ({problem.static.capacity})")
            for i in problem.dropped
        ),
        model=cost.model.to_json(),
        cluster=cost.cluster.to_json(),
        cost_model={"origin": cost.cluster.origin, "device": cost.cluster.device},
        settings={
            "global_batch_tokens": problem.global_batch_tokens,
            "short_steps": outcome.short_steps,
            "max_length": problem.static.capacity,
            "windows": outcome.windows,
            "extra_groups": [asdict(group) for group in outcome.extra],
            **({"order": problem.order} if STRATEGIES[strategy].orders and problem.order != FASTEST else {}),
        },
    )
    plan = Plan(
        info,
        step=schedule.step.astype(np.int32, copy=False),
        micro_step=schedule.micro_step.astype(np.int16, copy=False),
        rank_start=schedule.rank_start.astype(np.int32, copy=False),
        sp_degree=column("sp_degree", np.int16),
        gc_layers=column("gc_layers", np.int16),
        capacity=column("capacity", np.int32),
        predicted_s=seconds.astype(np.float32, copy=False),
        sample_offsets=packs.offsets,
        sample_ids=packs.sample_ids.astype(np.int64, copy=False),
        lengths=in_plan.astype(np.int32, copy=False),
    )
    details = {**measure_order(plan), **outcome.details}
    return replace(plan, info=replace(info, metrics=asdict(measure(plan, cost, problem.longest)), details=details))

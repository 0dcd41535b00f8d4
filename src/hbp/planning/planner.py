"""The way from lengths to a plan: groups → packs → micro-steps → steps → rows.

A strategy is a function from a :class:`~hbp.planning.strategy.Problem` to scheduled packs and their groups
(:class:`~hbp.planning.strategy.Outcome`); everything around it (dropping what cannot fit, predicting, measuring,
writing the rows) is common to all, so that strategies differ only in what they decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np

from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Group, Plan, PlanInfo, hash_lengths
from hbp.planning import baselines
from hbp.planning.metrics import measure, measure_order
from hbp.planning.mixed.groups import search_groups
from hbp.planning.mixed.windows import windowed_schedule
from hbp.planning.packs import Lengths
from hbp.planning.paper.curriculum import default_short_steps, order_steps
from hbp.planning.paper.groups import Choice, SamplesByLength, best_setting, fitting_capacity, published_groups
from hbp.planning.paper.packing import hierarchical_packs
from hbp.planning.schedule import balance_batches, in_order
from hbp.planning.settings import settings_to_try
from hbp.planning.strategy import Outcome, Problem

MOST_MICRO_STEPS = int(np.iinfo(np.int16).max) + 1
"""Of one step, as the plan file counts them in int16."""

Strategy = Callable[[Problem], Outcome]


def hbp(problem: Problem) -> Outcome:
    """The paper's method: Algorithm 1's groups, hierarchical packing, GreedyFill, balance batching, curriculum."""
    lengths, ids = problem.lengths, problem.sample_ids
    groups = published_groups(problem.cost, lengths[ids], problem.static.capacity)
    packs = hierarchical_packs(lengths, ids, groups, problem.rng)
    schedule = balance_batches(
        packs,
        problem.pack_cost(groups),
        groups,
        lengths,
        problem.world_size,
        problem.global_batch_tokens,
        problem.rng,
    )
    n_steps = int(schedule.step.max()) + 1
    kind = np.empty(n_steps, np.int64)
    kind[schedule.step] = schedule.packs.group
    lowest = min(group.sp_degree for group in groups)
    short = {i for i, group in enumerate(groups) if group.sp_degree == lowest}
    count = default_short_steps(n_steps) if problem.short_steps is None else problem.short_steps
    position = order_steps(kind, short, count, problem.rng)
    return Outcome(replace(schedule, step=position[schedule.step]), groups, short_steps=count)


def hbp_mixed(problem: Problem) -> Outcome:
    """Our best: groups searched for the data, packs that are alike, steps that hold the data's mix."""
    lengths = problem.own_lengths
    batch = problem.global_batch_tokens if problem.batch_given else None
    groups = search_groups(problem.cost, lengths, int(lengths.max()), problem.longest, batch)
    return windowed_schedule(problem, groups)


STRATEGIES: Mapping[str, Strategy] = {
    "concat": baselines.concat,
    "ffd": baselines.ffd,
    "bfd": baselines.bfd,
    "isf": baselines.isf,
    "sorted": baselines.sorted_batches,
    "lb": baselines.lb,
    "dcp": baselines.dcp,
    "hbp": hbp,
    "hbp-mixed": hbp_mixed,
}


def make_plan(
    lengths: Lengths,
    cost: CostModel,
    *,
    strategy: str = "hbp-mixed",
    seed: int = 0,
    max_length: int | None = None,
    global_batch_tokens: int | None = None,
    short_steps: int | None = None,
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
        windows: of `hbp-mixed`: pieces that the shuffled samples are planned in. More stay closer to a random order,
            fewer are faster. None: as many as cost at most a hundredth of the speed.
        static: setting of the strategies that have only one. None: the fastest of all that fit
            (:mod:`hbp.planning.settings`).

    Returns:
        The plan with its metrics; not yet validated (:func:`hbp.plan.write_plan` does).

    Raises:
        HbpError: no samples, an unknown strategy, or a longest sample that no setting fits into memory.
    """
    if strategy not in STRATEGIES:
        raise HbpError(f"no strategy {strategy!r}: give one of {', '.join(STRATEGIES)}")
    if not len(lengths):
        raise HbpError("there are no samples to plan; give data with at least one")
    if int(lengths.min()) < 1:
        raise HbpError(
            f"sample {int(lengths.argmin())} has {int(lengths.min())} tokens; every length must be 1 or more"
        )
    limit = static.capacity if static else max_length
    dropped = np.zeros(0, np.int64) if limit is None else np.flatnonzero(lengths > limit)
    own = np.delete(lengths, dropped) if len(dropped) else lengths
    if not len(own):
        raise HbpError(f"every sample is longer than {limit} tokens; raise --max-length to {int(lengths.max())}")
    longest = static.capacity if static else fitting_capacity(cost, own, max_length)
    longer = max_length is None
    choices = (
        [Choice(static, 0.0)]
        if static
        else settings_to_try(strategy, cost, own, longest, longer=longer, batch=global_batch_tokens)
    )
    best: Plan | None = None
    for choice in choices:
        if best is not None and choice.seconds >= best.info.metrics["predicted_s"]:
            break  # and so are all after it
        setting = choice.group
        batch = global_batch_tokens or default_batch_tokens(cost, own, setting.capacity)
        problem = Problem(
            lengths=lengths,
            dropped=dropped,
            static=setting,
            longest=max_length,
            cost=cost,
            global_batch_tokens=batch,
            batch_given=global_batch_tokens is not None,
            short_steps=short_steps,
            windows=windows,
            rng=np.random.default_rng(seed),
        )
        plan = to_plan(STRATEGIES[strategy](problem), problem, strategy, seed)
        if best is None or plan.info.metrics["predicted_s"] < best.info.metrics["predicted_s"]:
            best = plan
    assert best is not None
    asked = {
        "max_length": max_length,
        "global_batch_tokens": global_batch_tokens,
        "short_steps": short_steps,
        "windows": windows,
        "static": asdict(static) if static else None,
    }
    return replace(best, info=replace(best.info, settings={**best.info.settings, "asked": asked}))


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
        seconds = problem.pack_cost(groups)(schedule.packs)
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

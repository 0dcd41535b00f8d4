"""The plan that a run follows: the user's own, or one made here whose packs are then seen to fit the memory budget.

Rank 0 plans, without torch, and writes the plan folder; every rank reads the same file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hbp.config import Config
from hbp.cost.cluster import GIB
from hbp.data.samples import Samples
from hbp.errors import HbpError
from hbp.plan import Group, Plan, hash_lengths, piece_folders, read_info, read_plan, write_plan
from hbp.planning.planner import make_plan
from hbp.progress import say
from hbp.run.engine import Engine
from hbp.run.steps.less_memory import LessMemory, read_less
from hbp.simulator import plan_cost_model
from hbp.train.launch import rank_zero_first
from hbp.train.measure.micro_batch import measure_rows
from hbp.train.model import CausalLMWithLoss

MEMORY_ROUNDS = 4
OVER_BY = 0.1
"""Share of the budget that a pack which ran out of memory is taken to be over it."""


def own_plans(config: Config) -> list[Path]:
    """Folders of the user's own plan, or of a stream's pieces in their order; none where plans are made here."""
    if config.plan.path is None:
        return []
    path = Path(config.plan.path)
    pieces = [piece for piece in piece_folders(path) if read_info(piece).n_tokens]  # the last may hold nothing
    return pieces or [path]


def own_plan(engine: Engine, own: Path, folder: Path, model: CausalLMWithLoss | None = None) -> tuple[Plan, float]:
    """A plan of the user's own, copied to ``folder/plan``, and the peak bytes of its fullest packs. A collective.

    Args:
        engine: samples and cost model.
        own: the plan's folder.
        folder: of the part.
        model: in training; none yet: a fresh one runs the packs.

    Raises:
        HbpError: it was made for other ranks or data, or its packs do not fit the device.
    """
    copy = folder / "plan"
    with rank_zero_first() as first:
        if first:
            plan = read_plan(own)
            check_plan(plan, engine.samples.lengths, engine.cost.world_size)
            if own.resolve() != copy.resolve():
                write_plan(plan, copy)
    plan = read_plan(copy)
    peak = peak_bytes(engine, plan, model or engine.fresh_model())
    if math.isinf(peak):
        raise HbpError(f"a pack of the plan {own} does not fit the memory of a device; make it with less memory")
    return plan, peak


def plan_within_memory(
    engine: Engine,
    strategy: str,
    folder: Path,
    model: CausalLMWithLoss | None = None,
    *,
    seed: int | None = None,
    global_batch_tokens: int | None = None,
    short_steps: int | None = None,
) -> tuple[Plan, float]:
    """Plan into ``folder/plan``, run the fullest packs, plan again knowing what they took, until all fit.

    The plan's own cluster (:func:`as_planned`) then knows it too.

    Raises:
        HbpError: none does.
    """
    budget, model = engine.cost.cluster.memory_bytes, model or engine.fresh_model()
    for _ in range(MEMORY_ROUNDS):
        plan = write_and_read(
            engine, strategy, folder, seed=seed, global_batch_tokens=global_batch_tokens, short_steps=short_steps
        )
        worst = peak_bytes(engine, plan, model)
        if worst <= budget:
            return plan, worst
        took = "more than the device has" if math.isinf(worst) else f"{worst / GIB:.3f} GiB"
        say(f"a pack took {took}, over the budget of {budget / GIB:.3f} GiB: planning again with that known")
        over = OVER_BY * budget if math.isinf(worst) else worst - budget
        cluster = engine.cost.cluster
        cluster = dataclasses.replace(cluster, fixed_bytes=cluster.fixed_bytes + over)
        engine = dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster))
    raise HbpError(
        f"no plan keeps within {budget / GIB:.3f} GiB a process (a pack of the last took {took}); "
        "raise cluster.memory_gib or lower data.max_length"
    )


def peak_bytes(engine: Engine, plan: Plan, model: CausalLMWithLoss) -> float:
    """Peak bytes of any rank in the fullest packs of a plan, infinite if one does not fit. A collective.

    Random states are left alone, so that what is trained does not depend on what was measured.
    """
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        peaks = measure_rows(model, plan, engine.samples, engine.mesh, engine.device)
    return max(peaks.values(), default=0.0)


def as_planned(engine: Engine, plan: Plan) -> Engine:
    """With the cost model that a plan was made with, and so what was learnt of memory while it was made."""
    planned = plan_cost_model(plan)
    if planned is None:  # another program's plan
        return engine
    return dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=planned.cluster))


def with_less_memory(engine: Engine, folder: Path) -> Engine:
    """With the memory that plans are to count on after a step of the run in `folder` ran out of it. A collective."""
    found: list[LessMemory | None] = [read_less(folder, engine.config) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    less = found[0]
    if less is None:
        return engine
    say(
        f"plans count on {less.budget_bytes / GIB:.3f} GiB a process, since {less.why}; cluster.memory_gib changes that"
    )
    cluster = dataclasses.replace(engine.cost.cluster, memory_bytes=less.budget_bytes)
    return dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster), lowered=True)


def counts_on_more(plan: Plan, engine: Engine) -> bool:
    """Whether a plan was made before a step ran out of memory, and so counts on more than there is."""
    planned = plan_cost_model(plan) if engine.lowered else None
    had = math.inf if planned is None else planned.cluster.memory_bytes
    return engine.lowered and had > engine.cost.cluster.memory_bytes


def global_batch_tokens(plan: Plan, config: Config) -> int:
    """That a plan was made for; of another program's plan that does not say, the configured one or its mean step."""
    asked = plan.info.settings.get("global_batch_tokens") or config.plan.global_batch_tokens
    return int(asked or plan.info.n_tokens // plan.n_steps)


def check_plan(plan: Plan, lengths: npt.NDArray[np.int32], world_size: int) -> None:
    """Refuse a plan that was made for another world size or other data."""
    if plan.info.world_size != world_size:
        raise HbpError(
            f"the plan was made for {plan.info.world_size} ranks but {world_size} are running; "
            f"make one with `hbp plan --gpus {world_size}`"
        )
    inside = int(plan.sample_ids.max(initial=-1)) < len(lengths)
    known = plan.info.is_piece or not plan.info.lengths_sha256  # of another program, with samples dropped
    whole = known or plan.info.lengths_sha256 == hash_lengths(lengths)
    if not inside or not whole or not np.array_equal(plan.lengths, lengths[plan.sample_ids]):
        raise HbpError(
            f"the plan was made for other data ({plan.info.n_samples} samples) than this ({len(lengths)} samples): "
            "lengths differ; make it again with `hbp plan`"
        )


def check_plans(plans: Sequence[Plan], lengths: npt.NDArray[np.int32], world_size: int) -> None:
    """Refuse plans of an epoch that do not fit the ranks or the data, or together not every sample once."""
    for plan in plans:
        check_plan(plan, lengths, world_size)
    if not plans[0].info.is_piece:
        return
    held = [plan.sample_ids for plan in plans]
    dropped = [sample for plan in plans for sample, _ in plan.info.dropped if sample < len(lengths)]
    times = np.bincount(np.concatenate([*held, np.array(dropped, np.int64)]), minlength=len(lengths))
    if (times != 1).any():
        sample = int(np.flatnonzero(times != 1)[0])
        raise HbpError(
            f"the pieces of the stream hold sample {sample} {times[sample]} times, of {len(lengths)} that must each be "
            "there once; plan the whole data as one stream"
        )


def write_and_read(
    engine: Engine,
    strategy: str,
    folder: Path,
    *,
    seed: int | None = None,
    global_batch_tokens: int | None = None,
    short_steps: int | None = None,
    static: Group | None = None,
) -> Plan:
    """Rank 0 plans the engine's samples into ``folder/plan``; every rank reads the same file. A collective.

    Args:
        engine: samples and cost model.
        strategy: to plan with.
        folder: of the part.
        seed: of the plan; None: the configuration's.
        global_batch_tokens: None: the configuration's.
        short_steps: of the curriculum; None: the configuration's.
        static: setting of the strategies that have only one.
    """
    config = engine.config
    with rank_zero_first() as first:
        if first:
            plan = make_plan(
                engine.samples.lengths,
                engine.cost,
                strategy=strategy,
                seed=config.seed if seed is None else seed,
                max_length=config.data.max_length,
                global_batch_tokens=global_batch_tokens or config.plan.global_batch_tokens,
                short_steps=config.plan.short_steps if short_steps is None else short_steps,
                order=config.plan.order,
                static=static,
            )
            write_plan(plan, folder / "plan")
    return read_plan(folder / "plan")


def evaluation_plans(engine: Engine) -> dict[str, tuple[Plan, Samples]]:
    """Best-fit packs of the held-out samples, for forward passes only, of each source by name; none if there are none.

    No pack holds samples of two sources, so that each has its own loss.
    """
    held_out, plans = engine.held_out, {}
    with_room = dataclasses.replace(engine.cost.cluster, memory_bytes=1e18)
    cost = dataclasses.replace(engine.cost, cluster=with_room)
    sources = held_out.store.sources
    for number, source in enumerate(sources):
        mine = held_out if len(sources) == 1 else Samples(held_out.store, held_out.ids[held_out.sources == number])
        if len(mine.ids):
            plan = make_plan(mine.lengths, cost, strategy="bfd", max_length=int(mine.lengths.max()))
            plans[source.name] = plan, mine
    return plans

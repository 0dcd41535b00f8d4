"""The plan that a run follows: the user's own, or one made here whose packs are then seen to fit the memory budget.

Rank 0 plans, without torch, and writes the plan folder; every rank reads the same file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from hbp.cost.cluster import GIB
from hbp.errors import HbpError
from hbp.plan import Group, Plan, hash_lengths, read_plan, write_plan
from hbp.planning.planner import make_plan
from hbp.prepare import Engine
from hbp.progress import say
from hbp.train.launch import rank_zero_first
from hbp.train.profile import measure_rows

MEMORY_ROUNDS = 4


def plan_to_run(engine: Engine, folder: Path) -> tuple[Plan, Engine]:
    """The plan to run, in ``folder/plan``, and the engine whose cost model it was made with. A collective."""
    config = engine.config
    if config.plan.path is None:
        return plan_within_memory(engine, config.plan.strategy, folder)
    plan = read_plan(Path(config.plan.path))
    check_plan(plan, engine.samples.lengths, engine.cost.world_size)
    if dist.get_rank() == 0:
        write_plan(plan, folder / "plan")
    return plan, engine


def plan_within_memory(
    engine: Engine, strategy: str, folder: Path, *, seed: int | None = None, global_batch_tokens: int | None = None
) -> tuple[Plan, Engine]:
    """Plan, run the fullest packs, and plan again with what they took known, until they keep within the budget.

    Raises:
        HbpError: none does.
    """
    budget = engine.cost.cluster.memory_bytes
    for _ in range(MEMORY_ROUNDS):
        plan = write_and_read(engine, strategy, folder, seed=seed, global_batch_tokens=global_batch_tokens)
        model = engine.fresh_model()
        peaks = measure_rows(model, plan, engine.samples, engine.mesh, engine.device)
        worst = max(peaks.values())
        if worst <= budget:
            return plan, engine
        say(f"a pack took {worst / GIB:.3f} GiB, over the budget of {budget / GIB:.3f}: planning again with that known")
        cluster = engine.cost.cluster
        cluster = dataclasses.replace(cluster, fixed_bytes=cluster.fixed_bytes + worst - budget)
        engine = dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster))
    raise HbpError(
        f"no plan keeps within {budget / GIB:.3f} GiB a process (the last needed {worst / GIB:.3f}); "
        "raise cluster.memory_gib or lower data.max_length"
    )


def check_plan(plan: Plan, lengths: npt.NDArray[np.int32], world_size: int) -> None:
    """Refuse a plan that was made for another world size or other data."""
    if plan.info.world_size != world_size:
        raise HbpError(
            f"the plan was made for {plan.info.world_size} ranks but {world_size} are running; "
            f"make one with `hbp plan --gpus {world_size}`"
        )
    same = plan.info.lengths_sha256 == hash_lengths(lengths)
    if not same or not np.array_equal(plan.lengths, lengths[plan.sample_ids]):
        raise HbpError(
            f"the plan was made for other data ({plan.info.n_samples} samples) than this ({len(lengths)} samples): "
            "lengths differ; make it again with `hbp plan`"
        )


def write_and_read(
    engine: Engine,
    strategy: str,
    folder: Path,
    *,
    seed: int | None = None,
    global_batch_tokens: int | None = None,
    static: Group | None = None,
) -> Plan:
    """Rank 0 plans the engine's samples into ``folder/plan``; every rank reads the same file. A collective.

    Args:
        engine: samples and cost model.
        strategy: to plan with.
        folder: of the part.
        seed: of the plan; None: the configuration's.
        global_batch_tokens: None: the configuration's.
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
                short_steps=config.plan.short_steps,
                windows=config.plan.windows,
                static=static,
            )
            write_plan(plan, folder / "plan")
    return read_plan(folder / "plan")


def evaluation_plan(engine: Engine) -> Plan | None:
    """Best-fit packs of the held-out samples, for forward passes only; None if there are none."""
    if not len(engine.held_out.ids):
        return None
    with_room = dataclasses.replace(engine.cost.cluster, memory_bytes=1e18)
    cost, lengths = dataclasses.replace(engine.cost, cluster=with_room), engine.held_out.lengths
    return make_plan(lengths, cost, strategy="bfd", max_length=int(lengths.max()))

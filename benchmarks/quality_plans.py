"""What `quality.py` compares: the settings, and the plan of each.

A plan is made for a real cluster and a real model, every sample standing for one :data:`SCALE` times as long, and then
written down for the samples as they are. So which samples share a pack, a step and a rank, in which order, and how many
seconds a step is predicted to take, is what LLaMA-3.1-8B with contexts of 128K tokens would have on 16 H100s; what is
learnt is learnt by a small model from the short samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hbp.config import PlanConfig
from hbp.cost.predict import CostModel
from hbp.plan import Plan, hash_lengths, validate
from hbp.plan_info import ORDERS
from hbp.planning.packs import Lengths, packs_of
from hbp.planning.paper.packing import balance_batches
from hbp.planning.planner import make_plan, to_plan
from hbp.planning.settings import Wanted, every_degree
from hbp.planning.strategy import Outcome, Problem

SCALE = 32
"""Tokens that a token stands for."""
GPUS = 16
PAPER_STEPS = 2000
"""Steps of the paper's run, roughly: Tulu3 and LongCite on 32 GPUs; what its 100 and 500 first steps are a share of."""
UNPACKED = "unpacked"


@dataclass(frozen=True)
class Setting:
    """One way to train. The defaults are those of `hbp train`."""

    name: str
    strategy: str = "hbp-mixed"
    order: str | None = None
    """`plan.order`; None: the default."""
    curriculum: float | None = None
    """Share of the steps that hold short samples only; None: the default."""
    loss: str = "ave-token"
    rate_by: str = "tokens"
    """What the learning rate follows: tokens, or steps."""
    seconds_of: str | None = None
    """Another setting whose predicted seconds this one may use: it gets as large a share of the samples."""
    question: str = ""
    """Which table it is in."""


DEFAULT = "ours"
DEFAULT_ORDER: str = PlanConfig.model_fields["order"].default


def settings() -> list[Setting]:
    """All of them, one factor at a time around the defaults, the most important first."""
    found = [
        Setting(UNPACKED, UNPACKED, question="main"),
        Setting("naive packing", "concat", question="main"),
        Setting("hbp, as published", "hbp", question="main"),
        Setting(DEFAULT, question="main"),
        Setting("unpacked, ours' seconds", UNPACKED, seconds_of=DEFAULT, question="main"),
        Setting("naive packing, ours' seconds", "concat", seconds_of=DEFAULT, question="main"),
    ]
    others = [order for order in ORDERS if order != DEFAULT_ORDER]
    found += [Setting(f"order {order}", order=order, question="order") for order in others]
    found += [
        Setting("run-token", loss="run-token", question="loss"),
        Setting("fastest, run-token", order="fastest", loss="run-token", question="loss"),
        Setting("curriculum off", curriculum=0.0, question="curriculum"),
        Setting("token-mean", loss="token-mean", question="loss"),
        Setting("sum", loss="sum", question="loss"),
        Setting("sample-mean", loss="sample-mean", question="loss"),
        Setting("curriculum 500", curriculum=500 / PAPER_STEPS, question="curriculum"),
        Setting("curriculum 100", curriculum=100 / PAPER_STEPS, question="curriculum"),
        Setting("rate by steps", rate_by="steps", question="rate"),
        Setting("naive packing, token-mean", "concat", loss="token-mean", question="loss"),
    ]
    return found


def cost_model(gpus: int = GPUS) -> CostModel:
    """Of the cluster that plans are made for."""
    return CostModel.of("llama-3.1-8b", "h100-nvlink", gpus)


def plan_setting(setting: Setting, lengths: Lengths, batch: int, seed: int, cost: CostModel) -> Plan:
    """The plan of a setting for samples of these lengths, with steps of `batch` tokens.

    Args:
        setting: to plan.
        lengths: of the samples as they are trained on.
        batch: tokens of an optimizer step, of the same kind.
        seed: of the plan.
        cost: of the cluster, which each sample is :data:`SCALE` times as long for.
    """
    longer = np.asarray(lengths, np.int32) * SCALE
    if setting.strategy == UNPACKED:
        return scaled_down(unpacked_plan(longer, batch * SCALE, seed, cost))
    steps = max(1, round(int(lengths.sum()) / batch))
    more: dict[str, object] = {"order": setting.order or DEFAULT_ORDER} if setting.strategy == "hbp-mixed" else {}
    if setting.curriculum is not None:
        more["short_steps"] = round(setting.curriculum * steps)
    plan = make_plan(
        longer,
        cost,
        strategy=setting.strategy,
        seed=seed,
        global_batch_tokens=batch * SCALE,
        **more,  # type: ignore[arg-type]
    )
    return scaled_down(plan)


def unpacked_plan(lengths: Lengths, batch: int, seed: int, cost: CostModel) -> Plan:
    """A sample a micro-batch, in random order, at the one setting that is fastest for the longest."""
    longest = int(lengths.max())
    choice = every_degree(Wanted(cost, lengths, longest, False, batch))[0]
    problem = Problem(
        lengths=lengths,
        dropped=np.zeros(0, np.int64),
        static=choice.group,
        longest=None,
        cost=cost,
        global_batch_tokens=batch,
        batch_given=True,
        short_steps=None,
        windows=None,
        rng=np.random.default_rng(seed),
        order=DEFAULT_ORDER,
    )
    groups = (problem.static,)
    schedule = balance_batches(
        packs_of(np.arange(len(lengths)), problem.rng.permutation(problem.sample_ids)),
        problem.pack_cost(groups),
        groups,
        lengths,
        cost.world_size,
        batch,
        problem.rng,
        by_cost=False,
        counted=False,
    )
    plan = to_plan(Outcome(schedule, groups), problem, "concat", seed)  # which has one setting and no order, as this
    return dataclasses.replace(plan, info=dataclasses.replace(plan.info, strategy=UNPACKED))


def scaled_down(plan: Plan) -> Plan:
    """The same rows for samples of a :data:`SCALE`-th of the length; seconds and metrics stay the long ones'."""
    lengths = plan.lengths // SCALE
    own = np.zeros(plan.info.n_samples, np.int32)
    own[plan.sample_ids] = lengths
    info = dataclasses.replace(plan.info, n_tokens=int(lengths.sum()), lengths_sha256=hash_lengths(own), groups=())
    capacity = -(-plan.capacity // SCALE)
    scaled = dataclasses.replace(plan, info=info, lengths=lengths, capacity=capacity)
    validate(scaled)
    return scaled


def seconds_of_steps(plan: Plan, cost: CostModel) -> np.ndarray:
    """Predicted seconds of each optimizer step on the cluster that it was made for, float64 ``[steps]``."""
    index = plan.micro_step_index()
    step_of = np.zeros(int(index[-1]) + 1, np.int64)
    step_of[index] = plan.step
    return np.bincount(step_of, plan.micro_step_seconds(), plan.n_steps) + cost.cluster.step_overhead_s


def what_it_is(plan: Plan) -> Mapping[str, float]:
    """Figures of a plan that the tables name beside what was learnt."""
    details, metrics = plan.info.details, plan.info.metrics
    return {"drift": details["drift"], "abr": metrics["abr"], "steps_off": details["steps_off"]}

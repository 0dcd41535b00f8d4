"""The training loop: run a plan, one optimizer step after another.

:func:`train` reads top to bottom: the rate, the micro-steps, one update, one record, and ``on_step``. The plan decides
everything about packs; the loop only keeps the collectives of all ranks in step, which the plan's equal micro-step
counts guarantee. What goes on around a step (logs, checkpoints, evaluation, ending early) is done by the caller in
``on_step``, from a record that is the same on every rank, so that every rank decides alike.

Learning rate follows tokens, not steps: plans that cut the same tokens into different steps see the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from hbp.config import TrainConfig
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Plan
from hbp.run_log import StepRecord
from hbp.train.batch import IDLE, MicroBatch, SampleSource, make_micro_batch, micro_batches, rows_of_rank
from hbp.train.loss import global_batches
from hbp.train.model import CausalLMWithLoss, set_gc_layers
from hbp.train.records import Efficiency, Recorder, StepClock, gather
from hbp.train.watch import enter, leave

SLOWER = 10
"""A step that takes so many times what the slowest before would have it take may have hung."""


class CountedSamples(SampleSource, Protocol):
    """Samples whose targets are counted."""

    @property
    def loss_tokens(self) -> npt.NDArray[np.integer]:
        """Targets of each sample, int ``[N]``."""
        ...


@dataclass(frozen=True)
class Learner:
    """What is trained on this rank, and what with."""

    model: CausalLMWithLoss
    """Sharded over ``mesh.world``."""
    optimizer: torch.optim.Optimizer
    mesh: ParallelMesh
    """Gets the SP groups of a plan's degrees that it does not hold yet."""
    config: TrainConfig
    device: torch.device

    @classmethod
    def of(cls, model: CausalLMWithLoss, mesh: ParallelMesh, config: TrainConfig, device: torch.device) -> Learner:
        """With a new optimizer."""
        return cls(model, make_optimizer(model, config), mesh, config, device)


@dataclass(frozen=True)
class Start:
    """Where training begins in a plan, and in the run that the plan is a part of."""

    step: int = 0
    """First step to run."""
    tokens: int = 0
    """Tokens that the run has seen."""
    tokens_total: int | None = None
    """Tokens that the run is to see; None: those of the plan."""
    seconds: float = 0.0
    """Seconds that the run has taken in this plan."""


class StepLimit:
    """How long a rank may stand in a step before it is held to hang: far longer than the steps before make likely."""

    def __init__(self, plan: Plan, config: TrainConfig) -> None:
        self.predicted = np.maximum(np.bincount(plan.step, plan.predicted_s, plan.n_steps), 1e-9)
        self.least = math.inf if config.hang_minutes is None else 60 * config.hang_minutes
        self.pace: float | None = None

    def learn(self, step: int, seconds: float) -> None:
        """From a step that is done."""
        self.pace = max(self.pace or 0.0, seconds / float(self.predicted[step]))

    def seconds(self, step: int) -> float:
        """Of a step to come; without end for the first, in which kernels are compiled and connections made."""
        return math.inf if self.pace is None else max(self.least, SLOWER * self.pace * float(self.predicted[step]))


class StepFailed(Exception):
    """A step raised on this rank; its cause says what."""

    def __init__(self, step: int, micro_step: int | None, row: int, sample_ids: Sequence[int]) -> None:
        """`micro_step` None: after the last, with no row (:data:`~hbp.train.batch.IDLE`)."""
        super().__init__(f"step {step}, micro-step {micro_step}, row {row}")
        self.step, self.micro_step, self.row, self.sample_ids = step, micro_step, row, sample_ids


def train(
    learner: Learner,
    plan: Plan,
    samples: CountedSamples,
    on_step: Callable[[StepRecord], bool | None] = lambda record: None,
    *,
    start: Start = Start(),
    signal: Callable[[], int] = lambda: 0,
    efficiency: Efficiency | None = None,
) -> list[StepRecord]:
    """Run the steps of a plan on this rank.

    Args:
        learner: model, optimizer and recipe.
        plan: made for this world size.
        samples: token ids, loss masks and counts of targets by the plan's sample ids.
        on_step: called after each step, on every rank; True ends training there.
        start: where to begin.
        signal: number of a signal that this rank has received, or 0.
        efficiency: for MFU; None: not reported.

    Returns:
        The record of each step, equal on all ranks.

    Raises:
        StepFailed: a step raised on this rank.
    """
    rank, config, device = dist.get_rank(), learner.config, learner.device
    learner.mesh.prepare(plan.sp_degree.tolist())
    rows, batches = rows_of_rank(plan, rank), global_batches(plan, samples.loss_tokens, config.loss)
    work = ((row, batches[step]) for step in range(start.step, plan.n_steps) for row in rows[step])
    packs = micro_batches(plan, work, samples, learner.mesh, rank, device)
    recorder = Recorder.of(plan, batches, device, start.seconds, efficiency)
    may_take, records, tokens_done = StepLimit(plan, config), list[StepRecord](), start.tokens
    tokens_total = start.tokens_total or start.tokens + sum(batch.tokens for batch in batches[start.step :])
    for step in range(start.step, plan.n_steps):
        clock, limit_s = StepClock(device), may_take.seconds(step)
        lr = learning_rate(config, tokens_done, batches[step].tokens, tokens_total)
        loss = _run_micro_steps(learner.model, plan, step, rows[step], packs, clock, limit_s)
        with _naming_the_pack(plan, step):
            norm = _update(learner, lr)
            record = recorder.record(step, clock, loss, norm, lr, signal())
        leave()
        may_take.learn(step, record.seconds)
        tokens_done += record.tokens
        records.append(record)
        if on_step(record):
            break
    return records


def _run_micro_steps(
    model: CausalLMWithLoss,
    plan: Plan,
    step: int,
    rows: Sequence[int],
    packs: Iterator[MicroBatch],
    clock: StepClock,
    limit_s: float,
) -> Tensor:
    """Forward and backward of this rank's rows of a step; its part of the loss. The watch knows how far it is."""
    loss = torch.zeros((), dtype=torch.float32, device=clock.device)
    enter(step, 0, limit_s)
    for micro_step, row in enumerate(rows):
        with clock.micro_step(), _naming_the_pack(plan, step, micro_step, row):
            batch = next(packs)
            enter(step, micro_step + 1, limit_s)
            loss += forward_backward(model, batch, dist.get_world_size())
    enter(step, len(rows) + 1, limit_s)
    return loss


def _update(learner: Learner, lr: float) -> Tensor:
    """Clip the gradients, take the optimizer's step, clear them; their norm before it was clipped."""
    optimizer = learner.optimizer
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(trained, learner.config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def forward_backward(model: CausalLMWithLoss, batch: MicroBatch, scale: float = 1.0) -> Tensor:
    """One micro-step: the summed loss (detached), gradients of `scale` times it left in the parameters."""
    set_gc_layers(model, batch.gc_layers)
    loss = model(*batch.inputs)
    (loss * scale).backward()
    return loss.detach()


def evaluate(learner: Learner, plan: Plan, samples: CountedSamples) -> float | None:
    """Mean cross entropy over the loss tokens of a plan's samples; None if they have none."""
    rank, model = dist.get_rank(), learner.model
    total = torch.zeros((), dtype=torch.float64, device=learner.device)  # summed there: the host does not wait
    targets = int(samples.loss_tokens[plan.sample_ids].sum())
    if not targets:
        return None
    learner.mesh.prepare(plan.sp_degree.tolist())
    model.eval()
    with torch.no_grad():
        for step in rows_of_rank(plan, rank):
            for row in step:
                batch = make_micro_batch(plan, row, samples, learner.mesh, rank, learner.device)
                total += model(batch.input_ids, batch.position_ids, batch.labels, batch.layout).detach()
    model.train()
    if isinstance(model, FSDPModule):  # which keeps its root gathered until a backward
        model.reshard()
    return float(gather([float(total)], learner.device).sum()) / targets


def learning_rate(config: TrainConfig, tokens_done: int, tokens_of_step: int, tokens_total: int) -> float:
    """Linear rise, then a cosine to ``final_lr``, by the share of tokens seen at the middle of the step."""
    at = min(1.0, (tokens_done + tokens_of_step / 2) / tokens_total)
    if at < config.warmup:
        return config.lr * at / config.warmup
    fall = (at - config.warmup) / max(1 - config.warmup, 1e-9)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * fall)) / 2)


def make_optimizer(model: CausalLMWithLoss, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained; fused, as `foreach` would hold another copy of them all."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


@contextmanager
def _naming_the_pack(plan: Plan, step: int, micro_step: int | None = None, row: int = IDLE) -> Iterator[None]:
    try:
        yield
    except HbpError:
        raise
    except Exception as error:
        ids = [] if row == IDLE else plan.samples(row)[0].tolist()
        raise StepFailed(step, micro_step, row, ids) from error

"""The training loop: run a plan, one optimizer step after another.

:func:`train` reads top to bottom: the rate, the micro-steps, one update, one record, and ``on_step``. The plan decides
everything about packs; the loop only keeps the collectives of all ranks in step, which the plan's equal micro-step
counts guarantee. What goes on around a step (logs, checkpoints, evaluation, ending early) is done by the caller in
``on_step``, from a record that is the same on every rank, so that every rank decides alike.

A step whose loss or gradient norm is not finite is skipped on all ranks before the optimizer sees it: every rank
decides from the gathered losses and the norm of the whole gradient, so all decide alike. It costs one small message a
step and, on CUDA, that the host waits for the gradients before it launches the optimizer.

Learning rate follows tokens, not steps: plans that cut the same tokens into different steps see the same schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Plan
from hbp.run_log import StepRecord
from hbp.train.batch import IDLE, MicroBatch, SampleSource, make_micro_batch, micro_batches, rows_of_rank
from hbp.train.loss import MeanStep, global_batches
from hbp.train.model import CausalLMWithLoss, set_gc_layers
from hbp.train.records import Efficiency, Recorder, StepClock, gather
from hbp.train.watch import enter, leave

if TYPE_CHECKING:  # measuring needs no configuration, nor pydantic
    from hbp.config import TrainConfig

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


@dataclass(frozen=True)
class StepLosses:
    """What each pack of a step added to its loss, the same on every rank."""

    step: int
    rows: Sequence[int]
    """Of the plan."""
    losses: Sequence[float]
    """Of each row, all ranks of its SP group together; as `train.loss` weighs tokens."""
    problem: str = ""
    """What was not finite, for people; empty: nothing, and the step was taken."""
    gradients: Sequence[str] = ()
    """Parameters with gradients that are not finite, where there was a problem."""


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
    look: Callable[[StepLosses], None] = lambda losses: None,
    start: Start = Start(),
    signal: Callable[[], int] = lambda: 0,
    efficiency: Efficiency | None = None,
    mean: MeanStep | None = None,
) -> list[StepRecord]:
    """Run the steps of a plan on this rank.

    Args:
        learner: model, optimizer and recipe.
        plan: made for this world size.
        samples: token ids, loss masks and counts of targets by the plan's sample ids.
        on_step: called after each step, on every rank; True ends training there.
        look: called on every rank before `on_step`, with the losses of the step's packs.
        start: where to begin.
        signal: number of a signal that this rank has received, or 0.
        efficiency: for MFU; None: not reported.
        mean: step of the plan that the run began with; None: this is that plan.

    Returns:
        The record of each step, equal on all ranks.

    Raises:
        StepFailed: a step raised on this rank.
    """
    rank, config, device = dist.get_rank(), learner.config, learner.device
    learner.mesh.prepare(plan.sp_degree.tolist())
    rows, batches = rows_of_rank(plan, rank), global_batches(plan, samples.loss_tokens, config.loss, mean)
    work = ((row, batches[step]) for step in range(start.step, plan.n_steps) for row in rows[step])
    packs = micro_batches(plan, work, samples, learner.mesh, rank, device)
    recorder = Recorder.of(plan, batches, device, start.seconds, efficiency)
    may_take, records, tokens_done = StepLimit(plan, config), list[StepRecord](), start.tokens
    tokens_total = start.tokens_total or start.tokens + sum(batch.tokens for batch in batches[start.step :])
    for step in range(start.step, plan.n_steps):
        clock, limit_s = StepClock(device), may_take.seconds(step)
        lr = learning_rate(config, tokens_done, batches[step].tokens, tokens_total)
        own = _run_micro_steps(learner.model, plan, step, rows[step], packs, clock, limit_s)
        with _naming_the_pack(plan, step):
            losses = gather(own.tolist(), device)  # [ranks, 1 + micro-steps]: the sum, as this rank added it up, first
            norm, problem, gradients = _update(learner, lr, float(losses[:, 0].sum()))
            record = recorder.record(step, clock, losses[:, 0], norm, lr, signal(), problem)
        leave()
        look(_losses_of_packs(plan, step, losses[:, 1:], problem, gradients))
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
    """Forward and backward of this rank's rows of a step; the watch knows how far it is.

    Returns:
        This rank's part of the loss and then that of each micro-step, float32 ``[1 + micro-steps]``.
    """
    loss, each = torch.zeros((), dtype=torch.float32, device=clock.device), list[Tensor]()
    enter(step, 0, limit_s)
    for micro_step, row in enumerate(rows):
        with clock.micro_step(), _naming_the_pack(plan, step, micro_step, row):
            batch = next(packs)
            enter(step, micro_step + 1, limit_s)
            each.append(forward_backward(model, batch, dist.get_world_size()))
            loss += each[-1]
    enter(step, len(rows) + 1, limit_s)
    return torch.stack([loss, *each])


def _update(learner: Learner, lr: float, loss: float) -> tuple[float, str, list[str]]:
    """Clip the gradients, take the optimizer's step unless something is not finite, clear them. A collective.

    Returns:
        The gradients' norm before it was clipped; what was not finite, empty if nothing; gradients that were not.
    """
    optimizer = learner.optimizer
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=None)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    found = {"loss": loss, "gradient norm": norm}
    problem = " and ".join(f"{name} {value}" for name, value in found.items() if not math.isfinite(value))
    gradients = list[str]()
    if problem:
        named = [(name, p.grad) for name, p in learner.model.named_parameters() if p.requires_grad]
        gradients = not_finite(named, learner.device)
    else:
        torch.nn.utils.clip_grads_with_norm_(trained, learner.config.max_grad_norm, total)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, problem, gradients


def not_finite(named: Iterable[tuple[str, Tensor | None]], device: torch.device) -> list[str]:
    """Names of the tensors of which some rank's shard holds NaN or infinity, the same on every rank. A collective.

    Args:
        named: the same names in the same order on every rank; None counts as finite.
        device: of this rank.
    """
    names, flags = list[str](), [torch.zeros((), dtype=torch.bool, device=device)]  # so that there is one
    for name, tensor in named:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        names.append(name)
        flags.append(flags[0] if local is None else ~local.detach().isfinite().all())
    found = gather(torch.stack(flags).double().tolist(), device).max(axis=0)[1:].tolist()
    return [name for name, bad in zip(names, found, strict=True) if bad]


def _losses_of_packs(
    plan: Plan, step: int, losses: npt.NDArray[np.float64], problem: str, gradients: Sequence[str]
) -> StepLosses:
    """From each rank's loss of each micro-step, ``[ranks, micro-steps]``."""
    rows = np.flatnonzero(plan.step == step)
    _, micro = np.unique(plan.micro_step[rows], return_inverse=True)
    first, degree = plan.rank_start[rows], plan.sp_degree[rows]
    of_rows = [float(losses[a : a + n, m].sum()) for a, n, m in zip(first, degree, micro, strict=True)]
    return StepLosses(step, rows.tolist(), of_rows, problem, gradients)


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
    """AdamW over the parameters that are trained; norms and biases, the vectors, without weight decay.

    Fused, as `foreach` would hold another copy of them all.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if config.decay_all or parameter.ndim > 1]
    rest = [parameter for parameter in trained if not config.decay_all and parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


@contextmanager
def _naming_the_pack(plan: Plan, step: int, micro_step: int | None = None, row: int = IDLE) -> Iterator[None]:
    try:
        yield
    except HbpError:
        raise
    except Exception as error:
        ids = [] if row == IDLE else plan.samples(row)[0].tolist()
        raise StepFailed(step, micro_step, row, ids) from error

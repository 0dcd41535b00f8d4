"""The training loop: run a plan, one optimizer step after another.

It reads top to bottom: the rows of this rank, the micro-steps of a step, one clip, one optimizer step, one record. The
plan decides everything about packs; the loop only keeps the collectives of all ranks in step, which the plan's equal
micro-step counts guarantee.

Learning rate follows tokens, not steps: plans that cut the same tokens into different steps see the same schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hbp.config import TrainConfig
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Plan
from hbp.train.batch import SampleSource, make_micro_batch, micro_batches, rows_of_rank
from hbp.train.loss import global_batches
from hbp.train.model import CausalLMWithLoss
from hbp.train.profile import forward_backward


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did; a line of ``steps.jsonl``."""

    step: int
    loss: float
    """Of the global batch, as `train.loss` defines it."""
    grad_norm: float
    lr: float
    tokens: int
    loss_tokens: int
    started_s: float
    """Seconds since training began."""
    seconds: float
    tokens_per_s: float
    group: str
    """The packing groups that the step ran."""
    rank_wall_s: list[list[float]]
    """``[rank][micro_step]``: from the start of a micro-step to the start of the next."""
    rank_busy_s: list[list[float]]
    """The part of it that the rank computed; the rest it waited for others. On CUDA equal to the wall time."""


@dataclass
class _MicroClock:
    """Wall and busy seconds of each micro-step of a step, as this rank saw them.

    On CPU a rank that waits in a collective uses no processor time, so the process's own time is what it worked.
    """

    device: torch.device
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall, busy = time.perf_counter(), time.process_time()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter() - wall)
        used = time.process_time() - busy if self.device.type == "cpu" else self.wall[-1]
        self.busy.append(min(used, self.wall[-1]))


def train(
    model: CausalLMWithLoss,
    plan: Plan,
    samples: SampleSource,
    loss_tokens: npt.NDArray[np.integer],
    mesh: ParallelMesh,
    config: TrainConfig,
    device: torch.device,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> list[StepRecord]:
    """Run every step of a plan on this rank.

    Args:
        model: sharded over ``mesh.world``.
        plan: made for this world size.
        samples: token ids and loss masks by the plan's sample ids.
        loss_tokens: targets of each sample, int ``[N]``.
        mesh: gets the SP groups of the plan's degrees that it does not hold yet.
        config: optimizer and loss.
        device: of this rank.
        on_step: called after each step, on every rank.

    Returns:
        The record of each step, equal on all ranks.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = torch.optim.AdamW(
        model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, foreach=True
    )
    mesh.prepare(plan.sp_degree.tolist())
    rows = rows_of_rank(plan, rank)
    tokens_of_step = np.bincount(plan.step, weights=plan.tokens(), minlength=plan.n_steps).astype(np.int64)
    steps = global_batches(plan, loss_tokens, config.loss)
    work = ((row, steps[step]) for step in range(plan.n_steps) for row in rows[step])
    batches = micro_batches(plan, work, samples, mesh, rank, device)
    records: list[StepRecord] = []
    began, tokens_done = time.perf_counter(), 0
    for step in range(plan.n_steps):
        started = time.perf_counter()
        lr = learning_rate(config, tokens_done, int(tokens_of_step[step]), int(tokens_of_step.sum()))
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock = _MicroClock(device)
        summed = torch.zeros((), dtype=torch.float32, device=device)
        for _ in rows[step]:
            with clock.micro_step():
                summed += forward_backward(model, next(batches), world_size)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gathered = _gather([float(summed), *clock.wall, *clock.busy], device)
        seconds = time.perf_counter() - started
        n, tokens = len(rows[step]), int(tokens_of_step[step])
        record = StepRecord(
            step=step,
            loss=float(gathered[:, 0].sum()),
            grad_norm=float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
            lr=lr,
            tokens=tokens,
            loss_tokens=steps[step].loss_tokens,
            started_s=started - began,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            group=groups_of_step(plan, step),
            rank_wall_s=np.round(gathered[:, 1 : 1 + n], 5).tolist(),
            rank_busy_s=np.round(gathered[:, 1 + n :], 5).tolist(),
        )
        tokens_done += tokens
        records.append(record)
        on_step(record)
    return records


def evaluate(
    model: CausalLMWithLoss,
    plan: Plan,
    samples: SampleSource,
    loss_tokens: npt.NDArray[np.integer],
    mesh: ParallelMesh,
    device: torch.device,
) -> float:
    """Mean cross entropy over the loss tokens of a plan's samples."""
    total = 0.0
    mesh.prepare(plan.sp_degree.tolist())
    model.eval()
    with torch.no_grad():
        for step in rows_of_rank(plan, dist.get_rank()):
            for row in step:
                batch = make_micro_batch(plan, row, samples, mesh, dist.get_rank(), device)
                total += float(model(batch.input_ids, batch.position_ids, batch.labels, batch.layout))
    model.train()
    return float(_gather([total], device).sum()) / max(int(loss_tokens[plan.sample_ids].sum()), 1)


def groups_of_step(plan: Plan, step: int) -> str:
    """The groups of a step for people, such as ``4096/SP1/GC0``."""
    a, b = np.searchsorted(plan.step, [step, step + 1])
    settings = zip(plan.capacity[a:b], plan.sp_degree[a:b], plan.gc_layers[a:b], strict=True)
    return " + ".join(f"{c}/SP{d}/GC{k}" for c, d, k in sorted(set(settings)))


def learning_rate(config: TrainConfig, tokens_done: int, tokens_of_step: int, tokens_total: int) -> float:
    """Linear rise, then a cosine to ``final_lr``, by the share of tokens seen at the middle of the step."""
    at = (tokens_done + tokens_of_step / 2) / tokens_total
    if at < config.warmup:
        return config.lr * at / config.warmup
    fall = (at - config.warmup) / max(1 - config.warmup, 1e-9)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * fall)) / 2)


def _gather(values: Sequence[float], device: torch.device) -> npt.NDArray[np.float64]:
    """Every rank's values, ``[ranks, values]``."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every).cpu().numpy()

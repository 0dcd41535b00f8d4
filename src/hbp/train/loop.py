"""The training loop: run a plan, one optimizer step after another.

It reads top to bottom: the rows of this rank, the micro-steps of a step, one clip, one optimizer step, one record. The
plan decides everything about packs; the loop only keeps the collectives of all ranks in step, which the plan's equal
micro-step counts guarantee. What goes on around a step (logs, checkpoints, evaluation, ending early) is done by the
caller in ``on_step``, from a record that is the same on every rank, so that every rank decides alike.

Learning rate follows tokens, not steps: plans that cut the same tokens into different steps see the same schedule.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hbp.config import TrainConfig
from hbp.errors import HbpError
from hbp.parallel.gather_kv import ALL_GATHER
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Plan
from hbp.train.batch import IDLE, SampleSource, make_micro_batch, micro_batches, rows_of_rank
from hbp.train.loss import global_batches
from hbp.train.measure.micro_batch import forward_backward
from hbp.train.model import CausalLMWithLoss
from hbp.train.watch import enter, leave

SLOWER = 10
"""A step that takes so many times what the slowest before would have it take may have hung."""
TIMELINE_RANKS = 32
"""First ranks whose micro-steps are logged one by one,"""
TIMELINE_CELLS = 8_000
"""in the first micro-steps of a plan, so many of all these ranks together: what the report draws."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step did, the same on all ranks; a line of ``steps.jsonl``. Its size is that of no cluster."""

    step: int
    loss: float
    """Of the global batch, as `train.loss` defines it."""
    grad_norm: float
    lr: float
    tokens: int
    loss_tokens: int
    started_s: float
    """Seconds since training began, by rank 0's clock."""
    seconds: float
    tokens_per_s: float
    group: str
    """The packing groups that the step ran."""
    skew: float
    """Busy seconds of the busiest rank minus those of the idlest, over the former; on CUDA that of the wall times."""
    slowest_rank: int
    """The busiest rank."""
    mean_wall_s: float
    """Seconds from the start of the first micro-step to the end of the last, mean over ranks."""
    mean_busy_s: float
    """The part of it that the rank computed; the rest it waited for others. On CUDA equal to the wall time."""
    memory_bytes: int
    """Of the rank that used most: peak of CUDA's allocator in this step; on CPU the process's resident memory."""
    rank_wall_s: list[list[float]] = field(default_factory=list)
    """``[rank][micro_step]``: from the start of a micro-step to the start of the next; of :data:`TIMELINE_RANKS` ranks
    at most, and empty after :data:`TIMELINE_CELLS`."""
    rank_busy_s: list[list[float]] = field(default_factory=list)
    """The part of it that the rank computed."""
    tflops: float | None = None
    """Model FLOPs (forward and backward, without recomputation) a second of each rank, in 10¹²."""
    mfu: float | None = None
    """The same over the device's peak, 0 to 1."""
    signal: int = 0
    """Number of a signal that some rank had received when the step ended, 0 for none."""


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
class Efficiency:
    """What MFU needs to know."""

    step_flops: npt.NDArray[np.float64]
    """Model FLOPs of each step of the plan, all ranks together ``[steps]``."""
    peak_flops_per_s: float | None
    """Of one device; None: unknown."""


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


@dataclass
class _MicroClock:
    """Wall and busy seconds of each micro-step of a step, as this rank saw them.

    On CPU a rank that waits in a collective uses no processor time, so the process's own time is what it worked. On
    CUDA events are recorded in the stream and read once, when the step is over: nothing waits in between.
    """

    device: torch.device
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
            return
        wall, busy = time.perf_counter(), time.process_time()
        yield
        self.wall.append(time.perf_counter() - wall)
        self.busy.append(min(time.process_time() - busy, self.wall[-1]))

    def read(self) -> None:
        """Fill in the times of a step that is over."""
        for begin, end in self.events:
            end.synchronize()
            self.wall.append(begin.elapsed_time(end) / 1e3)
        if self.events:
            self.busy = list(self.wall)


def make_optimizer(model: CausalLMWithLoss, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that are trained; fused, as `foreach` would hold another copy of them all."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


def train(
    model: CausalLMWithLoss,
    plan: Plan,
    samples: SampleSource,
    loss_tokens: npt.NDArray[np.integer],
    mesh: ParallelMesh,
    config: TrainConfig,
    device: torch.device,
    on_step: Callable[[StepRecord], bool | None] = lambda record: None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: Start = Start(),
    signal: Callable[[], int] = lambda: 0,
    efficiency: Efficiency | None = None,
) -> list[StepRecord]:
    """Run the steps of a plan on this rank.

    Args:
        model: sharded over ``mesh.world``.
        plan: made for this world size.
        samples: token ids and loss masks by the plan's sample ids.
        loss_tokens: targets of each sample, int ``[N]``.
        mesh: gets the SP groups of the plan's degrees that it does not hold yet.
        config: optimizer and loss.
        device: of this rank.
        on_step: called after each step, on every rank; True ends training there.
        optimizer: of :func:`make_optimizer`; None: a new one.
        start: where to begin.
        signal: number of a signal that this rank has received, or 0.
        efficiency: for MFU; None: not reported.

    Returns:
        The record of each step, equal on all ranks.

    Raises:
        StepFailed: a step raised on this rank.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    optimizer = optimizer or make_optimizer(model, config)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mesh.prepare(plan.sp_degree.tolist())
    rows = rows_of_rank(plan, rank)
    tokens_of_step = np.bincount(plan.step, weights=plan.tokens(), minlength=plan.n_steps).astype(np.int64)
    tokens_total = start.tokens_total or start.tokens + int(tokens_of_step[start.step :].sum())
    steps, drawn = global_batches(plan, loss_tokens, config.loss), timeline_micro_steps(plan)
    work = ((row, steps[step]) for step in range(start.step, plan.n_steps) for row in rows[step])
    batches = micro_batches(plan, work, samples, mesh, rank, device)
    may_take, records = StepLimit(plan, config), list[StepRecord]()
    began, tokens_done = time.perf_counter() - start.seconds, start.tokens
    for step in range(start.step, plan.n_steps):
        started = time.perf_counter()
        lr = learning_rate(config, tokens_done, int(tokens_of_step[step]), tokens_total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock = _MicroClock(device)
        summed = torch.zeros((), dtype=torch.float32, device=device)
        limit_s = may_take.seconds(step)
        enter(step, 0, limit_s)
        for micro_step, row in enumerate(rows[step]):
            with clock.micro_step(), _naming_the_pack(plan, step, micro_step, row):
                batch = next(batches)
                enter(step, micro_step + 1, limit_s)
                summed += forward_backward(model, batch, world_size)
        enter(step, len(rows[step]) + 1, limit_s)
        with _naming_the_pack(plan, step):
            norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.read()
            now = time.perf_counter()
            mine = [float(summed), started - began, now - started, float(signal()), memory_bytes(device)]
            gathered = _gather([*mine, *clock.wall, *clock.busy], device)
        leave()
        n, tokens = len(rows[step]), int(tokens_of_step[step])
        walls, busy = gathered[:, len(mine) : len(mine) + n], gathered[:, len(mine) + n :]
        rank_busy, seconds = busy.sum(axis=1), float(gathered[:, 2].max())
        may_take.learn(step, seconds)
        tflops, mfu = _efficiency(efficiency, step, seconds * world_size)
        record = StepRecord(
            step=step,
            loss=float(gathered[:, 0].sum()),
            grad_norm=float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
            lr=lr,
            tokens=tokens,
            loss_tokens=steps[step].loss_tokens,
            started_s=float(gathered[0, 1]),
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            group=groups_of_step(plan, step),
            skew=_skew(rank_busy),
            slowest_rank=int(rank_busy.argmax()),
            mean_wall_s=float(walls.sum(axis=1).mean()),
            mean_busy_s=float(rank_busy.mean()),
            memory_bytes=int(gathered[:, 4].max()),
            rank_wall_s=_timeline(walls, drawn[step]),
            rank_busy_s=_timeline(busy, drawn[step]),
            tflops=tflops,
            mfu=mfu,
            signal=int(gathered[:, 3].max()),
        )
        tokens_done += tokens
        records.append(record)
        if on_step(record):
            break
    return records


@contextmanager
def _naming_the_pack(plan: Plan, step: int, micro_step: int | None = None, row: int = IDLE) -> Iterator[None]:
    try:
        yield
    except HbpError:
        raise
    except Exception as error:
        ids = [] if row == IDLE else plan.samples(row)[0].tolist()
        raise StepFailed(step, micro_step, row, ids) from error


def timeline_micro_steps(plan: Plan) -> list[int]:
    """How many micro-steps of each step are logged rank by rank ``[steps]``."""
    first = TIMELINE_CELLS // min(TIMELINE_RANKS, plan.info.world_size)
    counts = np.zeros(plan.n_steps, np.int64)
    np.maximum.at(counts, plan.step, plan.micro_step + 1)
    done = np.cumsum(counts) - counts
    return np.clip(first - done, 0, counts).tolist()


def _timeline(seconds: npt.NDArray[np.float64], micro_steps: int) -> list[list[float]]:
    return np.round(seconds[:TIMELINE_RANKS, :micro_steps], 5).tolist() if micro_steps else []


def _skew(busy: npt.NDArray[np.float64]) -> float:
    most = float(busy.max())
    return (most - float(busy.min())) / most if most else 0.0


def _efficiency(efficiency: Efficiency | None, step: int, device_seconds: float) -> tuple[float | None, float | None]:
    if efficiency is None:
        return None, None
    rate = float(efficiency.step_flops[step]) / device_seconds
    return rate / 1e12, rate / efficiency.peak_flops_per_s if efficiency.peak_flops_per_s else None


def memory_bytes(device: torch.device) -> float:
    """Peak of CUDA's allocator since the last call; on CPU the process's resident memory, 0 where none tells."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return float(peak)
    try:
        return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def evaluate(
    model: CausalLMWithLoss,
    plan: Plan,
    samples: SampleSource,
    loss_tokens: npt.NDArray[np.integer],
    mesh: ParallelMesh,
    device: torch.device,
) -> float:
    """Mean cross entropy over the loss tokens of a plan's samples."""
    total = torch.zeros((), dtype=torch.float64, device=device)  # summed there: the host does not wait
    mesh.prepare(plan.sp_degree.tolist())
    model.eval()
    with torch.no_grad():
        for step in rows_of_rank(plan, dist.get_rank()):
            for row in step:
                batch = make_micro_batch(plan, row, samples, mesh, dist.get_rank(), device)
                total += model(batch.input_ids, batch.position_ids, batch.labels, batch.layout).detach()
    model.train()
    if isinstance(model, FSDPModule):  # which keeps its root gathered until a backward
        model.reshard()
    return float(_gather([float(total)], device).sum()) / max(int(loss_tokens[plan.sample_ids].sum()), 1)


def groups_of_step(plan: Plan, step: int) -> str:
    """The groups of a step for people, such as ``4096/SP1/GC0``."""
    a, b = np.searchsorted(plan.step, [step, step + 1])
    keys = plan.capacity[a:b].astype(np.int64) << 32 | plan.sp_degree[a:b].astype(np.int64) << 16 | plan.gc_layers[a:b]
    settings = [(key >> 32, key >> 16 & 0xFFFF, key & 0xFFFF) for key in np.unique(keys).tolist()]
    return sys.intern(" + ".join(f"{c}/SP{d}/GC{k}" for c, d, k in settings))


def learning_rate(config: TrainConfig, tokens_done: int, tokens_of_step: int, tokens_total: int) -> float:
    """Linear rise, then a cosine to ``final_lr``, by the share of tokens seen at the middle of the step."""
    at = min(1.0, (tokens_done + tokens_of_step / 2) / tokens_total)
    if at < config.warmup:
        return config.lr * at / config.warmup
    fall = (at - config.warmup) / max(1 - config.warmup, 1e-9)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * fall)) / 2)


def _gather(values: Sequence[float], device: torch.device) -> npt.NDArray[np.float64]:
    """Every rank's values, ``[ranks, values]``."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    every = mine.new_empty(dist.get_world_size() * len(values))
    ALL_GATHER(every, mine)
    return every.view(-1, len(values)).cpu().numpy()

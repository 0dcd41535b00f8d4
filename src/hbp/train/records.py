"""How a step's record is measured: each rank's clock and memory, gathered so that all ranks hold the same record.

Model FLOPs utilisation is the FLOPs that the model needs, over what the device could do in the same time. Counted as
PaLM's appendix B does, with the documents' own attention: forward once, backward twice, nothing for recomputation (so
that recomputing does not look like work), attention only over the pairs that the mask keeps.

The seconds of single micro-steps are kept of the first ranks and micro-steps of a plan alone, as far as the report
draws them: a record's size is that of no cluster.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hbp.cost.model_spec import ModelSpec
from hbp.parallel.gather_kv import ALL_GATHER
from hbp.plan import Plan
from hbp.run_log import StepRecord
from hbp.train.loss import GlobalBatch

TIMELINE_RANKS = 32
"""First ranks whose micro-steps are logged one by one,"""
TIMELINE_CELLS = 8_000
"""in the first micro-steps of a plan, so many of all these ranks together: what the report draws."""
FORWARD_AND_BACKWARD = 3
PEAK_BF16_FLOPS = {  # dense, from the data sheets; the longest name that matches counts
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
PROBE = 1024
PROBE_S = 0.1


@dataclass(frozen=True)
class Efficiency:
    """What MFU needs to know."""

    step_flops: npt.NDArray[np.float64]
    """Model FLOPs of each step of the plan, all ranks together ``[steps]``."""
    peak_flops_per_s: float | None
    """Of one device; None: unknown."""


@dataclass
class StepClock:
    """When a step began, and wall and busy seconds of each of its micro-steps, as this rank saw them.

    On CPU a rank that waits in a collective uses no processor time, so the process's own time is what it worked. On
    CUDA events are recorded in the stream and read once, when the step is over: nothing waits in between.
    """

    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    wall: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def micro_step(self) -> Iterator[None]:
        """Time the body as the next micro-step."""
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


@dataclass(frozen=True)
class Recorder:
    """Makes the records of a plan's steps; holds what is known of them before they run."""

    batches: Sequence[GlobalBatch]
    """Of each step."""
    groups: Sequence[str]
    """Of each step, for people."""
    drawn: Sequence[int]
    """Micro-steps of each step that are logged rank by rank."""
    device: torch.device
    began: float
    """When training of the plan began, by this rank's clock."""
    efficiency: Efficiency | None

    @classmethod
    def of(
        cls,
        plan: Plan,
        batches: Sequence[GlobalBatch],
        device: torch.device,
        before_s: float,
        efficiency: Efficiency | None,
    ) -> Recorder:
        """Args: `before_s` seconds were spent on the plan before now."""
        began = time.perf_counter() - before_s
        return cls(batches, groups_of_steps(plan), timeline_micro_steps(plan), device, began, efficiency)

    def record(
        self,
        step: int,
        clock: StepClock,
        losses: npt.NDArray[np.float64],
        norm: float,
        lr: float,
        signal: int,
        problem: str = "",
    ) -> StepRecord:
        """Of a step that is done on this rank. A collective.

        Args:
            step: of the plan.
            clock: of this rank.
            losses: each rank's part ``[ranks]``.
            norm: of the gradients, before they were clipped.
            lr: that the step was taken with.
            signal: that this rank has received, or 0.
            problem: for which the step was skipped.
        """
        clock.read()
        now, batch = time.perf_counter(), self.batches[step]
        reserved = reserved_memory(self.device)  # before the peaks begin anew
        mine = [clock.began - self.began, now - clock.began, float(signal), memory_bytes(self.device), *reserved]
        every = gather([*mine, *clock.wall, *clock.busy], self.device)
        started, took, signals, memory, held, retries = every[:, : len(mine)].T
        walls, busy = np.split(every[:, len(mine) :], 2, axis=1)
        rank_busy, seconds = busy.sum(axis=1), float(took.max())
        tflops, mfu = _rates(self.efficiency, step, seconds * len(every))
        return StepRecord(
            step=step,
            loss=float(losses.sum()) if batch.loss_tokens and not problem else None,
            grad_norm=norm if math.isfinite(norm) else None,
            lr=lr,
            tokens=batch.tokens,
            loss_tokens=batch.loss_tokens,
            started_s=float(started[0]),
            seconds=seconds,
            tokens_per_s=batch.tokens / seconds,
            group=self.groups[step],
            skew=_skew(rank_busy),
            slowest_rank=int(rank_busy.argmax()),
            mean_wall_s=float(walls.sum(axis=1).mean()),
            mean_busy_s=float(rank_busy.mean()),
            memory_bytes=int(memory.max()),
            reserved_bytes=int(held.max()),
            alloc_retries=int(retries.max()),
            rank_wall_s=_timeline(walls, self.drawn[step]),
            rank_busy_s=_timeline(busy, self.drawn[step]),
            tflops=tflops,
            mfu=mfu,
            signal=int(signals.max()),
            skipped=problem,
        )


def groups_of_steps(plan: Plan) -> list[str]:
    """The groups of each step for people, such as ``4096/SP1/GC0 + 16384/SP2/GC0``, ``[steps]``."""
    groups, of_row = plan.groups_of_rows()
    bounds = np.searchsorted(plan.step, np.arange(plan.n_steps + 1))
    steps = (sorted(groups[i] for i in np.unique(of_row[a:b])) for a, b in itertools.pairwise(bounds))
    return [sys.intern(" + ".join(f"{g.capacity}/SP{g.sp_degree}/GC{g.gc_layers}" for g in groups)) for groups in steps]


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


def _rates(efficiency: Efficiency | None, step: int, device_seconds: float) -> tuple[float | None, float | None]:
    if efficiency is None:
        return None, None
    rate = float(efficiency.step_flops[step]) / device_seconds
    return rate / 1e12, rate / efficiency.peak_flops_per_s if efficiency.peak_flops_per_s else None


def step_flops(plan: Plan, spec: ModelSpec) -> npt.NDArray[np.float64]:
    """Model FLOPs of each optimizer step, all ranks together, float64 ``[steps]``."""
    per_token = spec.linear_flops_per_token() + spec.head_flops_per_token()
    flops = plan.lengths * per_token + spec.attention_pairs(plan.lengths) * spec.attention_flops_per_pair()
    step_of_sample = np.repeat(plan.step, np.diff(plan.sample_offsets))
    sums = np.bincount(step_of_sample, weights=flops, minlength=plan.n_steps)
    return np.asarray(FORWARD_AND_BACKWARD * sums)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device: a GPU's dense bf16 figure from its data sheet, None if not known; on CPU a measured one.

    On CPU the peak is what a float32 matrix product of 1,024² reaches with this process's threads, on this machine as
    busy as it is: a yardstick, not a data sheet.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_BF16_FLOPS if key in name]
        return PEAK_BF16_FLOPS[max(known, key=len)] if known else None
    a = torch.ones(PROBE, PROBE)
    a @ a
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < PROBE_S:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * PROBE**3 / best if best < float("inf") else None


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


def reserved_memory(device: torch.device) -> tuple[float, float]:
    """What CUDA's allocator held of the device at most since :func:`memory_bytes` was asked, and how often in the run
    it gave cached blocks back to the driver to find room, which is slow; 0 on CPU."""
    if device.type != "cuda":
        return 0.0, 0.0
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return float(torch.cuda.max_memory_reserved(device)), float(retries)


def gather(values: Sequence[float], device: torch.device) -> npt.NDArray[np.float64]:
    """Every rank's values, ``[ranks, values]``."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    every = mine.new_empty(dist.get_world_size() * len(values))
    ALL_GATHER(every, mine)
    return every.view(-1, len(values)).cpu().numpy()

"""Measure micro-batches on the engine that trains: same model, same sharding, same attention, same loss.

Each point is a forward and a backward of packs with the given documents, one pack on every SP group at once, into
gradients that exist already, as in all but the first micro-step of training. Seconds are the slowest rank's, the median
of the repeats. Bytes are the peak of what the allocator had given out, plus the states that stay (parameters, gradients
and AdamW moments): ``max_memory_allocated`` on CUDA, and on CPU the running sum of the profiler's allocation events,
which sees every tensor including temporaries, in a run of its own so as not to disturb the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from hbp.cost.fit import Point
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Plan
from hbp.train.batch import MicroBatch, SampleSource, micro_batch_of
from hbp.train.model import CausalLMWithLoss, local_parameter_bytes, set_gc_layers

GRADIENTS, MOMENTS = 1, 2  # each as large as the parameters that are trained; AdamW has two moments
ENOUGH_S = 1.0
"""Seconds after which a micro-batch has been measured well enough."""


def measure_point(
    model: CausalLMWithLoss,
    mesh: ParallelMesh,
    lengths: Sequence[int],
    sp_degree: int,
    gc_layers: int,
    *,
    device: torch.device,
    repeats: int = 3,
) -> Point:
    """Run one micro-batch of random tokens and return its seconds and peak bytes (the same on every rank).

    It is repeated until :data:`ENOUGH_S` are measured, but at most `repeats` times; with 0 only memory is.
    """
    mesh.prepare([sp_degree])
    rng = np.random.default_rng(0)
    vocab = model.lm.config.vocab_size
    documents = [(rng.integers(0, vocab, n).astype(np.int32), np.ones(n, np.uint8)) for n in lengths]
    rank = dist.get_rank()
    batch = micro_batch_of(documents, 0, sp_degree, rank % sp_degree, gc_layers, mesh, device)

    def run() -> None:
        forward_backward(model, batch)

    gradients = [_hold_gradient(p) for p in model.parameters() if p.requires_grad]
    peak = _peak_bytes(run, device)  # also warms up kernels, collectives and the allocator
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH_S:  # alike on all ranks, since the seconds are
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(highest(time.perf_counter() - start, device))
    model.zero_grad(set_to_none=True)
    trained_bytes = sum(t.numel() * t.element_size() for t in gradients)
    states = local_parameter_bytes(model) + (GRADIENTS + MOMENTS) * trained_bytes
    median = float(np.median(seconds)) if seconds else 0.0
    return Point(tuple(lengths), sp_degree, gc_layers, median, highest(peak + states, device))


def _hold_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Give a parameter a gradient to accumulate into; returns this rank's part of it."""
    gradient = parameter.grad = torch.zeros_like(parameter)
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def measure_rows(
    model: CausalLMWithLoss, plan: Plan, samples: SampleSource, mesh: ParallelMesh, device: torch.device
) -> dict[tuple[int, int, int], float]:
    """Peak bytes of any rank for the fullest pack of each (capacity, SP degree, recomputed layers) of a plan."""
    peaks = {}
    for setting, row in sorted(heaviest_rows(plan).items()):
        _, lengths = plan.samples(row)
        peaks[setting] = measure_point(
            model, mesh, lengths.tolist(), setting[1], setting[2], device=device, repeats=0
        ).peak_bytes
    return peaks


def heaviest_rows(plan: Plan) -> dict[tuple[int, int, int], int]:
    """The row with the most tokens of each (capacity, SP degree, recomputed layers) that a plan uses."""
    order = np.argsort(plan.tokens(), kind="stable")
    settings = zip(plan.capacity[order], plan.sp_degree[order], plan.gc_layers[order], strict=True)
    return {(int(c), int(d), int(k)): int(row) for (c, d, k), row in zip(settings, order, strict=True)}


def forward_backward(model: CausalLMWithLoss, batch: MicroBatch, scale: float = 1.0) -> torch.Tensor:
    """One micro-step: the summed loss (detached), gradients of `scale` times it left in the parameters."""
    set_gc_layers(model, batch.gc_layers)
    loss = model(*batch.inputs)
    (loss * scale).backward()
    return loss.detach()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def highest(value: float, device: torch.device) -> float:
    """The highest of all ranks' values, on every rank."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def _peak_bytes(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return peak_of(sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree())))


def _allocations(events: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def peak_of(events: Sequence[tuple[int, int, int]]) -> float:
    """Peak of what is allocated, from (time, address, bytes) in order of time, bytes negative where they are freed.

    A block that another thread frees last, as gloo's do with messages, leaves no record of that. Nothing that a
    micro-batch allocates outlives it (gradients are there before), so a block without such a record was freed somewhere
    else; it is counted until the next of its kind is allocated.
    """
    alive: dict[int, int] = {}
    lost: set[int] = set()
    for index, (_, address, size) in enumerate(events):
        if size > 0:
            if address in alive:
                lost.add(alive[address])
            alive[address] = index
        else:
            alive.pop(address, None)
    lost |= set(alive.values())
    total, peak, last_lost = 0, 0, 0
    for index, (_, _, size) in enumerate(events):
        total += size
        if index in lost:
            total, last_lost = total - last_lost, size
        peak = max(peak, total)
    return float(peak)

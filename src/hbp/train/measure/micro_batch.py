"""Measure micro-batches on the engine that trains: same model, same sharding, same attention, same loss.

Each point is a forward and a backward of packs with the given documents, one pack on every SP group at once, into
gradients that exist already, as in all but the first micro-step of training. Seconds are the slowest rank's, the median
of the repeats. Bytes are the peak of what the allocator had given out, plus the states that stay (parameters, gradients
and AdamW moments): ``max_memory_allocated`` on CUDA, and on CPU the running sum of the profiler's allocation events,
which sees every tensor including temporaries.

Bytes are measured first, in a run that waits for no other rank (:func:`without_others`): in place of every collective
stands a copy of the rank's own part. It allocates what training allocates, which is all that a measurement of memory
needs. A rank that runs out of memory in the middle of a micro-batch would leave the others waiting; here nobody waits,
so each rank finds out for itself whether the pack fits, and the ranks compare afterwards: its peak is infinite then,
and so is the point's. Results and gradients mean nothing.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from hbp.cost.fit import Point
from hbp.parallel.gather_kv import ALL_GATHER, REDUCE_SCATTER
from hbp.parallel.mesh import ParallelMesh
from hbp.plan import Group, Plan
from hbp.train.batch import MicroBatch, SampleSource, micro_batch_of
from hbp.train.loop import forward_backward
from hbp.train.model import CausalLMWithLoss, local_parameter_bytes

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

    It is repeated until :data:`ENOUGH_S` are measured, but at most `repeats` times; with 0 only memory is, as it is
    where a rank runs out of it: its peak bytes are infinite then, and its seconds 0.
    """
    mesh.prepare([sp_degree])
    rng = np.random.default_rng(0)
    vocab = model.lm.config.vocab_size
    documents = [(rng.integers(0, vocab, n).astype(np.int32), np.ones(n, np.uint8)) for n in lengths]
    rank = dist.get_rank()
    batch = micro_batch_of(documents, 0, sp_degree, rank % sp_degree, gc_layers, mesh, device)
    peak = highest(peak_alone(model, batch, device), device)
    if not repeats or math.isinf(peak):
        return Point(tuple(lengths), sp_degree, gc_layers, 0.0, peak)

    hold_gradients(model)
    forward_backward(model, batch)  # collectives of a new group begin slowly
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH_S:  # alike on all ranks, since the seconds are
        _wait(device)
        start = time.perf_counter()
        forward_backward(model, batch)
        _wait(device)
        seconds.append(highest(time.perf_counter() - start, device))
    model.zero_grad(set_to_none=True)
    return Point(tuple(lengths), sp_degree, gc_layers, float(np.median(seconds)), peak)


def peak_alone(model: CausalLMWithLoss, batch: MicroBatch, device: torch.device) -> float:
    """Peak bytes of this rank, states included; infinite where it runs out of memory."""
    batch, peak = alone(batch), math.inf
    try:
        with without_others(model):
            gradients = hold_gradients(model)
            peak = peak_bytes_of(lambda: forward_backward(model, batch), device)
            peak += local_parameter_bytes(model) + (GRADIENTS + MOMENTS) * gradients
    except torch.OutOfMemoryError:
        start_over(model)
    model.zero_grad(set_to_none=True)
    if math.isinf(peak):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return peak


def start_over(model: nn.Module) -> None:
    """Bring FSDP2 back to before a micro-batch that raised in its middle: nothing gathered, nothing under way.

    From torch 2.13 it does so itself; for 2.11 and 2.12, what it keeps between the passes is taken back here.
    """
    reset = getattr(model, "reset_iter_state", None)
    if reset is not None:
        reset()
        return
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        shared, tree = state._comm_ctx, state._state_ctx
        tree.iter_forward_root, tree.post_backward_final_callback_queued = None, False
        shared.all_gather_state = shared.reduce_scatter_state = None
        shared.post_forward_order.clear()
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is not None:
            group._all_gather_result = group._post_reduce_event = group._partial_reduce_output = None
            group._all_reduce_state = group._reshard_after_forward_event = None
            group._training_state = TrainingState.IDLE
            group._post_forward_indices.clear()
            group._to_sharded()


def hold_gradients(model: CausalLMWithLoss) -> int:
    """Give the parameters gradients to accumulate into; returns the bytes of this rank's part of them."""
    size = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            gradient = parameter.grad = torch.zeros_like(parameter)
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            size += local.numel() * local.element_size()
    return size


def measure_rows(
    model: CausalLMWithLoss, plan: Plan, samples: SampleSource, mesh: ParallelMesh, device: torch.device
) -> dict[Group, float]:
    """Peak bytes of any rank for the fullest pack of each group of a plan.

    Infinite for a pack for which a rank has not the memory.
    """
    peaks = {}
    for group, row in sorted(heaviest_rows(plan).items()):
        lengths = plan.samples(row)[1].tolist()
        point = measure_point(model, mesh, lengths, group.sp_degree, group.gc_layers, device=device, repeats=0)
        peaks[group] = point.peak_bytes
    return peaks


def heaviest_rows(plan: Plan) -> dict[Group, int]:
    """The row with the most tokens of each group that a plan uses."""
    groups, of_row = plan.groups_of_rows()
    order = np.argsort(plan.tokens(), kind="stable")
    heaviest = np.full(len(groups), -1)
    heaviest[of_row[order]] = order  # the last of a group's rows is what stays
    return {group: int(row) for group, row in zip(groups, heaviest, strict=True) if row >= 0}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def highest(value: float, device: torch.device) -> float:
    """The highest of all ranks' values, on every rank."""
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def peak_bytes_of(run: Callable[[], object], device: torch.device) -> float:
    """Most bytes that running it had given out at a time, over what was before; every tensor is seen."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree()))
    return float(max(itertools.accumulate((size for _, size in events), initial=0)))


def _allocations(events: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Time and bytes of each, negative where they are freed."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


@dataclass(frozen=True)
class _Communication:
    """Of FSDP2 (its ``Comm`` interface), with the others or without."""

    alone: bool

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Communication):
    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Any:
        if not self.alone:
            return ALL_GATHER(output_tensor, input_tensor, group=group, async_op=async_op)
        for part in output_tensor.chunk(group.size()):
            part.copy_(input_tensor)
        return None


class _ReduceScatter(_Communication):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        if not self.alone:
            return REDUCE_SCATTER(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        output_tensor.copy_(input_tensor[: output_tensor.numel()])
        return None


@contextmanager
def without_others(model: nn.Module) -> Iterator[None]:
    """FSDP2 neither gathers nor reduces inside; micro-batches have to be :func:`alone` too."""
    _set_communication(model, alone=True)
    try:
        yield
    finally:
        _set_communication(model, alone=False)


def _set_communication(model: nn.Module, alone: bool) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(cast(Any, _AllGather(alone)))
            module.set_custom_reduce_scatter(cast(Any, _ReduceScatter(alone)))


def alone(batch: MicroBatch) -> MicroBatch:
    """The same without process groups, so that sequence parallelism sends nothing."""
    gather = replace(batch.layout.gather, group=None) if batch.layout.gather else None
    return replace(batch, layout=replace(batch.layout, sp_group=None, gather=gather))

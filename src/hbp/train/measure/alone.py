"""Run micro-batches without the other ranks: in place of every collective, a copy of this rank's own part.

It allocates what training allocates, which is all that a measurement of memory needs. A rank that runs out of memory in
the middle of a micro-batch would leave the others waiting in a collective; here nobody waits, so each rank finds out
for itself whether the pack fits, and the ranks compare afterwards. Results and gradients mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from hbp.parallel.gather_kv import ALL_GATHER, REDUCE_SCATTER
from hbp.train.batch import MicroBatch


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

"""Activation offload: what autograd keeps for backward waits in host memory.

Offloading the inputs of recomputed layers leaves almost nothing on the device between forward and backward, at the cost
of two copies over the bus. Copies to the host run beside the computation, on a stream of their own, those back queue
with what needs them; both go through pinned memory, so neither waits for the host. Parameters stay where they are (FSDP
gathers and frees them itself), and so do small tensors, whose copies would cost more than they free.

The hooks are torch's saved-tensor hooks, as in its own `save_on_cpu`, which knows neither exception.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL_BYTES = 1 << 20
"""A tensor of fewer stays on the device."""


@dataclass
class Kept:
    """A saved tensor: on its device, or in host memory."""

    device: torch.device
    tensor: Tensor
    copied: torch.cuda.Event | None = None
    """When the copy to the host is done."""


def offloaded_activations(small_bytes: int = SMALL_BYTES) -> saved_tensors_hooks:
    """A context in which tensors saved for backward move to host memory; they come back when backward asks.

    Args:
        small_bytes: tensors of fewer stay.
    """

    def pack(tensor: Tensor) -> Kept:
        if is_parameter(tensor) or tensor.numel() * tensor.element_size() < small_bytes:
            return Kept(tensor.device, tensor)
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return Kept(tensor.device, host)
        stream = side_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # what computes it
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not another's before that
        return Kept(tensor.device, host, stream.record_event())

    def unpack(kept: Kept) -> Tensor:
        if kept.copied is None:
            return kept.tensor.to(kept.device)
        current = torch.cuda.current_stream(kept.device)
        current.wait_event(kept.copied)
        return kept.tensor.to(kept.device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies, one a device for the whole run: each new one would keep memory of its own."""
    return torch.cuda.Stream(device)


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)

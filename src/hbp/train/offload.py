"""Activation offload: what autograd keeps for backward waits in host memory.

Offloading the inputs of recomputed layers leaves almost nothing on the device between forward and backward, at the cost
of two copies over the bus. Copies go through pinned memory and queue behind the computation that needs them, so neither
waits for the host. Parameters stay where they are (FSDP gathers and frees them itself), and so do small tensors, whose
copies would cost more than they free.

The hooks are torch's saved-tensor hooks, as in its own `save_on_cpu`, which knows neither exception.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALL_BYTES = 1 << 20
"""A tensor of fewer stays on the device."""

Kept = tuple[torch.device, Tensor]
"""Where a tensor was, and what is kept of it"""


def offloaded_activations(small_bytes: int = SMALL_BYTES) -> saved_tensors_hooks:
    """A context in which tensors saved for backward move to host memory; they come back when backward asks.

    Args:
        small_bytes: tensors of fewer stay.
    """

    def pack(tensor: Tensor) -> Kept:
        if is_parameter(tensor) or tensor.numel() * tensor.element_size() < small_bytes:
            return tensor.device, tensor
        pinned = tensor.is_cuda
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        return tensor.device, host

    def unpack(kept: Kept) -> Tensor:
        device, tensor = kept
        return tensor.to(device, non_blocking=tensor.is_pinned())

    return saved_tensors_hooks(pack, unpack)


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)

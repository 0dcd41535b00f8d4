"""A frozen base in four bits (QLoRA, https://arxiv.org/abs/2305.14314): packed once as it is read, sharded by FSDP2.

Each run of :data:`BLOCK` weights of a row is divided by its largest magnitude, and each quotient stored as the nearest
of 16 values, the quantiles of a normal distribution (NF4, appendix E of the paper). A row's codes and magnitudes lie
side by side in one uint8 parameter, ``[out, in / 2 + 4 · in / BLOCK]``: 4.5 bits a weight. So a shard of rows is packed
on its own, and the gather that FSDP2 makes of a layer moves bytes of four-bit weights.

A product unpacks the whole matrix, uses it, and forgets it; backward, which wants the gradient of the inputs alone,
unpacks it again. The trade: a seventh of float32's memory and messages, two sevenths of bfloat16's, for two tables'
look-ups a weight and micro-batch, in torch's own operations. The paper's second quantization (of the
magnitudes, .4 bits a weight) is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hbp.errors import HbpError
from hbp.train.check.families import decoder_of

SHARDS_INTEGERS = (2, 13)
"""The first torch that was tried whose FSDP takes parameters of integers."""
BLOCK = 64
"""Weights that share a magnitude; a row of fewer is one block."""
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Appendix E of the paper."""


def block_of(columns: int) -> int:
    """Weights that share a magnitude, in rows of so many.

    Raises:
        HbpError: rows that no whole blocks or bytes make up.
    """
    block = min(BLOCK, columns)
    if columns % block or block % 2:
        raise HbpError(f"model.quantize=nf4 takes rows of a multiple of {BLOCK} weights, not of {columns}")
    return block


def row_bytes(columns: int) -> int:
    """Bytes of a packed row."""
    return columns // 2 + 4 * (columns // block_of(columns))


def pack(weights_RC: Tensor) -> Tensor:
    """Rows of weights as uint8 ``[R, row_bytes(C)]``: two codes a byte, the first in its high half, then magnitudes."""
    rows, columns = weights_RC.shape
    blocks = weights_RC.float().reshape(rows, columns // block_of(columns), block_of(columns))
    largest = blocks.abs().amax(2, keepdim=True)
    scaled = torch.where(largest > 0, blocks / largest, 0.0)
    levels = torch.tensor(LEVELS, device=weights_RC.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(rows, columns // 2, 2)
    magnitudes = largest.view(rows, -1).contiguous().view(torch.uint8)
    return torch.cat([codes[..., 0] << 4 | codes[..., 1], magnitudes], dim=1)


def unpack(packed_RB: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weights ``[R, C]`` that packed rows stand for."""
    codes, magnitudes = packed_RB.split([columns // 2, 4 * (columns // block_of(columns))], dim=1)
    levels = torch.tensor(LEVELS, device=packed_RB.device)
    pairs = torch.stack([codes >> 4, codes & 15], dim=2).view(len(packed_RB), -1, block_of(columns))
    scale = magnitudes.contiguous().view(torch.float32)
    return (levels[pairs.int()] * scale[..., None]).view(len(packed_RB), columns).to(dtype)


class _Product(torch.autograd.Function):
    """Keeps the packed weights, not the unpacked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.columns = columns
        return F.linear(x, unpack(packed, columns, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradient @ unpack(packed, ctx.columns, gradient.dtype), None, None


class PackedLinear(nn.Linear):
    """A linear layer whose frozen weight is packed; adapters around it see the layer that it was."""

    def __init__(self, of: nn.Linear) -> None:
        """In the place of a layer; with its values, if it has storage."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = of.in_features, of.out_features
        shape, dense = (of.out_features, row_bytes(of.in_features)), of.weight.detach()
        packed = torch.empty(shape, dtype=torch.uint8, device="meta") if dense.is_meta else pack(dense)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = of.bias

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""
        out: Tensor = _Product.apply(input, self.weight, self.in_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    @property
    def dense_shape(self) -> torch.Size:
        """Of the weight as a checkpoint has it."""
        return torch.Size((self.out_features, self.in_features))


def shards_integers() -> bool:
    """Whether FSDP of this torch takes parameters of integers, as packed weights are; 2.11 does not."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= SHARDS_INTEGERS


def pack_base(lm: Any) -> None:
    """Put packed layers in the place of a model's frozen linear layers, before it is sharded.

    Embedding and head stay as they are, as in the paper.

    Args:
        lm: transformers model with adapters.

    Raises:
        HbpError: weights that this does not know (stacked experts), or nothing to pack.
    """
    if any(p.ndim == 3 and ".experts." in name for name, p in lm.named_parameters()):
        raise HbpError("model.quantize does not know stacked experts; set it to none for a mixture of experts")
    done = 0
    for layer in decoder_of(lm).layers:
        for path, module in list(layer.named_modules()):
            if type(module) is nn.Linear and not module.weight.requires_grad and ".lora_" not in f".{path}":
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, PackedLinear(module))
                done += 1
    if not done:
        raise HbpError("model.quantize=nf4: no frozen linear layer to pack; set lora.rank")


def packed_layers(root: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a module, by their paths."""
    return {path: module for path, module in root.named_modules() if isinstance(module, PackedLinear)}

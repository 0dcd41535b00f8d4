"""Ulysses sequence parallelism for packed documents, as a transformers attention function.

Outside attention each rank of the SP group holds a slice of the pack's tokens with all heads. For attention one
all-to-all turns that into all tokens with a slice of the heads, document attention runs as on one device, and a
second all-to-all turns the result back (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509). Queries, keys and values
travel in one message. Communication per rank falls with the degree; Ulysses ends at the number of heads, and for higher
degrees it is composed with gathered keys and values (:mod:`hbp.parallel.gather_kv`).

Key/value heads fewer than the degree are repeated up to it before the exchange: right, but the bytes are sent, and the
cost model counts them. Keys and values may differ in head size (multi-head latent attention).

The degree is not a setting of the model. It comes with each pack (:class:`PackLayout`, passed through the model's
keyword arguments), so one model runs packs of any degree in any order, and recomputation under gradient checkpointing
sees the layout of its own pack.

Legend: ``T`` tokens of this rank, ``S`` tokens of the pack (``T`` × degree), ``H``/``K`` query and key/value heads,
``D`` head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

from hbp.errors import HbpError
from hbp.parallel.gather_kv import Gather, gathered_attention
from hbp.parallel.varlen import Documents, check_kernel, document_attention

ATTENTION_NAMES = {
    "auto": "hbp",
    "varlen": "hbp_varlen",
    "sdpa": "hbp_by_document",
    "flex": "hbp_by_blocks",
    "flash": "hbp_fa",
    "eager": "hbp_written_out",
}
"""Of each kernel at transformers, which takes any name with `flash`, `flex` or `sdpa` in it for one of its own."""


@dataclass(frozen=True)
class PackLayout:
    """How one pack lies over the ranks that run it."""

    documents: Documents
    sp_degree: int = 1
    sp_group: ProcessGroup | None = None
    """The ranks that exchange heads: the whole SP group, unless keys and values are gathered too. None above degree 1:
    nothing is sent, each rank keeps its own (:mod:`hbp.train.measure.micro_batch`)."""
    gather: Gather | None = None
    sp_rank: int = 0
    filler: int = 0
    """Tokens at the end of the pack that belong to no sample."""

    @property
    def ulysses_degree(self) -> int:
        """Ranks that exchange heads."""
        return self.sp_degree // (self.gather.ways if self.gather else 1)

    def pinned(self) -> PackLayout:
        """The same with its tensors in pinned host memory."""
        gather = self.gather.pinned() if self.gather else None
        return replace(self, documents=self.documents.pinned(), gather=gather)

    def to(self, device: torch.device) -> PackLayout:
        """The same with its tensors on a device."""
        gather = self.gather.to(device) if self.gather else None
        return replace(self, documents=self.documents.to(device), gather=gather)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the ranks that run the pack, in place, without gradient."""
        for group in (self.sp_group, self.gather.group if self.gather else None):
            if group is not None:
                dist.all_reduce(x, group=group)
        return x


class Sealed:
    """A pack's layout as compiled layers should see it: one object like another.

    torch.compile (2.11) takes a frozen dataclass for its fields, and would compile a layer anew for every number of
    documents, eight times, and then not at all.
    """

    def __init__(self, layout: PackLayout) -> None:
        self.layout = layout


class _Kept(torch.autograd.Function):
    """Allocates in both directions what an exchange does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


def _exchange(sent: Tensor, group: ProcessGroup | None) -> Tensor:
    if group is None:
        kept: Tensor = _Kept.apply(sent)
        return kept
    return wait_tensor(all_to_all_single_autograd(sent, None, None, group))


def exchange_to_heads(x_TF: Tensor, degree: int, group: ProcessGroup | None) -> Tensor:
    """Tokens of this rank, features of all heads → tokens of the pack, features of this rank's heads.

    Args:
        x_TF: ``[T, degree, F]``, the middle axis being the rank that owns those heads.
        degree: SP degree.
        group: SP group.

    Returns:
        ``[S, F]``.
    """
    sent = x_TF.transpose(0, 1).contiguous()  # [degree, T, F]
    return _exchange(sent, group).view(degree * x_TF.size(0), x_TF.size(2))


def exchange_to_tokens(x_SF: Tensor, degree: int, group: ProcessGroup | None) -> Tensor:
    """The way back: ``[S, F]`` with this rank's heads → ``[T, degree, F]`` with all heads of this rank's tokens."""
    tokens = x_SF.size(0) // degree
    return _exchange(x_SF.contiguous(), group).view(degree, tokens, x_SF.size(1)).transpose(0, 1)


def ulysses_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    layout: PackLayout,
    *,
    sinks_H: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Causal document attention of a pack spread over ``layout.sp_group``.

    Args:
        q_THD: queries of this rank's tokens ``[T, H, D]``.
        k_TKD: keys ``[T, K, D]``.
        v_TKD: values ``[T, K, D]`` (``D`` may differ from the keys').
        layout: the pack.
        sinks_H: attention sinks of all heads; each rank uses, and gets the gradients of, those of its own.
        options: scale, window, softcap and kernel, as in :func:`~hbp.parallel.varlen.document_attention`.

    Returns:
        ``[T, H, D]`` with the values' ``D``.
    """
    degree, group = layout.ulysses_degree, layout.sp_group
    if degree == 1:
        return _attend(q_THD, k_TKD, v_TKD, layout, sinks_H=sinks_H, **options)
    tokens, heads = q_THD.shape[:2]
    if heads % degree:
        raise HbpError(f"SP degree {degree} does not divide the model's {heads} attention heads; lower the degree")
    k_TKD, v_TKD = _repeat_heads(k_TKD, degree, heads), _repeat_heads(v_TKD, degree, heads)
    parts = (q_THD, k_TKD, v_TKD)
    mine = [(x.size(1) // degree, x.size(2)) for x in parts]  # heads and head size on this rank afterwards
    packed = torch.cat([x.reshape(tokens, degree, -1) for x in parts], dim=2)
    split = exchange_to_heads(packed, degree, group).split([h * d for h, d in mine], dim=1)
    q, k, v = (x.unflatten(1, shape) for x, shape in zip(split, mine, strict=True))
    sinks = None if sinks_H is None else sinks_H.view(degree, -1)[layout.sp_rank % degree]
    out = _attend(q, k, v, layout, sinks_H=sinks, **options)
    return exchange_to_tokens(out.flatten(1), degree, group).reshape(tokens, heads, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, **options: Any) -> Tensor:
    if layout.gather is None:
        return document_attention(q, k, v, layout.documents, **options)
    return gathered_attention(q, k, v, layout.gather, **options)


def _repeat_heads(x_TKD: Tensor, degree: int, heads: int) -> Tensor:
    """Repeat key/value heads up to the next count that the degree divides and that divides the query heads."""
    kv_heads = x_TKD.size(1)
    if kv_heads % degree == 0:
        return x_TKD
    times = next(
        t for t in range(2, heads // kv_heads + 1) if kv_heads * t % degree == 0 and heads % (kv_heads * t) == 0
    )
    return x_TKD.repeat_interleave(times, dim=1)


@torch.compiler.disable  # the layout is another for every pack: compiled, each would be compiled anew
def _attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    hbp_layout: PackLayout | Sealed | None = None,
    hbp_kernel: str = "auto",
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' AttentionInterface: ``[1, H, T, D]`` in, ``[1, T, H, D]`` out; `s_aux` are sinks ``[H]``."""
    if hbp_layout is None:
        raise HbpError(
            "the attention function 'hbp' needs the pack's layout: call the model with hbp_layout=..., or for "
            "evaluation and generate after model.set_attn_implementation('sdpa')"
        )
    layout = hbp_layout.layout if isinstance(hbp_layout, Sealed) else hbp_layout
    if attention_mask is not None or dropout:
        raise HbpError("packed documents take no attention mask and no attention dropout; set attention_dropout to 0")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    options = {"scale": scaling, "sliding_window": sliding_window, "softcap": softcap, "kernel": hbp_kernel}
    out = ulysses_attention(q, k, v, layout, sinks_H=s_aux, **options)
    return out[None], None


def register_attention(kernel: str = "auto") -> str:
    """Register document attention with transformers; returns the name to pass as ``attn_implementation``.

    Args:
        kernel: of :mod:`hbp.parallel.varlen`.

    Raises:
        HbpError: no such kernel here.
    """
    from transformers import AttentionInterface

    check_kernel(kernel)
    name = ATTENTION_NAMES[kernel]
    AttentionInterface.register(name, functools.partial(_attention_interface, hbp_kernel=kernel))
    return name

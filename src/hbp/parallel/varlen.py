"""Attention over packed documents on one device: documents never see each other.

Legend: ``S`` tokens, ``H`` query heads, ``K`` key/value heads (``H`` a multiple of ``K``), ``D`` head size.

On CUDA this is torch's native variable-length flash attention, one kernel for the whole pack. On CPU, which has no
such kernel, it is a loop of fused ``scaled_dot_product_attention`` calls, one a document. Both cost the sum of the
squared document lengths, not the square of the pack's length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin and end."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # [documents + 1] int32, on the device of the pack

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)


def make_documents(lengths: tuple[int, ...], device: torch.device) -> Documents:
    """Documents laid end to end from token 0."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Documents(lengths, ends.to(device, non_blocking=True))


def document_attention(
    q_SHD: Tensor,
    k_SKD: Tensor,
    v_SKD: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each document.

    Args:
        q_SHD: queries ``[S, H, D]``.
        k_SKD: keys ``[S, K, D]``.
        v_SKD: values ``[S, K, D]``.
        documents: lengths that sum to ``S``.
        scale: softmax scale; ``D ** -0.5`` if None.
        sliding_window: tokens that a query sees, itself included; None for all before it.

    Returns:
        ``[S, H, D]``.
    """
    if q_SHD.is_cuda:
        return _varlen_cuda(q_SHD, k_SKD, v_SKD, documents, scale, sliding_window)
    return _varlen_loop(q_SHD, k_SKD, v_SKD, documents, scale, sliding_window)


def _varlen_cuda(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = documents.cu_seqlens, documents.longest
    reach = -1 if window is None else window - 1
    out = varlen_attn(
        q,
        k,
        v,
        cu,
        cu,
        longest,
        longest,
        scale=scale,
        window_size=(reach, 0),
        enable_gqa=q.size(1) != k.size(1),
    )
    assert isinstance(out, Tensor)
    return out


def _varlen_loop(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None, window: int | None
) -> Tensor:
    gqa = q.size(1) != k.size(1)
    pieces = []
    lengths = list(documents.lengths)
    for q_doc, k_doc, v_doc in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        length = q_doc.size(0)
        mask = None
        if window is not None and length > window:
            at = torch.arange(length, device=q.device)
            ahead = at[:, None] - at[None, :]
            mask = (ahead >= 0) & (ahead < window)
        out = F.scaled_dot_product_attention(
            q_doc.transpose(0, 1)[None],
            k_doc.transpose(0, 1)[None],
            v_doc.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=gqa,
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)

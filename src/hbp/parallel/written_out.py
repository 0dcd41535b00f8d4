"""Document attention written out, block by block of queries: for what no fused kernel of a device knows.

Softcapped scores (Gemma 2: ``cap · tanh(score / cap)``, https://arxiv.org/abs/2408.00118) and attention sinks (gpt-oss:
a learned number a head that takes part in the softmax and has no value, https://arxiv.org/abs/2309.17453). Scores are
float32. A block's scores exist in its forward and once more in its backward; what is kept between them are queries,
keys and values, so memory grows with the tokens. Time is that of plain matrix products over the pairs of each block.

Legend as in :mod:`hbp.parallel.varlen`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 128
"""Queries whose scores exist at a time"""


def written_out_attention(
    q_SHD: Tensor,
    k_RKD: Tensor,
    v_RKD: Tensor,
    lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention within each document.

    Args:
        q_SHD: queries ``[S, H, D]``.
        k_RKD: keys ``[R, K, D]``.
        v_RKD: values ``[R, K, D]`` (``D`` may differ from the keys').
        lengths: queries of each document, its last tokens.
        key_lengths: keys of each.
        scale: of the scores; ``D ** -0.5`` if None.
        window: tokens that a query sees, itself included; None for all before it.
        softcap: bound of the scores, None for none.
        sinks_H: of each head, None for none.

    Returns:
        ``[S, H, D]`` with the values' ``D``.
    """
    scale = q_SHD.size(2) ** -0.5 if scale is None else scale
    pieces = []
    for q, k, v in zip(q_SHD.split(lengths), k_RKD.split(key_lengths), v_RKD.split(key_lengths), strict=True):
        before = k.size(0) - q.size(0)
        for begin in range(0, q.size(0), BLOCK):
            end = min(begin + BLOCK, q.size(0))
            first = 0 if window is None else max(0, before + begin - window + 1)  # the oldest key that a query sees
            seen = slice(first, before + end)
            inputs = (q[begin:end], k[seen], v[seen], sinks_H, before + begin - first, scale, window, softcap)
            if torch.is_grad_enabled():
                pieces.append(checkpoint(_block, *inputs, use_reentrant=False))
            else:
                pieces.append(_block(*inputs))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    before: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Of queries, the first of which has `before` keys ahead of its own."""
    groups = k.size(1)
    grouped = q.float().unflatten(1, (groups, -1))  # [Q, K, H / K, D]
    scores = torch.einsum("qghd,kgd->ghqk", grouped, k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(before, before + q.size(0), device=q.device)[:, None] - torch.arange(
        k.size(0), device=q.device
    )
    unseen = ahead < 0 if window is None else (ahead < 0) | (ahead >= window)
    scores = scores.masked_fill(unseen, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : k.size(0)]
    return torch.einsum("ghqk,kgd->qghd", weights, v.float()).flatten(1, 2).to(v.dtype)

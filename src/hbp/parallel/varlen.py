"""Attention over packed documents on one device: documents never see each other.

One interface, :func:`document_attention`, over five kernels:

- ``varlen``: torch's native variable-length flash attention, one launch for the whole pack; CUDA, half precision;
- ``sdpa``: ``scaled_dot_product_attention``, document by document; anywhere. Equal lengths are not batched, since few
  documents have the same; one longer than a sliding window goes in blocks;
- ``flex``: torch's FlexAttention, compiled, with a block mask made once a pack; CUDA (on CPU it has no backward);
- ``flash``: the ``flash-attn`` package, for users who have it;
- ``eager``: written out in blocks (:mod:`hbp.parallel.written_out`); anywhere.

``auto`` takes ``varlen`` on CUDA and ``sdpa`` elsewhere, and for what these cannot do (softcapped scores, attention
sinks: :data:`FEATURES`) ``flex`` and ``eager``. All cost the sum of the squared document lengths, not the
square of the pack's length (``flex`` up to whole blocks of 128).

Queries may be fewer than keys (:mod:`hbp.parallel.gather_kv`): then a document's queries are its *last* tokens, as in
flash attention.

Legend: ``S`` query tokens, ``R`` key tokens, ``H`` query heads, ``K`` key/value heads (``H`` a multiple of ``K``),
``D`` head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from hbp.errors import HbpError
from hbp.parallel.written_out import written_out_attention


@dataclass(frozen=True)
class Documents:
    """Where the documents of a pack begin and end, as queries and as keys."""

    lengths: tuple[int, ...]
    cu_seqlens: Tensor  # [documents + 1] int32, on the device of the pack
    key_lengths: tuple[int, ...]
    cu_key_lengths: Tensor  # the same, of the keys
    block_masks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)
    """FlexAttention's, by sliding window: made by the first layer that asks, used by the others."""
    cut_masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)
    """SDPA's, of documents with fewer queries than keys, likewise; at most one document of a chunk has fewer."""

    @property
    def longest(self) -> int:
        """Queries of the longest document."""
        return max(self.lengths)

    @property
    def longest_keys(self) -> int:
        """Keys of the longest document."""
        return max(self.key_lengths)

    def to(self, device: torch.device) -> Documents:
        """The same on a device; does not wait for the copy."""
        ends = self.cu_seqlens.to(device, non_blocking=True)
        same = self.cu_key_lengths is self.cu_seqlens
        key_ends = ends if same else self.cu_key_lengths.to(device, non_blocking=True)
        return Documents(self.lengths, ends, self.key_lengths, key_ends)

    def pinned(self) -> Documents:
        """The same in pinned host memory, so that nothing waits for the copy to a device."""
        ends = self.cu_seqlens.pin_memory()
        same = self.cu_key_lengths is self.cu_seqlens
        return Documents(self.lengths, ends, self.key_lengths, ends if same else self.cu_key_lengths.pin_memory())


def make_documents(
    lengths: tuple[int, ...], device: torch.device, key_lengths: tuple[int, ...] | None = None
) -> Documents:
    """Documents laid end to end from token 0.

    Args:
        lengths: tokens of each.
        device: of the pack.
        key_lengths: keys of each, where its queries are only its last tokens; none: as many.
    """
    ends = _ends(lengths, device)
    if key_lengths is None:
        return Documents(lengths, ends, lengths, ends)
    return Documents(lengths, ends, key_lengths, _ends(key_lengths, device))


def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def document_attention(
    q_SHD: Tensor,
    k_RKD: Tensor,
    v_RKD: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Causal attention within each document.

    Args:
        q_SHD: queries ``[S, H, D]``.
        k_RKD: keys ``[R, K, D]``.
        v_RKD: values ``[R, K, D]`` (``D`` may differ from the keys').
        documents: query lengths that sum to ``S`` and key lengths that sum to ``R``.
        scale: softmax scale; ``D ** -0.5`` if None.
        sliding_window: tokens that a query sees, itself included; None for all before it.
        softcap: bound of the scores, ``cap · tanh(score / cap)``; None for none.
        sinks_H: of each head a number that takes part in the softmax; None for none.
        kernel: a name of :data:`KERNELS` or :data:`FEATURES`, or ``auto``.

    Returns:
        ``[S, H, D]`` with the values' ``D``.

    Raises:
        HbpError: the kernel lacks a feature.
    """
    features = frozenset(n for n, value in (("softcap", softcap), ("sinks", sinks_H)) if value is not None)
    if kernel == "auto":
        kernel = ("flex" if features else "varlen") if q_SHD.is_cuda else ("eager" if features else "sdpa")
    if not features and kernel in KERNELS:
        return KERNELS[kernel](q_SHD, k_RKD, v_RKD, documents, scale, sliding_window)
    check_features(kernel, features)
    if kernel == "eager":
        lengths = documents.lengths, documents.key_lengths
        return written_out_attention(q_SHD, k_RKD, v_RKD, *lengths, scale, sliding_window, softcap, sinks_H)
    if kernel == "flash":
        return _flash(q_SHD, k_RKD, v_RKD, documents, scale, sliding_window, softcap)
    return _flex(q_SHD, k_RKD, v_RKD, documents, scale, sliding_window, softcap, sinks_H)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    unequal: dict[str, Any] = {"enable_gqa": q.size(1) != k.size(1)} if _names_unequal_heads(varlen_attn) else {}
    size = v.size(2)
    q, k, v, scale = _one_head_size(q, k, v, scale)
    out = varlen_attn(
        q,
        k,
        v,
        documents.cu_seqlens,
        documents.cu_key_lengths,
        documents.longest,
        documents.longest_keys,
        scale=scale,
        window_size=_reach(window),
        **unequal,
    )
    assert isinstance(out, Tensor)
    return out[..., :size]


@functools.cache
def _names_unequal_heads(varlen_attn: Callable[..., Any]) -> bool:
    """Whether it has to be told of fewer key/value heads: from torch 2.12; before, it just takes them."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    size = v.size(2)
    q, k, v, scale = _one_head_size(q, k, v, scale)
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        documents.cu_seqlens,
        documents.cu_key_lengths,
        documents.longest,
        documents.longest_keys,
        softmax_scale=scale,
        causal=True,
        window_size=_reach(window),
        softcap=softcap or 0.0,
    )
    return out[..., :size]


def _reach(window: int | None) -> tuple[int, int]:
    """Flash attention's window: tokens seen to the left and to the right, -1 for all."""
    return (-1 if window is None else window - 1, 0)


def _one_head_size(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values with zeros up to one head size (MLA): flash attention knows no other.

    Zeros change neither a score nor, beyond the values' own size, which is cut off again, the output; the scale stays
    that of the keys' own size.
    """
    size = max(q.size(2), v.size(2))
    scale = q.size(2) ** -0.5 if scale is None else scale

    def padded(x: Tensor) -> Tensor:
        return x if x.size(2) == size else F.pad(x, (0, size - x.size(2)))

    return padded(q), padded(k), padded(v), scale


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float | None, window: int | None) -> Tensor:
    size = v.size(2)
    q, k, v, scale = _one_head_size(q, k, v, scale)  # of unlike sizes it would write out every score
    queries, keys, pieces = list(documents.lengths), list(documents.key_lengths), list[Tensor]()
    for of_document in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        pieces += _sdpa_document(*of_document, scale, window, documents.cut_masks)
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out[..., :size]


def _sdpa_document(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: dict[tuple[Any, ...], Tensor]
) -> list[Tensor]:
    """Attention of a document's last queries, in pieces that follow each other.

    A mask of every query and key would be the square of a document that is longer than its window. So, past the first
    `window` tokens, which see all before them, queries go in blocks with the keys that a block reaches: all blocks are
    one call, on overlapping views of the keys, and share one small mask. Memory and time grow with the length.
    """
    queries, keys = q.size(0), k.size(0)
    if window is None or keys <= window:
        mask, key = None, (queries, keys, q.dtype, q.device)
        if queries != keys:
            mask = masks.get(key)
            if mask is None:
                mask = masks[key] = _causal_mask(queries, keys, keys, q.dtype, q.device)
        return [_sdpa_blocks(q, k, v, queries, keys, mask, scale)]
    pieces = []
    done = max(0, window - (keys - queries))  # queries that see all before them
    if done:
        pieces += _sdpa_document(q[:done], k[:window], v[:window], scale, None, masks)
    block, before = max(min(window, 32), window // 4), window - 1  # keys that all of a block's queries may reach back
    mask = _shared_mask(block, block + before, window, q.dtype, q.device)
    for size in (block, (queries - done) % block):  # full blocks, and what is left
        end = done + (queries - done) // size * size if size else done
        if end > done:
            reached = slice(keys - queries + done - before, keys - queries + end)
            here = mask[:size, : size + before]
            pieces.append(_sdpa_blocks(q[done:end], k[reached], v[reached], size, size + before, here, scale))
            done = end
    return pieces


def _sdpa_blocks(q: Tensor, k: Tensor, v: Tensor, queries: int, keys: int, mask: Tensor | None, scale: float) -> Tensor:
    """Blocks of `queries` queries, each with `keys` keys of which the last goes with its last query."""
    q = q.unflatten(0, (-1, queries)).transpose(1, 2)  # [blocks, H, queries, D]
    k, v = (x.unfold(0, keys, queries).transpose(2, 3) for x in (k, v))  # [blocks, K, keys, D], views
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.size(1) != k.size(1)
    )
    return out.transpose(1, 2).flatten(0, 1)


def _causal_mask(queries: int, keys: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to the scores of the last `queries` of `keys` tokens, ``[queries, keys]``: 0 where a query sees a key.

    Of the scores' type: SDPA would make one of a boolean mask, for every layer anew.
    """
    with torch.inference_mode(False):  # training may come after, with the same one
        ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        unseen = (ahead < 0) | (ahead >= window)
        return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)


_shared_mask = functools.lru_cache(maxsize=4)(_causal_mask)
"""One for all layers and packs: autograd keeps it as long as they do."""


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    if window not in documents.block_masks:
        documents.block_masks[window] = _block_mask(documents, window, q.device)
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    mask, gqa = documents.block_masks[window], q.size(1) != k.size(1)
    attend, capped = _flex_attention(q.is_cuda), None if softcap is None else _capped(softcap)
    if sinks_H is None:
        return attend(q, k, v, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)
    from torch.nn.attention.flex_attention import AuxRequest

    sums = AuxRequest(lse=True)
    out: Any = attend(q, k, v, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=gqa, return_aux=sums)
    values, log_sum = out[0][0].transpose(0, 1), out[1].lse[0].transpose(0, 1)  # [S, H, D], [S, H]
    share = torch.sigmoid(log_sum.float() - sinks_H.float())  # of the softmax, what is not the sink's
    return (values.float() * share[..., None]).to(values.dtype)


@functools.cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """FlexAttention's change to scores: one object for each bound, so that it is compiled once."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _flex_attention(compiled: bool) -> Callable[..., Tensor]:
    """FlexAttention is a kernel only when compiled; the CPU, for forward passes alone, runs it written out."""
    from torch.nn.attention.flex_attention import flex_attention

    plain: Callable[..., Tensor] = flex_attention
    return torch.compile(plain, dynamic=True) if compiled else plain


BLOCK = 128
"""Queries, and keys, of a block of FlexAttention."""


def _block_mask(documents: Documents, window: int | None, device: torch.device) -> Any:
    """FlexAttention's mask, from where documents begin and end alone: no query is held against every key.

    The keys that a block of queries may see are one run, from the first that its first query sees (within a window, the
    first that any of its queries does) to its last query's own. Blocks of that run are computed with a mask, but those
    that all of its queries see in full, which are one run too if they are of one document. On the host: blocks².
    """
    from torch.nn.attention.flex_attention import BlockMask

    of_query, at_query = _places(documents.lengths, documents.key_lengths)  # document, and position among the keys
    of_key, at_key = _places(documents.key_lengths, documents.key_lengths)
    begins = (np.cumsum(documents.key_lengths) - documents.key_lengths)[of_query]  # first key of each query's document
    reach = np.maximum(0, at_query + 1 - window) if window is not None else np.zeros_like(at_query)
    low, high = begins + reach, begins + at_query + 1  # the keys [low, high) that each query sees
    first = np.arange(0, len(of_query), BLOCK)
    last = np.minimum(first + BLOCK, len(of_query)) - 1
    n_keys = -(-len(of_key) // BLOCK)
    from_block = np.minimum.reduceat(low, first) // BLOCK
    to_block = -(-high[last] // BLOCK)
    whole = of_query[first] == of_query[last]
    full_from = np.where(whole, -(-low[last] // BLOCK), n_keys)
    full_to = np.where(whole & (last - first + 1 == BLOCK), high[first] // BLOCK, 0)
    block = np.arange(n_keys)
    full = (block >= full_from[:, None]) & (block < full_to[:, None])
    some = (block >= from_block[:, None]) & (block < to_block[:, None]) & ~full

    def chosen(blocks: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """How many key blocks each query block has, and which, those first; int32 ``[1, 1, blocks(, keys)]``."""
        order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
        counts = blocks.sum(axis=1).astype(np.int32)
        return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(device)

    of_query_d, at_query_d, of_key_d, at_key_d = (
        torch.from_numpy(x).to(device) for x in (of_query, at_query, of_key, at_key)
    )

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ahead = at_query_d[query] - at_key_d[key]
        seen = (of_query_d[query] == of_key_d[key]) & (ahead >= 0)
        return seen if window is None else seen & (ahead < window)

    lengths = len(of_query), len(of_key)
    return BlockMask.from_kv_blocks(*chosen(some), *chosen(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)


def _places(lengths: Sequence[int], ends: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Document of each token, and its position in it, the last token of a document standing at its end."""
    count = np.array(lengths)
    document = np.repeat(np.arange(len(count)), count)
    shift = np.array(ends) - np.cumsum(count)
    return document, np.arange(len(document)) + shift[document]


Kernel = Callable[[Tensor, Tensor, Tensor, Documents, float | None, int | None], Tensor]
KERNELS: Mapping[str, Kernel] = {"varlen": _varlen, "sdpa": _sdpa, "flex": _flex, "flash": _flash}
FEATURES: Mapping[str, frozenset[str]] = {
    "eager": frozenset(("softcap", "sinks")),
    "flex": frozenset(("softcap", "sinks")),
    "flash": frozenset(("softcap",)),
}
"""What kernels can do beyond scale and window; the others nothing."""


def check_features(kernel: str, features: Collection[str]) -> None:
    """Refuse a kernel for a model that needs what it lacks.

    Args:
        kernel: a name of a kernel, or ``auto``.
        features: ``softcap``, ``sinks``.

    Raises:
        HbpError: names the feature and kernels that have it.
    """
    lacking = set(features) - FEATURES.get(kernel, frozenset())
    if kernel != "auto" and lacking:
        able = [name for name, known in FEATURES.items() if lacking <= known]
        raise HbpError(
            f"the model's attention has {' and '.join(sorted(lacking))}, which the kernel {kernel!r} lacks; give auto "
            f"or {' or '.join(able)}"
        )


def check_kernel(kernel: str) -> None:
    """Refuse a kernel that does not exist or is not installed.

    Raises:
        HbpError: names the kernels that there are, or the package that is missing.
    """
    if kernel not in ("auto", "eager", *KERNELS):
        raise HbpError(f"no attention kernel {kernel!r}: give auto, eager, {', '.join(KERNELS)}")
    if kernel in ("varlen", "flex") and not torch.cuda.is_available():
        raise HbpError(f"the attention kernel {kernel!r} trains on CUDA alone; give auto or sdpa")
    if kernel == "flash":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            raise HbpError(
                "the attention kernel 'flash' needs the flash-attn package; install it or give auto"
            ) from None

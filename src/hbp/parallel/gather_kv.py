"""Attention with gathered keys and values: what lets an SP degree exceed the number of heads.

Ulysses divides the heads, so it ends at their number. Beyond it, ranks divide the *queries* instead: each gathers the
keys and values of the whole pack from the others (reduce-scatter in backward) and attends with its own queries. The
idea is Llama 3's context parallelism (https://arxiv.org/abs/2407.21783, Section 3.3.2), which suits packed documents
better than a ring: one message, exact softmax, document masks as on one device.

Under a causal mask later queries of a document see more keys. So the pack is cut into twice as many chunks as ranks,
and each rank holds two of them: that with the most query-key pairs and that with the fewest, the next and the last but
one, and so on, which of all ways to pair them has the least work on the busiest rank. Of one document that fills the
pack these are chunks ``a`` and ``2g − 1 − a``, and every rank computes the same share; of several documents, where late
tokens may see little, pairing by place left some ranks up to twice the work of others.

It composes with Ulysses: :class:`~hbp.parallel.mesh.SequenceGroups` says which ranks exchange heads and which gather.
A rank sends its keys and values to ``g − 1`` others and holds those of the whole pack for its share of the heads, where
Ulysses would hold no more than its share of everything: memory is what it trades.

Legend: ``S`` tokens of the pack, ``T`` tokens of this rank after the Ulysses exchange (``S / g``), ``H``/``K`` query
and key/value heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from hbp.parallel.mesh import SequenceGroups
from hbp.parallel.varlen import Documents, document_attention, make_documents

# Named so since torch 2.13; before that:
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive queries of this rank and the keys that they may see."""

    queries: slice
    """Of this rank's tokens."""
    keys: slice
    """Of the pack's."""
    documents: Documents


@dataclass(frozen=True)
class Gather:
    """Who gathers, and which queries this rank then attends with."""

    ways: int
    group: ProcessGroup | None
    """None: nothing is sent, each rank takes its own part for everyone's (:mod:`hbp.train.measure.micro_batch`)."""
    chunks: tuple[Chunk, ...]
    places: tuple[int, ...]
    """Where each chunk of the pack is among all that are gathered, two of each rank."""

    def pinned(self) -> Gather:
        """The same with its tensors in pinned host memory."""
        return replace(self, chunks=tuple(replace(c, documents=c.documents.pinned()) for c in self.chunks))

    def to(self, device: torch.device) -> Gather:
        """The same with its tensors on a device."""
        return replace(self, chunks=tuple(replace(c, documents=c.documents.to(device)) for c in self.chunks))


def token_multiple(groups: SequenceGroups) -> int:
    """What a pack's tokens must be a multiple of: every rank of every chunk holds as many."""
    return groups.degree * (2 if groups.gather > 1 else 1)


def tokens_of_rank(lengths: Sequence[int], groups: SequenceGroups, sp_rank: int) -> list[slice]:
    """Which tokens of a pack a rank of the SP group holds, in its order: at most two runs.

    Args:
        lengths: tokens of each document, which sum to a multiple of :func:`token_multiple`.
        groups: of the degree.
        sp_rank: rank within the SP group.
    """
    share = sum(lengths) // groups.degree
    row, column = divmod(sp_rank, groups.ulysses)
    begin, end = column * share, (column + 1) * share  # within what the ranks of this row hold together
    runs = []
    for chunk in _chunks_of_row(lengths, groups.gather, row):
        size = chunk.stop - chunk.start
        a, b = max(begin, 0), min(end, size)
        if a < b:
            runs.append(slice(chunk.start + a, chunk.start + b))
        begin, end = begin - size, end - size
    return runs


def _chunks_of_row(lengths: Sequence[int], ways: int, row: int) -> list[slice]:
    total = sum(lengths)
    if ways == 1:
        return [slice(0, total)]
    size = total // (2 * ways)
    return [slice(i * size, (i + 1) * size) for i in _chunks_of_rows(lengths, ways)[row]]


def _chunks_of_rows(lengths: Sequence[int], ways: int) -> list[tuple[int, int]]:
    """The two chunks of each row of ranks, early one first: the busiest with the least busy, and so on."""
    order = np.argsort(_pairs_of_chunks(lengths, 2 * ways), kind="stable").tolist()
    return [(min(pair), max(pair)) for pair in zip(order[:ways], order[: ways - 1 : -1], strict=True)]


def _pairs_of_chunks(lengths: Sequence[int], chunks: int) -> npt.NDArray[np.int64]:
    """Query-key pairs of causal attention in each of so many equal chunks of a pack, ``[chunks]``."""
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = np.concatenate([[0], ends])  # one more than documents: where the pack ends, too
    whole = np.concatenate([[0], np.cumsum([n * (n + 1) // 2 for n in lengths], dtype=np.int64)])
    cuts = np.arange(chunks + 1) * (int(ends[-1]) // chunks)
    document = np.searchsorted(ends, cuts, side="right")  # that each cut is in
    into = cuts - begins[document]
    return np.asarray(np.diff(whole[document] + into * (into + 1) // 2))


def make_gather(lengths: Sequence[int], groups: SequenceGroups, sp_rank: int, device: torch.device) -> Gather | None:
    """The gather of a pack of documents on this rank; None where the degree does not need one.

    Args:
        lengths: tokens of each document, which sum to a multiple of :func:`token_multiple`.
        groups: of the degree.
        sp_rank: rank within the SP group.
        device: of the pack.
    """
    if groups.gather == 1:
        return None
    row, done, chunks = sp_rank // groups.ulysses, 0, []
    for chunk in _chunks_of_row(lengths, groups.gather, row):
        size = chunk.stop - chunk.start
        chunks.append(_chunk(lengths, chunk, slice(done, done + size), device))
        done += size
    held = [chunk for pair in _chunks_of_rows(lengths, groups.gather) for chunk in pair]  # in the order of the ranks
    return Gather(groups.gather, groups.gather_group, tuple(chunks), tuple(np.argsort(held).tolist()))


def _chunk(lengths: Sequence[int], tokens: slice, queries: slice, device: torch.device) -> Chunk:
    """Documents cut to `tokens` as queries, and to all before the end of `tokens` as keys."""
    q_lengths, k_lengths, first, start = [], [], None, 0
    for length in lengths:
        end = min(start + length, tokens.stop)
        inside = end - max(start, tokens.start)
        if inside > 0:
            first = start if first is None else first
            q_lengths.append(inside)
            k_lengths.append(end - start)
        start += length
    assert first is not None
    return Chunk(queries, slice(first, tokens.stop), make_documents(tuple(q_lengths), device, tuple(k_lengths)))


class _AllGather(torch.autograd.Function):
    """Rows of all ranks of a group, first rank first; in backward each rank gets the sum over ranks for its rows."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ways: int, group: ProcessGroup | None) -> Tensor:
        ctx.ways, ctx.group = ways, group
        if group is None:
            return mine.repeat(ways, *[1] * (mine.ndim - 1))
        every = mine.new_empty(ways * mine.size(0), *mine.shape[1:])
        ALL_GATHER(every, mine, group=group)
        return every

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.group is None:
            return gradient.contiguous().chunk(ctx.ways)[0].clone(), None, None
        mine = gradient.new_empty(gradient.size(0) // ctx.ways, *gradient.shape[1:])
        REDUCE_SCATTER(mine, gradient.contiguous(), group=ctx.group)
        return mine, None, None


def gathered_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, gather: Gather, **options: Any) -> Tensor:
    """Causal document attention of this rank's queries over the keys and values of the whole pack.

    Args:
        q_THD: queries ``[T, H, D]``.
        k_TKD: keys ``[T, K, D]``.
        v_TKD: values ``[T, K, D]`` (``D`` may differ from the keys').
        gather: of the pack.
        options: as in :func:`~hbp.parallel.varlen.document_attention`.

    Returns:
        ``[T, H, D]`` with the values' ``D``.
    """
    tokens, sizes = q_THD.size(0), [x[0].numel() for x in (k_TKD, v_TKD)]
    mine = torch.cat([k_TKD.flatten(1), v_TKD.flatten(1)], dim=1)  # one message
    every = _AllGather.apply(mine, gather.ways, gather.group)
    halves = every.view(2 * gather.ways, tokens // 2, -1).unbind()  # each rank's early and late chunk
    pack = torch.cat([halves[place] for place in gather.places])
    k, v = pack.split(sizes, dim=1)
    k, v = k.unflatten(1, k_TKD.shape[1:]), v.unflatten(1, v_TKD.shape[1:])
    return torch.cat(
        [
            document_attention(q_THD[chunk.queries], k[chunk.keys], v[chunk.keys], chunk.documents, **options)
            for chunk in gather.chunks
        ]
    )

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import CPU

from hbp.parallel.varlen import document_attention, make_documents

HEADS, SIZE = 4, 8


def dense(q, k, v, lengths, scale=None, window=None):
    """One softmax over a block-diagonal causal mask, written out."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(document))
    ahead = at[:, None] - at[None, :]
    mask = (document[:, None] == document[None, :]) & (ahead >= 0) & (ahead < (window or len(at) + 1))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.size(2) ** -0.5)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def qkv(tokens: int, kv_heads: int, v_size: int = SIZE):
    generator = torch.Generator().manual_seed(tokens)
    shapes = (HEADS, SIZE), (kv_heads, SIZE), (kv_heads, v_size)
    return [torch.randn(tokens, *s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 20),
    scale=st.none() | st.just(0.7),
)
def test_equals_dense_attention_with_a_block_diagonal_mask(lengths, kv_heads, window, scale):
    inputs = qkv(sum(lengths), kv_heads)
    got = document_attention(*inputs, make_documents(tuple(lengths), CPU), scale=scale, sliding_window=window)
    want = dense(*inputs, lengths, scale, window)
    torch.testing.assert_close(got, want)
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (got, want)]
    torch.testing.assert_close(*gradients)


def test_values_of_another_size():
    inputs = qkv(9, HEADS, v_size=5)
    got = document_attention(*inputs, make_documents((4, 5), CPU))
    torch.testing.assert_close(got, dense(*inputs, [4, 5]))


@pytest.mark.parametrize("window", [None, 3])
def test_documents_do_not_see_each_other(window):
    lengths = (7, 9, 4)
    inputs = [x.detach() for x in qkv(sum(lengths), 2)]
    documents = make_documents(lengths, CPU)
    before = document_attention(*inputs, documents, sliding_window=window)
    for x in inputs:
        x[7:16] += 1.0  # the second document
    after = document_attention(*inputs, documents, sliding_window=window)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 7 + [True] * 9 + [False] * 4


def test_documents_lie_end_to_end():
    documents = make_documents((3, 1, 5), CPU)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.longest == 5

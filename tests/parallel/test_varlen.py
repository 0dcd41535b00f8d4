from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import CPU

from hbp.errors import HbpError
from hbp.parallel import varlen
from hbp.parallel.varlen import check_kernel, document_attention, make_documents

HEADS, SIZE = 4, 8


def dense(q, k, v, lengths, scale=None, window=None, softcap=None, sinks=None):
    """One softmax over a block-diagonal causal mask, written out."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(len(document))
    ahead = at[:, None] - at[None, :]
    mask = (document[:, None] == document[None, :]) & (ahead >= 0) & (ahead < (window or len(at) + 1))
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.size(2) ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)


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


@pytest.mark.parametrize("v_size", [5, 11])
@pytest.mark.parametrize("window", [None, 3])
def test_values_of_another_size(v_size, window):
    inputs = qkv(9, HEADS, v_size=v_size)
    got = document_attention(*inputs, make_documents((4, 5), CPU), sliding_window=window)
    want = dense(*inputs, [4, 5], window=window)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)))


@pytest.mark.parametrize("window", [40, 150])
def test_documents_of_many_blocks_of_a_window(window):
    """Blocks are shorter than these windows; documents end within one, at its end, and just beyond."""
    lengths = (39, 40, 41, 72, 73, 400, 187, 150, 151)
    with torch.inference_mode():  # the mask that this makes is trained with
        document_attention(*(x.detach() for x in qkv(400, 2)), make_documents((400,), CPU), sliding_window=window)
    inputs = qkv(sum(lengths), 2)
    got = document_attention(*inputs, make_documents(lengths, CPU), sliding_window=window)
    want = dense(*inputs, lengths, window=window)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want)))


def saved_bytes(tokens, v_size, window, layers=1):
    """Of the storages that autograd keeps, no two the same, for one document in float32."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for _ in range(layers):
            inputs = [x.detach().float().requires_grad_() for x in qkv(tokens, HEADS, v_size)]
            kept.append(document_attention(*inputs, make_documents((tokens,), CPU), sliding_window=window))
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(("v_size", "window"), [(SIZE, 64), (SIZE, None), (5, None), (5, 64)])
def test_what_is_kept_grows_with_the_length(v_size, window):
    """Queries, keys, values and output of one head size, a number a head, and one small mask for all layers."""
    flash = 4 * HEADS * (4 * SIZE + 1)
    mask = 4 * 32 * (32 + 63) if window else 0
    for tokens, layers in ((512, 1), (2048, 1), (512, 3)):
        assert saved_bytes(tokens, v_size, window, layers) == layers * tokens * flash + mask


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # no compiler here


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_queries_are_the_last_tokens_of_their_documents(kernel, window):
    """Fewer queries than keys, as where keys and values are gathered."""
    keys, queries = (9, 1, 12, 4), (3, 1, 12, 2)
    q, k, v = (x.detach().requires_grad_(kernel != "flex") for x in qkv(sum(keys), 2))  # flex: no backward on CPU
    last = torch.cat([torch.arange(sum(keys[: i + 1]) - n, sum(keys[: i + 1])) for i, n in enumerate(queries)])
    got = document_attention(q[last], k, v, make_documents(queries, CPU, keys), sliding_window=window, kernel=kernel)
    want = dense(q, k, v, keys, window=window)[last]
    torch.testing.assert_close(got, want)
    if kernel != "flex":
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, want)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("kv_heads", "v_size"), [(1, SIZE), (2, SIZE), (4, 5)])
def test_flex_equals_dense_attention(window, kv_heads, v_size):
    lengths = (130, 1, 7, 40)  # more than one block of 128
    inputs = [x.detach() for x in qkv(sum(lengths), kv_heads, v_size)]
    documents = make_documents(lengths, CPU)
    got = document_attention(*inputs, documents, scale=0.3, sliding_window=window, kernel="flex")
    torch.testing.assert_close(got, dense(*inputs, lengths, 0.3, window))
    mask = documents.block_masks[window]
    document_attention(*inputs, documents, sliding_window=window, kernel="flex")
    assert documents.block_masks == {window: mask}  # made once a pack


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("queries", [(700, 3, 260, 130), (130, 1, 129, 130)])
def test_block_masks_see_what_attention_sees(window, queries):
    """Against torch's own, made from every query and key: whole blocks are seen in full, no other sees more."""
    from torch.nn.attention.flex_attention import create_block_mask

    keys = (700, 3, 260, 130)
    documents = make_documents(queries, CPU, keys)
    mask = varlen._block_mask(documents, window, CPU)
    want = create_block_mask(mask.mask_mod, None, None, sum(queries), sum(keys), device="cpu")
    full, some = (blocks(want.full_kv_num_blocks, want.full_kv_indices), blocks(want.kv_num_blocks, want.kv_indices))
    got_full, got_some = (
        blocks(mask.full_kv_num_blocks, mask.full_kv_indices),
        blocks(mask.kv_num_blocks, mask.kv_indices),
    )
    assert got_full <= full
    assert full | some <= got_full | got_some
    assert got_full or queries[0] != 700 or window == 100
    if queries == keys and window is None:
        assert (got_full, got_some) == (full, some)
    q, k, v = (x.detach() for x in qkv(sum(keys), 2))
    last = torch.cat([torch.arange(sum(keys[: i + 1]) - n, sum(keys[: i + 1])) for i, n in enumerate(queries)])
    got = document_attention(q[last], k, v, documents, sliding_window=window, kernel="flex")
    torch.testing.assert_close(got, dense(q, k, v, keys, window=window)[last])


def blocks(counts, indices):
    chosen = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return {(row, column) for row, (count, columns) in enumerate(chosen) for column in columns[:count]}


def test_a_long_packs_block_mask_is_small():
    """128K tokens: a mask of every query and key would be 16 GiB of bytes, 128 of numbers."""
    lengths = (65_536, *[128] * 512)
    mask = varlen._block_mask(make_documents(lengths, CPU), None, CPU)
    assert mask.kv_indices.shape[-2:] == (1024, 1024)
    assert int(mask.full_kv_num_blocks.sum()) == 512 * 511 // 2
    assert int(mask.kv_num_blocks.sum()) == 1024  # the diagonal


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attn_is_asked_for_the_same(monkeypatch, window):
    """Without the package and its GPU: a stand-in that does what its arguments say."""

    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, longest_q, longest_k, *, softmax_scale, causal, window_size, softcap
    ):
        assert softcap == 0.0
        assert causal
        assert q.size(2) == k.size(2) == v.size(2)  # it knows one head size
        assert (longest_q, longest_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        reach, ahead = window_size
        assert ahead == 0
        return dense(q, k, v, cu_q.diff().tolist(), softmax_scale, None if reach == -1 else reach + 1)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    check_kernel("flash")
    lengths, inputs = (6, 9), qkv(15, 2, v_size=5)
    got = document_attention(*inputs, make_documents(lengths, CPU), sliding_window=window, kernel="flash")
    torch.testing.assert_close(got, dense(*inputs, lengths, None, window))


FEATURED = {
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "both": {"softcap": 0.8, "sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "neither": {},
}


def expected(inputs, lengths, options, **more):
    return dense(*inputs, lengths, softcap=options.get("softcap"), sinks=options.get("sinks_H"), **more)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("features", FEATURED)
def test_written_out_attention_equals_dense(features, window):
    """Values and all gradients, the sinks' included, over several blocks of queries."""
    lengths, options = (150, 1, 40, 261), dict(FEATURED[features])
    inputs = [x.detach().float().requires_grad_() for x in qkv(sum(lengths), 2, v_size=5)]
    if "sinks_H" in options:
        options["sinks_H"] = options["sinks_H"].clone().requires_grad_()
    documents = make_documents(lengths, CPU)
    got = document_attention(*inputs, documents, scale=0.5, sliding_window=window, kernel="eager", **options)
    want = expected(inputs, lengths, options, scale=0.5, window=window)
    torch.testing.assert_close(got, want)
    leaves = [*inputs, *([options["sinks_H"]] if "sinks_H" in options else [])]
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    gradients = [torch.autograd.grad((out * weights).sum(), leaves) for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "flex"])
@pytest.mark.parametrize("features", FEATURED)
def test_kernels_agree_on_the_features_that_they_claim(features, kernel):
    """The same pack, fewer queries than keys; flex forward alone, which is all that it does on CPU."""
    keys, queries, options = (139, 1, 12), (30, 1, 12), FEATURED[features]
    q, k, v = (x.detach().float() for x in qkv(sum(keys), 2))
    last = torch.cat([torch.arange(sum(keys[: i + 1]) - n, sum(keys[: i + 1])) for i, n in enumerate(queries)])
    documents = make_documents(queries, CPU, keys)
    got = document_attention(q[last], k, v, documents, sliding_window=7, kernel=kernel, **options)
    torch.testing.assert_close(got, expected((q, k, v), keys, options, window=7)[last])


def test_flash_attn_caps_scores(monkeypatch):
    def flash_attn_varlen_func(q, k, v, cu_q, *_, softmax_scale, causal, window_size, softcap):
        return dense(q, k, v, cu_q.diff().tolist(), softmax_scale, softcap=softcap)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    inputs = qkv(15, 2)
    got = document_attention(*inputs, make_documents((6, 9), CPU), softcap=0.8, kernel="flash")
    torch.testing.assert_close(got, dense(*inputs, (6, 9), softcap=0.8))


def test_kernels_are_not_chosen_for_what_they_lack():
    inputs, documents = [x.detach() for x in qkv(4, 2)], make_documents((4,), CPU)
    for kernel, lacking in (("sdpa", "softcap"), ("varlen", "softcap"), ("flash", "sinks"), ("sdpa", "sinks")):
        options = {"softcap": 1.0} if lacking == "softcap" else {"sinks_H": torch.zeros(HEADS)}
        message = f"the model's attention has {lacking}, which the kernel '{kernel}' lacks; give auto or "
        with pytest.raises(HbpError, match=message):
            document_attention(*inputs, documents, kernel=kernel, **options)
    for options in ({"softcap": 1.0}, {"sinks_H": torch.zeros(HEADS)}):  # auto takes one that has it
        torch.testing.assert_close(
            document_attention(*inputs, documents, **options).double(),
            expected(inputs, (4,), options),
            rtol=1e-5,
            atol=1e-6,
        )


def test_kernel_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(HbpError, match="needs the flash-attn package"):
        check_kernel("flash")
    if not torch.cuda.is_available():
        for kernel in ("varlen", "flex"):
            with pytest.raises(HbpError, match=f"'{kernel}' trains on CUDA alone"):
                check_kernel(kernel)


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [None, 3])
def test_documents_do_not_see_each_other(window, kernel):
    lengths = (7, 9, 4)
    inputs = [x.detach() for x in qkv(sum(lengths), 2)]
    documents = make_documents(lengths, CPU)
    before = document_attention(*inputs, documents, sliding_window=window, kernel=kernel)
    for x in inputs:
        x[7:16] += 1.0  # the second document
    after = document_attention(*inputs, documents, sliding_window=window, kernel=kernel)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False] * 7 + [True] * 9 + [False] * 4


def test_documents_lie_end_to_end():
    documents = make_documents((3, 1, 5), CPU)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 9]
    assert documents.cu_seqlens.dtype == torch.int32
    assert (documents.longest, documents.longest_keys) == (5, 5)
    assert documents.key_lengths == documents.lengths
    late = make_documents((2, 1), CPU, (4, 9))
    assert late.cu_seqlens.tolist() == [0, 2, 3]
    assert late.cu_key_lengths.tolist() == [0, 4, 13]
    assert (late.longest, late.longest_keys) == (2, 9)

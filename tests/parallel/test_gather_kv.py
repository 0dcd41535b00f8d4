"""Which tokens a rank holds, and attention over gathered keys and values, in threads that stand for ranks."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from workers import CPU

from hbp.parallel import gather_kv
from hbp.parallel.gather_kv import gathered_attention, make_gather, token_multiple, tokens_of_rank
from hbp.parallel.mesh import SequenceGroups
from tests.parallel.test_varlen import dense, qkv

GROUPS = st.builds(SequenceGroups, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 4]))


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 6))
def test_ranks_share_the_tokens(groups, times):
    total = token_multiple(groups) * times
    every = [tokens_of_rank(total, groups, rank) for rank in range(groups.degree)]
    held = [[token for run in runs for token in range(total)[run]] for runs in every]
    assert sorted(token for tokens in held for token in tokens) == list(range(total))
    assert {len(tokens) for tokens in held} == {total // groups.degree}
    assert all(len(runs) <= 2 for runs in every)
    assert all(tokens == sorted(tokens) for tokens in held)
    if groups.gather == 1:
        assert all(len(runs) == 1 for runs in every)  # Ulysses alone: contiguous


@pytest.mark.parametrize("ways", [2, 3, 4])
def test_one_long_document_costs_every_rank_alike(ways):
    total = 24 * ways
    pairs = []
    for rank in range(ways):
        gather = make_gather([total], SequenceGroups(1, ways), rank, CPU)
        ends = [(chunk.documents.lengths[0], chunk.documents.key_lengths[0]) for chunk in gather.chunks]
        pairs.append(sum(keys - queries + i + 1 for queries, keys in ends for i in range(queries)))
    assert len(set(pairs)) == 1
    assert sum(pairs) == total * (total + 1) // 2


def test_degrees_within_the_heads_gather_nothing():
    assert make_gather([8], SequenceGroups(4), 1, CPU) is None


class Ranks:
    """`ways` threads whose all-gather meets here."""

    def __init__(self, ways: int) -> None:
        self.barrier, self.parts = threading.Barrier(ways), {}

    def gather(self, mine: torch.Tensor, ways: int, rank: int) -> torch.Tensor:
        self.parts[rank] = mine
        self.barrier.wait(10)
        return torch.cat([self.parts[i] for i in range(ways)])


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    ways=st.sampled_from([2, 3]),
    kv_heads=st.sampled_from([1, 4]),
    window=st.none() | st.integers(1, 9),
    v_size=st.sampled_from([8, 5]),
)
def test_equals_dense_attention(lengths, ways, kv_heads, window, v_size):
    groups = SequenceGroups(1, ways)
    filler = -sum(lengths) % token_multiple(groups)
    lengths = [*lengths, filler] if filler else lengths
    total = sum(lengths)
    q, k, v = qkv(total, kv_heads, v_size)
    places = [torch.cat([torch.arange(total)[run] for run in tokens_of_rank(total, groups, r)]) for r in range(ways)]
    ranks, outs = Ranks(ways), [None] * ways

    def attend(rank: int) -> None:
        gather = make_gather(lengths, groups, rank, CPU)
        mine = places[rank]
        with_rank = gather_kv.Gather(ways, rank, gather.chunks)  # the rank in place of its group
        outs[rank] = gathered_attention(q[mine], k[mine], v[mine], with_rank, sliding_window=window)

    with mock.patch.object(gather_kv._AllGather, "apply", ranks.gather):
        threads = [threading.Thread(target=attend, args=(rank,)) for rank in range(ways)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    got = torch.empty(total, q.size(1), v_size, dtype=q.dtype).index_copy(0, torch.cat(places), torch.cat(outs))
    want = dense(q, k, v, lengths, window=window)
    torch.testing.assert_close(got, want)
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (got, want)]
    torch.testing.assert_close(*gradients)

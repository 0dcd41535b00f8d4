from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of
from workers import CPU, Samples, random_samples

from hbp.config import LOSSES
from hbp.parallel.mesh import ParallelMesh, SequenceGroups
from hbp.train.batch import IDLE, MicroBatch, make_micro_batch, micro_batch_of, micro_batches, rows_of_rank, steps
from hbp.train.loss import IGNORE, global_batches

MESH = ParallelMesh(None, made={d: SequenceGroups(d) for d in (1, 2, 3, 4, 8)})  # these tests never communicate
VOCAB = 1000


def packs_of(documents: list, degree: int) -> list:
    return [micro_batch_of(documents, 7, degree, rank, 2, MESH, CPU) for rank in range(degree)]


@st.composite
def documents(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    return random_samples(lengths, VOCAB, draw(st.integers(0, 99))).documents


@settings(max_examples=80, deadline=None)
@given(documents(), st.sampled_from([1, 2, 3, 4, 8]))
def test_slices_of_all_ranks_are_the_pack(docs, degree):
    slices = packs_of(docs, degree)
    sizes = {batch.input_ids.shape for batch in slices}
    assert len(sizes) == 1  # every rank holds as many tokens
    tokens = torch.cat([batch.input_ids[0] for batch in slices]).tolist()
    positions = torch.cat([batch.position_ids[0] for batch in slices]).tolist()
    labels = torch.cat([batch.labels for batch in slices]).tolist()

    want_tokens, want_positions, want_labels = [], [], []
    for ids, mask in docs:
        want_tokens += ids.tolist()
        want_positions += range(len(ids))
        want_labels += [int(ids[i + 1]) if mask[i + 1] else IGNORE for i in range(len(ids) - 1)]
        want_labels.append(IGNORE)  # the last token of a document has nothing to predict
    real, lengths = len(want_tokens), tuple(len(ids) for ids, _ in docs)
    spare = len(tokens) - real
    assert spare == -real % degree
    assert tokens[:real] == want_tokens
    assert positions == [*want_positions, *range(spare)]
    assert labels == want_labels + [IGNORE] * spare
    for batch in slices:  # the spare tokens are a document of their own, and every rank knows the whole pack
        assert batch.layout.documents.lengths == ((*lengths, spare) if spare else lengths)
        assert batch.layout.sp_degree == degree
        assert (batch.row, batch.gc_layers) == (7, 2)


def test_label_of_a_slice_that_ends_inside_a_document():
    ids, mask = np.array([5, 6, 7, 8], np.int32), np.array([1, 1, 1, 0], np.uint8)
    first, second = packs_of([(ids, mask)], 2)
    assert first.labels.tolist() == [6, 7]  # 7 lies on the other rank
    assert second.labels.tolist() == [IGNORE, IGNORE]  # 8 carries no loss
    assert second.position_ids.tolist() == [[2, 3]]


def test_slices_beyond_the_heads_are_a_busy_and_an_idle_one():
    """Degree 8 over 4 heads: two rows of ranks gather; the first holds the quarters with most and with fewest pairs."""
    docs = random_samples([30, 7], VOCAB).documents
    mesh = ParallelMesh(None, made={8: SequenceGroups(4, 2)})
    slices = [micro_batch_of(docs, 0, 8, rank, 0, mesh, CPU) for rank in range(8)]
    tokens = np.concatenate([*(ids for ids, _ in docs), np.zeros(11, np.int32)])  # rounded up to 48
    quarters = np.split(tokens, 4)
    want = [*np.split(np.concatenate(quarters[1::2]), 4), *np.split(np.concatenate(quarters[::2]), 4)]
    for batch, tokens_of_rank in zip(slices, want, strict=True):
        assert batch.input_ids[0].tolist() == tokens_of_rank.tolist()
        assert (batch.layout.filler, batch.layout.ulysses_degree, batch.layout.gather.ways) == (11, 4, 2)
    assert [c.documents.lengths for c in slices[0].layout.gather.chunks] == [(12,), (1, 11)]
    assert [c.documents.key_lengths for c in slices[5].layout.gather.chunks] == [(12,), (30, 6)]


def test_weights_follow_the_sample():
    ids = np.arange(5, dtype=np.int32)
    docs = [(ids, np.array(mask, np.uint8)) for mask in ([1, 1, 0, 1, 0], [0, 0, 0, 0, 1])]
    samples = Samples(docs)
    plan = plan_of([(0, 0, 0, 4, 0, [1, 0])], samples.lengths, 4)
    step = global_batches(plan, samples.loss_tokens, "sample-mean")[0]
    slices = [make_micro_batch(plan, 0, samples, MESH, rank, CPU, step) for rank in range(4)]
    weights = torch.cat([batch.weights for batch in slices])
    assert weights.tolist() == [0.5] * 5 + [0.25] * 5 + [0.0] * 2
    assert weights.dtype == torch.float32
    assert {batch.token_share for batch in slices} == {0.1}
    assert make_micro_batch(plan, 0, samples, MESH, 0, CPU).weights is None


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_goes_on_weighs_its_tokens_as_before(loss):
    samples = random_samples([4, 9, 5, 7, 30], VOCAB)
    plan = plan_of([(0, 0, 0, 1, 0, [1, 0]), (1, 0, 0, 1, 0, [2, 3]), (2, 0, 0, 1, 0, [4])], samples.lengths, 1)
    mesh = ParallelMesh(SimpleNamespace(get_rank=lambda: 0, size=lambda: 1))
    whole, rest = (list(steps(plan, samples, mesh, loss=loss, start=start)) for start in (0, 1))
    assert len(rest) == 2
    for (before,), (after,) in zip(whole[1:], rest, strict=True):
        assert torch.equal(before.weights, after.weights) and before.row == after.row


def test_token_mean_weighs_by_the_pack():
    """Packs of 6 loss tokens on two ranks and of 3 on one; one rank idles: 2/4 and 1/4 of the mean."""
    ids = np.arange(5, dtype=np.int32)
    samples = Samples([(ids, np.array(mask, np.uint8)) for mask in ([1] * 5, [0, 0, 0, 1, 1], [1, 0, 1, 1, 1])])
    plan = plan_of([(0, 0, 0, 2, 0, [0, 1]), (0, 0, 2, 1, 0, [2])], samples.lengths, 4)
    step = global_batches(plan, samples.loss_tokens, "token-mean")[0]
    slices = [make_micro_batch(plan, row, samples, MESH, rank, CPU, step) for row, rank in ((0, 0), (0, 1), (1, 2))]
    assert slices[0].weights.tolist() == slices[1].weights.tolist() == pytest.approx([2 / (4 * 6)] * 5)
    assert slices[2].weights.tolist() == pytest.approx([1 / (4 * 3)] * 5)


def test_idle_is_one_token_without_loss():
    plan = plan_of([(0, 0, 0, 1, 0, [0])], np.array([4], np.int32), 2)
    batch = make_micro_batch(plan, IDLE, Samples([]), MESH, 1, CPU)
    assert batch.input_ids.shape == (1, 1)
    assert batch.labels.tolist() == [IGNORE]
    assert (batch.layout.sp_degree, batch.layout.filler, batch.gc_layers, batch.row) == (1, 1, 0, IDLE)


@pytest.mark.parametrize("rank", [2, 3])
def test_row_gives_its_samples_in_order_to_its_ranks(rank):
    samples = random_samples([3, 4, 6], VOCAB)
    plan = plan_of([(0, 0, 0, 1, 0, [1]), (0, 0, 2, 2, 3, [2, 0])], samples.lengths, 4)
    batch = make_micro_batch(plan, 1, samples, MESH, rank, CPU)
    whole = np.concatenate([samples.documents[2][0], samples.documents[0][0], [0]])
    assert batch.input_ids[0].tolist() == whole[(rank - 2) * 5 : (rank - 1) * 5].tolist()
    assert (batch.layout.sp_degree, batch.gc_layers, batch.row) == (2, 3, 1)


def same(a: MicroBatch, b: MicroBatch) -> bool:
    tensors = zip(a.inputs, b.inputs, strict=True)
    return a.row == b.row and all(torch.equal(x, y) for x, y in tensors if isinstance(x, torch.Tensor))


def prefetched(samples, n: int):
    plan = plan_of([(i, 0, 0, 1, 0, [i]) for i in range(n)], samples.lengths, 1)
    steps = global_batches(plan, samples.loss_tokens)
    return plan, steps, micro_batches(plan, zip(range(n), steps, strict=True), samples, MESH, 0, CPU)


def test_micro_batches_come_in_order_and_ahead():
    samples, read = random_samples([3, 9, 5, 1, 7], VOCAB), []
    plain = samples.sample
    samples.sample = lambda index: read.append(index) or plain(index)
    plan, steps, batches = prefetched(samples, 5)
    assert read == []
    first = next(batches)
    batches_of = [first, *batches]
    assert read == list(range(5))  # each sample once
    for row, batch in enumerate(batches_of):
        assert same(batch, make_micro_batch(plan, row, samples, MESH, 0, CPU, steps[row]))


def test_failure_while_reading_ahead_comes_out_at_its_turn():
    samples = random_samples([3, 9, 5], VOCAB)
    plain = samples.sample
    samples.sample = lambda index: plain(index) if index < 2 else 1 / 0
    _, _, batches = prefetched(samples, 3)
    assert [next(batches).row, next(batches).row] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(batches)


@st.composite
def tilings(draw):
    """Rows of random steps over 4 ranks, with gaps."""
    rows = []
    for step in range(draw(st.integers(1, 3))):
        for micro in range(draw(st.integers(1, 3))):
            start, before = 0, len(rows)
            while start < 4:
                degree = draw(st.sampled_from([d for d in (1, 2, 4) if start % d == 0]))
                if draw(st.booleans()) or (start + degree == 4 and len(rows) == before):
                    rows.append((step, micro, start, degree, 0, [len(rows)]))
                start += degree
    return rows


@settings(max_examples=80, deadline=None)
@given(tilings())
def test_rows_of_rank(rows):
    plan = plan_of(rows, np.ones(len(rows), np.int32), 4)
    for rank in range(4):
        want = [
            [IDLE] * (1 + max(micro for step, micro, *_ in rows if step == wanted)) for wanted in range(plan.n_steps)
        ]
        for number, (step, micro, start, degree, *_) in enumerate(rows):
            if start <= rank < start + degree:
                want[step][micro] = number
        assert rows_of_rank(plan, rank) == want

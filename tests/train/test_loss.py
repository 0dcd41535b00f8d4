from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hbp.train.loss import IGNORE, ave_token_scale, summed_cross_entropy

TOKENS, HIDDEN, VOCAB = 13, 6, 17


def inputs(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCAB, (tokens,), generator=generator)
    labels[::3] = IGNORE
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 3, 4, 12, 13, 14, 1024])
def test_equals_cross_entropy_whatever_the_chunk(chunk):
    hidden, weight, labels = inputs()
    got = summed_cross_entropy(hidden, weight, labels, chunk)
    keep = labels != IGNORE
    want = F.cross_entropy((hidden @ weight.T)[keep], labels[keep], reduction="sum")
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][0][~keep].any()
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, weight, labels, chunk), want.detach())


def test_no_label_is_no_loss_and_no_gradient():
    hidden, weight, labels = inputs()
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), 4)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_logits_are_not_kept():
    """What autograd keeps does not grow with tokens × vocabulary."""
    hidden, weight, labels = inputs(64)
    kept: dict[int, torch.UntypedStorage] = {}  # a chunk is a view: each storage counts once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_cross_entropy(hidden, weight, labels, 4)
    assert sum(storage.nbytes() for storage in kept.values()) <= hidden.nbytes + weight.nbytes + labels.nbytes


def test_bfloat16_sums_in_float32():
    hidden, weight, labels = inputs(2000)
    loss = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, 16)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))


def test_ave_token_scale():
    """The mean over ranks of scale × rank sum is the global sum over the global count; Token-Mean is not."""
    sums, counts = [30.0, 2.0, 0.0, 8.0], [10, 1, 0, 9]
    scale = ave_token_scale(sum(counts), world_size=4)
    assert sum(scale * s for s in sums) / 4 == pytest.approx(sum(sums) / sum(counts))
    assert scale == pytest.approx(1 / (sum(counts) / 4))  # paper: one over the mean tokens a rank
    assert ave_token_scale(0, 4) == 4  # a step without targets divides by nothing

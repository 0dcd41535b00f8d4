from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plans import plan_of
from workers import CPU, DEEPSEEK_V2, LLAMA, QWEN3_MOE, random_samples, write_model

from hbp.config import LOSSES
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, SequenceGroups
from hbp.train.batch import IDLE, MicroBatch, micro_batch_of
from hbp.train.loss import (
    CHUNK,
    IGNORE,
    GlobalBatch,
    MeanStep,
    RouterLoss,
    documents_of_tokens,
    global_batches,
    summed_cross_entropy,
)
from hbp.train.measure.micro_batch import peak_bytes_of
from hbp.train.model import CausalLMWithLoss, load_model

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
    got = summed_cross_entropy(hidden, weight, labels, chunk=chunk)
    keep = labels != IGNORE
    want = F.cross_entropy((hidden @ weight.T)[keep], labels[keep], reduction="sum")
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][0][~keep].any()
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, weight, labels, chunk=chunk), want.detach())


def test_no_label_is_no_loss_and_no_gradient():
    hidden, weight, labels = inputs()
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE), chunk=4)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_logits_of_a_long_pack_are_bounded():
    """Forward and backward of 128K tokens give out no more than a few chunks of logits beside what comes in and out."""
    tokens, vocab = 2**17, 256
    hidden, weight = torch.ones(tokens, 4, requires_grad=True), torch.ones(vocab, 4, requires_grad=True)
    labels = torch.ones(tokens, dtype=torch.int64)
    peak = peak_bytes_of(lambda: summed_cross_entropy(hidden, weight, labels).backward(), torch.device("cpu"))
    assert peak - hidden.nbytes < 3 * CHUNK * vocab * 4 < tokens * vocab * 4 / 20


def test_evaluation_makes_no_gradients():
    hidden, weight, labels = torch.ones(8, 64, requires_grad=True), torch.ones(4096, 64, requires_grad=True), [1] * 8
    run = lambda: summed_cross_entropy(hidden, weight, torch.tensor(labels))  # noqa: E731
    with torch.no_grad():
        assert peak_bytes_of(run, torch.device("cpu")) < weight.nbytes / 2 < weight.nbytes
    assert peak_bytes_of(run, torch.device("cpu")) > weight.nbytes


@pytest.mark.parametrize("chunks", [128, 256])
def test_the_projections_gradient_is_as_exact_as_one_product(chunks):
    """In bfloat16 and with gradients that do not cancel, summing rounded products is 1 to 4 % off."""
    generator = torch.Generator().manual_seed(0)
    tokens, hidden_size, vocab = 8 * chunks, 32, 48
    hidden = (torch.randn(tokens, hidden_size, generator=generator) + 2).bfloat16()  # biased
    weight = torch.randn(vocab, hidden_size, generator=generator).mul(0.05).bfloat16().requires_grad_()
    labels = torch.randint(0, vocab // 4, (tokens,), generator=generator)
    summed_cross_entropy(hidden, weight, labels, chunk=8).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()
    once = weight.detach().clone().requires_grad_()
    F.cross_entropy((hidden @ once.T).float(), labels, reduction="sum").backward()

    def off(gradient: torch.Tensor) -> float:
        return float((gradient.double() - exact.grad).norm() / exact.grad.norm())

    assert off(weight.grad) < 1.05 * off(once.grad)
    assert off(weight.grad) < 0.005


def test_logits_are_not_kept():
    """What autograd keeps does not grow with tokens × vocabulary."""
    hidden, weight, labels = inputs(64)
    kept: dict[int, torch.UntypedStorage] = {}  # a chunk is a view: each storage counts once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        summed_cross_entropy(hidden, weight, labels, chunk=4)
    assert sum(storage.nbytes() for storage in kept.values()) <= hidden.nbytes + weight.nbytes + labels.nbytes


def test_bfloat16_sums_in_float32():
    hidden, weight, labels = inputs(2000)
    loss = summed_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, chunk=16)
    assert loss.dtype == torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))


@pytest.mark.parametrize("chunk", [1, 4, 13, 1024])
def test_weights_count_each_token(chunk):
    hidden, weight, labels = inputs()
    weights = torch.linspace(0, 2, TOKENS)
    got = summed_cross_entropy(hidden, weight, labels, weights, chunk)
    keep = labels != IGNORE
    want = (F.cross_entropy((hidden @ weight.T)[keep], labels[keep], reduction="none") * weights[keep]).sum()
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    torch.testing.assert_close(*gradients)


# Two steps; loss tokens of samples 0 to 4: 3, 0, 2, 4, 1
LENGTHS, TARGETS = np.array([5, 2, 4, 6, 3], np.int32), np.array([3, 0, 2, 4, 1])
PLAN = plan_of([(0, 0, 0, 1, 0, [2, 0]), (0, 0, 1, 1, 0, [1]), (1, 0, 0, 2, 0, [4, 3])], LENGTHS, 2)


def test_global_batches_of_a_plan():
    targets = np.array([3, 0, 2, 5, 1])
    first, second = global_batches(PLAN, targets, "sum")
    assert first == GlobalBatch("sum", 11, 5, 2, mean_tokens=10.0, mean_loss_tokens=5.5, turns=2)
    assert second == GlobalBatch("sum", 9, 6, 2, mean_tokens=10.0, mean_loss_tokens=5.5, turns=2)
    with pytest.raises(HbpError, match="no loss 'mean': give one of ave-token, run-token, sample-mean, sum, token"):
        global_batches(PLAN, TARGETS, "mean")


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_over_the_global_batch(loss):
    step = global_batches(PLAN, np.array([3, 0, 2, 5, 1]), loss)[0]
    entropies = {0: [1.0, 2.0, 6.0], 1: [], 2: [5.0, 1.0]}  # by loss token, wherever it was packed
    want = {
        "ave-token": 15 / 5,
        "sample-mean": (9 / 3 + 6 / 2) / 2,  # the sample without loss tokens does not count
        "sum": 15,
        "run-token": 15 / ((5 + 6) / 2),
        "token-mean": (15 / 5 + 0) / 2,  # one rank has all the loss tokens, the other none
    }[loss]
    weights = {i: step.token_weight(len(e), 5 if i in (0, 2) else 0) for i, e in entropies.items()}
    assert sum(weights[i] * sum(e) for i, e in entropies.items()) == pytest.approx(want)


def test_run_token_weighs_every_token_of_the_plan_alike():
    """Steps of 5 and 50 loss tokens; `ave-token` weighs a token of the first ten times as much."""
    targets = np.array([3, 0, 2, 45, 5])
    weights = {loss: [s.token_weight(3, 5) for s in global_batches(PLAN, targets, loss)] for loss in LOSSES}
    assert weights["run-token"] == [2 / 55, 2 / 55]
    assert weights["ave-token"] == [1 / 5, 1 / 50]
    assert np.mean([w * n for w, n in zip(weights["run-token"], (5, 50), strict=True)]) == pytest.approx(1)


def test_run_token_weighs_alike_what_is_planned_later():
    """A rest of one step with 9 loss tokens, in a run whose steps held 5 and 6: by itself it would count `1 / 9`."""
    rest = plan_of([(0, 0, 0, 1, 0, [0]), (0, 0, 1, 1, 0, [1])], np.array([9, 12], np.int32), 2)
    mean = MeanStep.of(PLAN, np.array([3, 0, 2, 5, 1]))
    (step,) = global_batches(rest, np.array([4, 5]), "run-token", mean)
    assert step.token_weight(4, 4) == 2 / (5 + 6)
    assert step.token_share == 1 / 10
    assert global_batches(rest, np.array([4, 5]), "ave-token", mean)[0].token_weight(4, 4) == 1 / 9


def test_router_losses_follow_the_loss():
    shares = {loss: [step.token_share for step in global_batches(PLAN, TARGETS, loss)] for loss in LOSSES}
    assert shares.pop("run-token") == [1 / 10, 1 / 10]
    assert all(share == [1 / 11, 1 / 9] for share in shares.values())


def test_ave_token_is_the_papers():
    """A rank's sum over the mean loss tokens a rank, averaged over ranks; a mean per rank is another number."""
    sums, counts = [30.0, 2.0, 0.0, 8.0], [10, 1, 0, 9]
    weight = GlobalBatch("ave-token", 40, sum(counts), 6).token_weight(3)
    papers = sum(s / (sum(counts) / 4) for s in sums) / 4
    assert sum(weight * s for s in sums) == pytest.approx(papers)
    assert sum(s / max(n, 1) for s, n in zip(sums, counts, strict=True)) / 4 != pytest.approx(papers, rel=0.05)


@pytest.mark.parametrize("loss", LOSSES)
def test_step_without_targets_divides_by_nothing(loss):
    assert GlobalBatch(loss, 4, 0, 0).token_weight(0) == 1


DOCUMENTS = random_samples([9, 1, 12], LLAMA["vocab_size"]).documents
STEP, ALONE = GlobalBatch("sum", 22, 0, 0), SequenceGroups()


def batch(documents, groups: SequenceGroups = ALONE, sp_rank: int = 0, row: int = 0) -> MicroBatch:
    mesh = ParallelMesh(None, made={groups.degree: groups})
    return micro_batch_of(documents, row, groups.degree, sp_rank, 0, mesh, CPU, STEP)


def router_part(model: CausalLMWithLoss, pack: MicroBatch) -> float:
    with torch.no_grad():
        with_routers = model(*pack.inputs)
        return float(with_routers - model(*pack.inputs[:-1], token_share=0.0))


@pytest.mark.parametrize("config", [QWEN3_MOE, DEEPSEEK_V2], ids=lambda c: c["model_type"])
def test_a_pack_costs_what_its_documents_do(tmp_path, config):
    model = load_model(write_model(tmp_path, config))
    packed = router_part(model, batch(DOCUMENTS))
    assert packed > 0.01
    assert packed == pytest.approx(sum(router_part(model, batch([d])) for d in DOCUMENTS), rel=1e-4)
    assert router_part(model, batch(DOCUMENTS[:1], row=IDLE)) == pytest.approx(0, abs=1e-6)  # an idle rank's pack


def test_off_unless_the_configuration_asks(tmp_path):
    quiet = {**QWEN3_MOE, "output_router_logits": False}
    assert RouterLoss(load_model(write_model(tmp_path / "quiet", quiet)).lm).coefficient == 0
    assert RouterLoss(load_model(write_model(tmp_path / "dense", LLAMA)).lm).coefficient == 0
    assert RouterLoss(load_model(write_model(tmp_path / "moe", QWEN3_MOE)).lm).coefficient == 0.1
    default = {k: v for k, v in DEEPSEEK_V2.items() if k != "aux_loss_alpha"}
    assert RouterLoss(load_model(write_model(tmp_path / "deepseek", default)).lm).coefficient == 0.001


@pytest.mark.parametrize("groups", [SequenceGroups(4), SequenceGroups(2, 2), SequenceGroups(1, 2)])
def test_tokens_know_their_document(groups):
    """Whatever slices a rank holds; filler belongs to no sample."""
    for sp_rank in range(groups.degree):
        pack = batch(DOCUMENTS, groups, sp_rank)
        document, counted = documents_of_tokens(pack.layout, CPU)
        ids = torch.cat([torch.from_numpy(ids) for ids, _ in DOCUMENTS])
        first = torch.tensor([0, 9, 10, 22])[document]
        place = first + pack.position_ids[0]
        assert counted.tolist() == (place < 22).tolist() == (document < 3).tolist()
        assert pack.input_ids[0][counted].tolist() == ids[place[counted]].tolist()

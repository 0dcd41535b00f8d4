"""Gradients under sequence parallelism are compared in ``tests/parallel/test_families.py``; here, one process."""

from __future__ import annotations

import pytest
import torch
from workers import CPU, DEEPSEEK_V2, LLAMA, QWEN3_MOE, random_samples, write_model

from hbp.parallel.mesh import ParallelMesh, SequenceGroups
from hbp.train.batch import IDLE, MicroBatch, micro_batch_of
from hbp.train.loss import GlobalBatch
from hbp.train.model import CausalLMWithLoss, load_model
from hbp.train.router_loss import RouterLoss, documents_of_tokens

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

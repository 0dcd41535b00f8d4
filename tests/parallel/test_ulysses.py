"""Training under any plan equals plain transformers on each document alone, in loss and in every gradient."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from workers import CPU, LLAMA, MISTRAL, Row, plan_of, random_samples, relative_error, run_ranks, write_model

from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.parallel.ulysses import PackLayout, ulysses_attention
from hbp.parallel.varlen import make_documents
from hbp.train import batch as batch_module
from hbp.train.batch import IDLE, make_micro_batch, rows_of_rank
from hbp.train.loop import step_loss_tokens
from hbp.train.loss import ave_token_scale
from hbp.train.model import load_model, shard
from hbp.train.profile import forward_backward

WORLD = 4
TOLERANCE = 1e-5
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL}
SAMPLES = random_samples([37, 5, 1, 50, 23, 11, 3, 19, 8, 29], LLAMA["vocab_size"])  # 8 is the window

PLANS: dict[str, list[Row]] = {
    "sp1": [
        (0, 0, 0, 1, 0, [0]),
        (0, 0, 1, 1, 0, [1, 2, 3]),
        (0, 0, 2, 1, 0, [4]),
        (0, 0, 3, 1, 0, [5, 6]),
        (0, 1, 0, 1, 0, [9]),
        (0, 1, 1, 1, 0, [8]),
        (0, 1, 2, 1, 0, [7]),
    ],
    "sp2": [(0, 0, 0, 2, 0, [0, 1, 2]), (0, 0, 2, 2, 0, [3, 4]), (0, 1, 0, 2, 0, [5, 6, 7]), (0, 1, 2, 2, 0, [8, 9])],
    "sp4": [(0, 0, 0, 4, 0, [9, 8, 7, 6, 5]), (0, 1, 0, 4, 0, [0, 1, 2]), (0, 2, 0, 4, 0, [3, 4])],
    "sp4 recomputed": [(0, 0, 0, 4, 3, [9, 8, 7, 6, 5, 2]), (0, 1, 0, 4, 1, [0, 1, 3, 4])],
    "mixed": [
        (0, 0, 0, 2, 1, [0, 7, 2]),  # 57 tokens over two ranks
        (0, 0, 2, 1, 3, [1, 6]),
        (0, 0, 3, 1, 0, [5]),
        (0, 1, 0, 4, 2, [3, 4]),
        (0, 2, 0, 1, 0, [8]),  # rank 1 idle
        (0, 2, 2, 2, 3, [9]),
    ],
}
LEAK = "sp2"
IN_ONE_PIECE = ("sp4 recomputed", "mixed")
"""Plans that also run without a shard for each layer."""

Run = tuple[Tensor, dict[str, Tensor]]
"""Loss and gradients by parameter name"""


def run_plans(
    rank: int, world: int, folders: dict[str, str]
) -> dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]:
    """Loss sum of this rank and full gradients of every plan, on the trainer's own path."""
    mesh = make_mesh(world, [1, 2, 4], "cpu")
    results = {}
    for model_name, folder in folders.items():
        models = {by_layer: load_model(folder) for by_layer in (True, False)}
        for by_layer, model in models.items():
            shard(model, mesh.world, by_layer=by_layer)

        def run(rows: list[Row], model=models[True]) -> Run:
            plan = plan_of(rows, SAMPLES.lengths, world)
            scale = ave_token_scale(int(step_loss_tokens(plan, SAMPLES.loss_tokens)[0]), world)
            loss = torch.zeros(())
            for row in rows_of_rank(plan, rank)[0]:
                loss += forward_backward(model, make_micro_batch(plan, row, SAMPLES, mesh, rank, CPU), scale)
            gradients = {name.removeprefix("lm."): p.grad.full_tensor().clone() for name, p in model.named_parameters()}
            model.zero_grad(set_to_none=True)
            return loss, gradients

        for name, rows in PLANS.items():
            results[model_name, name] = run(rows)
        for name in IN_ONE_PIECE:
            results[model_name, f"{name}, in one piece"] = run(PLANS[name], models[False])
        with mock.patch.object(batch_module, "make_documents", lambda n, device: make_documents((sum(n),), device)):
            results[model_name, "leak"] = run(PLANS[LEAK])
    return results


def reference(folder: str) -> Run:
    """Mean loss and its gradients: every document alone, transformers' eager attention, nothing of hbp."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    total, count = torch.zeros(()), 0
    for ids, mask in SAMPLES.documents:
        if mask[1:].any():
            tokens = torch.from_numpy(ids).long()
            picked = torch.from_numpy(mask[1:]).bool()
            logits = model(tokens[None]).logits[0, :-1]
            total = total + F.cross_entropy(logits[picked], tokens[1:][picked], reduction="sum")
            count += int(picked.sum())
    (total / count).backward()
    return total.detach() / count, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: write_model(Path(root, name), config) for name, config in CONFIGS.items()}
    ranks = run_ranks(run_plans, WORLD, folders)
    count = int(SAMPLES.loss_tokens.sum())
    return {name: reference(folder) for name, folder in folders.items()}, {
        key: (sum(rank[key][0] for rank in ranks) / count, ranks[0][key][1]) for key in ranks[0]
    }


def errors(runs, model: str, plan: str) -> dict[str, float]:
    (want_loss, want), (loss, gradients) = runs[0][model], runs[1][model, plan]
    assert gradients.keys() == want.keys()
    found = {name: relative_error(gradients[name], want[name]) for name in want}
    return {**found, "loss": relative_error(loss, want_loss)}


@pytest.mark.parametrize("plan", [*PLANS, *(f"{name}, in one piece" for name in IN_ONE_PIECE)])
@pytest.mark.parametrize("model", CONFIGS)
def test_plan_trains_as_documents_alone(runs, model, plan):
    found = errors(runs, model, plan)
    worst = max(found, key=found.__getitem__)
    print(f"{model} {plan}: {found[worst]:.1e} in {worst}")
    assert found[worst] < TOLERANCE, worst


@pytest.mark.parametrize("model", CONFIGS)
def test_documents_merged_into_one_are_seen(runs, model):
    """The tolerance means something: the leak of one document into the next is far above it, in every gradient."""
    found = errors(runs, model, "leak")
    assert found["loss"] > 1e-3
    assert min(found.values()) > 1e-3


def test_mixed_plan_covers_what_it_says():
    plan = plan_of(PLANS["mixed"], SAMPLES.lengths, WORLD)
    assert rows_of_rank(plan, 1)[0][2] == IDLE
    assert (plan.tokens() % plan.sp_degree).any()
    assert set(plan.sp_degree.tolist()) == {1, 2, 4}


def test_degree_that_does_not_divide_the_heads():
    layout = PackLayout(make_documents((6,), CPU), 3, mock.sentinel.group)
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    with pytest.raises(HbpError, match="degree 3 does not divide the model's 4 attention heads"):
        ulysses_attention(q, k, k, layout)

"""Training under any plan equals plain transformers on each document alone, in loss and in every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from plans import Row, plan_of
from torch import Tensor
from workers import CPU, FAMILIES, LLAMA, MISTRAL, QWEN3, random_samples, relative_error, run_ranks, write_model

from hbp.parallel.gather_kv import make_gather
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import make_documents
from hbp.train import batch as batch_module
from hbp.train.batch import IDLE, make_micro_batch, rows_of_rank
from hbp.train.loop import forward_backward
from hbp.train.loss import global_batches
from hbp.train.model import TRAINED_FAMILIES, load_model, shard

WORLD = 4
TOLERANCE = 1e-5
"""Of float32: largest difference over the largest entry."""
BFLOAT16_TOLERANCE = 1.5
"""Of bfloat16 compute over float32 states: distance of all gradients from the float32 reference, in multiples of the
distance of the unpacked model in bfloat16."""
FEW_HEADS = {  # degree 4 is Ulysses over 2 and gathered keys and values over 2; 3 heads: gathered over all 4
    "qwen3, 2 heads": {**QWEN3, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral, 3 heads": {**MISTRAL, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
}
CONFIGS = {**FAMILIES, **FEW_HEADS}
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
MIXED = "mixed"
IN_ONE_PIECE = {"llama": ("sp4 recomputed", MIXED), "deepseek_v2": (MIXED,)}
"""Plans that also run without a shard for each layer."""

Run = tuple[Tensor, dict[str, Tensor]]
"""Loss and gradients by parameter name"""


def run_plans(rank: int, world: int, folders: dict[str, str]) -> dict[tuple[str, str], Run]:
    """Loss of this rank and full gradients of every plan, on the trainer's own path."""
    results = {}
    for model_name, folder in folders.items():
        mesh = make_mesh(world, [1, 2, 4], "cpu", CONFIGS[model_name]["num_attention_heads"])

        def sharded(folder=folder, mesh=mesh, **options: Any):
            model = load_model(folder)
            shard(model, mesh.world, **options)
            return model

        def run(model, rows: list[Row], mesh=mesh) -> Run:
            plan = plan_of(rows, SAMPLES.lengths, world)
            step = global_batches(plan, SAMPLES.loss_tokens)[0]
            loss = torch.zeros(())
            for row in rows_of_rank(plan, rank)[0]:
                loss += forward_backward(model, make_micro_batch(plan, row, SAMPLES, mesh, rank, CPU, step), world)
            gradients = {name.removeprefix("lm."): p.grad.full_tensor().clone() for name, p in model.named_parameters()}
            model.zero_grad(set_to_none=True)
            return loss, gradients

        model = sharded()
        for name, rows in PLANS.items():
            results[model_name, name] = run(model, rows)
        with (
            mock.patch.object(batch_module, "make_documents", lambda n, device: make_documents((sum(n),), device)),
            mock.patch.object(batch_module, "make_gather", lambda n, *args: make_gather([sum(n)], *args)),
        ):
            results[model_name, "leak"] = run(model, PLANS[LEAK])
        half, seen = sharded(compute_dtype=torch.bfloat16), set()
        for module in half.modules():
            if type(module).__name__.endswith("DeepseekV2TopkRouter"):
                module.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.add(module.weight.dtype))
        results[model_name, "bfloat16"] = run(half, PLANS[MIXED])
        assert seen == ({torch.float32} if model_name == "deepseek_v2" else set())  # as transformers keeps them
        for name in IN_ONE_PIECE.get(model_name, ()):
            results[model_name, f"{name}, in one piece"] = run(sharded(by_layer=False), PLANS[name])
    return results


def reference(folder: str, dtype: torch.dtype = torch.float32) -> Run:
    """Mean loss and its gradients: every document alone, transformers' eager attention, nothing of hbp."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager)
    routed: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if type(module).__name__ == "DeepseekV2TopkRouter":
            module.register_forward_hook(lambda module, inputs, output: routed.append(output))
    total, count, tokens = torch.zeros(()), int(SAMPLES.loss_tokens.sum()), int(SAMPLES.lengths.sum())
    for ids, mask in SAMPLES.documents:
        sample = torch.from_numpy(ids).long()
        picked = torch.from_numpy(mask[1:]).bool()
        routed.clear()
        out = model(sample[None])
        logits = out.logits[0, :-1].float()
        total = total + F.cross_entropy(logits[picked], sample[1:][picked], reduction="sum") / count
        if model.config.model_type == "qwen3_moe":  # transformers' own
            total = total + model.config.router_aux_loss_coef * out.aux_loss * len(ids) / tokens
        for scores, _, choice in routed:
            total = total + model.config.aux_loss_alpha * deepseek_balance(scores, choice) * len(ids) / tokens
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters()}


def deepseek_balance(logits: Tensor, choice: Tensor) -> Tensor:
    """DeepSeek-V2's balance loss of a sequence and layer, without its factor."""
    tokens, experts = logits.shape
    chosen = F.one_hot(choice, experts).float().sum(dim=(0, 1)) * experts / (choice.size(1) * tokens)
    return (chosen * logits.softmax(-1).mean(0)).sum()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: write_model(Path(root, name), config) for name, config in CONFIGS.items()}
    ranks = run_ranks(run_plans, WORLD, folders, timeout=400)
    references = {name: reference(folder) for name, folder in folders.items()}
    references |= {f"{name}, bfloat16": reference(folder, torch.bfloat16) for name, folder in folders.items()}
    return references, {key: (sum(rank[key][0] for rank in ranks), ranks[0][key][1]) for key in ranks[0]}


def errors(runs, model: str, plan: str) -> dict[str, float]:
    (want_loss, want), (loss, gradients) = runs[0][model], runs[1][model, plan]
    assert gradients.keys() == want.keys()
    found = {name: relative_error(gradients[name], want[name]) for name in want}
    return {**found, "loss": relative_error(loss, want_loss)}


def check(runs, model: str, plan: str) -> None:
    found = errors(runs, model, plan)
    worst = max(found, key=found.__getitem__)
    print(f"{model} {plan}: {found[worst]:.1e} in {worst}")
    assert found[worst] < TOLERANCE, worst


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("model", CONFIGS)
def test_plan_trains_as_documents_alone(runs, model, plan):
    check(runs, model, plan)


@pytest.mark.parametrize(("model", "plan"), [(model, plan) for model, plans in IN_ONE_PIECE.items() for plan in plans])
def test_sharded_in_one_piece(runs, model, plan):
    check(runs, model, f"{plan}, in one piece")


@pytest.mark.parametrize("model", CONFIGS)
def test_documents_merged_into_one_are_seen(runs, model):
    """The tolerance means something: the leak of one document into the next is far above it, in every gradient."""
    found = errors(runs, model, "leak")
    assert found["loss"] > 1e-3
    assert min(found.values()) > 1e-3


def distance(got: Run, want: Run) -> float:
    """Of all gradients: norm of the difference over the norm."""
    a, b = (torch.cat([run[1][name].float().flatten() for name in sorted(want[1])]) for run in (got, want))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("model", CONFIGS)
def test_bfloat16(runs, model):
    """Computed in bfloat16, gradients stay float32 and no farther from the truth than the unpacked model's."""
    want, unpacked, got = runs[0][model], runs[0][f"{model}, bfloat16"], runs[1][model, "bfloat16"]
    assert all(g.dtype == torch.float32 for g in got[1].values())
    ours, theirs = distance(got, want), distance(unpacked, want)
    print(f"{model} bfloat16: {ours:.1e}, unpacked {theirs:.1e}")
    assert ours < BFLOAT16_TOLERANCE * theirs
    assert float(got[0]) == pytest.approx(float(want[0]), rel=0.01)


def test_mixed_plan_covers_what_it_says():
    plan = plan_of(PLANS[MIXED], SAMPLES.lengths, WORLD)
    assert rows_of_rank(plan, 1)[0][2] == IDLE
    assert (plan.tokens() % plan.sp_degree).any()
    assert set(plan.sp_degree.tolist()) == {1, 2, 4}


def test_every_trained_family_is_here():
    assert set(FAMILIES) == set(TRAINED_FAMILIES)

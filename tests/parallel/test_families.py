"""Training under any plan equals plain transformers on each document alone, in loss and in every gradient.

Every proven family passes `hbp check` here, all of them in one start of four processes; what is checked besides are
settings that the check does not vary, and that its bounds mean something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from workers import LLAMA, MISTRAL, QWEN3

from hbp.cost.dimensions import FAMILIES
from hbp.cost.known_models import KNOWN_MODELS
from hbp.parallel.gather_kv import make_gather
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import make_documents
from hbp.train import batch as batch_module
from hbp.train.check.compare import TOLERANCE, findings, model_config, write_pairs
from hbp.train.check.families import PROVEN_FAMILIES
from hbp.train.check.properties import (
    CPU,
    MIXED,
    NAMES,
    PROPERTIES,
    WORLD,
    RankRun,
    documents,
    put_together,
    run_plan,
    run_properties,
)
from hbp.train.check.ranks import run_ranks
from hbp.train.check.reference import Run, alone, worst
from hbp.train.check.tiny import write_tiny
from hbp.train.model import load_sharded, read_config

BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1, "aux_loss_alpha": 0.1}
"""Router losses, where the family has them"""
MODELS = {name: {} for name in ("llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "gemma-2-2b", "gemma-3-1b")}
MODELS |= {name: {} for name in ("phi-3-mini", "phi-4", "olmo-2-7b", "smollm3-3b", "glm-4-9b", "granite-3.3-8b")}
MODELS |= dict.fromkeys(("qwen3-30b-a3b", "deepseek-v2-236b", "gpt-oss-20b", "mixtral-8x7b"), BALANCED)
MODELS |= {"qwen1.5-moe-a2.7b": BALANCED, "deepseek-v3-671b": {}}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral"},
    "glm": {"model_type": "glm"},
    "qwen2, windows in later layers": {
        **KNOWN_MODELS["qwen2.5-7b"],
        "use_sliding_window": True,
        "sliding_window": 4096,
        "max_window_layers": 2,
    },
    "deepseek_v2, groups of experts": {
        **KNOWN_MODELS["deepseek-v2-236b"],
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
    },
    "qwen3_moe, a dense layer": {**KNOWN_MODELS["qwen3-30b-a3b"], "mlp_only_layers": [0]},
}
FEW_HEADS = {
    "qwen3, 2 heads": {**QWEN3, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral, 3 heads": {**MISTRAL, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
}
"""Degree 4 is Ulysses over 2 and gathered keys and values over 2; with 3 heads, gathered over all 4"""
IN_ONE_PIECE = ("llama-3.1-8b", "deepseek-v2-236b")
LEAK = ("llama-3.1-8b", "gpt-oss-20b")


def configs() -> dict[str, Any]:
    from transformers import AutoConfig

    found = {name: model_config(name) for name in MODELS}
    for name, settings in MODELS.items():
        for key, value in settings.items():
            setattr(found[name], key, value)
    return found | {
        name: AutoConfig.for_model(given["model_type"], **{k: v for k, v in given.items() if k != "model_type"})
        for name, given in OTHERS.items()
    }


def run_all(
    rank: int, world: int, pairs: dict[str, tuple[str, str]], few: dict[str, str]
) -> dict[tuple[str, str], RankRun | str]:
    results = run_properties(rank, world, pairs)

    def run(folder: str, plan: Any, **options: Any) -> RankRun:
        mesh = make_mesh(world, [1, 2, 4], "cpu", read_config(folder).num_attention_heads)
        return run_plan(load_sharded(folder, mesh.world, CPU, **options), mesh, rank, plan, documents())

    for name in IN_ONE_PIECE:
        results[name, "in one piece"] = run(pairs[name][0], MIXED, by_layer=False)
    for name, folder in few.items():
        results[name, "mixed"] = run(folder, MIXED)
    with (
        mock.patch.object(batch_module, "make_documents", lambda n, device: make_documents((sum(n),), device)),
        mock.patch.object(batch_module, "make_gather", lambda n, *args: make_gather([sum(n)], *args)),
    ):
        for name in LEAK:
            results[name, "leak"] = run(pairs[name][0], PROPERTIES[NAMES.index("SP 2")].plan)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pairs = write_pairs(configs(), root)
    few = {name: write_tiny(Path(root, name), config) for name, config in FEW_HEADS.items()}
    return pairs, few, run_ranks(run_all, WORLD, pairs, few, timeout=600)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_family_passes_its_check(runs, name):
    pairs, _, ranks = runs
    found = findings(name, pairs[name], ranks)
    assert [each.property for each in found] == list(NAMES)
    for each in found:
        print(f"{name}, {each.property}: {each.error} in {each.where}")
        assert each.holds, each


def of(runs, name: str, key: str, folder: str) -> tuple[Run, Run]:
    """A run and its reference."""
    return put_together([rank[name, key] for rank in runs[2]]), alone(folder, documents())


@pytest.mark.parametrize("name", IN_ONE_PIECE)
def test_sharded_in_one_piece(runs, name):
    error, where = worst(*of(runs, name, "in one piece", runs[0][name][0]))
    assert error < TOLERANCE, where


@pytest.mark.parametrize("name", FEW_HEADS)
def test_degrees_beyond_two_and_three_heads(runs, name):
    error, where = worst(*of(runs, name, "mixed", runs[1][name]))
    assert error < TOLERANCE, where


@pytest.mark.parametrize("name", LEAK)
def test_documents_merged_into_one_are_seen(runs, name):
    """The bounds mean something: the leak of one document into the next is far above them, in every gradient."""
    got, want = of(runs, name, "leak", runs[0][name][0])
    assert abs(float(got[0] / want[0]) - 1) > 100 * TOLERANCE
    for key, gradient in want[1].items():
        assert float((got[1][key] - gradient).abs().max() / gradient.abs().max()) > 100 * TOLERANCE, key


def test_routers_of_deepseek_stay_in_float32(runs):
    """As transformers keeps them, whatever the others are gathered in."""
    folder, seen = runs[0]["deepseek-v2-236b"][0], set()
    (dtypes,) = run_ranks(router_dtypes, 1, folder)
    seen |= dtypes
    assert seen == {torch.float32}


def router_dtypes(rank: int, world: int, folder: str) -> set[torch.dtype]:
    mesh, seen = make_mesh(world, [1], "cpu", 4), set[torch.dtype]()
    model = load_sharded(folder, mesh.world, CPU, compute_dtype=torch.bfloat16)
    for module in model.modules():
        if type(module).__name__.endswith("DeepseekV2TopkRouter"):
            module.register_forward_pre_hook(lambda module, inputs: seen.add(module.weight.dtype))
    run_plan(model, mesh, rank, [[(0, 1, 0, [0])]], documents())
    return seen


def test_every_proven_family_is_here_and_in_the_cost_model():
    here = {model_config(name).model_type for name in MODELS} | {given["model_type"] for given in OTHERS.values()}
    assert here == set(PROVEN_FAMILIES) == set(FAMILIES)
    assert LLAMA["model_type"] in here

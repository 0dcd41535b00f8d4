from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import config_of, run_here, write_job
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import distribute_tensor
from workers import CPU, LLAMA, QWEN3_MOE, random_samples, relative_error, run_ranks, write_config, write_model

from hbp.config import Config, LoraConfig
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.run.engine import make_engine
from hbp.train.batch import micro_batch_of
from hbp.train.check.compare import model_config
from hbp.train.check.tiny import tiny_config, write_tiny
from hbp.train.checkpoint import list_checkpoints
from hbp.train.export import export_model
from hbp.train.loop import forward_backward
from hbp.train.lora import add_adapters, has_adapters
from hbp.train.model import load_model, load_sharded, meta_model, shard

pytest.importorskip("peft")
CONFIG = LoraConfig(rank=4, alpha=8)
DOCUMENTS = random_samples([9, 4, 12, 7], LLAMA["vocab_size"]).documents


def gradients(rank: int, world: int, folder: str, gc_layers: int) -> dict[str, torch.Tensor]:
    """Of the adapters, for one pack over all ranks."""
    mesh = make_mesh(world, [1, world], "cpu")
    model = load_model(folder)
    add_adapters(model, CONFIG, folder, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # they start at zero, which hides the gradients of A
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    shard(model, mesh.world)
    # FSDP means over ranks, as the loss's scale knows.
    forward_backward(model, micro_batch_of(DOCUMENTS, 0, world, rank, gc_layers, mesh, CPU), float(world))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert frozen == []
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("gc_layers", [0, 2])
def test_adapters_gradients_under_sequence_parallelism(tmp_path, gc_layers):
    folder = write_model(tmp_path, LLAMA)
    (want,) = run_ranks(gradients, 1, folder, 0)
    for got in run_ranks(gradients, 2, folder, gc_layers):
        assert got.keys() == want.keys()
        assert len(want) == 2 * 7 * LLAMA["num_hidden_layers"]  # A and B of every linear layer but the head
        for name, gradient in want.items():
            assert float(gradient.abs().max()) > 0
            assert relative_error(got[name], gradient) < 1e-5, name


def test_adapters_alone_are_trained_saved_and_exported(tmp_path):
    """Stopped, resumed with dropout's random state, exported: what peft loads is the base with what was trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = {"lora": {"rank": 4, "dropout": 0.2}}
    job = write_job(tmp_path, samples=60, **options)
    base = write_model(job / "model", {**LLAMA, "vocab_size": 320})
    whole, stopped = (config_of(job, f"run_dir={job / name}") for name in ("whole", "stopped"))
    run_ranks(run_here, 2, whole)
    run_ranks(run_here, 2, stopped, 3)
    (checkpoint, *_) = list_checkpoints(job / "stopped" / "hbp" / "checkpoints")
    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    assert all("lora_" in name for name in saved if name.startswith(("model.", "optimizer.state.")))
    run_ranks(run_here, 2, stopped)
    exported = job / "whole" / "hbp" / "model"
    mine, again = (load_file(f / "adapter_model.safetensors") for f in (exported, job / "stopped" / "hbp" / "model"))
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert all("lora_" in name for name in mine)
    assert not (exported / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), exported)
    values = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert len(values) == len(mine)
    for name, parameter in values.items():
        assert torch.equal(parameter, mine[name.replace(".default.", ".")])
    assert any(float(p.abs().max()) > 0 for name, p in values.items() if "lora_B" in name)


ADAPTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "one name as text": ("llama-3.1-8b", {}, {"targets": "q_proj"}),
    "an expression": ("llama-3.1-8b", {}, {"targets": r"model\.layers\.0\..*_proj"}),
    "embedding and head": ("llama-3.1-8b", {}, {"targets": ("embed_tokens", "lm_head", "q_proj")}),
    "a tied head": ("llama-3.2-1b", {}, {"targets": ("lm_head", "q_proj")}),
    "a scaled embedding": ("gemma-2-2b", {}, {"targets": ("embed_tokens", "v_proj")}),
    "a head trained whole": ("llama-3.1-8b", {}, {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}),
    "a tied head trained whole": ("llama-3.2-1b", {}, {"targets": ("q_proj",), "modules_to_save": ("lm_head",)}),
    "both of a tied pair trained whole": (
        "llama-3.2-1b",
        {},
        {"targets": ("q_proj",), "modules_to_save": ("lm_head", "embed_tokens")},
    ),
    "DoRA on a tied head": ("llama-3.2-1b", {}, {"targets": ("lm_head", "q_proj"), "dora": True}),
    "all biases, rsLoRA": ("qwen2.5-7b", {}, {"targets": ("q_proj",), "bias": "all", "rslora": True}),
    "biases of adapted layers": ("qwen2.5-7b", {}, {"targets": ("q_proj",), "bias": "lora_only"}),
    "DoRA": ("llama-3.1-8b", {}, {"dora": True}),
    "experts and a dense layer": ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, {}),
    "experts and shared ones": ("deepseek-v2-236b", {}, {}),
    "experts with biases": ("gpt-oss-20b", {}, {}),
    "experts of old names": ("mixtral-8x7b", {}, {"targets": ("w1", "w2", "w3")}),
    "experts alone": ("gpt-oss-20b", {}, {"targets": "experts"}),
    "a matrix of the experts": ("qwen3-30b-a3b", {}, {"targets": ("experts.down_proj", "q_proj")}),
}
"""Model, changes to it, section `lora`"""
TRAINED = {
    "embedding and head": {"embed_tokens", "lm_head", "q_proj"},
    "experts and a dense layer": {"q_proj", "gate", "experts", "gate_proj", "up_proj", "down_proj"},
    "experts and shared ones": {"kv_a_proj_with_mqa", "gate", "experts", "gate_proj", "up_proj", "down_proj"},
    "experts with biases": {"q_proj", "k_proj", "v_proj", "o_proj", "experts"},
    "experts of old names": {"experts"},
    "experts alone": {"experts"},
    "a matrix of the experts": {"experts", "q_proj"},
}
"""Modules that have adapters, among others in those of experts and more"""


def adapted(
    rank: int, world: int, cases: dict[str, tuple[str, LoraConfig, str]]
) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss and the adapters' gradients of each case, whose values are drawn anew and exported."""
    mesh, found = make_mesh(world, [1, world], "cpu", 4), {}
    for name, (folder, config, out) in cases.items():
        adapt = partial(add_adapters, config=config, base=folder, seed=0)
        model = load_sharded(folder, mesh.world, CPU, adapt=adapt)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" in key:
                    drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
                    full = parameter.full_tensor() + drawn
                    parameter.copy_(distribute_tensor(full, mesh.world, parameter.placements))
        batch = micro_batch_of(DOCUMENTS, 0, world, rank, 1, mesh, CPU)
        loss = forward_backward(model, batch, float(world))
        gradients = {n: p.grad.full_tensor() for n, p in model.lm.named_parameters() if p.grad is not None}
        assert gradients.keys() == {n for n, p in model.lm.named_parameters() if p.requires_grad}
        export_model(model, Path(out))
        found[name] = (loss, gradients)
    return found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    cases = {}
    for number, (name, (model, changes, section)) in enumerate(ADAPTED.items()):
        config = model_config(model)
        for key, value in changes.items():
            setattr(config, key, value)
        folder = write_tiny(root / f"{number}", tiny_config(config))
        cases[name] = (folder, LoraConfig(rank=2, alpha=4, **section), str(root / f"{number}-out"))
    return cases, run_ranks(adapted, 2, cases)


@pytest.mark.parametrize("name", ADAPTED)
def test_what_is_trained_is_what_peft_loads(adapters, name, monkeypatch, tmp_path):
    """`peft` on one process, from the exported folder alone: the same loss, the same gradients of the same adapters."""
    from peft import AutoPeftModelForCausalLM

    cases, ranks = adapters
    monkeypatch.chdir(tmp_path)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "is_trainable": True}
    model = AutoPeftModelForCausalLM.from_pretrained(cases[name][2], **options)
    total = torch.zeros(())
    for ids, mask in DOCUMENTS:
        sample, picked = torch.from_numpy(ids).long(), torch.from_numpy(mask[1:]).bool()
        logits = model(sample[None]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits[picked], sample[1:][picked], reduction="sum")
    total.backward()
    want = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert float(sum(rank[name][0] for rank in ranks)) == pytest.approx(float(total), rel=1e-5)
    got = ranks[0][name][1]
    assert got.keys() == want.keys()
    for key, gradient in want.items():
        assert relative_error(got[key], gradient) < 1e-5, key
    if name in TRAINED:
        modules = {key.split(".lora_")[0].replace(".base_layer", "").rpartition(".")[2] for key in got}
        assert TRAINED[name] <= modules
        assert TRAINED[name] == modules or name.startswith("experts and") or name == "embedding and head"


REFUSED = {
    "lora.targets='nothing_like_this': no layer has that name; give all-linear or some of": {
        "targets": "nothing_like_this"
    },
    "lora.targets='nope': no layer has that name": {"targets": ("q_proj", "nope")},
    "lora.modules_to_save='nope': no module has that name": {"modules_to_save": ("nope",)},
    "lora.dora is not possible on embeddings": {"targets": ("embed_tokens",), "dora": True},
}
REFUSED_FOR_EXPERTS = {
    "lora.dropout=0.1 is not possible on stacked experts; set it to 0, or give lora.targets": {"dropout": 0.1},
    "lora.dora is not possible on stacked experts": {"dora": True},
}


@pytest.mark.parametrize("message", [*REFUSED, *REFUSED_FOR_EXPERTS])
def test_what_cannot_be(tmp_path, message):
    experts = message in REFUSED_FOR_EXPERTS
    model = meta_model(write_config(tmp_path, QWEN3_MOE if experts else LLAMA))
    assert not has_adapters(model)
    options = (REFUSED_FOR_EXPERTS if experts else REFUSED)[message]
    with pytest.raises(HbpError, match=re.escape(message)) as error:
        add_adapters(model, LoraConfig(rank=2, **options), "base", 0)
    assert "\n" not in str(error.value)


def test_the_base_is_found_from_another_folder(tmp_path, monkeypatch):
    write_config(tmp_path / "model", LLAMA)
    monkeypatch.chdir(tmp_path)
    for base, named in (("model", str(tmp_path / "model")), ("lab/model-on-the-hub", "lab/model-on-the-hub")):
        model = meta_model("model")
        add_adapters(model, CONFIG, base, 0)
        assert model.lm.peft_config["default"].base_model_name_or_path == named


def stack_of_two(rank: int, world: int, config: Config) -> tuple[int, int, list[str]]:
    """Trained parameters of a stack of two layers, predicted and there, and the trained ones without adapters."""
    engine = make_engine(config, CPU)
    model = engine.stack(2)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strangers = [name for name in trained if "lora_" not in name]
    return engine.cost.model.with_layers(2).adapter_parameters, sum(trained.values()), strangers


def test_a_profiles_stack_has_the_adapters_that_are_predicted(tmp_path):
    job = write_job(tmp_path, samples=60, lora={"rank": 4})
    write_model(job / "model", {**LLAMA, "vocab_size": 320})
    ((predicted, there, strangers),) = run_ranks(stack_of_two, 1, config_of(job))
    assert predicted == there > 0
    assert strangers == []

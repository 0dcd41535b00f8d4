from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from workers import CPU, DEEPSEEK_V2, LLAMA, MISTRAL, QWEN3_MOE, random_samples, write_config, write_model

from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh
from hbp.train import model as model_module
from hbp.train.batch import MicroBatch, micro_batch_of
from hbp.train.loop import forward_backward
from hbp.train.model import (
    compile_layers,
    is_parameter,
    load_model,
    local_parameter_bytes,
    offloaded_activations,
    set_gc_layers,
)

N_LAYERS = LLAMA["num_hidden_layers"]


def batch(gc_layers: int) -> MicroBatch:
    documents = random_samples([9, 4, 12], LLAMA["vocab_size"]).documents
    return micro_batch_of(documents, 0, 1, 0, gc_layers, ParallelMesh(None), CPU)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN3_MOE, DEEPSEEK_V2], ids=lambda c: c["model_type"])
def test_recomputation_of_k_layers(tmp_path, config):
    """Exactly the first k layers run their forward twice; loss and gradients stay the same."""
    model = load_model(write_model(tmp_path, config))
    runs = [0] * N_LAYERS

    def count(layer: int):
        def hook(*_):
            runs[layer] += 1

        return hook

    for index, layer in enumerate(model.layers):
        layer.mlp.register_forward_pre_hook(count(index))  # recomputation stops early: no forward hook
    want = None
    for k in [0, 2, N_LAYERS, 1]:
        runs[:] = [0] * N_LAYERS
        loss = forward_backward(model, batch(k), 0.1)
        assert sum(layer.gradient_checkpointing for layer in model.layers) == k
        assert runs == [2] * k + [1] * (N_LAYERS - k)
        got = {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}
        want = want or got
        torch.testing.assert_close(got, want)
        model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("count", [-1, N_LAYERS + 1])
def test_more_recomputed_layers_than_there_are(tmp_path, count):
    model = load_model(write_config(tmp_path, LLAMA))
    with pytest.raises(HbpError, match=f"recomputes {count} layers but the model has 3"):
        set_gc_layers(model, count)


def test_fresh_weights_follow_the_seed_alone(tmp_path):
    path = write_config(tmp_path, LLAMA)
    first = load_model(path, seed=1).state_dict()
    torch.rand(3)  # the caller's random state does not matter,
    state = torch.get_rng_state()
    second = load_model(f"{path}/config.json", seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # and is left alone
    other = load_model(path, seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm.model.embed_tokens.weight"], other["lm.model.embed_tokens.weight"])


def test_folder_with_weights_loads_them(tmp_path):
    from safetensors.torch import load_file

    saved = load_file(f"{write_model(tmp_path, MISTRAL)}/model.safetensors")
    model = load_model(str(tmp_path))
    loaded = dict(model.lm.named_parameters())
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert local_parameter_bytes(model) == sum(x.numel() * 4 for x in saved.values())


def test_vocabulary(tmp_path):
    fresh = load_model(write_config(tmp_path / "fresh", LLAMA), vocab_size=100)
    assert fresh.lm.get_input_embeddings().weight.shape[0] == 100
    folder = write_model(tmp_path / "saved", LLAMA)
    assert load_model(folder, vocab_size=60).lm.config.vocab_size == 64
    with pytest.raises(HbpError, match=r"tokenizer.s ids go up to 64 but .* embeds 64 \(ids up to 63\)"):
        load_model(folder, vocab_size=65)


def test_nothing_to_load(tmp_path):
    with pytest.raises(HbpError, match="cannot load a model from") as error:
        load_model(str(tmp_path / "missing"))
    assert "\n" not in str(error.value)


REFUSED = {
    "qwen3_next models have linear_attention layers, whose state would run": {"model_type": "qwen3_next"},
    "gemma3 models take more than text; give .* of their text model .gemma3_text. alone": {"model_type": "gemma3"},
    "attn_pdrop is 0.1; set it to 0": {"model_type": "gpt2"},
    "rotary embedding is 'dynamic', which depends on": {
        **LLAMA,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    },
    "attention_dropout is 0.1; set it to 0": {**LLAMA, "attention_dropout": 0.1},
    "is quantized .fp8.*give its weights in bfloat16": {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(tmp_path, message):
    with pytest.raises(HbpError, match=message) as error:
        load_model(write_config(tmp_path, REFUSED[message]))
    assert "\n" not in str(error.value)


PACKS = [([9, 4, 12], 0), ([5, 31], 2), ([7, 2], 0), ([3, 3, 8, 40], 2)]
"""Lengths and recomputed layers"""


def test_compiled_layers_train_alike(tmp_path):
    """Layers are compiled around an attention that is not, and no more often for packs of other lengths."""
    path, results, graphs = write_model(tmp_path, LLAMA), [], []
    torch.compiler.reset()

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(len(results))
        return graph

    for compiled in (False, True):
        model = load_model(path)
        if compiled:
            compile_layers(model, backend=count)
        for lengths, gc_layers in PACKS:
            documents = random_samples(lengths, LLAMA["vocab_size"]).documents
            pack = micro_batch_of(documents, 0, 1, 0, gc_layers, ParallelMesh(None), CPU)
            loss = forward_backward(model, pack, 0.1)
            results.append({"loss": loss, **{name: p.grad.clone() for name, p in model.named_parameters()}})
            model.zero_grad()
    for want, got in zip(results[: len(PACKS)], results[len(PACKS) :], strict=True):
        torch.testing.assert_close(got, want)
    assert len(PACKS) in graphs  # the first pack compiled something,
    assert max(graphs) < len(PACKS) + 2  # the third and fourth nothing


def test_parameters_and_small_tensors_stay():
    x, linear = torch.randn(64, 8, requires_grad=True), torch.nn.Linear(8, 16, bias=False)
    hooks = offloaded_activations(small_bytes=1024)
    moved: list[bool] = []

    def pack(tensor: torch.Tensor) -> model_module.Kept:
        kept = hooks.pack_hook(tensor)
        moved.append(kept.tensor.data_ptr() != tensor.data_ptr())
        assert moved[-1] == (not is_parameter(tensor) and tensor.nbytes >= 1024)
        return kept

    with saved_tensors_hooks(pack, hooks.unpack_hook):
        loss = linear(x).sigmoid()[:4].square().sum()
    assert set(moved) == {True, False}
    got = torch.autograd.grad(loss, (x, linear.weight))
    want = torch.autograd.grad(linear(x).sigmoid()[:4].square().sum(), (x, linear.weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("gc_layers", [0, 2, 3])
def test_offloaded_training_is_the_same_to_the_bit(tmp_path, monkeypatch, gc_layers):
    monkeypatch.setattr(model_module, "SMALL_BYTES", 0)
    monkeypatch.setattr(model_module.offloaded_activations, "__defaults__", (0,))
    model = load_model(write_model(tmp_path, LLAMA))
    documents = random_samples([9, 4, 12], LLAMA["vocab_size"]).documents
    batch = micro_batch_of(documents, 0, 1, 0, gc_layers, ParallelMesh(None), CPU)
    runs = []
    for model.offload_activations in (False, True):
        loss = forward_backward(model, batch)
        runs.append([loss, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

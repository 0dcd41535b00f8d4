"""A checkpoint read shard by shard is the one that `from_pretrained` loads, and no rank ever holds the whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from workers import CPU, DEEPSEEK_V2, LLAMA, QWEN2, QWEN3_MOE, random_samples, run_ranks, write_config, write_model

from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.train.batch import micro_batch_of
from hbp.train.loop import forward_backward
from hbp.train.model import CausalLMWithLoss, load_model, load_sharded, local_parameter_bytes, shard
from hbp.train.weights import stored

WORLD = 3  # divides neither the rows nor the experts
FEW_EXPERTS = "fewer experts than ranks"
CONFIGS = {
    "tied": LLAMA,
    "biases, llama3 rope": {
        **QWEN2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "experts one by one": QWEN3_MOE,
    "latent attention": DEEPSEEK_V2,
    FEW_EXPERTS: {
        **QWEN3_MOE,
        "hidden_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
}


def peak_bytes(run: Callable[[], object], folder: str) -> int:
    """The most memory that was given out at once; mapping a file of `folder`, which is an event too, gives out none."""
    mapped = {path.stat().st_size for path in Path(folder).glob("*.safetensors")}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if abs(event.nbytes()) not in mapped]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def load_both(rank: int, world: int, folders: dict[str, str]) -> dict[str, dict[str, object]]:
    mesh, found = make_mesh(world, [], "cpu"), {}
    documents = random_samples([9, 4, 12], LLAMA["vocab_size"], rank).documents
    for name, folder in folders.items():
        kept: list[CausalLMWithLoss] = []
        peak = peak_bytes(lambda folder=folder, kept=kept: kept.append(load_sharded(folder, mesh.world, CPU)), folder)
        (sharded,) = kept
        whole = load_model(folder)
        bytes_of_model = local_parameter_bytes(whole)
        shard(whole, mesh.world)
        runs = []
        for model in (sharded, whole):
            batch = micro_batch_of(documents, 0, 1, 0, 1, mesh, CPU)
            loss = forward_backward(model, batch)
            runs.append([loss, *(p.grad.to_local() for p in model.parameters())])
        names = [[n for n, _ in model.named_parameters()] for model in (sharded, whole)]
        parameters = zip(sharded.parameters(), whole.parameters(), strict=True)
        buffers = zip(sharded.named_buffers(), whole.named_buffers(), strict=True)
        found[name] = {
            "names": names[0] == names[1],
            "parameters": all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in parameters),
            "buffers": all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in buffers),
            "generation": sharded.lm.generation_config.to_dict() == whole.lm.generation_config.to_dict(),
            "training": all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
            "shards": local_parameter_bytes(sharded),
            "peak": peak,
            "whole": bytes_of_model,
        }
    return found


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {name: write_model(Path(root, name), config) for name, config in CONFIGS.items()}
    folders["several files"] = split_in_files(write_model(root / "split", LLAMA), 3)
    Path(folders["tied"], "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    folders["bfloat16"] = in_bfloat16(write_model(root / "half", LLAMA))
    return run_ranks(load_both, WORLD, folders)


def split_in_files(folder: str, count: int) -> str:
    path = Path(folder, "model.safetensors")
    tensors, files = load_file(path), [f"model-{i}.safetensors" for i in range(count)]
    places = {name: files[i % count] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if places[name] == file}, Path(folder, file))
    path.unlink()
    Path(folder, stored.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def in_bfloat16(folder: str) -> str:
    path = Path(folder, "model.safetensors")
    save_file({name: x.bfloat16() for name, x in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", [*CONFIGS, "several files", "bfloat16"])
def test_equals_from_pretrained(loaded, name):
    for found in (rank[name] for rank in loaded):
        assert found["names"]
        assert found["parameters"]
        assert found["buffers"]
        assert found["training"]
        assert found["generation"]


@pytest.mark.parametrize("name", [*CONFIGS, "several files", "bfloat16"])
def test_no_rank_holds_the_whole(loaded, name):
    ranks = [rank[name] for rank in loaded]
    whole = ranks[0]["whole"]
    assert sum(rank["shards"] for rank in ranks) == whole
    assert max(rank["shards"] for rank in ranks) < 1.15 * whole / WORLD  # nobody much more than his share
    for rank in ranks:
        assert rank["shards"] <= rank["peak"] < rank["shards"] + whole / WORLD  # a slice at a time is converted
        assert rank["peak"] < 0.75 * whole


def change(folder: str, edit) -> None:
    path = Path(folder, "model.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def failing(rank: int, world: int, folders: list[str]) -> list[str]:
    mesh, messages = make_mesh(world, [], "cpu"), []
    for folder in folders:
        with pytest.raises(HbpError) as error:
            load_sharded(folder, mesh.world, CPU)
        messages.append(str(error.value))
    return messages


def test_checkpoint_of_another_model(tmp_path):
    folders = [write_model(tmp_path / str(i), QWEN3_MOE if i < 2 else LLAMA) for i in range(5)]
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"
    norm = "model.layers.2.input_layernorm.weight"
    change(folders[0], lambda tensors: tensors.pop(expert))
    change(folders[1], lambda tensors: tensors.update({expert: torch.zeros(2, 2)}))
    change(folders[2], lambda tensors: tensors.pop(norm))
    change(folders[3], lambda tensors: tensors.update({norm: torch.zeros(5)}))
    Path(folders[4], "model.safetensors").write_bytes(b"x" * 100)
    (messages,) = run_ranks(failing, 1, folders)
    wanted = [
        f"has no tensor {expert}; is it of another model?",
        f"has {expert} of shape [2, 2] where the model's is [16, 32]",
        f"has no tensor {norm}; is it of another model?",
        f"has {norm} of shape [5] where the model's is [32]",
        "cannot be read",
    ]
    for message, part in zip(messages, wanted, strict=True):
        assert part in message
        assert "\n" not in message


def test_what_is_a_checkpoint_of_safetensors(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", LLAMA)
    assert stored.checkpoint_folder(folder) == Path(folder)
    assert stored.checkpoint_folder(write_config(tmp_path / "config", LLAMA)) is None
    assert stored.checkpoint_folder(f"{folder}/config.json") is None
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name != "lab/model":
            raise OSError("offline")
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert stored.checkpoint_folder("lab/model") == Path(folder)
    assert stored.checkpoint_folder("lab/other") is None
    assert asked == ["lab/model", "lab/other"]


def load_adapted(rank: int, world: int, folder: str) -> dict[str, object]:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    mesh = make_mesh(world, [], "cpu")

    def adapt(model: CausalLMWithLoss) -> None:
        peft.inject_adapter_in_model(config, model.lm)

    model = load_sharded(folder, mesh.world, CPU, seed=3, adapt=adapt)
    batch = micro_batch_of(random_samples([9, 4, 12], 64).documents, 0, 1, 0, 1, mesh, CPU)
    loss = forward_backward(model, batch)
    values = {name.removeprefix("lm."): p.full_tensor().detach() for name, p in model.named_parameters()}
    trained = {name for name, p in model.lm.named_parameters() if p.grad is not None}
    return {"values": values, "loss": loss, "trained": trained}


def test_adapters_on_a_model_that_no_rank_holds(tmp_path):
    pytest.importorskip("peft")
    folder = write_model(tmp_path, LLAMA)
    runs = [run_ranks(load_adapted, world, folder)[0] for world in (1, 3)]
    saved = load_file(f"{folder}/model.safetensors")
    batch = micro_batch_of(random_samples([9, 4, 12], 64).documents, 0, 1, 0, 0, ParallelMesh(None), CPU)
    loss = forward_backward(load_model(folder), batch)
    for run in runs:
        values = run["values"]
        base = {name.replace(".base_layer.", "."): x for name, x in values.items() if ".lora_" not in name}
        assert base.keys() == saved.keys()
        assert all(torch.equal(base[name], saved[name]) for name in saved)
        adapters = {name for name in values if ".lora_" in name}
        assert run["trained"] == adapters
        assert len(adapters) == 2 * 7 * LLAMA["num_hidden_layers"]
        for name in adapters:
            assert torch.equal(values[name], runs[0]["values"][name])  # for any number of ranks
            assert bool(values[name].any()) == (".lora_A." in name)
            assert values[name].abs().max() <= values[name].size(1) ** -0.5  # uniform, as peft draws them
        torch.testing.assert_close(run["loss"], loss)  # B is zero


FRESH = {"llama": LLAMA, "qwen2": QWEN2, "qwen3_moe": QWEN3_MOE, "deepseek_v2": DEEPSEEK_V2}


def draw(rank: int, world: int, folders: dict[str, str]) -> dict[str, dict[str, object]]:
    mesh, found = make_mesh(world, [], "cpu"), {}
    for name, folder in folders.items():
        kept: list[CausalLMWithLoss] = []
        peak = peak_bytes(lambda folder=folder, kept=kept: kept.append(load_sharded(folder, mesh.world, CPU)), folder)
        (model,) = kept
        found[name] = {
            "values": {n: p.full_tensor().detach() for n, p in model.lm.named_parameters()},
            "buffers": dict(model.lm.named_buffers()),
            "another seed": next(load_sharded(folder, mesh.world, CPU, seed=1).parameters()).full_tensor().detach(),
            "peak": peak,
            "shards": local_parameter_bytes(model),
        }
    return found


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    root = tmp_path_factory.mktemp("fresh")
    folders = {name: write_config(root / name, config) for name, config in FRESH.items()}
    return folders, [run_ranks(draw, world, folders) for world in (1, 2, 4)]


@pytest.mark.parametrize("name", FRESH)
def test_fresh_values_are_the_same_for_any_number_of_ranks(fresh, name):
    _, ((one,), *more) = fresh
    for rank in (rank for ranks in more for rank in ranks):
        for key in ("values", "buffers"):
            assert rank[name][key].keys() == one[name][key].keys()
            assert all(torch.equal(rank[name][key][n], x) for n, x in one[name][key].items())
    assert not torch.equal(one[name]["another seed"], next(iter(one[name]["values"].values())))


@pytest.mark.parametrize("name", FRESH)
def test_fresh_values_are_the_familys_own(fresh, name):
    folders, ((one,), *_) = fresh
    lm = load_model(folders[name]).lm
    wanted, drawn = {n: p.detach() for n, p in lm.named_parameters()}, one[name]["values"]
    assert drawn.keys() == wanted.keys()
    matrices = [n for n, x in wanted.items() if x.unique().numel() > 2]
    assert len(matrices) > 10
    for n, x in wanted.items():
        if n in matrices:
            assert float(drawn[n].std() / x.std()) == pytest.approx(1, abs=4 / x.numel() ** 0.5)
            assert float(drawn[n].mean().abs() / x.std()) < 5 / x.numel() ** 0.5
        else:  # norms and biases
            assert torch.equal(drawn[n], x)
    assert len({float(drawn[n].flatten()[0]) for n in matrices}) == len(matrices)
    assert all(torch.equal(one[name]["buffers"][n], x) for n, x in lm.named_buffers())


@pytest.mark.parametrize("name", FRESH)
def test_fresh_values_are_never_whole_on_a_rank(fresh, name):
    """A rank holds its shards and one module's parameters (its part of them a second time, while it is cut out)."""
    folders, (_, _, four) = fresh
    lm = load_model(folders[name]).lm
    largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in lm.modules())
    for rank in four:
        assert rank[name]["peak"] < rank[name]["shards"] + 2.3 * largest
        assert rank[name]["peak"] < sum(p.nbytes for p in lm.parameters())

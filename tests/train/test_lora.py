from __future__ import annotations

import numpy as np
import pytest
import torch
from jobs import config_of, run_here, write_job
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from workers import CPU, LLAMA, random_samples, relative_error, run_ranks, write_config, write_model

from hbp.config import Config, LoraConfig
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.run.engine import make_engine
from hbp.train.batch import micro_batch_of
from hbp.train.checkpoint import list_checkpoints
from hbp.train.loop import forward_backward
from hbp.train.lora import add_adapters, has_adapters
from hbp.train.model import load_model, shard

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


def test_what_cannot_be(tmp_path):
    model = load_model(write_config(tmp_path, LLAMA))
    assert not has_adapters(model)
    with pytest.raises(HbpError, match=r"lora.targets='nothing_like_this'"):
        add_adapters(model, LoraConfig(rank=2, targets="nothing_like_this"), "base", 0)
    assert np.isfinite([float(p.detach().sum()) for p in model.parameters()]).all()


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

"""A base in four bits trains as the same numbers in float32 do, sharded, and takes the memory that is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import config_of, write_job
from plans import Row, plan_of
from safetensors.torch import load_file, save_file
from torch import nn
from workers import CPU, LLAMA, QWEN3_MOE, random_samples, run_ranks, write_model

from hbp.config import LoraConfig, TrainConfig
from hbp.cost.cluster import load_cluster
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.run.job import check_ready
from hbp.train.loop import Learner, train
from hbp.train.lora import add_adapters
from hbp.train.model import load_sharded, local_parameter_bytes, meta_model
from hbp.train.weights.nf4 import LEVELS, PackedLinear, block_of, pack, pack_base, row_bytes, shards_integers, unpack

WIDE = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
SAMPLES = random_samples(np.random.default_rng(0).integers(3, 40, 16), LLAMA["vocab_size"])
LORA = LoraConfig(rank=4, alpha=8)


def test_each_weight_is_the_nearest_level() -> None:
    weights = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    packed = pack(weights)
    assert packed.dtype == torch.uint8 and packed.shape == (7, row_bytes(256)) == (7, 256 // 2 + 4 * 4)
    got = unpack(packed, 256, torch.float32)
    largest = weights.view(7, 4, 64).abs().amax(2, keepdim=True)
    nearest = (weights.view(7, 4, 64) / largest)[..., None].sub(torch.tensor(LEVELS)).abs().amin(3)
    torch.testing.assert_close((got - weights).abs().view(7, 4, 64), nearest * largest, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(unpack(pack(got), 256, torch.float32), got)  # nothing more is lost


def test_rows_are_packed_apart_and_zeros_stay() -> None:
    weights = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    weights[2] = 0
    torch.testing.assert_close(pack(weights)[2:5], pack(weights[2:5]))
    assert not unpack(pack(weights), 48, torch.float32)[2].any()
    assert block_of(48) == 48
    for columns in (96, 63):
        with pytest.raises(HbpError, match=f"not of {columns}"):
            block_of(columns)


def test_bitsandbytes_has_the_same_codes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weights, blocksize=64, quant_type="nf4"))
    torch.testing.assert_close(unpack(pack(weights), 128, torch.float32), theirs, atol=1e-6, rtol=1e-6)


def test_a_packed_layer_has_the_products_of_its_weights() -> None:
    layer = nn.Linear(64, 24)
    packed = PackedLinear(layer)
    layer.weight.data = unpack(packed.weight, 64, torch.float32)
    x, y = (torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    for module, given in ((layer, x), (packed, y)):
        module(given).square().sum().backward()
    torch.testing.assert_close(packed(y), layer(x))
    torch.testing.assert_close(y.grad, x.grad)


def dequantized(folder: str, out: Path) -> str:
    """A copy of a checkpoint, its layers' weights as four bits have them."""
    out.mkdir()
    for file in Path(folder).iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    for name, x in tensors.items():
        if ".layers." in name and x.ndim == 2:
            tensors[name] = unpack(pack(x), x.size(1), torch.float32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return str(out)


def trained(rank: int, world: int, folder: str, quantize: str, dtype: str = "float32") -> dict[str, Any]:
    """Three steps, degrees mixed, layers recomputed."""
    rows: list[Row] = [(0, 0, r, 1, r, [r, r + 4]) for r in range(world)]
    rows += [(1, 0, 0, world, 3, [8, 9, 10]), (2, 0, world - 1, 1, 1, [11, 12])]
    mesh = make_mesh(world, [], "cpu", WIDE["num_attention_heads"])
    model = load_sharded(
        folder,
        mesh.world,
        CPU,
        compute_dtype=getattr(torch, dtype),
        quantize=quantize,
        adapt=lambda model: add_adapters(model, LORA, folder, seed=1),
    )
    held = local_parameter_bytes(model.lm.get_decoder().layers[0])
    learner = Learner.of(model, mesh, TrainConfig(lr=1e-2, warmup=0, weight_decay=0), CPU)
    records = train(learner, plan_of(rows, SAMPLES.lengths, world), SAMPLES)
    adapters = {n: p.full_tensor().detach() for n, p in model.named_parameters() if p.requires_grad}
    kinds = {p.dtype for p in model.parameters() if not p.requires_grad}
    losses, norms = [r.loss for r in records], [r.grad_norm for r in records]
    return {"losses": losses, "norms": norms, "adapters": adapters, "bytes": held, "kinds": kinds}


def all_runs(rank: int, world: int, folder: str, dense: str) -> dict[str, Any]:
    return {
        "packed": trained(rank, world, folder, "nf4"),
        "dense": trained(rank, world, dense, "none"),
        "bfloat16": trained(rank, world, folder, "nf4", "bfloat16"),
    }


@pytest.mark.skipif(not shards_integers(), reason="this torch's FSDP does not take integers")
def test_two_ranks_train_adapters_on_a_packed_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = write_model(tmp_path / "model", WIDE)
    dense = dequantized(folder, tmp_path / "dense")
    for rank in run_ranks(all_runs, 2, folder, dense):
        got, want, half = rank["packed"], rank["dense"], rank["bfloat16"]
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-5)
        for name, value in want["adapters"].items():
            assert float((got["adapters"][name] - value).abs().max()) < 2e-5, name
        assert torch.uint8 in got["kinds"] and torch.uint8 not in want["kinds"]
        assert got["bytes"] < 0.35 * want["bytes"]  # adapters and norms are not packed
        assert half["losses"] == pytest.approx(want["losses"], rel=2e-2)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HbpError, match="stacked experts"):
        pack_base(meta_model(write_model(tmp_path / "moe", QWEN3_MOE)).lm)
    with pytest.raises(HbpError, match="no frozen linear layer"):
        pack_base(meta_model(write_model(tmp_path / "dense", LLAMA)).lm)


def test_a_torch_that_cannot_shard_integers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 makes parameters of them in a way that is for floating point alone."""
    pytest.importorskip("peft")
    job = config_of(write_job(tmp_path, samples=4), "model.quantize=nf4", "lora.rank=4")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(HbpError, match=r"model.quantize=nf4 needs torch 2.13 or newer; this is 2.11.0\+cu130"):
        check_ready(job)


def test_memory_counts_half_a_byte_a_packed_weight() -> None:
    spec = dataclasses.replace(load_model_spec("llama-3.1-8b"), adapter_parameters=10_000_000)
    packed = dataclasses.replace(spec, packed_parameters=6_000_000_000)
    held, less = (CostModel(each, load_cluster("h100-nvlink"), 8).bytes(4096, 1, 32) for each in (spec, packed))
    assert row_bytes(4096) / 4096 == 0.5625
    assert held - less == pytest.approx((4 - 0.5625) * 6e9 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model.quantize=nf4"], "takes lora.rank over 0"),
        (["model.quantize=nf4", "lora.rank=4", "lora.dora=true"], "DoRA needs the norms of dense weights"),
        (["model.hub_kernels=true"], "needs the package kernels|is for GPUs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, given: list[str], message: str) -> None:
    job = write_job(tmp_path, samples=4)
    with pytest.raises(HbpError, match=message) as caught:
        check_ready(config_of(job, *given))
    assert "\n" not in str(caught.value)

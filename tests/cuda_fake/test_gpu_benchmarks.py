"""The benchmarks for a lent GPU, on a device that is not there: what raises here would cost a GPU's minutes."""

from __future__ import annotations

import json

import gpu_hour
import gpu_profile
import gpu_train
import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, NAME, fake_cuda

from hbp.parallel.varlen import document_attention, make_documents
from hbp.train.measure import live, micro_batch
from hbp.train.measure.fake_world import fake_world


@pytest.fixture
def fewer_packs(monkeypatch):
    """A third of them, of every stack; and bytes are read as they are, where fake tensors would say 1."""
    every = gpu_profile.packs_of
    monkeypatch.setattr(gpu_profile, "packs_of", lambda *given: every(*given)[::3])
    for module in (live, micro_batch):
        monkeypatch.setattr(module, "highest", lambda value, device: value)


def test_profile(fewer_packs):
    """Every family: products, attention, stacks with no and with all layers recomputed, and fits. Bytes are the
    allocator's, which `CostModel` predicts without having seen any."""
    with fake_world(1), fake_cuda():
        result = gpu_profile.measure(DEVICE, tiny=True)
    assert result["failed"] == {}
    assert result["cluster"]["device"] == NAME
    assert list(result["models"]) == list(gpu_profile.STACKS)
    for name, model in result["models"].items():
        assert {p["gc_layers"] for p in model["points"]} == {0, *gpu_profile.STACKS[name]}, name
        assert model["skipped"] == 0
        assert model["memory_error_unfitted"]["max"] < 0.2, name
        assert all(row["both_s"] > 0 for row in result["attention"][name])


def test_training(tmp_path, monkeypatch):
    """Naive packing and ours, from a checkpoint, by plans that fill the device; TRL has a process of its own."""
    monkeypatch.setattr(gpu_train, "measure_trl", lambda *_: {"failed": "not here"})
    size = gpu_train.SIZES["tiny"]
    store, weights = gpu_train.prepare(size, tmp_path)
    with fake_world(1), fake_cuda():
        result = gpu_train.compare(size, store, weights, tmp_path, DEVICE, tmp_path / "out.json")
    for side in ("naive", "hbp"):
        assert "failed" not in result[side], result[side]
        assert result[side]["steps"] > 0
        assert result[side]["tokens"] > size.tokens / 2
    assert result["speedup_vs_naive"] > 0
    assert json.loads((tmp_path / "out.json").read_text()) == {side: result[side] for side in ("naive", "hbp")}


@pytest.mark.parametrize("part", ["attention", "profile", "tables", "packing", "deepseek"])
def test_hour(part, fewer_packs):
    """Each part in the process that it has there: it ends, and what it found can be written."""
    lines = []
    with fake_cuda():
        gpu_hour.RUN[part](DEVICE, True, lines.append)
    json.dumps(lines)
    if part == "packing":
        assert set(gpu_hour.ratios(lines)) == set(gpu_hour.STRATEGIES)
    if part == "tables":
        settings = {(degree, gc_layers // 8) for _, degree, gc_layers, *_ in gpu_hour.SETTINGS}
        assert {(line["sp_degree"], line["gc_layers"]) for line in lines} == settings
        for line in lines:
            assert line["peak_bytes"] == pytest.approx(line["predicted_bytes"], rel=0.5)
    if part in ("profile", "deepseek"):
        off = [line["point"]["peak_bytes"] / line["predicted_bytes"] - 1 for line in lines if "point" in line]
        assert len(off) > 6
        assert np.abs(off).max() < 0.6


@pytest.mark.parametrize(
    ("dtype", "size", "said"), [(torch.float32, 64, "fp16 and bf16"), (torch.bfloat16, 264, "up to 256")]
)
def test_what_the_kernel_refuses_is_refused(dtype, size, said):
    """As on a device; the operator's shapes alone would let it pass."""
    with fake_cuda():
        q, k, v = (torch.empty(16, 2, size, device=DEVICE, dtype=dtype) for _ in range(3))
        with pytest.raises(RuntimeError, match=said):
            document_attention(q, k, v, make_documents((9, 7), DEVICE))

"""The engine on CUDA without a GPU: every line of its paths runs, on tensors without numbers.

`make test-cuda-fake` runs this folder with the oldest torch and transformers that we support, `make test` with the
newest.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from fake_cuda import DEVICE, fake_cuda
from plans import plan_of
from workers import FAMILIES, LLAMA, random_samples, write_config

from hbp.config import TrainConfig
from hbp.parallel import varlen
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import document_attention, make_documents
from hbp.train.batch import micro_batch_of
from hbp.train.loop import Learner, evaluate, forward_backward, train
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.measure.micro_batch import measure_point, peak_alone
from hbp.train.records import reserved_memory

WORLD = 16


def documents(total: int) -> list[tuple[np.ndarray, np.ndarray]]:
    lengths = [total // 2, total // 4, 1, total - total // 2 - total // 4 - 1]
    return [(np.arange(n, dtype=np.int32) % 64, np.ones(n, np.uint8)) for n in lengths]


def wide(config: dict) -> dict:
    """Grouped products want rows of 16 bytes."""
    return {**config, "hidden_size": 64, **({"moe_intermediate_size": 32} if "moe_intermediate_size" in config else {})}


@pytest.mark.parametrize(
    ("family", "degree", "gc_layers"),
    [("llama", 2, 3), ("mistral", 1, 0), ("qwen2", 8, 1), ("qwen3", 2, 0), ("qwen3_moe", 1, 1), ("deepseek_v2", 8, 3)],
)
def test_every_family_at_every_kind_of_degree(tmp_path, family, degree, gc_layers):
    """With four heads degree 8 gathers keys and values too. The real `varlen_attn` takes what we hand it."""
    config = wide(FAMILIES[family])
    with fake_world(WORLD, 5), fake_cuda() as memory:
        mesh = make_mesh(WORLD, [1, degree], "cuda", heads=4)
        model = drawn_model(write_config(tmp_path, config), mesh.world, DEVICE, compute_dtype=torch.bfloat16)
        states = memory.now
        batch = micro_batch_of(documents(96 * degree), 0, degree, 5 % degree, gc_layers, mesh, DEVICE)
        loss = forward_backward(model, batch)
        assert loss.device == DEVICE
        assert loss.dtype == torch.float32
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            assert parameter.grad.device.type == "cuda"
        assert states < memory.now < memory.peak


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("sizes", [(64, 64), (192, 128)])
def test_attention_is_what_torch_calls_it(window, kv_heads, sizes):
    """Unequal heads and head sizes, windows, fewer queries than keys: no argument that this torch does not know."""
    with fake_cuda():
        q, k, v = (
            torch.empty(tokens, heads, size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
            for tokens, heads, size in ((70, 8, sizes[0]), (100, kv_heads, sizes[0]), (100, kv_heads, sizes[1]))
        )
        out = document_attention(q, k, v, make_documents((30, 40), DEVICE, (50, 50)), sliding_window=window)
        assert out.shape == (70, 8, sizes[1])
        out.sum().backward()
        assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("degree", [1, 4])
def test_training_and_evaluation(tmp_path, degree):
    """Whole steps: batches from pinned memory, events, clipping, fused AdamW, memory of the step; then evaluation."""
    samples = random_samples([40, 7, 9, 120, 3, 64, 30, 8], 64)
    rows = [(step, 0, r, degree, 2, ids) for step, (r, ids) in enumerate([(0, [0, 1, 2]), (0, [3, 4]), (0, [5, 6, 7])])]
    plan = plan_of(rows, samples.lengths, 4)
    with fake_world(4), fake_cuda() as memory:
        mesh = make_mesh(4, [degree], "cuda", heads=4)
        model = drawn_model(write_config(tmp_path, wide(LLAMA)), mesh.world, DEVICE, compute_dtype=torch.bfloat16)
        before = memory.now
        learner = Learner.of(model, mesh, TrainConfig(), DEVICE)
        trained = sum(p.to_local().nbytes for p in model.parameters())
        records = train(learner, plan, samples)
        assert len(records) == 3
        torch.ones(1 << 20, device=DEVICE)  # seen after it is gone
        assert reserved_memory(DEVICE) == (memory.peak, 0.0)
        assert memory.peak >= memory.now + 4 * (1 << 20)
        assert memory.now - before < 2.5 * trained + 4096 * len(list(model.parameters()))  # AdamW's moments
        assert math.isfinite(evaluate(learner, plan, samples))
        assert memory.now - before < 2.5 * trained + 4096 * len(list(model.parameters()))  # nothing stays gathered


def test_a_pack_that_does_not_fit_is_found_and_left(tmp_path):
    """Out of memory in forward and in backward: infinite bytes; then the model runs what fits, in as many bytes."""
    folder = write_config(tmp_path, {**wide(LLAMA), "num_hidden_layers": 4})
    with fake_world(8), fake_cuda() as memory:
        mesh = make_mesh(8, [1], "cuda")
        model = drawn_model(folder, mesh.world, DEVICE, compute_dtype=torch.bfloat16)
        batch = micro_batch_of(documents(512), 0, 1, 0, 1, mesh, DEVICE)
        fits, start, most = peak_alone(model, batch, DEVICE), memory.now, memory.peak
        for share in (0.05, 0.3, 0.5, 0.7, 0.98):
            memory.limit = start + share * (most - start)
            assert math.isinf(peak_alone(model, batch, DEVICE))
            memory.limit = math.inf
            assert memory.now - start < 8192
            assert peak_alone(model, batch, DEVICE) == pytest.approx(fits, rel=1e-3)


def test_a_micro_batch_is_measured(tmp_path):
    with fake_world(2), fake_cuda():
        mesh = make_mesh(2, [2], "cuda")
        model = drawn_model(write_config(tmp_path, wide(LLAMA)), mesh.world, DEVICE, compute_dtype=torch.bfloat16)
        point = measure_point(model, mesh, [64, 20, 100], 2, 1, device=DEVICE, repeats=2)
        assert (point.seconds, point.gc_layers) == (1.0, 1)  # numbers that are not there are read as 1


def test_layers_share_the_packs_layout(tmp_path, monkeypatch):
    """FSDP2 hands every layer the same layout, so that what is made once a pack (a block mask) is."""
    seen = []
    kernel = varlen.KERNELS["varlen"]

    def spy(q, k, v, given, scale, window):
        seen.append(given)
        return kernel(q, k, v, given, scale, window)

    monkeypatch.setattr(varlen, "KERNELS", {**varlen.KERNELS, "varlen": spy})
    with fake_world(2), fake_cuda():
        mesh = make_mesh(2, [1], "cuda")
        model = drawn_model(write_config(tmp_path, wide(LLAMA)), mesh.world, DEVICE, compute_dtype=torch.bfloat16)
        batch = micro_batch_of(documents(64), 0, 1, 0, 0, mesh, DEVICE)
        forward_backward(model, dataclasses.replace(batch))
    assert len(seen) == 3
    assert len({id(s) for s in seen}) == 1
    assert seen[0] is batch.layout.documents

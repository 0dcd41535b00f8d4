from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from workers import CPU, LLAMA, random_samples, write_model

from hbp.parallel.mesh import ParallelMesh
from hbp.train import offload
from hbp.train.batch import micro_batch_of
from hbp.train.measure.micro_batch import forward_backward
from hbp.train.model import load_model
from hbp.train.offload import is_parameter, offloaded_activations


def test_parameters_and_small_tensors_stay():
    x, linear = torch.randn(64, 8, requires_grad=True), torch.nn.Linear(8, 16, bias=False)
    hooks = offloaded_activations(small_bytes=1024)
    moved: list[bool] = []

    def pack(tensor: torch.Tensor) -> offload.Kept:
        kept = hooks.pack_hook(tensor)
        moved.append(kept[1].data_ptr() != tensor.data_ptr())
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
    monkeypatch.setattr(offload, "SMALL_BYTES", 0)
    monkeypatch.setattr(offload.offloaded_activations, "__defaults__", (0,))
    model = load_model(write_model(tmp_path, LLAMA))
    documents = random_samples([9, 4, 12], LLAMA["vocab_size"]).documents
    batch = micro_batch_of(documents, 0, 1, 0, gc_layers, ParallelMesh(None), CPU)
    runs = []
    for model.offload_activations in (False, True):
        loss = forward_backward(model, batch)
        runs.append([loss, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

"""Compiled layers over many different packs, sharded as in training: compiled once, and to the same values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from workers import CPU, LLAMA, write_config

from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.train.batch import IDLE, MicroBatch, micro_batch_of
from hbp.train.loop import forward_backward
from hbp.train.measure import fake_world as fake_world_module
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.model import CausalLMWithLoss, compile_layers, shard

WORLD, LAYERS = 8, 9
"""More layers than dynamo takes versions of one function by default."""
ROWS, COMPARED = 50, 10


def rows(mesh: ParallelMesh) -> list[MicroBatch]:
    """Packs of a plan that has every degree, some layers recomputed, and ranks that idle; no two alike."""
    rng, made = np.random.default_rng(0), []
    for number in range(ROWS):
        degree = int(rng.choice([1, 2, 4]))
        lengths = rng.integers(2, 40, rng.integers(1, 12)).tolist()
        documents = [(rng.integers(0, 64, n).astype(np.int32), np.ones(n, np.uint8)) for n in lengths]
        gc_layers = int(rng.integers(0, LAYERS + 1))
        made.append(micro_batch_of(documents, number, degree, 0, gc_layers, mesh, CPU))
    nothing = (np.zeros(1, np.int32), np.zeros(1, np.uint8))
    made.insert(7, micro_batch_of([nothing], IDLE, 1, 0, 0, mesh, CPU))
    return made


def trained(model: CausalLMWithLoss, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Losses of packs, and the gradients of all together."""
    losses = [forward_backward(model, batch).detach().clone() for batch in batches]
    return losses + [p.grad.to_local().clone() for p in model.parameters()]


def graphs() -> int:
    """That dynamo has made."""
    return counters["stats"]["unique_graphs"]


def test_fifty_different_rows_are_compiled_once(tmp_path, monkeypatch, caplog):
    folder, results, seen = write_config(tmp_path, {**LLAMA, "num_hidden_layers": LAYERS}), [], []
    torch.compiler.reset()
    counters.clear()

    def compiled_and_sharded(model: CausalLMWithLoss, *args: Any, **options: Any) -> None:
        compile_layers(model, backend="eager")  # where training has inductor, which this needs no compiler for
        shard(model, *args, **options)

    for compiled in (False, True):
        if compiled:
            monkeypatch.setattr(fake_world_module, "shard", compiled_and_sharded)
        with fake_world(WORLD):
            mesh = make_mesh(WORLD, [1, 2, 4], "cpu", heads=4)
            torch.manual_seed(0)
            model, batches = drawn_model(folder, mesh.world, CPU), rows(mesh)
            model.train()
            results.append(trained(model, batches[:COMPARED]))
            for batch in batches[COMPARED:] if compiled else ():
                seen.append(graphs())
                forward_backward(model, batch)
            if compiled:
                seen.append(graphs())
                for batch in batches[:4]:
                    with torch.no_grad():
                        model.eval()(*batch.inputs)
    assert seen[-1] == seen[0] > 0  # nothing more after the first packs
    assert not [record for record in caplog.records if "recompile_limit" in record.getMessage()]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)

"""Measured micro-batches: what counts as memory, and what is left behind."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from workers import CPU, LLAMA, run_ranks, write_config

from hbp.cost.fit import Point
from hbp.parallel.mesh import make_mesh
from hbp.train.batch import micro_batch_of
from hbp.train.loop import forward_backward
from hbp.train.measure.micro_batch import measure_point
from hbp.train.model import load_model, shard


def points(rank: int, world: int, folder: str) -> dict[str, Point | bool]:
    mesh = make_mesh(world, [1, 2], "cpu")
    model = load_model(folder)
    shard(model, mesh.world, by_layer=False)
    measured: dict[str, Point | bool] = {
        "plain": measure_point(model, mesh, (30, 34), 1, 0, device=CPU),
        "longer": measure_point(model, mesh, (300, 340), 1, 0, device=CPU, repeats=0),
        "recomputed": measure_point(model, mesh, (300, 340), 1, 3, device=CPU, repeats=0),
        "shared": measure_point(model, mesh, (300, 340), 2, 0, device=CPU, repeats=0),
    }
    measured["clean"] = all(p.grad is None for p in model.parameters())
    for parameter in itertools.islice(model.parameters(), 3, None):
        parameter.requires_grad_(False)
    measured["frozen"] = measure_point(model, mesh, (30, 34), 1, 0, device=CPU, repeats=0)
    return measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Point | bool]]:
    folder: Path = tmp_path_factory.mktemp("model")
    return run_ranks(points, 2, write_config(folder, {**LLAMA, "tie_word_embeddings": False}))


def test_ranks_agree_and_leave_no_gradients(measured: list[dict[str, Point | bool]]) -> None:
    assert measured[0] == measured[1]
    assert measured[0]["clean"]


def test_seconds_and_bytes(measured: list[dict[str, Point | bool]]) -> None:
    first = measured[0]
    peak = {name: p.peak_bytes for name, p in first.items() if isinstance(p, Point)}
    assert first["plain"].seconds > 0  # type: ignore[union-attr]
    assert first["longer"].seconds == 0  # type: ignore[union-attr]
    assert peak["plain"] < peak["recomputed"] < peak["longer"]
    assert peak["shared"] < peak["longer"]
    # States of two ranks: 16 bytes a parameter that is trained, 4 of one that is not.
    assert peak["frozen"] < peak["plain"]


def runs_out(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def one_rank_runs_out(rank: int, world: int, folder: str) -> list[tuple[Point, Point, Point]]:
    """Rank 1 does, in forward and then in backward; what was measured before, then, and after, for both."""
    mesh = make_mesh(world, [2], "cpu")
    model = load_model(folder)
    shard(model, mesh.world)
    measured = []
    for where in (model.layers[1].register_forward_hook, model.layers[1].mlp.register_full_backward_hook):
        before = measure_point(model, mesh, (30, 34), 2, 1, device=CPU, repeats=0)
        hook = where(runs_out) if rank == 1 else None
        then = measure_point(model, mesh, (30, 34), 2, 1, device=CPU)
        if hook:
            hook.remove()
        measured.append((before, then, measure_point(model, mesh, (30, 34), 2, 1, device=CPU, repeats=1)))
    assert all(p.grad is None for p in model.parameters())
    return measured


def test_a_rank_that_runs_out_of_memory_tells_the_others_and_goes_on(tmp_path: Path) -> None:
    mine, other = run_ranks(one_rank_runs_out, 2, write_config(tmp_path / "model", LLAMA))
    assert mine == other
    for before, then, after in mine:
        assert math.isinf(then.peak_bytes)
        assert then.seconds == 0
        assert after.peak_bytes == before.peak_bytes
        assert after.seconds > 0  # with the collectives of both ranks


def with_and_without_others(rank: int, world: int, folder: str) -> list[tuple[float, list[torch.Tensor]]]:
    """Loss and gradients of a micro-batch, before and after one was measured alone; heads beyond the degree too."""
    mesh = make_mesh(world, [2], "cpu", heads=1)
    model = load_model(folder)
    shard(model, mesh.world)
    documents = [(np.arange(24, dtype=np.int32), np.ones(24, np.uint8))]
    batch = micro_batch_of(documents, 0, 2, rank, 1, mesh, CPU)
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = float(forward_backward(model, batch))
        results.append((loss, [p.grad.full_tensor() for p in model.parameters()]))
        measure_point(model, mesh, (24,), 2, 1, device=CPU, repeats=0)
    return results


def test_training_communicates_again_after_a_measurement(tmp_path: Path) -> None:
    mine, other = run_ranks(with_and_without_others, 2, write_config(tmp_path / "model", LLAMA))
    for (loss, gradients), (_, again) in ((mine[0], mine[1]), (mine[0], other[1])):
        assert loss > 0
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))

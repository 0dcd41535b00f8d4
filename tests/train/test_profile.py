"""Measured micro-batches: what counts as memory, and what is left behind."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from workers import CPU, LLAMA, run_ranks, write_config

from hbp.cost.fit import Point
from hbp.parallel.mesh import make_mesh
from hbp.train.model import load_model, shard
from hbp.train.profile import measure_point, peak_of


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


def test_blocks_that_another_thread_frees_do_not_pile_up() -> None:
    kept = [(0, 1, 100), (1, 2, 50), (2, 2, -50), (3, 1, -100)]
    assert peak_of(kept) == 150
    messages = [(0, 1, 100), *((i, 10 + i, 30) for i in range(1, 9)), (20, 1, -100)]
    assert peak_of(messages) == 130
    again = [(0, 1, 100), *((i, 10, 30) for i in range(1, 9)), (20, 1, -100)]  # at one address
    assert peak_of(again) == 130
    assert peak_of([]) == 0

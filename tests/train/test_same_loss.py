"""One loss curve: the same samples a step give the same losses and gradient norms, however a plan lays them out."""

from __future__ import annotations

import numpy as np
import pytest
from plans import Row, plan_of
from workers import CPU, LLAMA, random_samples, run_ranks, write_config

from hbp.config import LOSSES, TrainConfig
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan
from hbp.train.loop import Learner, train
from hbp.train.model import load_model, shard

WORLD, STEPS, PER_STEP = 4, 4, 8
TOLERANCE = 1e-4
"""Relative, of losses and gradient norms after up to four optimizer steps in float32."""
SAMPLES = random_samples(np.random.default_rng(0).integers(2, 40, STEPS * PER_STEP), LLAMA["vocab_size"])
ONE_RANK = "one rank"

Pack = tuple[int, int, int, int, list[int]]
"""micro-step, first rank, SP degree, recomputed layers, which of the step's samples"""
LAYOUTS: dict[str, list[Pack]] = {
    "one micro-step": [(0, 0, 1, 0, [0, 1]), (0, 1, 1, 0, [2, 3]), (0, 2, 1, 0, [4, 5]), (0, 3, 1, 0, [6, 7])],
    "SP 2, accumulated": [(0, 0, 2, 0, [7, 0]), (0, 2, 2, 0, [1]), (1, 0, 2, 0, [6, 5, 4]), (1, 2, 2, 0, [3, 2])],
    "SP 4, recomputed": [(0, 0, 4, 3, [0, 2, 4, 6]), (1, 0, 4, 1, [1, 3, 5, 7])],
    "mixed, unequal, idle": [
        (0, 0, 2, 1, [0, 1, 2, 3]),
        (0, 2, 1, 3, [4]),
        (1, 0, 1, 0, [5]),  # ranks 1 to 3 idle
        (2, 0, 4, 2, [6]),
        (3, 0, 1, 0, [7]),
    ],
    ONE_RANK: [(i, 0, 1, i % 4, pair) for i, pair in enumerate([[3, 1], [0, 2], [7, 5], [4, 6]])],
}


def plan(layout: list[Pack], world: int) -> Plan:
    rows: list[Row] = []
    for step in range(STEPS):
        for micro, start, degree, gc_layers, samples in layout:
            rows.append((step, micro, start, degree, gc_layers, [step * PER_STEP + i for i in samples]))
    return plan_of(rows, SAMPLES.lengths, world)


def curves(rank: int, world: int, names: list[str], folder: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    mesh, found = make_mesh(world, [], "cpu"), {}  # training prepares the degrees of its plan
    for name in names:
        for loss in LOSSES:
            model = load_model(folder, seed=3)
            shard(model, mesh.world)
            config = TrainConfig(lr=1e-2, warmup=0.1, loss=loss)
            records = train(Learner.of(model, mesh, config, CPU), plan(LAYOUTS[name], world), SAMPLES)
            found[name, loss] = [(record.loss, record.grad_norm) for record in records]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = write_config(tmp_path_factory.mktemp("config"), LLAMA)
    many = [name for name in LAYOUTS if name != ONE_RANK]
    return {**run_ranks(curves, WORLD, many, folder)[0], **run_ranks(curves, 1, [ONE_RANK], folder)[0]}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_same_curve_under_every_plan(runs, name, loss):
    want = np.array(runs["one micro-step", loss])
    np.testing.assert_allclose(np.array(runs[name, loss]), want, rtol=TOLERANCE)
    assert len(want) == STEPS


def test_losses_are_different_losses(runs):
    """So that agreement between plans is not agreement between losses."""
    curve = {loss: np.array(runs[ONE_RANK, loss])[:, 0] for loss in LOSSES}
    assert (np.abs(curve["sample-mean"] / curve["ave-token"] - 1) > 5 * TOLERANCE).all()
    assert (curve["sum"] > 10 * curve["ave-token"]).all()

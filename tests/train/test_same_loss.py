"""One loss curve: the same samples a step give the same losses and gradient norms, however a plan lays them out.

But for `token-mean`, which is there for comparison: it is the mean of each rank's own mean, by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
from plans import Row, plan_of
from workers import CPU, LLAMA, random_samples, run_ranks, write_config

from hbp.config import LOSSES, TrainConfig
from hbp.parallel.mesh import ParallelMesh, SequenceGroups, make_mesh
from hbp.plan import Plan
from hbp.train.batch import micro_batch_of
from hbp.train.loop import Learner, train
from hbp.train.model import load_model, shard

WORLD, STEPS, PER_STEP = 4, 4, 8
TOLERANCE = 1e-4
"""Relative, of losses and gradient norms after up to four optimizer steps in float32."""
SAMPLES = random_samples(np.random.default_rng(0).integers(2, 40, STEPS * PER_STEP), LLAMA["vocab_size"])
ONE_RANK = "one rank"
SAME = [loss for loss in LOSSES if loss != "token-mean"]
"""Losses that do not depend on the packing."""

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


def summed_losses(folder: str) -> np.ndarray:
    """Cross entropy of each sample of the first step, summed, before training."""
    mesh, model = ParallelMesh(None, made={1: SequenceGroups()}), load_model(folder, seed=3)
    alone = [micro_batch_of([document], 0, 1, 0, 0, mesh, CPU) for document in SAMPLES.documents[:PER_STEP]]
    return np.array([float(model(*batch.inputs).detach()) for batch in alone])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = write_config(tmp_path_factory.mktemp("config"), LLAMA)
    many = [name for name in LAYOUTS if name != ONE_RANK]
    found = {**run_ranks(curves, WORLD, many, folder)[0], **run_ranks(curves, 1, [ONE_RANK], folder)[0]}
    return found | {"alone": summed_losses(folder)}


@pytest.mark.parametrize("loss", SAME)
@pytest.mark.parametrize("name", list(LAYOUTS)[1:])
def test_same_curve_under_every_plan(runs, name, loss):
    want = np.array(runs["one micro-step", loss])
    np.testing.assert_allclose(np.array(runs[name, loss]), want, rtol=TOLERANCE)
    assert len(want) == STEPS


def test_losses_are_different_losses(runs):
    """So that agreement between plans is not agreement between losses."""
    curve = {loss: np.array(runs[ONE_RANK, loss])[:, 0] for loss in LOSSES}
    for loss in ("sample-mean", "run-token"):  # token-mean is near to it in an untrained model
        assert (np.abs(curve[loss] / curve["ave-token"] - 1) > 5 * TOLERANCE).all(), loss
    assert (curve["sum"] > 10 * curve["ave-token"]).all()


def test_run_token_divides_every_step_by_the_same(runs):
    """The first step's sum, the same for all losses, ÷ the mean loss tokens of a step."""
    want = runs["alone"].sum() / (SAMPLES.loss_tokens.sum() / STEPS)
    assert runs["SP 4, recomputed", "run-token"][0][0] == pytest.approx(want, rel=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_token_mean_is_the_mean_of_the_ranks_means(runs, name):
    """Section 4.3 of the paper: each rank its own loss tokens, then the mean over ranks and micro-steps."""
    world, micro_steps = 1 if name == ONE_RANK else WORLD, max(pack[0] for pack in LAYOUTS[name]) + 1
    means = np.zeros((micro_steps, world))  # ranks of a pack have its mean; ranks without one, 0
    for micro, start, degree, _, samples in LAYOUTS[name]:
        mean = runs["alone"][samples].sum() / SAMPLES.loss_tokens[samples].sum()
        means[micro, start : start + degree] = mean
    assert runs[name, "token-mean"][0][0] == pytest.approx(means.mean(), rel=TOLERANCE)

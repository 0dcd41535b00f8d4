"""The live profile on tiny models: whole and in stacks, the time limit, and what every rank gets to know."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from workers import CPU, LLAMA, run_ranks, write_config

from hbp.cost.cluster import CLUSTERS
from hbp.cost.fit import Point, predict_bytes, predict_point
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.train.measure import live as live_profile_module
from hbp.train.measure.live import (
    LiveProfile,
    cut_config,
    in_its_nodes,
    live_profile,
    load_stack,
    packs_to_measure,
    stack_heights,
)
from hbp.train.model import CausalLMWithLoss, load_model, shard

DEEP = {**LLAMA, "num_hidden_layers": 6}
SPEC = spec_from_config(DEEP)
LENGTHS = np.array([5, 9, 30, 64, 20, 12])


def profile(folder: str, world: int, heights: tuple[int, ...], limit_s: float) -> LiveProfile:
    cost = CostModel(SPEC, CLUSTERS["cpu-local"], world)
    mesh = make_mesh(world, cost.degrees(), "cpu")

    def make_model(height: int | None) -> CausalLMWithLoss:
        model = load_model(folder) if height is None else load_stack(folder, height, CPU)
        assert len(model.layers) == (height or 6)
        shard(model, mesh.world, by_layer=SPEC.sharded_by_layer)
        return model

    packs = packs_to_measure(cost, LENGTHS, 64, CPU, heights=heights)
    return live_profile(make_model, cost, mesh, CPU, packs, limit_s=limit_s)


def whole_stacks_and_no_time(rank: int, world: int, folder: str) -> list[LiveProfile]:
    cases: list[tuple[tuple[int, ...], float]] = [((), math.inf), ((1, 2), math.inf), ((1, 2), 0.0)]
    return [profile(folder, world, *case) for case in cases]


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[list[LiveProfile]]:
    """``[rank][case]``"""
    folder = write_config(tmp_path_factory.mktemp("model"), DEEP)
    return run_ranks(whole_stacks_and_no_time, 2, folder)


def test_all_ranks_get_the_same(profiles: list[list[LiveProfile]]) -> None:
    for mine, other in zip(*profiles, strict=True):
        assert (mine.fit, mine.points, mine.collectives) == (other.fit, other.points, other.collectives)


def test_points_name_their_stack(profiles: list[list[LiveProfile]]) -> None:
    whole, stacks, _ = profiles[0]
    assert {p.n_layers for p in whole.points} == {None}
    assert {p.n_layers for p in stacks.points} == {1, 2}
    assert {p.sp_degree for p in whole.points} == {p.sp_degree for p in stacks.points} == {1, 2}
    heights = [p.n_layers for p in stacks.points]
    assert 0 < heights.count(1) < heights.count(2) == len(whole.points)
    for point in (*whole.points, *stacks.points):
        assert point.gc_layers in (0, point.n_layers or 6)
        assert point.seconds > 0


def test_fit_predicts_no_point_too_small(profiles: list[list[LiveProfile]]) -> None:
    for case in profiles[0]:
        cost = CostModel(SPEC, case.fit.cluster, 2)
        assert all(predict_bytes(cost, p) >= p.peak_bytes * (1 - 1e-9) for p in case.points)


def test_time_limit_leaves_one_point_of_each_stack(profiles: list[list[LiveProfile]]) -> None:
    hurried, stacks = profiles[0][2], profiles[0][1]
    assert [p.n_layers for p in hurried.points] == [1, 2]
    assert len(hurried.points) + hurried.skipped == len(stacks.points)
    assert stacks.skipped == 0


def test_single_rank_measures_no_collectives(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model", {**DEEP, "tie_word_embeddings": False})
    measured = run_ranks(_alone, 1, folder)[0]
    assert measured.collectives == ()
    assert measured.fit.cluster.link_bytes_per_s == CLUSTERS["cpu-local"].link_bytes_per_s


def _alone(rank: int, world: int, folder: str) -> LiveProfile:
    return profile(folder, world, (1, 2), math.inf)


def by_a_clock(rank: int, world: int, folder: str, limit_s: float) -> tuple[float, LiveProfile]:
    """Every pack takes a hundred times what is predicted; seconds that have passed at the end."""
    now, cost = [0.0], CostModel(SPEC, CLUSTERS["cpu-local"], world)

    def measured(model: Any, mesh: Any, lengths: Any, degree: int, gc: int, *, device: Any, repeats: int = 3) -> Point:
        point = Point(tuple(lengths), degree, gc, 0.1, 1e9)
        now[0] += 100 * predict_point(cost, point) if repeats else 0.0
        return point

    with (
        mock.patch.object(live_profile_module, "measure_point", measured),
        mock.patch.object(
            live_profile_module, "fit_cluster", mock.Mock(return_value=SimpleNamespace(held_out_error=0.0))
        ),
        mock.patch.object(live_profile_module, "time", SimpleNamespace(monotonic=lambda: now[0])),
    ):
        found = profile(folder, world, (), limit_s)
    return now[0], found


def test_no_pack_ends_after_the_limit(tmp_path: Path) -> None:
    """One is not begun that, as slow as the last against its prediction, would end later."""
    folder = write_config(tmp_path / "model", DEEP)
    ((whole_s, whole),) = run_ranks(by_a_clock, 1, folder, math.inf)
    ((short_s, short),) = run_ranks(by_a_clock, 1, folder, whole_s / 2)
    assert whole.skipped == 0
    assert short.skipped > 0
    assert len(short.points) > 1
    assert short_s <= whole_s / 2


def test_stack_is_the_first_layers_of_the_configuration(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **LLAMA,
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
        "head_dim": 8,
    }
    model = load_stack(write_config(tmp_path / "qwen", config), 3, CPU, vocab_size=100)
    assert model.lm.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert model.lm.config.vocab_size == 100
    spec = dataclasses.replace(spec_from_config(config).with_layers(3), vocab=100)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters()
    assert next(model.parameters()).dtype == torch.float32


def test_stacks_that_cannot_be(tmp_path: Path) -> None:
    for count in (0, 7):
        with pytest.raises(HbpError, match=f"6 layers, so a stack of {count}"):
            cut_config(DEEP, count)
    with pytest.raises(HbpError, match="cannot load a model"):
        load_stack(str(tmp_path / "none"), 1, CPU)


def test_small_models_are_measured_whole() -> None:
    assert stack_heights(10**6, 32) == ()
    assert stack_heights(8 * 10**9, 32) == (2, 4)
    assert stack_heights(8 * 10**9, 4) == ()


@pytest.mark.parametrize(("here", "expected"), [("4", 4), ("16", 8), (None, 8)])
def test_a_node_has_as_many_devices_as_its_launcher_has_ranks(monkeypatch, here, expected):
    """But where all ranks are in one node, it may have more devices than them."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert in_its_nodes(CLUSTERS["h100-nvlink"], 16).devices_per_node == expected

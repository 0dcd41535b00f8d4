"""A fit to points of a known cluster predicts what that cluster would take, and hardly ever too little memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import MODEL

from hbp.cost.cluster import CLUSTERS, ClusterSpec
from hbp.cost.fit import (
    OVERHEADS,
    RATES,
    Collective,
    Point,
    fit_cluster,
    grid,
    pooled_cluster,
    predict_bytes,
    predict_collective,
    predict_point,
)
from hbp.cost.predict import CostModel

BASE = CLUSTERS["cpu-local"]
LONGEST = 4096
TRUTHS = {
    "slow links": {"linear_flops_per_s": 20e9, "attention_flops_per_s": 9e9, "link_bytes_per_s": 2e8},
    "overheads": {"layer_overhead_s": 8e-3, "document_overhead_s": 2e-3, "collective_latency_s": 4e-3},
    "memory": {"activation_scale": 1.7, "fixed_bytes": 3e8},
}
Noise = Callable[[], float]


def exact() -> float:
    return 1.0


def noisy(percent: float, seed: int = 0) -> Noise:
    rng = np.random.default_rng(seed)
    return lambda: float(rng.uniform(1 - percent / 100, 1 + percent / 100))


def true_cluster(**changes: float) -> ClusterSpec:
    return dataclasses.replace(BASE, name="truth", fsdp_overlap=0.0, **changes)  # type: ignore[arg-type]


def packs(cost: CostModel, seed: int) -> list[tuple[tuple[int, ...], int, int]]:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(200), 1, 500), 16, LONGEST).astype(int)
    return grid(cost, lengths, LONGEST, rng)


def measure(cost: CostModel, chosen: Sequence[tuple[tuple[int, ...], int, int]], noise: Noise) -> list[Point]:
    """What a machine that is exactly as the cost model says would show."""
    points = []
    for lengths, degree, gc_layers in chosen:
        point = Point(lengths, degree, gc_layers, 0.0, cost.bytes(sum(lengths), degree, gc_layers) * noise())
        points.append(dataclasses.replace(point, seconds=predict_point(cost, point) * noise()))
    return points


def held_out(cost: CostModel) -> list[Point]:
    """Other packs, other numbers of recomputed layers, and longer ones than were measured."""
    rng = np.random.default_rng(99)
    chosen = [
        (tuple(rng.integers(16, longest, n).tolist()), degree, int(rng.integers(0, MODEL.n_layers + 1)))
        for degree in cost.degrees()
        for longest, n in ((100, 12), (1000, 5), (4000, 2))
    ]
    return measure(cost, chosen, exact)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("name", TRUTHS)
@pytest.mark.parametrize(("percent", "tolerance"), [(0.0, 1e-6), (2.0, 0.05)])
def test_predicts_points_that_it_was_not_given(world: int, name: str, percent: float, tolerance: float) -> None:
    truth = CostModel(MODEL, true_cluster(**TRUTHS[name]), world)
    points = measure(truth, packs(truth, 0), noisy(percent))
    fit = fit_cluster(BASE, MODEL, world, points, "here")
    fitted = CostModel(MODEL, fit.cluster, world)
    for point in held_out(truth):
        assert predict_point(fitted, point) == pytest.approx(point.seconds, rel=tolerance)
        used = fitted.bytes(sum(point.lengths), point.sp_degree, point.gc_layers)
        assert used == pytest.approx(point.peak_bytes, rel=tolerance)
    assert fit.held_out_error <= tolerance
    np.testing.assert_allclose(fit.predicted_s, [p.seconds for p in points], rtol=1.5 * tolerance)


def test_without_noise_the_constants_themselves_come_back() -> None:
    truth = true_cluster(**TRUTHS["slow links"], **TRUTHS["overheads"], **TRUTHS["memory"])
    cost = CostModel(MODEL, truth, 4)
    fit = fit_cluster(BASE, MODEL, 4, measure(cost, packs(cost, 0), exact), "here")
    for name in (*RATES, *OVERHEADS, "activation_scale", "fixed_bytes"):
        assert getattr(fit.cluster, name) == pytest.approx(getattr(truth, name), rel=1e-4), name


def test_what_is_kept_of_the_base_and_what_is_said() -> None:
    cost = CostModel(MODEL, true_cluster(linear_flops_per_s=1e9), 1)
    base = dataclasses.replace(BASE, fsdp_overlap=0.8, memory_bytes=5e9)
    fit = fit_cluster(base, MODEL, 1, measure(cost, packs(cost, 0), exact), "a machine")
    assert fit.cluster.linear_flops_per_s == pytest.approx(1e9)
    # One rank sends nothing, so its points say nothing of links.
    assert fit.cluster.link_bytes_per_s == BASE.link_bytes_per_s
    assert fit.cluster.collective_latency_s == BASE.collective_latency_s
    for name in ("name", "memory_bytes", "devices_per_node", "dtype_bytes", "step_overhead_s"):
        assert getattr(fit.cluster, name) == getattr(base, name)
    assert (fit.cluster.device, fit.cluster.origin) == ("a machine", "profiled on a machine")
    assert fit.cluster.fsdp_overlap == 0.8


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("world", [1, 4])
def test_what_recomputing_takes_comes_back(scale: float, world: int) -> None:
    truth = true_cluster(**TRUTHS["slow links"], recompute_scale=scale)
    cost = CostModel(MODEL, truth, world)
    fit = fit_cluster(BASE, MODEL, world, measure(cost, packs(cost, 0), exact), "here")
    assert fit.cluster.recompute_scale == scale
    assert fit.cluster.linear_flops_per_s == pytest.approx(20e9, rel=1e-4)


def test_the_only_point_with_recomputed_layers_can_be_left_out() -> None:
    cost = CostModel(MODEL, true_cluster(**TRUTHS["slow links"], recompute_scale=1.8), 1)
    chosen = packs(cost, 0)
    only = [p for p in chosen if p[2] == 0] + [next(p for p in chosen if p[2] > 0 and sum(p[0]) > 1000)]
    points = measure(cost, only, exact)
    assert len(fit_cluster(BASE, MODEL, 1, points, "here").held_out_s) == len(points)


def test_without_recomputed_layers_nothing_is_said_of_them() -> None:
    base = dataclasses.replace(BASE, recompute_scale=1.3)
    cost = CostModel(MODEL, base, 1)
    points = measure(cost, [pack for pack in packs(cost, 0) if pack[2] == 0], exact)
    assert fit_cluster(base, MODEL, 1, points, "here").cluster.recompute_scale == 1.3


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.8])
def test_overlap_of_fsdp_traffic_comes_back(overlap: float) -> None:
    """The longest packs hide the traffic, the shortest do not: that tells the share."""
    truth = dataclasses.replace(true_cluster(**TRUTHS["slow links"]), fsdp_overlap=overlap, link_bytes_per_s=3e7)
    cost = CostModel(MODEL, truth, 4)
    assert cost.seconds(1, 0).fsdp > 0.1
    points = measure(cost, packs(cost, 0), exact)
    fit = fit_cluster(BASE, MODEL, 4, points, "here", links(truth, 4, (1, 2, 4)))
    assert fit.cluster.fsdp_overlap == overlap
    np.testing.assert_allclose(fit.predicted_s, [p.seconds for p in points], rtol=1e-6)
    noisy_points = measure(cost, packs(cost, 0), noisy(3))
    fit = fit_cluster(BASE, MODEL, 4, noisy_points, "here", links(truth, 4, (1, 2, 4)))
    assert fit.cluster.fsdp_overlap == pytest.approx(overlap, abs=0.1001)


def links(cluster: ClusterSpec, world: int, degrees: Sequence[int]) -> list[Collective]:
    return [
        Collective("all_to_all", ranks, size, cluster.latency(ranks) + size / cluster.link(ranks))
        for ranks in degrees
        if 1 < ranks <= world
        for size in (1e5, 1e6, 1e7)
    ]


def test_degrees_that_did_not_run_are_predicted_from_the_collectives() -> None:
    """Only degree 1 ran; the links were measured between two ranks."""
    truth = true_cluster(**TRUTHS["slow links"], collective_latency_s=2e-3)
    cost = CostModel(MODEL, truth, 4)
    points = [p for p in measure(cost, packs(cost, 0), exact) if p.sp_degree == 1]
    fit = fit_cluster(BASE, MODEL, 4, points, "here", links(truth, 4, (2,)))
    fitted = CostModel(MODEL, fit.cluster, 4)
    for point in held_out(cost):
        assert predict_point(fitted, point) == pytest.approx(point.seconds, rel=1e-4)


def test_two_stacks_of_a_few_layers_tell_the_whole_model() -> None:
    whole = dataclasses.replace(MODEL, n_layers=24, windows=(None, 512) * 12)
    truth = true_cluster(linear_flops_per_s=2e10, layer_overhead_s=2e-3, activation_scale=1.3, fixed_bytes=1e8)
    points = []
    for height in (2, 4):
        stack = CostModel(whole.with_layers(height), truth, 2)
        points += [dataclasses.replace(p, n_layers=height) for p in measure(stack, packs(stack, 0), exact)]
    fit = fit_cluster(BASE, whole, 2, points, "here")
    cost, fitted = CostModel(whole, truth, 2), CostModel(whole, fit.cluster, 2)
    for pack, degree, gc_layers in packs(cost, 1):
        point = measure(cost, [(pack, degree, gc_layers)], exact)[0]
        assert predict_point(fitted, point) == pytest.approx(point.seconds, rel=1e-6)
        assert predict_bytes(fitted, point) == pytest.approx(point.peak_bytes, rel=1e-3)


def test_held_out_seconds_come_from_the_other_points() -> None:
    cost = CostModel(MODEL, true_cluster(), 1)
    points = measure(cost, packs(cost, 0), exact)
    outlier = dataclasses.replace(points[3], seconds=3 * points[3].seconds)
    fit = fit_cluster(BASE, MODEL, 1, [*points[:3], outlier, *points[4:]], "here")
    assert fit.held_out_s[3] == pytest.approx(points[3].seconds, rel=1e-6)
    assert abs(fit.predicted_s[3] / points[3].seconds - 1) > 1e-3
    assert fit.held_out_error < 0.2


NODES = {"devices_per_node": 2, "link_bytes_per_s": 8e8, "collective_latency_s": 1e-3}
NETWORK = {"node_bytes_per_s": 3e8, "node_latency_s": 5e-3}


def test_links_within_a_node_and_between_nodes_are_fitted_apart() -> None:
    """Eight ranks on four nodes, the network a tenth as fast; one rate for both is far off on what is fresh."""
    truth = true_cluster(**NODES, **NETWORK)
    base = dataclasses.replace(BASE, devices_per_node=2)
    cost, messages = CostModel(MODEL, truth, 8), links(truth, 8, (2, 4, 8))
    fit = fit_cluster(base, MODEL, 8, measure(cost, packs(cost, 0), exact), "here", messages)
    for name in (*RATES, *OVERHEADS):
        assert getattr(fit.cluster, name) == pytest.approx(getattr(truth, name), rel=1e-4), name
    points = measure(cost, packs(cost, 0), noisy(3))
    errors = []
    for start in (base, BASE):  # BASE takes all ranks for neighbours
        fitted = CostModel(MODEL, fit_cluster(start, MODEL, 8, points, "here", messages).cluster, 8)
        errors.append(np.mean([abs(predict_point(fitted, p) / p.seconds - 1) for p in held_out(cost)]))
    assert errors[0] < 0.03
    assert errors[0] < errors[1] / 3


def test_what_ran_in_one_node_says_nothing_of_the_network() -> None:
    cost = CostModel(MODEL, true_cluster(**TRUTHS["slow links"]), 2)
    base = dataclasses.replace(BASE, **NODES, **NETWORK)
    fit = fit_cluster(base, MODEL, 2, measure(cost, packs(cost, 0), exact), "here", links(cost.cluster, 2, (2,)))
    assert fit.cluster.link_bytes_per_s == pytest.approx(2e8)
    assert {name: getattr(fit.cluster, name) for name in NETWORK} == NETWORK


def test_one_device_a_node_has_the_network_alone() -> None:
    """No message stays in a node; the base's rate there, for which nothing is measured, does not hold others back."""
    base = dataclasses.replace(BASE, devices_per_node=1, link_bytes_per_s=1e6)
    truth = dataclasses.replace(base, fsdp_overlap=0.0, link_bytes_per_s=1e12, **NETWORK)  # type: ignore[arg-type]
    cost = CostModel(MODEL, truth, 4)
    points = measure(cost, packs(cost, 0), exact)
    fit = fit_cluster(base, MODEL, 4, points, "here", links(truth, 4, (2, 4)))
    fitted = CostModel(MODEL, fit.cluster, 4)
    for point in held_out(cost):
        assert predict_point(fitted, point) == pytest.approx(point.seconds, rel=1e-4)


def test_a_gather_over_nodes_shares_their_links_and_an_all_to_all_does_not() -> None:
    """A node receives what is gathered once, and hands it on inside; each device waits for its own in an all-to-all."""
    cluster = dataclasses.replace(BASE, **NODES, **NETWORK)
    gathered, exchanged = (
        predict_collective(cluster, Collective(kind, 8, 3e8, 0.0)) for kind in ("all_gather", "all_to_all")
    )
    assert (gathered, exchanged) == pytest.approx((1 + 6e-3, 2 + 6e-3))


def test_one_point_is_enough() -> None:
    point = Point((100, 200), 1, 0, 1.5, 4e8)
    fit = fit_cluster(BASE, MODEL, 1, [point], "here")
    assert fit.predicted_s == pytest.approx((1.5,))
    assert fit.held_out_error == 0
    assert fit.predicted_bytes[0] >= point.peak_bytes * (1 - 1e-9)


def test_relative_errors_count() -> None:
    """A pack of a tenth of a second counts as much as one of a minute."""
    cost = CostModel(MODEL, true_cluster(), 1)
    tiny = [((16,) * n, 1, gc_layers) for n in range(1, 7) for gc_layers in (0, 4)]
    long = [((n * 20_000,), 1, gc_layers) for n in range(1, 7) for gc_layers in (0, 4)]
    points = measure(cost, tiny + long, noisy(5))
    assert points[-1].seconds > 500 * points[0].seconds
    fit = fit_cluster(BASE, MODEL, 1, points, "here")
    np.testing.assert_allclose(fit.predicted_s, [p.seconds for p in points], rtol=0.1)


@given(
    st.sampled_from([1, 2, 4]),
    st.floats(0.3, 4),
    st.floats(0, 1e9),
    st.integers(0, 90),
    st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_no_point_is_predicted_to_need_less_memory_than_it_did(
    world: int, scale: float, fixed: float, percent: int, seed: int
) -> None:
    cost = CostModel(MODEL, true_cluster(activation_scale=scale, fixed_bytes=fixed), world)
    points = measure(cost, packs(cost, seed % 5), noisy(percent, seed))
    fit = fit_cluster(BASE, MODEL, world, points, "here")
    for predicted, point in zip(fit.predicted_bytes, points, strict=True):
        assert predicted >= point.peak_bytes * (1 - 1e-9)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(64, 100_000), st.lists(st.integers(1, 10**6), min_size=1), st.data())
@settings(max_examples=40, deadline=None)
def test_grid(world: int, longest: int, lengths: list[int], data: st.DataObject) -> None:
    cost = CostModel(MODEL, BASE, world)
    chosen = grid(cost, np.array(lengths), longest, np.random.default_rng(data.draw(st.integers(0, 9))))
    local = [sum(documents) / degree for documents, degree, _ in chosen]
    assert local == sorted(local)
    for degree in cost.degrees():
        mine = [(documents, gc_layers) for documents, d, gc_layers in chosen if d == degree]
        assert {gc_layers for _, gc_layers in mine} == {0, MODEL.n_layers}
        assert 8 <= len(mine) <= 24
        most = max(sum(documents) for documents, _ in mine)
        assert min(longest, longest * degree // 2) <= most <= longest * degree // 2
        # Ordinary packs stay shorter than recomputed ones: they take more memory.
        assert max(sum(documents) for documents, gc_layers in mine if not gc_layers) <= longest * degree // 4
    assert all(min(documents) >= 1 for documents, _, _ in chosen)


def test_points_of_several_models_give_one_cluster() -> None:
    """The constants of the machine that both models ran on, from the points of both."""
    truth = true_cluster(**TRUTHS["overheads"], **TRUTHS["memory"], linear_flops_per_s=20e9)
    wide = dataclasses.replace(MODEL, name="wide", hidden=512, intermediate=1500)
    costs = [CostModel(model, truth, 1) for model in (MODEL, wide)]
    measured = [(c.model, measure(c, packs(c, seed), noisy(2, seed))) for seed, c in enumerate(costs)]
    pooled = pooled_cluster(BASE, measured, 1, "both")
    assert (pooled.origin, pooled.device) == ("profiled on both", "both")
    assert pooled.linear_flops_per_s == pytest.approx(truth.linear_flops_per_s, rel=0.1)
    assert pooled.activation_scale == pytest.approx(truth.activation_scale, rel=0.1)
    for cost in costs:
        fitted = dataclasses.replace(cost, cluster=pooled)
        for point in measure(cost, packs(cost, 7), exact):
            assert predict_point(fitted, point) == pytest.approx(point.seconds, rel=0.1)
    alone = [fit_cluster(BASE, model, 1, points, "one").cluster for model, points in measured]
    assert pooled_cluster(BASE, measured[:1], 1, "one") == alone[0] != alone[1]

"""Seconds and bytes: against a hand calculation, and the properties that the planner leans on."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import ModelSpec, load_model_spec
from hbp.cost.predict import CostModel, Work

LLAMA = load_model_spec("llama-3.1-8b")
SMALL = dataclasses.replace(
    LLAMA, name="small", n_layers=6, hidden=256, heads=12, kv_heads=4, qk_head_dim=32, v_head_dim=32, vocab=1000
)
WINDOWED = dataclasses.replace(SMALL, windows=(64, None) * 3)
MODELS = [SMALL, WINDOWED, LLAMA, load_model_spec("qwen3-30b-a3b"), load_model_spec("deepseek-v2-236b")]
WORLDS = [1, 2, 6, 8, 32, 64]

costs = st.builds(
    CostModel,
    st.sampled_from(MODELS),
    st.sampled_from(list(CLUSTERS.values())).flatmap(
        lambda c: st.builds(
            dataclasses.replace,
            st.just(c),
            fsdp_overlap=st.sampled_from([0.0, 0.5, 1.0]),
            memory_bytes=st.floats(1e9, 2e12),
            activation_scale=st.floats(0.5, 3),
        )
    ),
    st.sampled_from(WORLDS),
)
packs = st.lists(st.integers(1, 5000), min_size=1, max_size=20)


def one(cost: CostModel, lengths: list[int]) -> Work:
    """The work of one pack."""
    return cost.work(np.array(lengths), np.array([0, len(lengths)]))


def seconds(cost: CostModel, lengths: list[int], degree: int, gc_layers: int) -> float:
    return float(cost.seconds(degree, gc_layers).of(one(cost, lengths))[0])


def draw_setting(data: Any, cost: CostModel) -> tuple[int, int]:
    return data.draw(st.sampled_from(cost.degrees())), data.draw(st.integers(0, cost.model.n_layers))


def test_seconds_by_hand() -> None:
    cluster = dataclasses.replace(
        CLUSTERS["cpu-local"],
        linear_flops_per_s=2.0,
        attention_flops_per_s=3.0,
        layer_overhead_s=5.0,
        document_overhead_s=7.0,
        link_bytes_per_s=11.0,
        node_bytes_per_s=11.0,
        collective_latency_s=13.0,
        fsdp_overlap=0.0,
    )
    layers, lengths, again = 6, [10, 20], 2 / 6
    flops = 2 * layers * (256 * 32 * (12 + 4 + 4 + 12) + 3 * 256 * SMALL.intermediate)
    linear = 30 * (flops * (3 + again) + 2 * 256 * 1000 * 4) / 2
    attention = (55 + 210) * 2 * layers * 12 * 64 * (3.5 + again) / 3
    launches = layers * (3 + again) * (5 + 2 * 7)
    alone = linear + attention + launches
    assert seconds(CostModel(SMALL, cluster, 1), lengths, 1, 2) == pytest.approx(alone)

    # On four ranks: each has a quarter of the tokens and pairs, three quarters of the heads' bytes travel, twice a
    # layer and pass; FSDP gathers twice and reduces once.
    sent = 30 / 4 * layers * (32 * 4 * 2 * (12 + 4)) * 3 / 4 * (2 + again) / 11
    latency = layers * 2 * (2 + again) * 13
    fsdp = SMALL.parameters() * 3 / 4 * (2 * 4 + 4) / 11 + 3 * (layers + 1) * 13
    busy = (linear + attention) / 4 + launches + sent + latency
    assert seconds(CostModel(SMALL, cluster, 4), lengths, 4, 2) == pytest.approx(busy + fsdp)
    for overlap in (0.25, 1.0):
        hiding = dataclasses.replace(cluster, fsdp_overlap=overlap)
        expected = busy + max(0.0, fsdp - overlap * busy)
        assert seconds(CostModel(SMALL, hiding, 4), lengths, 4, 2) == pytest.approx(expected)


TINY = dataclasses.replace(SMALL, name="tiny", intermediate=500)  # layers of less than a million parameters


def test_a_model_of_small_layers_is_gathered_in_one_piece() -> None:
    assert SMALL.sharded_by_layer
    assert not TINY.sharded_by_layer
    slow = dataclasses.replace(CLUSTERS["cpu-local"], link_bytes_per_s=11.0, collective_latency_s=13.0)
    fsdp = TINY.parameters() * 3 / 4 * (4 + 4) / 11 + 2 * 13  # gathered once and reduced once
    assert CostModel(TINY, slow, 4).seconds(1, 0).fsdp == pytest.approx(fsdp)
    assert CostModel(TINY, slow, 4).static_bytes() == pytest.approx(TINY.parameters() * (16 / 4 + 4 + 4))


def test_bytes_by_hand() -> None:
    cluster = dataclasses.replace(CLUSTERS["cpu-local"], activation_scale=1.5, fixed_bytes=1e6)
    layer = SMALL.layer_parameters(0)
    root = SMALL.parameters() - 6 * layer
    static = SMALL.parameters() * 16 / 4 + (2 * layer + root) * 4 + max(layer, root) * 4 + 1e6
    assert CostModel(SMALL, cluster, 4).static_bytes() == pytest.approx(static)
    saved, kept = SMALL.layer_activation_bytes(0, 4, 2), 256 * 4
    logits = 1000 * (4 + 4)  # with their gradients
    for gc_layers, whole in ((0, 6), (2, 4), (6, 1)):  # one layer at a time is recomputed
        acts = 1.5 * (whole * saved + gc_layers * kept) + 4 * 256 * 4
        for tokens, in_chunk in ((1000, 500), (8000, 1024)):
            expected = static + tokens / 2 * acts + in_chunk * logits
            assert CostModel(SMALL, cluster, 4).bytes(tokens, 2, gc_layers) == pytest.approx(expected)


@given(costs, st.lists(packs, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_work_adds_up_over_documents(cost: CostModel, drawn: list[list[int]]) -> None:
    lengths = np.concatenate(drawn)
    offsets = np.cumsum([0, *map(len, drawn)])
    alone, folded = cost.work(lengths), cost.work(lengths, offsets)
    for name in ("documents", "tokens", "pairs"):
        each = getattr(alone, name)
        parts = [each[a:b].sum() for a, b in pairwise(offsets)]
        np.testing.assert_allclose(getattr(folded, name), parts, rtol=1e-9)
    np.testing.assert_array_equal(folded.documents, list(map(len, drawn)))
    np.testing.assert_array_equal(folded.tokens, list(map(sum, drawn)))
    np.testing.assert_array_equal(folded[1:].tokens, folded.tokens[1:])


@given(costs, packs, st.data())
@settings(max_examples=60, deadline=None)
def test_seconds_are_affine_in_the_documents(cost: CostModel, lengths: list[int], data: Any) -> None:
    spent = cost.seconds(*draw_setting(data, cost))
    each = spent.marginal(cost.work(np.array(lengths)))
    pack = one(cost, lengths)
    assert spent.marginal(pack)[0] == pytest.approx(each.sum())
    assert spent.compute(pack)[0] == pytest.approx(spent.fixed + each.sum())
    busy = spent.compute(pack)[0]
    assert busy <= spent.of(pack)[0] <= busy + spent.fsdp * (1 + 1e-12)


@given(costs, packs, st.integers(1, 1000), st.data())
@settings(max_examples=60, deadline=None)
def test_more_tokens_and_more_recomputation_take_longer(
    cost: CostModel, lengths: list[int], more: int, data: Any
) -> None:
    degree, gc_layers = draw_setting(data, cost)
    now = seconds(cost, lengths, degree, gc_layers)
    longer = [lengths[0] + more, *lengths[1:]]
    # Fully overlapped FSDP traffic hides what is shorter than it.
    assert seconds(cost, longer, degree, gc_layers) >= now * (1 - 1e-12)
    assert seconds(cost, [*lengths, more], degree, gc_layers) >= now * (1 - 1e-12)
    unhidden = CostModel(cost.model, dataclasses.replace(cost.cluster, fsdp_overlap=0.0), cost.world_size)
    assert seconds(unhidden, longer, degree, gc_layers) > seconds(unhidden, lengths, degree, gc_layers)
    if gc_layers < cost.model.n_layers:
        assert seconds(unhidden, lengths, degree, gc_layers + 1) > seconds(unhidden, lengths, degree, gc_layers)


@given(costs, st.data())
@settings(max_examples=60, deadline=None)
def test_recomputation_saves_bytes(cost: CostModel, data: Any) -> None:
    degree = data.draw(st.sampled_from(cost.degrees()))
    tokens = data.draw(st.integers(1, 10**6))
    used = [cost.bytes(tokens, degree, k) for k in range(cost.model.n_layers)]
    assert all(b < a for a, b in pairwise(used))
    # The last layer to be recomputed saves nothing: it must be whole while it is.
    assert used[-2] > cost.bytes(tokens, degree, cost.model.n_layers) > cost.static_bytes()
    assert cost.bytes(tokens + 1, degree, 0) > used[0]


@given(costs, st.data())
@settings(max_examples=150, deadline=None)
def test_fewest_gc_layers_by_brute_force(cost: CostModel, data: Any) -> None:
    degree = data.draw(st.sampled_from(cost.degrees()))
    layers, budget = cost.model.n_layers, cost.cluster.memory_bytes
    longest = cost.longest_packs(degree)
    edge = float(data.draw(st.sampled_from(list(longest))))
    tokens = data.draw(st.integers(1, 300_000) | st.integers(-2, 2).map(lambda i: max(1, int(edge) + i)))
    fewest = cost.fewest_gc_layers(tokens, degree)
    # A pack that fits to the last byte may fall to either side by rounding.
    certainly = [k for k in range(layers + 1) if cost.bytes(tokens, degree, k) <= budget * (1 - 1e-12)]
    perhaps = [k for k in range(layers + 1) if cost.bytes(tokens, degree, k) <= budget * (1 + 1e-12)]
    assert fewest in {min(certainly, default=None), min(perhaps, default=None)}
    assert longest.shape == (layers + 1,)
    assert (np.diff(longest) >= 0).all()


def test_no_room_for_the_states() -> None:
    cost = CostModel(LLAMA, dataclasses.replace(CLUSTERS["h100-nvlink"], memory_bytes=1e9), 8)
    assert cost.fewest_gc_layers(1, 1) is None
    assert not cost.longest_packs(8).any()


@given(st.integers(1, 300), st.integers(1, 130))
@settings(max_examples=100, deadline=None)
def test_degrees_are_the_powers_of_two_that_divide_world_and_heads(world: int, heads: int) -> None:
    model: ModelSpec = dataclasses.replace(SMALL, heads=heads, kv_heads=1)
    degrees = CostModel(model, CLUSTERS["cpu-local"], world).degrees()
    assert degrees == [d for d in (2**i for i in range(10)) if world % d == 0 and heads % d == 0]

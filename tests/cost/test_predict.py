"""Seconds and bytes: against a hand calculation, and the properties that the planner leans on."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import tiny_cost

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
    last = 2 * layers * 256 * SMALL.intermediate  # the MLP's way down, which is not recomputed
    linear = 30 * (flops * (3 + again) - last * again + 2 * 256 * 1000 * 3) / 2
    attention = (55 + 210) * 2 * layers * 12 * 64 * (3.5 + again) / 3
    launches = layers * (3 + again) * (5 + 2 * 7)
    alone = linear + attention + launches
    assert seconds(CostModel(SMALL, cluster, 1), lengths, 1, 2) == pytest.approx(alone)
    few_rows = dataclasses.replace(cluster, half_rate_tokens=40.0)  # as if each product had 40 rows more
    more = alone + 40 * flops * (3 + again) / 2
    assert seconds(CostModel(SMALL, few_rows, 1), lengths, 1, 2) == pytest.approx(more)

    slow_again = dataclasses.replace(few_rows, recompute_scale=1.5)
    half = (30 + 40) * 2 / 6 * flops / 2 - 30 * last * 2 / 6 / 2 + (55 + 210) * 2 * layers * 12 * 64 * 2 / 6 / 3
    half = (half + layers * 2 / 6 * (5 + 2 * 7)) / 2
    assert seconds(CostModel(SMALL, slow_again, 1), lengths, 1, 2) == pytest.approx(more + half)

    # On four ranks: each has a quarter of the tokens and pairs, three quarters of the heads' bytes travel, twice a
    # layer and pass; FSDP gathers layers twice, the rest once, and reduces all once.
    sent = 30 / 4 * layers * (32 * 4 * 2 * (12 + 4)) * 3 / 4 * (2 + again) / 11
    latency = layers * 2 * (2 + again) * 13
    twice = layers * SMALL.layer_parameters(0)
    fsdp = (SMALL.parameters() * (4 + 4) + twice * 4) * 3 / 4 / 11 + (3 * layers + 2) * 13
    busy = (linear + attention) / 4 + launches + sent + latency
    assert seconds(CostModel(SMALL, cluster, 4), lengths, 4, 2) == pytest.approx(busy + fsdp)
    more = dataclasses.replace(cluster, recompute_scale=2.0)  # of compute alone: what travels again is the same
    repeated = seconds(CostModel(SMALL, more, 4), lengths, 4, 2) - busy - fsdp
    local = (30 * (flops - last) / 2 + (55 + 210) * 2 * layers * 12 * 64 / 3) / 4 + layers * (5 + 2 * 7)
    assert repeated == pytest.approx(local * 2 / 6)
    for overlap in (0.25, 1.0):
        hiding = dataclasses.replace(cluster, fsdp_overlap=overlap)
        expected = busy + max(0.0, fsdp - overlap * busy)
        assert seconds(CostModel(SMALL, hiding, 4), lengths, 4, 2) == pytest.approx(expected)


def test_degree_beyond_the_heads_by_hand() -> None:
    """12 heads at degree 8: Ulysses over 4, keys and values gathered over 2, two nodes."""
    cluster = dataclasses.replace(
        CLUSTERS["cpu-local"],
        devices_per_node=4,
        linear_flops_per_s=1e30,
        attention_flops_per_s=1e30,
        layer_overhead_s=0.0,
        document_overhead_s=0.0,
        link_bytes_per_s=11.0,
        node_bytes_per_s=8.0,
        collective_latency_s=13.0,
        node_latency_s=17.0,
        fsdp_overlap=1.0,
    )
    spent = CostModel(SMALL, cluster, 8).seconds(8, 3)
    passes = SMALL.n_layers * (2 + 3 / 6)
    exchanged = 32 * 4 * 2 * (12 + 4) * 3 / 4 / 11  # heads of 32, float32, within a node
    gathered = (2 - 1) * 32 * 4 * 2 * 4 / (8 / 4)  # four heads of keys and values, between the nodes
    assert spent.per_token == pytest.approx(passes * (exchanged + gathered) / 8)
    assert spent.fixed == pytest.approx(passes * (2 * 13 + 13 + 17))


def test_few_tokens_an_expert_are_slow() -> None:
    """Each expert's products have their own few rows, and all experts' weights are read."""
    cluster = dataclasses.replace(CLUSTERS["h100-nvlink"], layer_overhead_s=0.0)
    moe, dense = (CostModel(load_model_spec(name), cluster, 1) for name in ("qwen3-30b-a3b", "llama-3.1-8b"))

    def fixed_share(cost: CostModel) -> float:
        spent = cost.seconds(1, 0)
        return spent.fixed / (4096 * spent.per_token)

    assert fixed_share(moe) > 5 * fixed_share(dense)


def test_attention_takes_the_time_of_the_padded_heads() -> None:
    """Five products in backward to two in forward, all of the keys' head size; MFU counts what the model needs."""
    unit = dataclasses.replace(CLUSTERS["h100-nvlink"], attention_flops_per_s=1.0)
    for name, needed, spent in (("llama-3.1-8b", 128 + 128, 2 * 128), ("deepseek-v2-236b", 192 + 128, 2 * 192)):
        model = load_model_spec(name)
        products = 2 * model.n_layers * model.heads
        assert model.attention_flops_per_pair() == products * needed
        seconds = CostModel(model, unit, 1).seconds(1, model.n_layers).per_pair
        assert seconds == pytest.approx(products * spent * (1 + 1 + 2.5))


TINY = dataclasses.replace(SMALL, name="tiny", intermediate=500)  # layers of less than a million parameters


def test_a_model_of_small_layers_is_gathered_in_one_piece() -> None:
    assert SMALL.sharded_by_layer
    assert not TINY.sharded_by_layer
    slow = dataclasses.replace(CLUSTERS["cpu-local"], link_bytes_per_s=11.0, collective_latency_s=13.0)
    fsdp = TINY.parameters() * 3 / 4 * (4 + 4) / 11 + 2 * 13  # gathered once and reduced once
    assert CostModel(TINY, slow, 4).seconds(1, 0).fsdp == pytest.approx(fsdp)
    # All of it gathered, and at the end all gradients before and while they are reduced.
    assert CostModel(TINY, slow, 4).bytes(0, 1, 0) == pytest.approx(TINY.parameters() * (16 / 4 + 4 + 4 + 4))


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
    # One more recomputed layer keeps its input, and with few tokens may save nothing: from the next to last on,
    # backward has one layer whole in any case, beside the gradients of the one before.
    kept = cost.model.checkpoint_bytes_per_token(cost.cluster.dtype_bytes) * cost.cluster.activation_scale
    assert all(b <= a + kept * tokens / degree + 1e-6 * a for a, b in pairwise(used))
    assert used[0] >= used[-1] >= cost.bytes(0, 1, 0)
    assert cost.bytes(tokens + 1, degree, 0) >= used[0]
    if tokens > 10_000 * degree:  # no longer hidden by what is there without tokens
        assert all(b < a for a, b in pairwise(used[:-1]))
        assert cost.bytes(tokens + 1, degree, 0) > used[0]
    # The last layer to be recomputed may save nothing: it must be whole while it is.
    more = cost.bytes(tokens, degree, cost.model.n_layers) - used[-1]
    assert more <= kept * tokens / degree + 1e-6 * used[-1]


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
def test_degrees_are_the_powers_of_two_that_divide_the_world(world: int, heads: int) -> None:
    model: ModelSpec = dataclasses.replace(SMALL, heads=heads, kv_heads=1)
    cost = CostModel(model, CLUSTERS["cpu-local"], world)
    assert cost.degrees() == [d for d in (2**i for i in range(10)) if world % d == 0]
    for degree in cost.degrees():
        ulysses, gather = model.ulysses_degree(degree), model.gather_degree(degree)
        assert ulysses * gather == degree
        assert heads % ulysses == 0
        assert gather == 1 or heads % (2 * ulysses)  # Ulysses takes all that it can
        assert np.isfinite(cost.seconds(degree, 0).of(one(cost, [1000]))).all()


def test_a_plans_own_cost_model_is_known_again() -> None:
    """Also where the model has none of what is left out of the file."""
    cost = tiny_cost(2)
    again = CostModel.from_json(cost.model.to_json(), dataclasses.asdict(cost.cluster), 2)
    assert again == cost

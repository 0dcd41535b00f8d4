"""Algorithm 1: groups fit memory, contain the longest, and are the fastest of what fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import can_fit, tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.errors import HbpError
from hbp.planning.groups import best_setting, choose_groups, longest_capacity, longest_settings, typical_pack

LLAMA = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 32)


@pytest.mark.parametrize(
    ("longest", "limit", "capacity"),
    [
        (1, None, 64),
        (64, None, 64),
        (65, None, 128),
        (8192, None, 8192),
        (8193, None, 9216),
        (8193, 100, 100),
        (5, 7, 7),
    ],
)
def test_longest_capacity(longest: int, limit: int | None, capacity: int) -> None:
    assert longest_capacity(np.array([1, longest]), limit) == capacity


def test_typical_pack_is_the_average_of_samples_that_fit() -> None:
    cost = tiny_cost(4)
    work = typical_pack(cost, np.array([10, 30, 500]), 100)  # 10 and 30: 2.5 times over
    pairs = 10 * 11 / 2 + 30 * 31 / 2
    assert [x.item() for x in (work.documents, work.tokens, work.pairs)] == pytest.approx([5, 100, pairs * 2.5])
    assert typical_pack(cost, np.array([500]), 100).documents.item() == 1  # none fits: one document of that length


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4, 8, 12]),
    st.integers(50, 6000),
)
@settings(max_examples=100, deadline=None)
def test_groups_fit_memory_or_are_refused(lengths: list[int], world: int, tokens: int) -> None:
    cost, array = tiny_cost(world, tokens), np.array(lengths)
    longest = longest_capacity(array, None)
    budget = cost.cluster.memory_bytes
    if not can_fit(cost, longest):
        for choose in (choose_groups, longest_settings):
            with pytest.raises(HbpError, match=f"a pack of {longest} tokens needs") as caught:
                choose(cost, array, longest)
            assert "\n" not in str(caught.value)
        return
    groups = choose_groups(cost, array, longest)
    capacities = [group.capacity for group in groups]
    assert capacities == sorted(set(capacities))
    assert capacities[-1] == longest
    for group in groups:
        assert group.sp_degree in cost.degrees()
        assert cost.bytes(group.capacity, group.sp_degree, group.gc_layers) <= budget * (1 + 1e-9)
        if group.gc_layers:  # the fewest recomputed layers
            assert cost.bytes(group.capacity, group.sp_degree, group.gc_layers - 1) > budget * (1 - 1e-9)


def test_best_setting_is_the_fastest_of_all_degrees() -> None:
    lengths = generate("mix-128k", 2000, 0)
    for capacity in (4096, 32768, 131072):
        choice = best_setting(LLAMA, lengths, capacity)
        assert choice is not None
        pack = typical_pack(LLAMA, lengths, capacity)
        rivals = []
        for degree in LLAMA.degrees():
            gc_layers = LLAMA.fewest_gc_layers(capacity, degree)
            if gc_layers is not None:
                rivals.append(float(LLAMA.seconds(degree, gc_layers).of(pack)[0]) * degree / capacity)
        assert len(rivals) > 1
        assert choice.seconds_per_token == pytest.approx(min(rivals))


def test_no_memory_at_all() -> None:
    cost = dataclasses.replace(LLAMA, cluster=dataclasses.replace(LLAMA.cluster, memory_bytes=0.0))
    assert best_setting(cost, np.array([5]), 64) is None
    with pytest.raises(HbpError, match=r"over the budget of 0\.00 GiB"):
        choose_groups(cost, np.array([5]), 64)


def test_long_data_get_a_group_without_communication() -> None:
    """Stage 2: what fits a rank of the longest group's packs alone needs no SP."""
    groups = choose_groups(LLAMA, generate("mix-128k", 5000, 0), 131072)
    assert groups[-1].capacity == 131072
    assert groups[-1].sp_degree > 1
    assert groups[0].sp_degree == 1
    assert 131072 // groups[-1].sp_degree in {group.capacity for group in groups}


def test_one_short_sample_needs_one_group_or_few() -> None:
    groups = choose_groups(tiny_cost(4), np.array([5]), 64)
    assert groups[-1].capacity == 64
    assert all(group.sp_degree == 1 and group.gc_layers == 0 for group in groups)

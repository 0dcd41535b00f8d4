"""Algorithm 1: groups fit memory, contain the longest, and are the fastest of what fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import can_fit, tiny_cost

from hbp.cost.cluster import CLUSTERS, GIB
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel, Work
from hbp.data.length_sets import generate
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.paper.groups import published_candidates, published_groups
from hbp.planning.planner import make_plan
from hbp.planning.settings import SamplesByLength, best_setting, group_seconds, longest_capacity, longest_settings

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


def test_samples_by_length_sum_a_range_of_lengths() -> None:
    cost = tiny_cost(4)
    lengths = np.array([500, 30, 10, 20, 20])
    samples = SamplesByLength(cost, lengths)
    for above, up_to in ((0, 1000), (10, 30), (10, 29), (9, 10), (600, 700)):
        chosen = lengths[(lengths > above) & (lengths <= up_to)]
        total, longest = samples.between(above, up_to)
        for name in ("documents", "tokens", "pairs"):
            assert getattr(total, name).item() == pytest.approx(getattr(cost.work(chosen), name).sum())
        assert longest.tokens.item() == max(chosen, default=0)


def test_group_seconds_are_those_of_packs_dealt_evenly() -> None:
    """Of equal samples that fill their packs and slots, they are what the plan will be predicted to take."""
    lengths = np.full(64, 2048)
    for degree in (1, 2, 8):
        group = Group(8192, degree, 3)
        plan = make_plan(lengths, LLAMA, strategy="bfd", static=group, global_batch_tokens=8192)
        total, longest = SamplesByLength(LLAMA, lengths).between(0, 8192)
        if 16 % (32 // degree) == 0:
            predicted = plan.micro_step_seconds().sum()
            assert group_seconds(LLAMA, group, total, longest) == pytest.approx(predicted, rel=1e-6)


def test_group_seconds_wait_for_the_longest_sample() -> None:
    lengths = np.array([100_000] + [500] * 40)
    total, longest = SamplesByLength(LLAMA, lengths).between(0, 131072)
    group = Group(131072, 1, 32)
    alone = LLAMA.seconds(1, 32).of(LLAMA.work(np.array([100_000])))[0]
    assert group_seconds(LLAMA, group, total, longest) == pytest.approx(alone)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.sampled_from([1, 2, 4, 8, 12]),
    st.integers(50, 6000),
)
@cases(100)
def test_groups_fit_memory_or_are_refused(lengths: list[int], world: int, tokens: int) -> None:
    cost, array = tiny_cost(world, tokens), np.array(lengths)
    longest = longest_capacity(array, None)
    budget = cost.cluster.memory_bytes
    if not can_fit(cost, longest):
        for choose in (published_groups, longest_settings):
            with pytest.raises(HbpError, match=f"a pack of {longest} tokens needs") as caught:
                choose(cost, array, longest)
            assert "\n" not in str(caught.value)
        return
    groups = published_groups(cost, array, longest)
    capacities = [group.capacity for group in groups]
    assert capacities == sorted(set(capacities))
    assert capacities[-1] == longest
    for group in groups:
        assert group.sp_degree in cost.degrees()
        assert cost.bytes(group.capacity, group.sp_degree, group.gc_layers) <= budget * (1 + 1e-9)
        if group.gc_layers:  # the fewest recomputed layers
            assert cost.bytes(group.capacity, group.sp_degree, group.gc_layers - 1) > budget * (1 - 1e-9)


def test_every_degree_is_tried_and_the_fastest_comes_first() -> None:
    lengths = generate("mix-128k", 2000, 0)
    choices = longest_settings(LLAMA, lengths, 131072)
    assert len(choices) > 1
    assert [c.seconds for c in choices] == sorted(c.seconds for c in choices)
    assert {c.group.sp_degree for c in choices} == {
        d for d in LLAMA.degrees() if LLAMA.fewest_gc_layers(131072, d) is not None
    }


def test_best_setting_is_the_fastest_a_token_of_all_degrees() -> None:
    samples = SamplesByLength(LLAMA, generate("mix-128k", 5000, 0))
    total, _ = samples.between(0, 65536)
    share = 65536 / total.tokens[0]
    rates = {}
    for degree in LLAMA.degrees():
        gc_layers = LLAMA.fewest_gc_layers(65536, degree)
        if gc_layers is not None:
            pack = Work(total.documents * share, total.tokens * share, total.pairs * share)
            rates[degree] = float(LLAMA.seconds(degree, gc_layers).of(pack)[0]) * degree / 65536
    found = best_setting(LLAMA, samples, 65536)
    assert found is not None
    assert found.seconds_per_token == pytest.approx(min(rates.values()))
    assert rates[found.group.sp_degree] == min(rates.values())
    assert best_setting(tiny_cost(2, 500), SamplesByLength(LLAMA, np.array([5])), 100_000) is None


def test_published_groups_are_stage_two_of_the_candidates() -> None:
    lengths = generate("mix-128k", 5000, 0)
    candidates = published_candidates(LLAMA, lengths, 131072)
    assert [c.group.capacity for c in candidates] == [8192, 16384, 32768, 65536, 131072]
    best = min(candidates, key=lambda c: c.seconds_per_token).group
    last = candidates[-1].group
    expected = {best.capacity, last.capacity, best.capacity // best.sp_degree}
    if last.capacity // last.sp_degree >= best.capacity:
        expected.add(last.capacity // last.sp_degree)
    groups = published_groups(LLAMA, lengths, 131072)
    assert {group.capacity for group in groups} == expected
    assert all(group.sp_degree == 1 for group in groups if group not in (best, last))


def test_memory_as_in_the_paper_gives_its_layers_and_its_groups() -> None:
    """With activations as large as the paper's software has, its Table 4 and the groups of its Table 11 come out."""
    tight = dataclasses.replace(LLAMA, cluster=dataclasses.replace(LLAMA.cluster, memory_bytes=28 * GIB))
    published = {(16384, 1): 28, (32768, 8): 8, (65536, 8): 24, (131072, 8): 29}
    for (tokens, degree), layers in published.items():
        assert tight.fewest_gc_layers(tokens, degree) == pytest.approx(layers, abs=2)
    groups = published_groups(tight, generate("tulu3-longcite", 20000, 0), 131072)
    assert {(16384, 1), (131072, 8)} <= {(group.capacity, group.sp_degree) for group in groups}


def test_no_memory_at_all() -> None:
    cost = dataclasses.replace(LLAMA, cluster=dataclasses.replace(LLAMA.cluster, memory_bytes=0.0))
    with pytest.raises(HbpError, match=r"over the budget of 0\.00 GiB"):
        published_groups(cost, np.array([5]), 64)


def test_long_data_get_a_group_without_communication() -> None:
    """Stage 2: what fits a rank of the longest group's packs alone needs no SP."""
    groups = published_groups(LLAMA, generate("mix-128k", 5000, 0), 131072)
    assert groups[-1].capacity == 131072
    assert groups[-1].sp_degree > 1
    assert groups[0].sp_degree == 1


def test_one_short_sample_needs_no_sp() -> None:
    groups = published_groups(tiny_cost(4), np.array([5]), 64)
    assert groups[-1].capacity == 64
    assert all(group.sp_degree == 1 and group.gc_layers == 0 for group in groups)

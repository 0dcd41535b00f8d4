"""The search for groups: what it finds fits, is exact for its own sum, and no worse than Algorithm 1."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.plan import Group
from hbp.planning.mixed import groups as group_search
from hbp.planning.mixed.groups import Trial, best_groups, candidate_capacities, search_groups
from hbp.planning.paper.groups import published_groups
from hbp.planning.settings import SamplesByLength

LLAMA = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 32)


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([None, 3000]),
)
@cases(15)
def test_groups_fit_and_hold_every_sample(lengths: list[int], world: int, limit: int | None) -> None:
    cost = tiny_cost(world, 3000)
    groups = search_groups(cost, np.array(lengths), max(lengths), limit)
    capacities = [group.capacity for group in groups]
    assert capacities == sorted(set(capacities))
    assert capacities[-1] >= max(lengths)
    assert limit is None or capacities[-1] <= limit
    needed = [group.sp_degree > 1 for group in groups]
    assert needed == sorted(needed) and not needed[0], "what needs no SP gets none"
    for group in groups:
        assert world % group.sp_degree == 0
        assert cost.bytes(group.capacity, group.sp_degree, group.gc_layers) <= cost.cluster.memory_bytes * (1 + 1e-9)


@pytest.mark.parametrize("filled", [True, False])
def test_the_path_is_the_cheapest_of_all_sets(filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every subset of a few candidates and every setting of each, by the same sum."""
    monkeypatch.setattr(group_search, "GROUP_SAVES", 0.0)
    lengths = generate("mix-128k", 3000, 0)
    longest = int(lengths.max())
    samples = SamplesByLength(LLAMA, lengths)
    capacities = np.array([8192, 24_000, 65_536, longest])
    options = {int(c): group_search._settings(LLAMA, int(c))[:3] for c in capacities}
    price = min(group_search._price(LLAMA, g) for groups in options.values() for g in groups) if filled else 0.0

    def seconds(groups: tuple[Group, ...]) -> float:
        total, before = 0.0, -1
        for group in groups:
            j = int(np.flatnonzero(capacities == group.capacity)[0])
            total += group_search._seconds_after(LLAMA, group, samples, capacities, j, price, filled)[before + 1]
            before = j
        return total

    every = []
    for n in range(1, 5):
        for chosen in itertools.combinations(capacities.tolist(), n):
            if chosen[-1] == longest:
                sets = itertools.product(*(options[c] for c in chosen))
                every += [groups for groups in sets if group_search._communicates_if_needed(groups, True)]
    found = best_groups(LLAMA, samples, longest, options, alone=True, filled=filled)
    assert seconds(found) == pytest.approx(min(map(seconds, every)))


def test_candidates_are_the_longest_packs_of_every_setting() -> None:
    found = candidate_capacities(LLAMA, 131072, None)
    assert found == sorted(set(found))
    assert 131072 in found
    for degree in (1, 2, 8):
        for most in LLAMA.longest_packs(degree)[::2]:
            if 256 <= most <= max(131072, LLAMA.longest_packs(1)[-1]):
                assert int(most) // 64 * 64 in found
    assert max(candidate_capacities(LLAMA, 8192, 16384)) <= 16384


def test_slow_networks_want_longer_packs() -> None:
    """FSDP's traffic has to hide behind something."""
    lengths = generate("short-32k", 20_000, 0)
    slow = dataclasses.replace(LLAMA, cluster=CLUSTERS["h100-ethernet"])
    fast_groups, slow_groups = (search_groups(c, lengths, int(lengths.max()), None) for c in (LLAMA, slow))
    assert slow_groups[-1].capacity > 2 * fast_groups[-1].capacity


def test_no_slower_than_algorithm_1() -> None:
    lengths = generate("tulu3-longcite", 20_000, 0)
    longest = int(lengths.max())
    trial = Trial(LLAMA, SamplesByLength(LLAMA, lengths), 32)
    found = search_groups(LLAMA, lengths, longest, None)
    assert trial.price(found) < trial.price(published_groups(LLAMA, lengths, longest))


def test_no_micro_step_exceeds_the_global_batch_asked_for() -> None:
    lengths = generate("short-32k", 20_000, 0)
    longest = int(lengths.max())
    for batch in (2 * 32 * longest, 32 * longest):
        groups = search_groups(LLAMA, lengths, longest, None, batch)
        assert all(32 // group.sp_degree * group.capacity <= batch for group in groups)
    small = search_groups(LLAMA, lengths, longest, None, 8 * longest)  # packs of the longest sample have to be
    assert all(32 // g.sp_degree * g.capacity <= 8 * longest or g.capacity == longest for g in small)


def test_samples_that_fit_degree_1_do_not_communicate() -> None:
    """Where a shorter SP group would be faster than recomputing more layers without SP."""
    slow = CostModel(LLAMA.model, CLUSTERS["a100-pcie"], 256)
    lengths = generate("mix-32k", 1_000_000, 0)
    groups = search_groups(slow, lengths, int(lengths.max()), None)
    needed = [group.sp_degree > 1 for group in groups]
    assert needed == sorted(needed)


@pytest.mark.parametrize("short_of", [1, 30_000])
def test_a_batch_just_below_the_longest_sample_is_not_given_up(short_of: int) -> None:
    lengths = generate("tulu3-longcite", 20_000, 0)
    longest = int(lengths.max())
    groups = search_groups(LLAMA, lengths, longest, None, longest - short_of)
    assert groups[-1].sp_degree == 32
    assert all(32 // group.sp_degree * group.capacity <= longest for group in groups)

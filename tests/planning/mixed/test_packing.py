"""A window's packs: nothing lost, whole micro-steps, sorted by time, and mixed degrees laid side by side."""

from __future__ import annotations

from collections import Counter

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
from hbp.planning.mixed import packing, tail
from hbp.planning.mixed.open_packs import Packed, tile_by_seconds
from hbp.planning.mixed.packing import pack_histogram
from hbp.planning.packs import Int, PackCosts

GROUPS = (Group(64, 1, 0), Group(256, 2, 1), Group(1024, 4, 2))
ALIKE = (Group(64, 1, 0), Group(256, 2, 0), Group(512, 2, 2), Group(700, 2, 3), Group(1024, 4, 2))
LONGEST = GROUPS[-1].capacity

ADVERSARIAL: dict[str, list[int]] = {
    "all equal": [50] * 60,
    "all longest": [1024] * 7,
    "one giant": [1024] + [10] * 200,
    "one giant alone": [1000],
    "powers of two ± 1": [2**k + e for k in range(2, 10) for e in (-1, 0, 1)] * 3,
    "one sample": [3],
    "fewer packs than ranks": [60, 61],
    "no shorts to fill with": [600] * 5 + [200] * 7,
    "just over half": [33] * 50 + [129] * 9 + [513] * 3,
    "ones": [1] * 500,
}


def pack(lengths: list[int], groups: tuple[Group, ...], world: int, *, last: bool, seed: int = 0) -> tuple[Packed, Int]:
    """Packs and the histogram of what waits; every invariant is checked on the way."""
    counts = np.bincount(np.array(lengths), minlength=LONGEST + 1).astype(np.int64)
    cost = tiny_cost(world)
    costs = PackCosts(cost, LONGEST)
    packed = pack_histogram(counts, groups, costs, world, np.random.default_rng(seed), last=last)
    waiting = Counter({int(n): int(counts[n]) for n in np.flatnonzero(counts)})
    assert Counter(packed.taken.tolist()) + waiting == Counter(lengths)
    assert (counts >= 0).all()
    n_packs = len(packed.group)
    for p in range(n_packs):
        group = packed.groups[packed.group[p]]
        inside = packed.taken[packed.pack_of == p]
        assert 0 < inside.sum() <= group.capacity
        alone = cost.seconds(group.sp_degree, group.gc_layers).of(cost.work(inside, np.array([0, len(inside)])))
        assert packed.seconds[p] == pytest.approx(alone[0])
    check_tiling(
        packed.micro_step, packed.rank_start, np.array([packed.groups[g].sp_degree for g in packed.group]), world
    )
    return packed, counts


def check_tiling(micro: Int, start: Int, degree: Int, world: int) -> list[int]:
    """Ranks used by each micro-step."""
    used: dict[int, set[int]] = {}
    for m, s, d in zip(micro.tolist(), start.tolist(), degree.tolist(), strict=True):
        ranks = set(range(s, s + d))
        assert s % d == 0
        assert ranks <= set(range(world))
        here = used.setdefault(m, set())
        assert not here & ranks
        here |= ranks
    assert sorted(used) == list(range(len(used)))
    return [len(used[m]) for m in range(len(used))]


LENGTHS = st.lists(st.integers(1, 64) | st.integers(1, 300) | st.integers(1, LONGEST), min_size=1, max_size=150)


@given(lengths=LENGTHS, world=st.sampled_from([4, 8]), groups=st.sampled_from([GROUPS, GROUPS[1:], GROUPS[2:], ALIKE]))
@cases(60)
def test_the_last_window_places_everything(lengths: list[int], world: int, groups: tuple[Group, ...]) -> None:
    packed, waiting = pack(lengths, groups, world, last=True)
    assert not waiting.any()
    assert packed.groups[: len(groups)] == groups
    for group in packed.groups[len(groups) :]:
        assert group.capacity <= groups[-1].capacity
        assert any(group.sp_degree == g.sp_degree and group.gc_layers <= g.gc_layers for g in groups)


@given(lengths=LENGTHS, world=st.sampled_from([4, 8]), groups=st.sampled_from([GROUPS, ALIKE]), seed=st.integers(0, 3))
@cases(80)
def test_an_inner_window_leaves_no_rank_idle(
    lengths: list[int], world: int, groups: tuple[Group, ...], seed: int
) -> None:
    packed, _ = pack(lengths, groups, world, last=False, seed=seed)
    assert packed.groups[: len(groups)] == groups
    degree = np.array([packed.groups[g].sp_degree for g in packed.group], np.int64)
    assert set(check_tiling(packed.micro_step, packed.rank_start, degree, world)) <= {world}
    for m in range(int(packed.micro_step.max(initial=-1)) + 1):
        assert len(set(degree[packed.micro_step == m].tolist())) == 1


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("lengths", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_sets(lengths: list[int], last: bool) -> None:
    pack(lengths, GROUPS, 8, last=last)


def test_whole_micro_steps_run_from_slow_to_fast() -> None:
    """Neighbours in time share a micro-step, so the slowest of one is no slower than the fastest of the one before."""
    lengths = np.random.default_rng(0).integers(1, 300, 400).tolist()
    packed, _ = pack(lengths, GROUPS, 4, last=False)
    assert len(set(packed.group.tolist())) > 1
    for g in set(packed.group.tolist()):
        own = packed.group == g
        order = np.lexsort((packed.rank_start[own], packed.micro_step[own]))
        assert (np.diff(packed.seconds[own][order]) <= 1e-12).all()


def test_long_packs_are_filled_to_the_last_token_with_short_samples() -> None:
    packed, _ = pack([600] * 2 + [3, 2, 1] * 300, GROUPS, 8, last=True)
    long = packed.group == 2
    loads = np.bincount(packed.pack_of, weights=packed.taken, minlength=len(packed.group))
    assert loads[long].tolist() == [LONGEST] * 2


LLAMA = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 64)
FEW = (Group(11_328, 1, 0), Group(87_488, 8, 0), Group(107_776, 8, 7), Group(131_072, 16, 0))


def few_micro_steps(lengths: Int, groups: tuple[Group, ...] = FEW) -> Packed:
    counts = np.bincount(lengths, minlength=131_073).astype(np.int64)
    return pack_histogram(counts, groups, PackCosts(LLAMA, 131_072), 64, np.random.default_rng(0), last=True)


def waiting(packed: Packed) -> float:
    """Share of all rank-seconds that ranks of packs with SP wait or idle."""
    degree = np.array([g.sp_degree for g in packed.groups])[packed.group]
    slowest = np.zeros(int(packed.micro_step.max()) + 1)
    np.maximum.at(slowest, packed.micro_step, packed.seconds)
    long = np.isin(packed.micro_step, packed.micro_step[degree > 1])
    busy = float((packed.seconds * degree)[long].sum())
    return float((slowest[np.unique(packed.micro_step[long])].sum() * 64 - busy) / (slowest.sum() * 64))


@pytest.mark.parametrize("name", ["tulu3-longcite", "openhermes-longcite"])
def test_few_long_packs_finish_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting cannot bring together packs of documents that differ, where one micro-step takes many of them."""
    lengths = generate(name, 60_000, 0)
    found = few_micro_steps(lengths)
    monkeypatch.setattr(packing, "WAITS", 1.0)
    sorted_alone = few_micro_steps(lengths)
    assert waiting(found) < 0.6 * waiting(sorted_alone)
    assert found.micro_step.max() <= sorted_alone.micro_step.max() + 1


def test_groups_of_one_degree_share_the_micro_step_at_their_boundary() -> None:
    """Nine documents for eight places: the ninth is not alone among packs of short samples."""
    lengths = np.array([100_000] * 9 + [80_000] * 15 + [500] * 200_000)
    packed = few_micro_steps(lengths)
    long = np.array([g.sp_degree for g in packed.groups])[packed.group] == 8
    holds = [set(packed.taken[packed.pack_of == p].tolist()) & {80_000, 100_000} for p in np.flatnonzero(long)]
    assert len(holds) == 24
    assert all(holds)


def test_no_pack_grows_beyond_the_micro_steps_of_the_other_groups() -> None:
    """A user's global batch bounds these; only packs of the longest samples may exceed it."""
    groups = (Group(11_328, 1, 0), Group(60_000, 8, 0), Group(131_072, 8, 12))
    lengths = np.concatenate([np.linspace(20_000, 60_000, 32).astype(np.int64), [131_072], np.full(100_000, 500)])
    packed = few_micro_steps(lengths, groups)
    tokens = np.bincount(packed.pack_of, packed.taken)
    with_longest = np.isin(packed.micro_step, packed.micro_step[packed.pack_of[packed.taken == 131_072]])
    assert tokens[~with_longest & (packed.group != 0)].max() <= 11_328 * 8
    assert (np.bincount(packed.micro_step[~with_longest], tokens[~with_longest]) <= 11_328 * 64).all()


SLOW = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-ethernet"], 64)
HIDING = (Group(74_240, 1, 29), Group(111_872, 4, 21), Group(132_544, 8, 12))
"""Packs so long that FSDP's traffic of a slow network hides behind them."""


def run_seconds(lengths: Int, groups: tuple[Group, ...] = HIDING) -> float:
    counts = np.bincount(lengths, minlength=131_073).astype(np.int64)
    packed = pack_histogram(counts, groups, PackCosts(SLOW, 131_072), 64, np.random.default_rng(0), last=True)
    slowest = np.zeros(int(packed.micro_step.max()) + 1)
    np.maximum.at(slowest, packed.micro_step, packed.seconds)
    return float(slowest.sum())


def test_few_tokens_at_the_end_share_several_micro_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone they would wait for FSDP's traffic: five seconds for a two-hundredth of the tokens.

    The two full micro-steps take longer than the traffic that they hide, so a third of all hides it too.
    """
    groups = (Group(88_000, 1, 30), *HIDING[1:])
    lengths = np.full(64 * 88_000 * 2 // 500 + 100, 500)
    shared = run_seconds(lengths, groups)
    monkeypatch.setattr(tail, "UNEVEN", 1.0)
    assert shared < 0.9 * run_seconds(lengths, groups)


def test_samples_that_outweigh_a_long_pack_have_the_next_group_as_home(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.concatenate([np.linspace(20_000, 130_000, 300).astype(np.int64), np.full(100_000, 500)])
    at_home_further_up = run_seconds(lengths)
    monkeypatch.setattr(packing, "_even_length", lambda counts: len(counts))
    assert at_home_further_up < 0.98 * run_seconds(lengths)


@given(
    packs=st.lists(
        st.tuples(st.floats(0.1, 10.0) | st.sampled_from([1.0, 2.0]), st.sampled_from([1, 2, 4])), max_size=40
    ),
    world=st.sampled_from([4, 8, 12]),
)
@cases(200)
def test_mixed_degrees_side_by_side(packs: list[tuple[float, int]], world: int) -> None:
    """Aligned, no rank twice; no pack waits that idle ranks could hold, none is slower than a micro-step before it."""
    seconds, degree = np.array([s for s, _ in packs]), np.array([d for _, d in packs], np.int64)
    micro, start = tile_by_seconds(seconds, degree, world)
    used = check_tiling(micro, start, degree, world)
    for m, busy in enumerate(used):
        later = micro > m
        assert not (degree[later] <= world - busy).any()
        assert seconds[later].max(initial=0.0) <= seconds[micro == m].max()


def test_mixed_degrees_by_hand() -> None:
    micro, start = tile_by_seconds(np.array([5.0, 4.0, 3.0, 1.0]), np.array([1, 4, 2, 1]), 4)
    assert micro.tolist() == [0, 1, 0, 0]
    assert start.tolist() == [2, 0, 0, 3]

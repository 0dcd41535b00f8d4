"""Hierarchical packing: home groups, and GreedyFill from the largest group down."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.plan import Group
from hbp.planning.paper.packing import hierarchical_packs


def pack(lengths: list[int], capacities: list[int], ids: list[int] | None = None) -> list[tuple[int, list[int]]]:
    """(group, sample ids) of each pack; the invariants are checked on the way."""
    chosen = np.arange(len(lengths)) if ids is None else np.array(ids, np.int64)
    groups = [Group(capacity, 2**i, 0) for i, capacity in enumerate(capacities)]
    packs = hierarchical_packs(np.array(lengths, np.int32), chosen, groups, np.random.default_rng(0))
    assert sorted(packs.sample_ids.tolist()) == sorted(chosen.tolist())
    result = []
    for p, (start, end) in enumerate(pairwise(packs.offsets.tolist())):
        members = packs.sample_ids[start:end].tolist()
        group = int(packs.group[p])
        assert 0 < sum(lengths[i] for i in members) <= capacities[group]
        longest = max(lengths[i] for i in members)
        assert group == next(g for g, capacity in enumerate(capacities) if longest <= capacity)  # its smallest group
        result.append((group, members))
    return result


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=80),
    st.sets(st.integers(1, 399), max_size=3),
    st.data(),
)
@cases(100)
def test_every_sample_once_in_a_pack_of_its_longest_members_group(
    lengths: list[int], smaller: set[int], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    pack(lengths, [*sorted(smaller), 400], ids)


def test_room_is_filled_with_the_longest_shorter_samples() -> None:
    packs = pack([70, 28, 15, 10, 2], [30, 100])
    assert (1, [0, 1, 4]) in [(group, sorted(members)) for group, members in packs]
    assert (0, [2, 3]) in [(group, sorted(members)) for group, members in packs]


def test_the_largest_group_fills_first_and_leaves_the_rest_to_the_next() -> None:
    lengths = [90, 45, 10, 5, 5]
    packs = [(group, sorted(lengths[i] for i in members)) for group, members in pack(lengths, [5, 50, 100])]
    assert sorted(packs) == [(0, [5]), (1, [5, 45]), (2, [10, 90])]


def test_a_capacity_itself_is_its_groups_own() -> None:
    assert sorted(pack([50, 51, 100], [50, 100])) == [(0, [0]), (1, [1]), (1, [2])]


def test_an_empty_group_makes_no_packs() -> None:
    assert {group for group, _ in pack([60, 70, 80], [10, 20, 100])} == {2}
    assert pack([1, 2], [10], []) == []

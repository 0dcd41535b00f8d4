"""Order of the steps: short groups first, then every group spread evenly."""

from __future__ import annotations

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.planning.paper.curriculum import default_short_steps, order_steps


def run(kinds: list[int], short: set[int], short_steps: int, seed: int = 0) -> list[int]:
    """Kinds in the order of the run."""
    position = order_steps(np.array(kinds), short, short_steps, np.random.default_rng(seed))
    assert sorted(position.tolist()) == list(range(len(kinds)))
    result = np.empty(len(kinds), int)
    result[position] = kinds
    return result.tolist()


@pytest.mark.parametrize(("steps", "short"), [(0, 0), (9, 0), (10, 1), (999, 99), (5000, 500), (10**6, 500)])
def test_default_is_500_but_at_most_a_tenth(steps: int, short: int) -> None:
    assert default_short_steps(steps) == short


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.sets(st.integers(0, 3)),
    st.integers(0, 70),
    st.integers(0, 9),
)
@cases(100)
def test_the_first_steps_are_short(kinds: list[int], short: set[int], short_steps: int, seed: int) -> None:
    order = run(kinds, short, short_steps, seed)
    first = min(short_steps, sum(kind in short for kind in kinds))
    assert all(kind in short for kind in order[:first])
    assert sorted(order) == sorted(kinds)


def test_afterwards_every_group_is_spread_evenly() -> None:
    """The n-th of m steps falls into the n-th of m parts of the run, so counts of any prefix are near their share."""
    kinds = [0] * 600 + [1] * 300 + [2] * 100
    order = np.array(run(kinds, {0}, 0))
    for kind, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
        ahead = np.cumsum(order == kind) - share * np.arange(1, 1001)
        assert np.abs(ahead).max() <= 3
    late = np.array(run(kinds, {0}, 100))
    assert (late[:100] == 0).all()
    rest = late[100:]
    assert np.abs(np.cumsum(rest == 2) - np.arange(1, 901) / 9).max() <= 12  # 100 short steps of 900 came out early


def test_steps_of_one_group_are_shuffled_by_the_seed() -> None:
    positions = [order_steps(np.zeros(50, int), {0}, 10, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert positions[0] == positions[1] != positions[2]
    assert positions[0] != list(range(50))

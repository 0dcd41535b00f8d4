"""Order of micro-steps: every stretch holds every group's share, steps are of the asked size, short ones come first."""

from __future__ import annotations

import numpy as np
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.planning.mixed.order import cut_steps, interleave, shorts_first


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 20))
@cases(80)
def test_every_stretch_holds_each_kind_s_share(counts: list[int], seed: int) -> None:
    """Within one micro-step for two kinds; each kind more may push the others of a share p by p.

    Between any two times of the window a kind's count is within 1 of its due. A stretch counts micro-steps, not time,
    so its own length is off by the others' ± 1 too: |count − due| ≤ 1 + p (kinds − 2).
    """
    kind = np.repeat(np.arange(len(counts)), counts)
    order = interleave(kind, np.zeros(len(kind), np.int64), np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(kind)))
    for k, count in enumerate(counts):
        share = count / len(kind)
        ahead = np.concatenate([[0], np.cumsum(kind[order] == k)]) - share * np.arange(len(kind) + 1)
        assert ahead.max() - ahead.min() <= max(0.0, 1 + share * (len(counts) - 2)) + 1e-9


@given(
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=60), seed=st.integers(0, 9)
)
@cases(60)
def test_windows_follow_each_other(places: list[tuple[int, int]], seed: int) -> None:
    window, kind = (np.array(x, np.int64) for x in zip(*places, strict=True))
    order = interleave(kind, window, np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(places)))
    assert (np.diff(window[order]) >= 0).all()


def test_the_seed_decides_the_order() -> None:
    kind, window = np.zeros(50, np.int64), np.zeros(50, np.int64)
    orders = [interleave(kind, window, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_steps_are_cut_by_the_middle_of_micro_steps() -> None:
    step = cut_steps(np.array([2, 0, 1]), np.array([4.0, 4.0, 4.0]), 8.0)
    assert step.tolist() == [0, 1, 0]
    # A micro-step larger than the batch takes a step of its own, and numbers leave no gap.
    assert cut_steps(np.array([0, 1, 2]), np.array([1.0, 90.0, 1.0]), 10.0).tolist() == [0, 1, 2]


@given(tokens=st.lists(st.integers(1, 100), min_size=1, max_size=60), batch=st.integers(1, 500), seed=st.integers(0, 9))
@cases(80)
def test_steps_hold_the_batch_to_within_one_micro_step(tokens: list[int], batch: int, seed: int) -> None:
    amounts = np.array(tokens, np.float64)
    order = np.random.default_rng(seed).permutation(len(tokens))
    step = cut_steps(order, amounts, batch)
    run = step[order]
    assert run[0] == 0
    assert set(np.diff(run).tolist()) <= {0, 1}
    # Few steps are cut evenly, so that there are as many as the batch asks for: then they hold their share of all.
    share = max(batch, amounts.sum() / (run[-1] + 1))
    assert np.bincount(step, weights=amounts).max() <= share + amounts.max()


def test_short_micro_steps_come_first() -> None:
    order, tokens = np.array([0, 1, 2, 3]), np.full(4, 4.0)
    short = np.array([False, True, False, True])
    for steps, expected in ((0, [0, 1, 2, 3]), (1, [1, 0, 2, 3]), (2, [1, 3, 0, 2]), (9, [1, 3, 0, 2])):
        found, used = shorts_first(order, short, tokens, 4.0, steps)
        assert (found.tolist(), used) == (expected, steps)
    found, used = shorts_first(order, np.ones(4, bool), tokens, 4.0, 2)
    assert (found.tolist(), used) == ([0, 1, 2, 3], 2)
    assert shorts_first(np.arange(40), np.arange(40) % 2 == 0, np.full(40, 4.0), 4.0, None)[1] == 4  # a tenth

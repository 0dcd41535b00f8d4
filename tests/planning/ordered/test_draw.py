"""Which samples a step holds: the shuffle's own, or every octave of length dealt evenly."""

from __future__ import annotations

import itertools

import numpy as np
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from hbp.planning.ordered.draw import cut_shuffle, deal_evenly

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=200).map(lambda found: np.array(found, np.int32))


@given(LENGTHS, st.integers(1, 30))
@cases(100)
def test_the_shuffle_is_cut_into_equal_parts(lengths: np.ndarray, n_steps: int) -> None:
    step = cut_shuffle(lengths, n_steps)
    assert np.diff(step, prepend=0).min() >= 0
    assert step[0] == 0
    assert len(np.unique(step)) == step[-1] + 1 <= n_steps
    part, longest = lengths.sum() / n_steps, lengths.max()
    assert np.bincount(step, lengths).max() <= part + longest
    if longest <= part:
        assert step[-1] == n_steps - 1
        assert np.bincount(step, lengths).min() >= part - longest


@given(LENGTHS, st.integers(1, 30), st.integers(0, 9))
@cases(100)
def test_the_longest_octave_is_dealt_evenly(lengths: np.ndarray, n_steps: int, seed: int) -> None:
    step = deal_evenly(lengths, np.full(n_steps, lengths.sum() / n_steps), 1e9, np.random.default_rng(seed))
    assert step.shape == lengths.shape
    assert ((step >= 0) & (step < n_steps)).all()
    octave = np.frexp(lengths)[1]
    own = octave == octave.max()
    tokens = np.bincount(step[own], lengths[own], n_steps)
    assert tokens.max() - tokens.min() <= lengths.max()


def test_every_octave_is_dealt_evenly_where_there_are_many() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1.5, 50_000).astype(np.int32) + 1, 30_000)
    step = deal_evenly(lengths, np.full(20, lengths.sum() / 20), 1e9, rng)
    for octave in np.unique(np.frexp(lengths)[1]):
        own = np.frexp(lengths)[1] == octave
        tokens = np.bincount(step[own], lengths[own], 20)
        assert tokens.max() - tokens.min() <= 4 * 2**octave, octave
    assert np.ptp(np.bincount(step, lengths)) <= 64


def test_a_step_gets_what_it_has_room_for() -> None:
    lengths, room = np.full(1000, 10, np.int32), np.array([6000.0, 3000.0, 1000.0, 0.0])
    step = deal_evenly(lengths, room, 1e9, np.random.default_rng(0))
    assert np.bincount(step, lengths, 4).tolist() == room.tolist()


def test_which_steps_get_one_more_is_random() -> None:
    few = [deal_evenly(np.array([9], np.int32), np.full(50, 1.0), 1e9, np.random.default_rng(s))[0] for s in range(20)]
    assert len(set(few)) > 5


def test_long_samples_come_in_company_of_like_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1024, 2048, 1000).astype(np.int32)
    step = deal_evenly(lengths, np.full(20, lengths.sum() / 20), 1000, rng)
    tokens = np.bincount(step, lengths, 20)
    assert np.abs(tokens - lengths.sum() / 20).max() <= lengths.max()
    ends = sorted((int(lengths[step == s].min()), int(lengths[step == s].max())) for s in range(20))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    assert np.diff(step[np.argsort(lengths, kind="stable")]).min() < 0  # and which step has which is random

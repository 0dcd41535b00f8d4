"""Query-key pairs that causal and windowed attention keep, against counting them one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.cost.model_spec import ModelSpec, load_model_spec


def brute_pairs(length: int, window: int | None) -> int:
    return sum(min(i + 1, window or length) for i in range(length))


def windowed(windows: tuple[int | None, ...]) -> ModelSpec:
    return dataclasses.replace(load_model_spec("llama-3.1-8b"), n_layers=len(windows), windows=windows)


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.lists(st.none() | st.integers(1, 200), min_size=1, max_size=5),
    st.sampled_from([np.int16, np.int32, np.int64]),
)
@settings(max_examples=60, deadline=None)
def test_pairs_equal_brute_force(lengths: list[int], windows: list[int | None], dtype: type) -> None:
    spec = windowed(tuple(windows))
    real = [np.mean([brute_pairs(length, window) for window in windows]) for length in lengths]
    pairs = spec.attention_pairs(np.array(lengths, dtype))
    assert pairs.dtype == np.float64
    np.testing.assert_allclose(pairs, real, rtol=1e-12)


def test_pairs_of_long_documents_are_exact_and_do_not_overflow() -> None:
    length = 10_000_000
    full = windowed((None,)).attention_pairs(np.array([length], np.int32))
    assert int(full[0]) == length * (length + 1) // 2

"""Made-up lengths are what their descriptions say."""

from __future__ import annotations

import numpy as np
import pytest

from hbp.data.length_sets import LENGTH_SETS, generate
from hbp.errors import HbpError

MANY = 400_000
LONGEST = {
    "short-32k": 8192,
    "short-128k": 8192,
    "mix-32k": 32768,
    "mix-128k": 131072,
    "tulu3-longcite": 131072,
    "openhermes-longcite": 131072,
    "tulu3-longwriter": 131072,
    "mix-1m": 1048576,
}


def test_every_set_is_tested() -> None:
    assert set(LONGEST) == set(LENGTH_SETS)


@pytest.mark.parametrize("name", LONGEST)
def test_same_for_the_same_seed(name: str) -> None:
    first = generate(name, 1000, 3)
    assert first.dtype == np.int32 and first.shape == (1000,)
    np.testing.assert_array_equal(first, generate(name, 1000, 3))
    assert (first != generate(name, 1000, 4)).any()
    assert len(generate(name, 0, 0)) == 0


@pytest.mark.parametrize("name", LONGEST)
def test_bounds(name: str) -> None:
    lengths = generate(name, MANY, 0)
    assert lengths.min() >= 16
    assert 0.4 * LONGEST[name] < lengths.max() <= LONGEST[name]


@pytest.mark.parametrize(
    ("name", "median"),
    [
        ("short-32k", 500),
        ("short-128k", 500),
        ("mix-128k", 500),
        ("mix-1m", 500),
        ("tulu3-longcite", 400),
        ("openhermes-longcite", 300),
        ("tulu3-longwriter", 400),
    ],
)
def test_median_of_the_short_samples(name: str, median: int) -> None:
    lengths = generate(name, MANY, 0)
    # Long samples, where there are any, lie above the median: leave out as many as there are.
    share = LENGTH_SETS[name][2]
    assert np.quantile(lengths, 0.5 * (1 - share)) == pytest.approx(median, rel=0.02)


@pytest.mark.parametrize(
    ("name", "above", "share"),
    [
        ("short-128k", 8191, 0.0026),  # P(lognormal > 8192) = P(z > 2.797)
        ("mix-32k", 8192, 0.05),
        ("mix-32k", 32767, 0.05 * 0.8),  # what is longer is cut to the capacity
        ("mix-128k", 8192, 0.05),
        ("mix-128k", 69632, 0.025),  # uniform
        ("tulu3-longcite", 32768, 0.002 * 98304 / 129024),
        ("openhermes-longcite", 4096, 0.002 * 126976 / 129024),
        ("tulu3-longwriter", 6000, 0.994 * 0.00691 + 0.003),  # P(z > 2.462), and half of LongWriter
        ("mix-1m", 8192, 0.02),
        ("mix-1m", 92682, 0.01),  # log-uniform
    ],
)
def test_shares(name: str, above: int, share: float) -> None:
    lengths = generate(name, MANY, 0)
    four_sigma = 4 * np.sqrt(share / MANY)
    assert float((lengths > above).mean()) == pytest.approx(share, abs=four_sigma)


def test_mean_of_tulu3() -> None:
    lengths = generate("tulu3-longcite", MANY, 0)
    assert lengths[lengths <= 32768].mean() == pytest.approx(730, rel=0.05)


def test_unknown_set() -> None:
    with pytest.raises(HbpError, match=r"no length set 'short': give one of short-32k, .*mix-1m"):
        generate("short", 1, 0)

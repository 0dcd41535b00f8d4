"""Our packers are the published ones: as many bins as the peers' own code, and as first and best fit by definition."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hbp.data.length_sets import generate
from hbp.planning.kernels import best_fit_decreasing, by_falling_length, first_fit

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
PEERS = importlib.import_module("packing_peers")
SETS = [("short-32k", 32768), ("mix-128k", 131072), ("mix-32k", 32768)]


def lengths_of(name: str) -> np.ndarray:
    return generate(name, 900, 3)  # one batch of every peer


def ours(lengths: np.ndarray, capacity: int, *, best: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    if best:
        return best_fit_decreasing(lengths, capacity, rng)
    order = by_falling_length(lengths, rng)
    bin_of = np.empty(len(lengths), np.int64)
    bin_of[order] = first_fit(lengths[order], capacity)
    return bin_of


def by_definition(lengths: np.ndarray, capacity: int, *, best: bool) -> int:
    """Bins of first or best fit decreasing, one sample and one bin after the other."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if not fits:
            rooms.append(capacity - length)
            continue
        at = min(fits)[1] if best else fits[0][1]
        rooms[at] -= length
    return len(rooms)


@pytest.mark.parametrize(("name", "capacity"), SETS)
@pytest.mark.parametrize("best", [True, False])
def test_as_many_bins_as_by_definition(name: str, capacity: int, best: bool) -> None:
    lengths = lengths_of(name)
    assert int(ours(lengths, capacity, best=best).max()) + 1 == by_definition(lengths, capacity, best=best)


def peer(package: str, name: str, lengths: np.ndarray, capacity: int) -> np.ndarray:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    seconds, bins = PEERS.peers()[name](lengths, capacity)
    assert seconds > 0
    assert bins.min() == 0, "each sample has a bin"
    assert np.bincount(bins, weights=lengths).max() <= capacity
    return bins


@pytest.mark.parametrize(("name", "capacity"), SETS)
def test_as_many_bins_as_best_fit_of_trl(name: str, capacity: int) -> None:
    lengths = lengths_of(name)
    bins = peer("trl", "trl bfd, one batch", lengths, capacity)
    assert bins.max() == ours(lengths, capacity, best=True).max()


@pytest.mark.parametrize(("name", "capacity"), SETS)
def test_as_many_bins_as_first_fit_of_axolotl(name: str, capacity: int) -> None:
    """In the order given: it does not sort."""
    lengths = lengths_of(name)
    bins = peer("axolotl", "axolotl first fit", lengths, capacity)
    assert bins.max() == first_fit(lengths, capacity).max()


@pytest.mark.parametrize(("name", "capacity"), SETS)
def test_as_many_bins_as_binpacking(name: str, capacity: int) -> None:
    lengths = lengths_of(name)
    bins = peer("binpacking", "binpacking, 1000 rows", lengths, capacity)
    assert bins.max() == ours(lengths, capacity, best=False).max()

"""Tiny cases against the brute-force optimum: the bound is never above it, and `hbp-mixed` is near it.

Every way to put up to five samples into packs, every setting that memory allows each pack, every way to lay the packs
over two ranks micro-step by micro-step. Packs that small leave nothing to fill, the search works with candidate lengths
64 tokens apart, and gives no sample more ranks than memory asks for: so the gap here is an upper end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from plans import tiny_cost

from hbp.cost.predict import CostModel
from hbp.planning.lower_bound import lower_bound
from hbp.planning.planner import make_plan

WORLD = 2


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        for i, part in enumerate(smaller):
            yield [*smaller[:i], [first, *part], *smaller[i + 1 :]]
        yield [[first], *smaller]


def pack_seconds(cost: CostModel, pack: list[int]) -> dict[int, float]:
    """Fastest time of a pack at each degree."""
    work = cost.work(np.array(pack), np.array([0, len(pack)]))
    found = {}
    for degree in cost.degrees():
        k = cost.fewest_gc_layers(sum(pack), degree)
        if k is not None:
            found[degree] = min(float(cost.seconds(degree, j).of(work)[0]) for j in range(k, cost.model.n_layers + 1))
    return found


def optimum(cost: CostModel, lengths: list[int]) -> float:
    """Least seconds of all micro-steps over every plan."""
    best = np.inf
    for packs in partitions(lengths):
        options = [pack_seconds(cost, pack) for pack in packs]
        for degrees in itertools.product(*options):
            whole = sum(option[d] for option, d in zip(options, degrees, strict=True) if d == WORLD)
            halves = sorted((option[d] for option, d in zip(options, degrees, strict=True) if d == 1), reverse=True)
            best = min(best, whole + sum(halves[::WORLD]))  # neighbours in time share a micro-step
    return best


def test_the_bound_and_the_plan_enclose_the_optimum() -> None:
    rng, gaps = np.random.default_rng(0), []
    for _ in range(60):
        cost = tiny_cost(WORLD, int(rng.integers(700, 2500)))
        lengths = rng.integers(1, 700, int(rng.integers(1, 6))).tolist()
        best = optimum(cost, lengths)
        plan = make_plan(np.array(lengths), cost, short_steps=0)
        found = float(plan.micro_step_seconds().sum())
        assert lower_bound(np.array(lengths), cost) <= best * (1 + 1e-9)
        assert best <= found * (1 + 1e-6)
        gaps.append(found / best - 1)
    assert np.mean(np.array(gaps) < 1e-6) > 0.5  # are optimal
    assert np.mean(gaps) < 0.04
    assert np.quantile(gaps, 0.9) < 0.15
    assert max(gaps) < 0.25

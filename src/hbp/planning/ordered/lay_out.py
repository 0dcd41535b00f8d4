"""Packs of all steps, their groups and their place: what every order but the fastest ends with.

A pack's group is its degree, the fewest recomputed layers that its tokens need, and its tokens rounded up by a
fraction of an octave (or the most that so many layers hold): packs made for one step are of every length, and a plan
lists its groups.

Legend: ``N`` samples, ``P`` packs. Complexity: a sort of the packs and of the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hbp.plan import Group
from hbp.planning.metrics import drift
from hbp.planning.ordered.step_packing import StepCosts
from hbp.planning.packs import Float, Int, Lengths, Schedule, packs_of
from hbp.planning.strategy import Outcome, Problem

FINE = 3
"""Capacities have so many binary digits below the first."""


@dataclass(frozen=True)
class Laid:
    """Packs and where they run. Which rank each begins at follows."""

    pack_of: Int  # [N]
    step: Int  # [P]
    micro_step: Int  # [P] of the step
    degree: Int  # [P]
    gc_layers: Int  # [P]
    capacity: Int  # [P]

    def __len__(self) -> int:
        return len(self.step)


def pack_steps(lengths: Lengths, step: Int, costs: StepCosts) -> Laid:
    """Every step packed apart (:mod:`hbp.planning.ordered.step_packing`).

    Args:
        lengths: of the samples ``[N]``.
        step: of each ``[N]``.
        costs: of the run.
    """
    order = np.lexsort((-lengths.astype(np.int64), step))
    falling = lengths[order].astype(np.int64)
    bounds = np.flatnonzero(np.diff(step[order], prepend=-1, append=-1)) if len(order) else np.zeros(1, np.int64)
    pack_of, packs = np.empty(len(lengths), np.int64), 0
    steps, micros, degrees = ([np.zeros(0, np.int64)] for _ in range(3))
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own, micro, degree = costs.pack(falling[begin:end])
        pack_of[order[begin:end]] = own + packs
        packs += len(micro)
        steps.append(np.full(len(micro), step[order[begin]]))
        micros.append(micro)
        degrees.append(degree)
    degree = np.concatenate(degrees)
    tokens = np.bincount(pack_of, lengths, packs).astype(np.int64)
    capacity, gc_layers = _smallest_groups(tokens, degree, costs)
    return Laid(pack_of, np.concatenate(steps), np.concatenate(micros), degree, gc_layers, capacity)


def _smallest_groups(tokens: Int, degree: Int, costs: StepCosts) -> tuple[Int, Int]:
    """Capacity and recomputed layers of packs of so many tokens (module docstring)."""
    unit = 2 ** np.maximum(0, np.frexp(tokens)[1].astype(np.int64) - 1 - FINE)
    capacity, gc_layers = -(-tokens // unit) * unit, np.empty(len(tokens), np.int64)
    for d, rooms in zip(costs.degrees, costs.rooms, strict=True):
        here = degree == d
        gc_layers[here] = np.searchsorted(rooms, tokens[here])
        capacity[here] = np.minimum(capacity[here], rooms[gc_layers[here]])
    return capacity, gc_layers


def joined(parts: Sequence[tuple[Int, Laid]], n: int) -> Laid:
    """The packs of parts that hold these of `n` samples; a step's micro-steps of a later part follow the earlier's."""
    pack_of, packs = np.empty(n, np.int64), 0
    n_steps = 1 + max(int(part.step.max(initial=0)) for _, part in parts)
    so_far, micro = np.zeros(n_steps, np.int64), []
    for samples, part in parts:
        pack_of[samples] = part.pack_of + packs
        packs += len(part)
        micro.append(part.micro_step + so_far[part.step])
        more = np.zeros(n_steps, np.int64)
        np.maximum.at(more, part.step, part.micro_step + 1)
        so_far += more
    step, degree, gc_layers, capacity = (
        np.concatenate([getattr(part, name) for _, part in parts])
        for name in ("step", "degree", "gc_layers", "capacity")
    )
    return Laid(pack_of, step, np.concatenate(micro), degree, gc_layers, capacity)


def outcome_of(problem: Problem, laid: Laid, searched: Sequence[Group], short_steps: int) -> Outcome:
    """Ranks and groups found, as a strategy gives it back; `searched` are groups that samples have their home in."""
    number = np.unique(laid.step, return_inverse=True)[1]
    order = np.lexsort((-laid.degree, laid.micro_step, number))
    degree = laid.degree[order]
    before = np.cumsum(degree) - degree
    first = np.flatnonzero(np.diff(laid.micro_step[order], prepend=-1) | np.diff(number[order], prepend=-1))
    starts = np.empty(len(order), np.int64)
    starts[order] = before - np.repeat(before[first], np.diff(first, append=len(order)))
    kinds, group = np.unique(np.stack([laid.capacity, laid.degree, laid.gc_layers]), axis=1, return_inverse=True)
    groups = tuple(Group(*map(int, kind)) for kind in kinds.T)
    packs = replace(packs_of(laid.pack_of, problem.sample_ids, n_packs=len(laid)), group=group.reshape(-1))
    return Outcome(
        Schedule(packs, number.astype(np.int64), laid.micro_step, starts),
        groups,
        extra=tuple(g for g in groups if g not in searched),
        short_steps=short_steps,
    )


@dataclass(frozen=True)
class Worth:
    """What an order is chosen by."""

    seconds: float
    """Predicted, of the run."""
    drift: float
    n_steps: int


def worth(problem: Problem, outcome: Outcome) -> Worth:
    """Seconds and drift of scheduled packs, as the plan's metrics will have them."""
    schedule, packs = outcome.schedule, outcome.schedule.packs
    if outcome.known is None:
        seconds: npt.NDArray[np.floating] = problem.pack_cost(outcome.groups)(packs).astype(np.float32)
        lengths = problem.lengths[packs.sample_ids]
    else:
        seconds, lengths = outcome.known
    key = schedule.step.astype(np.int64) << 16 | schedule.micro_step
    micro = np.unique(key, return_inverse=True)[1]
    slowest: Float = np.zeros(int(micro.max()) + 1)
    np.maximum.at(slowest, micro, seconds.astype(np.float64))
    n_steps = int(schedule.step.max()) + 1
    total = float(slowest.sum()) + n_steps * problem.cost.cluster.step_overhead_s
    return Worth(total, drift(schedule.step, packs.offsets, lengths, n_steps), n_steps)


def travel(problem: Problem, outcome: Outcome, shuffle: Int) -> Mapping[str, float]:
    """How far samples are from their place in the shuffle (:mod:`hbp.planning.mixed.order`)."""
    packs = outcome.schedule.packs
    tokens = packs.sum(problem.lengths.astype(np.float64))
    of_step = np.bincount(outcome.schedule.step, tokens)
    middle = (np.cumsum(of_step) - of_step / 2) / of_step.sum()
    place = np.empty(len(problem.lengths))
    place[problem.sample_ids[shuffle]] = (np.arange(len(shuffle)) + 0.5) / len(shuffle)
    at = np.repeat(middle[outcome.schedule.step], np.diff(packs.offsets))
    return {"travel": float(np.abs(at - place[packs.sample_ids]).mean())}

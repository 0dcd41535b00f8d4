"""`hbp-mixed`: our best plan, window by window over a random order of the samples.

The samples are shuffled and the order is cut into windows. Each window is packed into whole micro-steps
(:mod:`hbp.planning.histogram_packs`); what does not fill one waits for the next window. So a sample is trained on about
where the shuffle put it, never further away than its window is long (but for those that wait, and for the curriculum's
first phase), while inside a window packs are free to be sorted and dealt by cost. One long window balances best, many
short ones stay closest to a random order: :data:`MICRO_STEPS_PER_WINDOW` is where a hundredth of the speed is given up
at most.

Inside a window the micro-steps of all groups are interleaved evenly and cut into optimizer steps of the global batch,
so a step holds of each group its share of the window, to within a bound of a few micro-steps
(:mod:`hbp.planning.composition`).

A bounded window is also all that a stream needs (:mod:`hbp.planning.streaming`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.composition import cut_steps, interleave, shorts_first
from hbp.planning.fill import count_lengths, counting_sort, shuffled
from hbp.planning.histogram_packs import PackCosts, pack_histogram
from hbp.planning.packs import Int, Lengths, Packs
from hbp.planning.problem import Outcome, Problem
from hbp.planning.schedule import Schedule

MICRO_STEPS_PER_WINDOW = 1024


class TooFewSamples(HbpError):
    """All would have to wait."""


@dataclass(frozen=True)
class Window:
    """Packs of one window with their place, in micro-steps from 0, and what waits for the next."""

    packs: Packs
    micro_step: Int  # [P]
    rank_start: Int  # [P]
    seconds: npt.NDArray[np.float64]  # [P]
    tokens: npt.NDArray[np.float64]  # [P]
    groups: tuple[Group, ...]
    waiting: Int
    """Positions of the samples that were not placed."""


def plan_window(
    positions: Int,
    lengths: Lengths,
    groups: Sequence[Group],
    costs: PackCosts,
    world_size: int,
    rng: np.random.Generator,
    *,
    last: bool,
) -> Window:
    """Plan the samples at these positions of the shuffle.

    Args:
        positions: what packs are to hold, in random order ``[n]``.
        lengths: of each ``[n]``.
        groups: in order of rising capacity; no length exceeds the last one's.
        costs: predicts packs.
        world_size: ranks.
        rng: decides which lengths wait.
        last: nothing may wait.
    """
    counts = count_lengths(lengths, int(lengths.max(initial=0)))
    ends = np.cumsum(counts)
    starts = ends - counts
    packed = pack_histogram(counts, groups, costs, world_size, rng, last=last)
    ordered = counting_sort(positions, lengths, len(starts) - 1)
    order = np.lexsort((packed.rank_start, packed.micro_step))
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    offsets, ids = _draw(number[packed.pack_of], packed.taken, len(order), starts, ordered)
    # Of each length, what was drawn came first; the rest waits.
    waiting = ordered[_ranges(ends - counts, counts)]
    packs = Packs(offsets, ids, packed.group[order])
    return Window(
        packs,
        packed.micro_step[order],
        packed.rank_start[order],
        packed.seconds[order],
        np.bincount(number[packed.pack_of], packed.taken, len(order)).astype(np.float64),
        packed.groups,
        waiting,
    )


@njit(cache=True)
def _draw(pack_of: Int, taken: Int, n_packs: int, starts: Int, ordered: Int) -> tuple[Int, Int]:
    """Offsets of the packs, and for each sample placed the next one of its length, pack by pack."""
    offsets = np.zeros(n_packs + 1, np.int64)
    for pack in pack_of:
        offsets[pack + 1] += 1
    for pack in range(n_packs):
        offsets[pack + 1] += offsets[pack]
    at, next_of = offsets[:-1].copy(), starts.copy()
    drawn = np.empty(len(pack_of), ordered.dtype)
    for i in range(len(pack_of)):
        drawn[at[pack_of[i]]] = ordered[next_of[taken[i]]]
        next_of[taken[i]] += 1
        at[pack_of[i]] += 1
    return offsets, drawn


def _ranges(starts: Int, counts: Int) -> Int:
    """starts[i] .. starts[i] + counts[i] − 1 for every i, one after the other."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def default_windows(tokens: int, groups: Sequence[Group], world_size: int) -> int:
    """As many windows as hold :data:`MICRO_STEPS_PER_WINDOW` of the shortest group each."""
    shortest = groups[0]
    return max(1, tokens // (world_size // shortest.sp_degree * shortest.capacity * MICRO_STEPS_PER_WINDOW))


def windowed_schedule(problem: Problem, groups: Sequence[Group], *, to_the_end: bool = True) -> Outcome:
    """Every window planned, and their micro-steps composed into optimizer steps.

    Args:
        problem: samples, costs, world, global batch, windows (None: :func:`default_windows`) and curriculum.
        groups: in order of rising capacity.
        to_the_end: False leaves samples that fill no whole micro-step waiting (a stream has more to come).
    """
    ids, world = problem.sample_ids, problem.world_size
    order = shuffled(len(ids), problem.rng)
    if len(ids) < len(problem.lengths):  # some are dropped: positions are not ids
        order = ids.astype(order.dtype)[order]
    tokens = int(problem.own_lengths().sum(dtype=np.int64))
    n_windows = min(len(ids), problem.windows or default_windows(tokens, groups, world))
    costs = PackCosts(problem.cost, int(problem.own_lengths().max()))
    bounds = np.linspace(0, len(ids), n_windows + 1).astype(np.int64)
    waiting = np.zeros(0, order.dtype)
    found: list[Window] = []
    for number in range(n_windows):
        fresh = np.arange(bounds[number], bounds[number + 1], dtype=order.dtype)
        positions = np.concatenate([waiting, fresh])
        here = problem.lengths[order[positions]]
        last = to_the_end and number == n_windows - 1
        found.append(plan_window(positions, here, groups, costs, world, problem.rng, last=last))
        waiting = found[-1].waiting
    if not any(len(window.packs) for window in found):
        raise TooFewSamples(f"{len(ids)} samples do not fill one micro-step; give a larger buffer")
    return replace(_compose(problem, found, order), waiting=order[waiting])


def _compose(problem: Problem, found: list[Window], order: Int) -> Outcome:
    """Order the micro-steps of all windows, cut them into steps, and lay the samples out pack by pack."""
    groups, world = found[-1].groups, problem.world_size
    sizes = np.concatenate([np.diff(w.packs.offsets) for w in found])
    kind = np.concatenate([w.packs.group for w in found])
    seconds = np.concatenate([w.seconds for w in found])
    start = np.concatenate([w.rank_start for w in found])
    n_micro = np.cumsum([0, *(int(w.micro_step[-1]) + 1 if len(w.micro_step) else 0 for w in found)])
    micro = np.concatenate([w.micro_step + base for w, base in zip(found, n_micro, strict=False)])
    tokens = np.concatenate([w.tokens for w in found])

    firsts = np.unique(micro, return_index=True)[1]
    window = np.repeat(np.arange(len(found)), np.diff(n_micro))
    of_micro = np.bincount(micro, weights=tokens).astype(np.float64)
    sequence = interleave(kind[firsts], window, problem.rng)
    degree = np.array([group.sp_degree for group in groups])
    short = degree[kind[firsts]] == degree.min()
    sequence, first_steps = shorts_first(sequence, short, of_micro, problem.global_batch_tokens, problem.short_steps)
    step_of_micro = cut_steps(sequence, of_micro, problem.global_batch_tokens)
    place = np.empty(len(sequence), np.int64)
    place[sequence] = np.arange(len(sequence))
    first_of_step = np.unique(step_of_micro[sequence], return_index=True)[1]

    rows = np.lexsort((start, place[micro]))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[rows])])
    begins = np.empty(len(rows), np.int64)
    begins[rows] = offsets[:-1]
    step = step_of_micro[micro]
    middle = _middle_of_steps(step, tokens)
    sample_ids = np.empty(int(offsets[-1]), np.int64)
    away, at = 0.0, 0
    n_windows = len(found)
    for w in (found.pop(0) for _ in range(n_windows)):  # each is let go once it is laid out
        here = slice(at, at + len(w.packs))
        away += _lay_out(sample_ids, begins[here], w.packs.offsets, w.packs.sample_ids, order, middle[step[here]])
        at += len(w.packs)
    schedule = Schedule(
        Packs(offsets, sample_ids, kind[rows]),
        step[rows],
        place[micro[rows]] - first_of_step[step[rows]],
        start[rows],
    )
    spent, sorted_whole = _order_price(seconds, kind, micro, groups, world)
    return Outcome(
        schedule,
        groups,
        seconds[rows],
        first_steps,
        n_windows,
        {"travel": float(away / len(sample_ids)), "speed_given_up": max(0.0, 1 - sorted_whole / spent)},
    )


def _middle_of_steps(step: Int, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where in the run, 0 to 1, the middle of each step lies, by tokens."""
    of_step = np.bincount(step, weights=tokens)
    return np.asarray((np.cumsum(of_step) - of_step / 2) / of_step.sum())


@njit(cache=True)
def _lay_out(into: Int, begins: Int, offsets: Int, positions: Int, order: Int, place: npt.NDArray[np.float64]) -> float:
    """Write each pack's sample ids to its place in the plan; returns how far the samples travelled, summed."""
    away, n = 0.0, len(order)
    for pack in range(len(begins)):
        at = begins[pack]
        for i in range(offsets[pack], offsets[pack + 1]):
            position = positions[i]
            into[at] = order[position]
            at += 1
            away += abs(place[pack] - (position + 0.5) / n)
    return away


def _order_price(
    seconds: npt.NDArray[np.float64], kind: Int, micro: Int, groups: Sequence[Group], world: int
) -> tuple[float, float]:
    """Seconds of the micro-steps as they are, and if each group's packs were sorted over the whole run instead."""
    slowest = np.zeros(int(micro.max()) + 1)
    np.maximum.at(slowest, micro, seconds)
    whole = 0.0
    for index, group in enumerate(groups):
        own = -np.sort(-seconds[kind == index])
        whole += float(own[:: world // group.sp_degree].sum())
    return float(slowest.sum()), whole

"""`hbp-mixed`: our best plan, window by window over a random order of the samples.

The samples are shuffled and the order is cut into windows. Each window is packed into whole micro-steps
(:mod:`hbp.planning.mixed.packing`); what does not fill one waits for the next window. So a sample is trained on about
where the shuffle put it, never further away than its window is long (but for those that wait, and for the curriculum's
first phase), while inside a window packs are free to be sorted and dealt by cost. One long window balances best, many
short ones stay closest to a random order: :data:`MICRO_STEPS_PER_WINDOW` is where a hundredth of the speed is given up
at most.

Inside a window the micro-steps of all groups are interleaved evenly and cut into optimizer steps of the global batch,
so a step holds of each group its share of the window, to within a bound of a few micro-steps
(:mod:`hbp.planning.mixed.order`).

A bounded window is also all that a stream needs (:mod:`hbp.planning.mixed.stream`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.errors import HbpError
from hbp.plan import Group, IntArray
from hbp.planning.kernels import count_lengths, counting_sort, shuffled
from hbp.planning.mixed.order import cut_steps, interleave, shorts_first
from hbp.planning.mixed.packing import pack_histogram
from hbp.planning.packs import Int, Lengths, PackCosts, Packs, Schedule
from hbp.planning.strategy import Outcome, Problem

MICRO_STEPS_PER_WINDOW = 1024


class TooFewSamples(HbpError):
    """All would have to wait."""


@dataclass(frozen=True)
class Drawn:
    """Samples in the order of their packs, of one window or of all."""

    positions: Int  # [N] in the shuffle
    lengths: Int  # [N] int32

    def __getitem__(self, part: slice) -> Drawn:
        return Drawn(self.positions[part], self.lengths[part])


@dataclass(frozen=True)
class Window:
    """Packs of one window in order of their place, and what waits for the next. Columns as narrow as the plan file's,
    since all windows are held until the last is planned."""

    sizes: IntArray  # [P] int32: samples of each pack
    tokens: IntArray  # [P] int32
    seconds: npt.NDArray[np.float64]  # [P] predicted
    group: IntArray  # [P] int16
    micro_step: IntArray  # [P] int32, from 0
    rank_start: IntArray  # [P] int32
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
    into: Drawn,
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
        into: gets the samples of the packs from its beginning on, ``[n]`` or longer.
        last: nothing may wait.
    """
    counts = count_lengths(lengths, int(lengths.max(initial=0)))
    ends = np.cumsum(counts)
    starts = ends - counts
    packed = pack_histogram(counts, groups, costs, world_size, rng, last=last)
    ordered = counting_sort(positions, lengths, len(starts) - 1)
    order = np.argsort(packed.micro_step * world_size + packed.rank_start, kind="stable")
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    pack_of = number[packed.pack_of]
    sizes, tokens = np.zeros((2, len(order)), np.int32)
    waiting = _draw(pack_of, packed.taken, starts, ends, ordered, sizes, tokens, into.positions, into.lengths)
    return Window(
        sizes,
        tokens,
        packed.seconds[order],
        packed.group[order].astype(np.int16),
        packed.micro_step[order].astype(np.int32),
        packed.rank_start[order].astype(np.int32),
        packed.groups,
        waiting,
    )


@njit(cache=True)
def _draw(
    pack_of: Int,
    taken: Int,
    starts: Int,
    ends: Int,
    ordered: Int,
    sizes: IntArray,
    tokens: IntArray,
    drawn: Int,
    lengths: Int,
) -> Int:
    """Draw for each sample placed the next one of its length ``l``, which are ``ordered[starts[l] : ends[l]]``.

    Fills samples and tokens of each pack, and what is drawn and its length, pack by pack; returns what is not drawn.
    """
    for i in range(len(pack_of)):
        sizes[pack_of[i]] += 1
        tokens[pack_of[i]] += taken[i]
    # at[p]: where the next sample of pack p goes, first the pack's beginning; next_of[l]: the next sample of length l.
    at, next_of = np.cumsum(sizes) - sizes, starts.copy()
    for i in range(len(pack_of)):
        pack, length = pack_of[i], taken[i]
        drawn[at[pack]], lengths[at[pack]] = ordered[next_of[length]], length
        at[pack] += 1
        next_of[length] += 1
    waiting, n = np.empty(len(ordered) - len(pack_of), ordered.dtype), 0
    for length in range(len(starts)):
        for i in range(next_of[length], ends[length]):
            waiting[n] = ordered[i]
            n += 1
    return waiting


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
    own, world = problem.own_lengths, problem.world_size
    order = shuffled(len(own), problem.rng)
    n_windows = min(len(own), problem.windows or default_windows(int(own.sum(dtype=np.int64)), groups, world))
    costs = PackCosts(problem.cost, int(own.max()))
    bounds = np.linspace(0, len(own), n_windows + 1).astype(np.int64)
    waiting, placed = np.zeros(0, order.dtype), 0
    drawn = Drawn(np.empty_like(order), np.empty(len(own), np.int32))
    found: list[Window] = []
    for number in range(n_windows):
        fresh = np.arange(bounds[number], bounds[number + 1], dtype=order.dtype)
        positions = np.concatenate([waiting, fresh])
        here, into = own[order[positions]], drawn[placed:]
        last = to_the_end and number == n_windows - 1
        found.append(plan_window(positions, here, groups, costs, world, problem.rng, into, last=last))
        waiting = found[-1].waiting
        placed += len(positions) - len(waiting)
    if not placed:
        raise TooFewSamples(f"{len(own)} samples do not fill one micro-step; give a larger buffer")
    if len(problem.dropped):  # numbers among those left become sample ids
        order = problem.sample_ids[order]
    extra = tuple(group for group in found[-1].groups if group not in groups)
    return replace(_compose(problem, found, drawn[:placed], order), extra=extra, waiting=order[waiting])


def _compose(problem: Problem, found: list[Window], drawn: Drawn, order: Int) -> Outcome:
    """Order the micro-steps of all windows, cut them into steps, and lay the samples out pack by pack.

    Packs of a micro-step are adjacent and stay so: the order of packs follows from that of the micro-steps.
    """
    groups, n_windows = found[-1].groups, len(found)
    of_windows = [np.bincount(w.micro_step) for w in found]
    sizes, tokens, seconds, kind, rank_start = (
        np.concatenate([getattr(w, name) for w in found])
        for name in ("sizes", "tokens", "seconds", "group", "rank_start")
    )
    found.clear()
    packs = np.concatenate(of_windows)  # of each micro-step
    firsts = np.cumsum(packs) - packs
    spent, sorted_whole = _order_price(seconds, kind, firsts, groups, problem.world_size)

    kinds, degree = kind[firsts], np.array([group.sp_degree for group in groups])
    of_micro = np.add.reduceat(tokens, firsts, dtype=np.float64)
    sequence = interleave(kinds, np.repeat(np.arange(n_windows), [len(x) for x in of_windows]), problem.rng)
    sequence, first_steps = shorts_first(
        sequence, degree[kinds] == degree.min(), of_micro, problem.global_batch_tokens, problem.short_steps
    )
    step_of_micro = cut_steps(sequence, of_micro, problem.global_batch_tokens)
    steps = step_of_micro[sequence]
    first_of_step = np.flatnonzero(np.diff(steps, prepend=-1))
    micro_in_step = np.arange(len(steps)) - first_of_step[steps]

    rows = _ranges(firsts[sequence], packs[sequence])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[rows], dtype=np.int64)])
    samples = np.add.reduceat(sizes, firsts, dtype=np.int64)
    kind, rank_start, predicted = kind[rows], rank_start[rows], seconds.astype(np.float32)[rows]
    del rows, sizes, tokens, seconds  # before the samples, which are the bulk
    sample_ids, lengths = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int32)
    begins = (np.cumsum(samples) - samples)[sequence]
    middle = _middle_of_steps(step_of_micro, of_micro)[steps]
    away = _lay_out(sample_ids, lengths, begins, samples[sequence], drawn.positions, drawn.lengths, order, middle)
    schedule = Schedule(
        Packs(offsets, sample_ids, kind),
        np.repeat(steps.astype(np.int32), packs[sequence]),
        np.repeat(micro_in_step.astype(np.int32), packs[sequence]),
        rank_start,
    )
    return Outcome(
        schedule,
        groups,
        known=(predicted, lengths),
        short_steps=first_steps,
        windows=n_windows,
        details={"travel": away / len(sample_ids), "speed_given_up": max(0.0, 1 - sorted_whole / spent)},
    )


def _ranges(starts: Int, counts: Int) -> Int:
    """starts[i] .. starts[i] + counts[i] − 1 for every i, one after the other."""
    ends = np.cumsum(counts)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])


def _middle_of_steps(step: Int, tokens: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where in the run, 0 to 1, the middle of each step lies, by tokens."""
    of_step = np.bincount(step, weights=tokens)
    return np.asarray((np.cumsum(of_step) - of_step / 2) / of_step.sum())


@njit(cache=True)
def _lay_out(
    ids: Int,
    lengths: Int,
    begins: Int,
    samples: Int,
    positions: Int,
    of_positions: Int,
    order: Int,
    place: npt.NDArray[np.float64],
) -> float:
    """Write ids and lengths of the samples, micro-step by micro-step, each ``samples`` many from ``begins`` on.

    Returns:
        How far the samples travelled to the ``place`` of their micro-step, summed.
    """
    away, n, at = 0.0, len(order), 0
    for micro in range(len(begins)):
        for i in range(begins[micro], begins[micro] + samples[micro]):
            ids[at], lengths[at] = order[positions[i]], of_positions[i]
            away += abs(place[micro] - (positions[i] + 0.5) / n)
            at += 1
    return away


def _order_price(
    seconds: npt.NDArray[np.float64], kind: Int, firsts: Int, groups: Sequence[Group], world: int
) -> tuple[float, float]:
    """Seconds of the micro-steps as they are, and if each degree's packs were sorted over the whole run instead.

    ``firsts`` are the first packs of the micro-steps.
    """
    whole = 0.0
    degree = np.array([group.sp_degree for group in groups])[kind]
    for each in np.unique(degree):
        own = -np.sort(-seconds[degree == each])
        whole += float(own[:: world // each].sum())
    return float(np.maximum.reduceat(seconds, firsts).sum()), whole

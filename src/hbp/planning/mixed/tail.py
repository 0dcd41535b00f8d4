"""What no longer group needs: all samples left, in packs of the shortest group, and the end of the run.

Before the last window, what fills no whole micro-step waits. In the last one it becomes a micro-step of its own, of as
many tokens a rank as it takes, a group in its own right; or several share it, where FSDP's traffic would not hide
behind one alone.

Complexity: that of :func:`hbp.planning.mixed.even_fit.even_fit`, a few times.
"""

from __future__ import annotations

import numpy as np

from hbp.cost.predict import CostModel, Work
from hbp.plan import Group
from hbp.planning.mixed.even_fit import even_fit
from hbp.planning.mixed.open_packs import Given, OpenPacks
from hbp.planning.packs import Float, Int

UNEVEN = 1e-4
"""Share of the time that more than one short micro-step at the end have to save."""
STEPS_UP = 100
"""Short micro-steps that do not hold what is left get longer by such a part, all together."""
TAIL_SLACK = 5e-5
"""Room of the last micro-step over what it must hold, as a share of the window: lets packs of whole samples close."""


def pack_the_rest(
    given: Given, counts: Int, rng: np.random.Generator, *, last: bool
) -> tuple[list[OpenPacks], tuple[Group, ...]]:
    """All samples left, in packs of the shortest group that they need; whole micro-steps unless this is the last.

    Args:
        given: of the window.
        counts: samples left; what is placed is taken out.
        rng: decides which lengths wait.
        last: place everything.

    Returns:
        Packs, one part a group, and all groups: those given and the last micro-step's.
    """
    slots, capacity = given.slots(given.bottom), given.every[given.bottom].capacity
    tokens = int(counts @ np.arange(len(counts)))
    big = -(-int(counts[capacity // 2 + 1 :].sum()) // slots)  # micro-steps: no two of these share a pack
    whole = max(tokens // (slots * capacity), big - 1)  # micro-steps that are full, or as good as
    if not tokens or not (whole or last):
        return [], given.every
    if last:
        return _to_the_end(given, counts, whole)
    waiting = rng.binomial(counts, max(0.0, 1 - whole * slots * capacity / tokens))
    counts -= waiting
    pack_of, taken, _ = even_fit(counts, np.full(whole * slots, capacity), slots)
    counts += waiting
    group = np.full(whole * slots, given.bottom)
    packs = OpenPacks.of(given.every, group, pack_of, taken, given.costs)
    return [packs] if len(packs) else [], given.every  # of few samples all may wait


def _to_the_end(given: Given, counts: Int, whole: int) -> tuple[list[OpenPacks], tuple[Group, ...]]:
    """Everything in about `whole` full micro-steps and one or more short ones, as short as they can be."""
    group, slots, cost = given.every[given.bottom], given.slots(given.bottom), given.costs.cost
    capacity, lengths = group.capacity, np.arange(len(counts))
    tokens = int(counts @ lengths)
    short = _short_micro_steps(group, counts, whole + 1, slots, cost)
    whole += 1 - short
    rest = max(0, tokens - whole * slots * capacity) / (short * slots)
    mean = tokens / max(int(counts.sum()), 1)
    tail = int(max(rest, mean) + TAIL_SLACK * whole * capacity / short) + 1  # tokens of a short pack
    while True:
        tail = min(tail, capacity)
        room = np.concatenate([np.full(whole * slots, capacity), np.full(short * slots, tail)])
        left = counts.copy()
        pack_of, taken, _ = even_fit(left, room, slots)
        if not left.any():
            break
        if tail == capacity:  # full length does not do: one more micro-step, as short as can be
            whole, short, tail = whole + short, 1, 0
        over, longest = int(left @ lengths), int(lengths[left > 0][-1])
        tail += max(over // (short * slots), tail // (STEPS_UP * short), 1) + (longest if tail < longest else 0)
    counts[:] = 0
    gc_layers = cost.fewest_gc_layers(tail, group.sp_degree)
    assert gc_layers is not None  # no more than a full pack needs
    last = Group(tail, group.sp_degree, gc_layers)
    parts, groups, n_full = [], given.every, whole * slots
    for own, here in ((group, pack_of < n_full), (last, pack_of >= n_full)):
        if here.any():
            groups = groups if own in groups else (*groups, own)
            of_group = np.full(len(room), groups.index(own))
            parts.append(OpenPacks.of(groups, of_group, pack_of[here], taken[here], given.costs))
    return parts, groups


def _short_micro_steps(group: Group, counts: Int, most: int, slots: int, cost: CostModel) -> int:
    """How many micro-steps share what fills no whole one, so that the run takes least time.

    One, of what is left, unless FSDP's traffic would have too little to hide behind there: then the packs of more than
    one are a little shorter.

    Args:
        group: of the packs.
        counts: histogram of what they are to hold.
        most: micro-steps in all.
        slots: packs of a micro-step.
        cost: of the run.
    """
    n = np.arange(1, most + 1)
    values = np.flatnonzero(counts)
    tokens = float(counts @ np.arange(len(counts)))
    tail = np.maximum(1.0, (tokens - (most - n) * slots * float(group.capacity)) / (n * slots))
    share = tail / tokens
    work, weights = cost.work(values), counts[values].astype(np.float64)
    full = float(group.capacity) / tokens
    spent = cost.seconds(group.sp_degree, group.gc_layers)

    def of(part: Float) -> Float:
        return spent.of(Work(part * weights.sum(), part * tokens, part * float(work.pairs @ weights)))

    seconds = (most - n) * of(np.full(most, full)) + n * of(share)
    longer = np.cumsum(counts[::-1])[::-1]  # samples of at least each length
    fits = (
        longer[np.minimum(tail.astype(np.int64) + 1, len(counts) - 1)] * (tail + 1 < len(counts)) <= (most - n) * slots
    )
    fits[0] = True
    seconds[~fits] = np.inf
    return int(np.argmax(seconds <= seconds.min() * (1 + UNEVEN))) + 1

"""Algorithm 1: choose the packing groups (paper, Section 4.1, Appendices F and I).

Stage 1: for every candidate length and SP degree take the fewest recomputed layers that fit memory, predict the time,
keep the fastest degree (FindBestSpCkpt). ``l_best`` is the length with the lowest time at equal tokens, ``l_max`` the
longest, which is always kept.

Stage 2 removes needless communication: a group of length ``l`` at degree ``s`` gives each rank ``l / s`` tokens, so
samples up to that length need no SP at all: ``l_best / s_best`` and ``l_max / s_max`` become groups too.

Where the paper profiles packs of its data, here the cost model predicts the packs that *this* data set would fill:
a pack of length ``l`` has the documents, tokens and pairs of the average of its samples up to ``l``.

Complexity: candidates × degrees predictions, and one sort of the lengths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.packs import Lengths

N_CANDIDATES = 6
SHORTEST_CANDIDATE = 256


@dataclass(frozen=True)
class Choice:
    """A group and what it is predicted to cost."""

    group: Group
    seconds_per_token: float
    """Rank-seconds per token: time at equal tokens, times the ranks."""


def longest_capacity(lengths: Lengths, max_length: int | None) -> int:
    """Packing length of the largest group: the user's limit, or the longest sample rounded up."""
    if max_length is not None:
        return max_length
    longest = int(lengths.max())
    unit = 1024 if longest > 8192 else 64
    return math.ceil(longest / unit) * unit


def typical_pack(cost: CostModel, lengths: Lengths, capacity: int) -> Work:
    """What a full pack of a length holds on average, if it is filled from the samples that are no longer."""
    fitting = lengths[lengths <= capacity]
    work = cost.work(fitting if len(fitting) else np.array([capacity]))
    scale = capacity / work.tokens.sum()
    sums = (np.array([x.sum() * scale]) for x in (work.documents, work.tokens, work.pairs))
    return Work(*sums)


def settings_that_fit(cost: CostModel, lengths: Lengths, capacity: int) -> list[Choice]:
    """Every SP degree that can run a packing length, each with the fewest recomputed layers that fit memory."""
    pack = typical_pack(cost, lengths, capacity)
    choices = []
    for degree in cost.degrees():
        gc_layers = cost.fewest_gc_layers(capacity, degree)
        if gc_layers is not None:
            seconds = float(cost.seconds(degree, gc_layers).of(pack)[0])
            choices.append(Choice(Group(capacity, degree, gc_layers), seconds * degree / capacity))
    return choices


def best_setting(cost: CostModel, lengths: Lengths, capacity: int) -> Choice | None:
    """FindBestSpCkpt: the fastest (SP degree, recomputed layers) for one packing length; None if nothing fits."""
    return min(settings_that_fit(cost, lengths, capacity), key=lambda c: c.seconds_per_token, default=None)


def longest_settings(cost: CostModel, lengths: Lengths, capacity: int) -> list[Choice]:
    """:func:`settings_that_fit` for the longest packing length, which has to fit; the fastest first.

    Raises:
        HbpError: it does not, at any degree, even with every layer recomputed.
    """
    choices = settings_that_fit(cost, lengths, capacity)
    if not choices:
        degree, gib = cost.degrees()[-1], 2.0**30
        least = cost.bytes(capacity, degree, cost.model.n_layers) / gib
        raise HbpError(
            f"a pack of {capacity} tokens needs {least:.2f} GiB a device at SP degree {degree} with every layer "
            f"recomputed, over the budget of {cost.cluster.memory_bytes / gib:.2f} GiB; use more devices, a larger "
            "memory budget, or a shorter --max-length"
        )
    return sorted(choices, key=lambda c: c.seconds_per_token)


def choose_groups(cost: CostModel, lengths: Lengths, longest: int) -> tuple[Group, ...]:
    """The groups of Algorithm 1 in order of rising capacity; the last has capacity `longest`."""
    top = longest_settings(cost, lengths, longest)[0]
    candidates = [math.ceil(longest / 2**i) for i in range(1, N_CANDIDATES) if longest / 2**i >= SHORTEST_CANDIDATE]
    settings = [c for c in (best_setting(cost, lengths, length) for length in candidates) if c is not None]
    best = min([top, *settings], key=lambda c: c.seconds_per_token)
    wanted = {best.group.capacity, longest}
    wanted |= {c.group.capacity // c.group.sp_degree for c in (best, top)}
    chosen = [best_setting(cost, lengths, length) for length in sorted(wanted - {longest})]
    return (*(c.group for c in chosen if c is not None), top.group)

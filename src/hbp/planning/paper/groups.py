"""Algorithm 1: choose the packing groups (paper, Section 4.1, Appendices F and I).

Stage 1: for every candidate length (the longest, ``l_max``, and its halves) take the SP degree, with the fewest
recomputed layers that fit memory, whose packs take the least time (FindBestSpCkpt). The paper measures; here the time
is predicted, for packs full of the data's own documents, and the memory per recomputed layer is the cost model's, whose
slope is fitted to measured points. ``l_best`` is the length with the least time at equal tokens.

Stage 2 removes needless communication: a group of length ``l`` at degree ``s`` gives each rank ``l / s`` tokens, so
samples up to that length need no SP at all. The groups are ``l_best / s_best``, ``l_best``, ``l_max / s_max`` (unless
it is shorter than ``l_best``, whose range it would cut) and ``l_max``, without repeats.

:mod:`hbp.planning.mixed.groups` is our own choice. Complexity: one count of the lengths, then (candidates × degrees)
predictions.
"""

from __future__ import annotations

import math

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.planning.packs import Lengths
from hbp.planning.settings import Candidate, SamplesByLength, best_setting, longest_settings

N_PUBLISHED = 5
"""The paper's candidates for 128K: 8K, 16K, 32K, 64K, 128K."""


def published_candidates(cost: CostModel, lengths: Lengths, longest: int) -> list[Candidate]:
    """Stage 1: the best setting of `longest` and of its halves, rising, of those that fit memory."""
    samples = SamplesByLength(cost, lengths)
    capacities = sorted({math.ceil(longest / 2**i) for i in range(N_PUBLISHED)})
    found = (best_setting(cost, samples, capacity) for capacity in capacities if capacity >= int(samples.lengths[0]))
    return [candidate for candidate in found if candidate is not None]


def published_groups(cost: CostModel, lengths: Lengths, longest: int) -> tuple[Group, ...]:
    """The groups of Algorithm 1 in order of rising capacity; the last has capacity `longest`.

    Raises:
        HbpError: packs of `longest` tokens do not fit memory.
    """
    longest_settings(cost, lengths, longest)  # or nothing fits
    candidates = published_candidates(cost, lengths, longest)
    last = candidates[-1].group
    best = min(candidates, key=lambda c: c.seconds_per_token).group
    groups = {group.capacity: group for group in (best, last)}
    for whole in (best, last):
        alone = whole.capacity // whole.sp_degree  # what a rank of this group holds needs no SP
        gc_layers = cost.fewest_gc_layers(alone, 1)
        if (
            gc_layers is not None
            and alone >= 1
            and alone not in groups
            and not (whole is last and alone < best.capacity)
        ):
            groups[alone] = Group(alone, 1, gc_layers)
    return tuple(groups[capacity] for capacity in sorted(groups))

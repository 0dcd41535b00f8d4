"""Hierarchical packing and GreedyFill: the packing half of the paper's Algorithm 2 (Section 4.2, Appendices E and J).

1. A sample goes to the smallest group that holds it.
2. From the largest group down, the group's own samples are packed to its length by whole-set best fit decreasing.
3. The room left is filled with samples of the smaller groups, longest first, which are taken out there.

The paper packs with iterative sampling and filtering; best fit decreasing is faster and leaves 0.00-0.04 % of padding
where that leaves 0.1-14 % (measured on the same sets). What it trades: none of the samples' own order survives, which
the schedule makes up for by shuffling micro-steps.

Complexity: that of :mod:`hbp.planning.kernels`, once a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbp.plan import Group
from hbp.planning.kernels import best_fit_decreasing, greedy_fill
from hbp.planning.packs import Int, Lengths, Packs, join, packs_of


def hierarchical_packs(lengths: Lengths, sample_ids: Int, groups: Sequence[Group], rng: np.random.Generator) -> Packs:
    """Pack samples into groups.

    Args:
        lengths: of the whole data set, tokens ``[N]``.
        sample_ids: which of them to pack; none longer than the last group.
        groups: in order of rising capacity.
        rng: breaks ties between samples of equal length.

    Returns:
        Packs whose ``group`` indexes `groups`; every sample once, none over its capacity.
    """
    capacities = np.array([group.capacity for group in groups])
    home = np.searchsorted(capacities, lengths[sample_ids])
    waiting = np.ones(len(sample_ids), bool)
    parts = []
    for index in range(len(groups) - 1, -1, -1):
        own = np.flatnonzero(waiting & (home == index))
        if not len(own):
            continue
        ids = sample_ids[own]
        packs = packs_of(best_fit_decreasing(lengths[ids], groups[index].capacity, rng), ids, index)
        waiting[own] = False
        shorter = np.flatnonzero(waiting)
        if index and len(shorter):
            room = groups[index].capacity - packs.sum(lengths.astype(np.int64))
            into = greedy_fill(room, lengths[sample_ids[shorter]], rng)
            chosen = shorter[into >= 0]
            packs = _add(packs, into[into >= 0], sample_ids[chosen], index)
            waiting[chosen] = False
        parts.append(packs)
    return join(parts)


def _add(packs: Packs, into: Int, ids: Int, group: int) -> Packs:
    """Packs with further samples, each put into the pack that `into` names."""
    pack_of = np.repeat(np.arange(len(packs)), np.diff(packs.offsets))
    return packs_of(np.concatenate([pack_of, into]), np.concatenate([packs.sample_ids, ids]), group, n_packs=len(packs))

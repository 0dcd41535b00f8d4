"""Packs of a window before they have a place, what they are made with, and how they are laid out in micro-steps.

Packs of one SP degree are cut into micro-steps slowest first, so that the ranks of one hold packs of like time. What
fills no micro-step waits for the next window or, in the last one, is laid side by side, degrees mixed.

Legend: ``P`` packs, ``N`` samples placed in them. Complexity: a sort of the packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hbp.plan import Group
from hbp.planning.packs import Float, Int, PackCosts


@dataclass(frozen=True)
class Given:
    """What stays the same while a window is packed."""

    groups: tuple[Group, ...]
    """In order of rising capacity."""
    every: tuple[Group, ...]
    """Those, then further capacities between two of one degree."""
    lows: Int
    """Samples over ``lows[i]`` tokens, up to ``lows[i + 1]``, are at home in group ``i``."""
    bottom: int
    """The shortest group that any sample is at home in."""
    costs: PackCosts
    world: int
    """Ranks of a micro-step."""

    def slots(self, group: int) -> int:
        """Packs of a group that a micro-step takes."""
        return self.world // self.every[group].sp_degree


@dataclass(frozen=True, eq=False)
class OpenPacks:
    """Packs of one SP degree before they have a place."""

    groups: tuple[Group, ...]
    """That ``group`` indexes."""
    group: Int  # [P]
    pack_of: Int  # [N] pack of each sample
    taken: Int  # [N] its length
    seconds: Float  # [P] predicted

    @classmethod
    def of(cls, groups: tuple[Group, ...], group: Int, pack_of: Int, taken: Int, costs: PackCosts) -> OpenPacks:
        """Those of the packs that hold something, with what they are predicted to take."""
        holds = np.bincount(pack_of, minlength=len(group)) > 0
        if not holds.all():  # numbers without the empty ones
            group, pack_of = group[holds], (np.cumsum(holds) - 1)[pack_of]
        work, seconds = costs.work(pack_of, taken, len(group)), np.empty(len(group))
        for index in np.unique(group):
            here = group == index
            seconds[here] = costs.cost.seconds(groups[index].sp_degree, groups[index].gc_layers).of(work[here])
        return cls(groups, group, pack_of, taken, seconds)

    def __len__(self) -> int:
        return len(self.group)

    def degrees(self) -> Int:
        """SP degree of each pack ``[P]``."""
        return np.array([group.sp_degree for group in self.groups], np.int64)[self.group]

    def slowest_first(self) -> OpenPacks:
        """The same packs, numbered by falling seconds."""
        order = np.argsort(-self.seconds, kind="stable")
        number = np.empty(len(self), np.int64)
        number[order] = np.arange(len(self))
        return OpenPacks(self.groups, self.group[order], number[self.pack_of], self.taken, self.seconds[order])

    def split(self, count: int) -> tuple[OpenPacks, OpenPacks]:
        """The first `count` packs, and the others."""
        if count == len(self):
            return self, self._those(slice(0), slice(0))
        first = self.pack_of < count
        others = self._those(slice(count, None), ~first)
        return self._those(slice(count), first), replace(others, pack_of=others.pack_of - count)

    def _those(self, packs: slice, samples: slice | npt.NDArray[np.bool_]) -> OpenPacks:
        return OpenPacks(
            self.groups, self.group[packs], self.pack_of[samples], self.taken[samples], self.seconds[packs]
        )


def joined(parts: Sequence[OpenPacks], groups: tuple[Group, ...]) -> OpenPacks:
    """All packs of all parts in order; `groups` holds those of every part first."""
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return replace(parts[0], groups=groups)
    firsts, none = np.cumsum([0, *(len(part) for part in parts)]), np.zeros(0, np.int64)
    return OpenPacks(
        groups,
        np.concatenate([none, *(part.group for part in parts)]),
        np.concatenate([none, *(part.pack_of + first for part, first in zip(parts, firsts[:-1], strict=True))]),
        np.concatenate([none, *(part.taken for part in parts)]),
        np.concatenate([np.zeros(0), *(part.seconds for part in parts)]),
    )


@dataclass(frozen=True)
class Packed:
    """Packs of a window and their place in its micro-steps. ``P`` packs, ``N`` samples placed."""

    groups: tuple[Group, ...]
    """Those given, capacities between them, and a shorter one where the last micro-step needed it."""
    pack_of: Int  # [N]
    taken: Int  # [N] length of each sample placed
    group: Int  # [P] index into groups
    micro_step: Int  # [P] from 0
    rank_start: Int  # [P]
    seconds: Float  # [P] predicted


def place(parts: Sequence[OpenPacks], groups: tuple[Group, ...], counts: Int, world: int, *, last: bool) -> Packed:
    """Cut the packs of each part, slowest first, into micro-steps; what fills none waits or is laid out mixed.

    Args:
        parts: each of one degree.
        groups: of all parts.
        counts: histogram of the samples that wait for the next window; gets those of packs that wait.
        world: ranks.
        last: no pack may wait.
    """
    whole, rest = [], []  # packs that fill micro-steps of their own, and the others
    micro_step, rank_start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    n_micro = 0
    for part in parts:
        degree = int(part.degrees()[0])
        slots = world // degree
        fill, over = part.slowest_first().split(len(part) // slots * slots)
        whole.append(fill)
        rest.append(over)
        at = np.arange(len(fill))
        micro_step.append(n_micro + at // slots)
        rank_start.append(at % slots * degree)
        n_micro += len(fill) // slots
    left = joined(rest, groups)
    if last:
        side, first = tile_by_seconds(left.seconds, left.degrees(), world)
        whole.append(left)
        micro_step.append(n_micro + side)
        rank_start.append(first)
    else:
        counts += np.bincount(left.taken, minlength=len(counts))
    packs = joined(whole, groups)
    return Packed(
        groups,
        packs.pack_of,
        packs.taken,
        packs.group,
        np.concatenate(micro_step),
        np.concatenate(rank_start),
        packs.seconds,
    )


def tile_by_seconds(seconds: Float, degree: Int, world: int) -> tuple[Int, Int]:
    """Lay packs of any degrees side by side: micro-step and first rank of each.

    A micro-step takes the slowest pack left, then again and again the slowest that its free ranks hold. Powers of two,
    highest degree first, keep every group aligned.
    """
    micro, start = np.empty(len(seconds), np.int64), np.empty(len(seconds), np.int64)
    order = np.argsort(-seconds, kind="stable")
    queues = {int(d): [int(p) for p in order[degree[order] == d]][::-1] for d in np.unique(degree)}  # slowest last
    step = 0
    while any(queues.values()):
        free, side = world, []
        while True:
            fitting = [d for d, queue in queues.items() if queue and d <= free]
            if not fitting:
                break
            d = max(fitting, key=lambda d: seconds[queues[d][-1]])
            side.append(queues[d].pop())
            free -= d
        at = 0
        for pack in sorted(side, key=lambda p: -degree[p]):
            micro[pack], start[pack] = step, at
            at += int(degree[pack])
        step += 1
    return micro, start

"""What a strategy is, what it is given, and what it gives back.

Nothing outside a strategy's own file asks for its name: what others need to know of it is a field of
:class:`Strategy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.plan_info import DEFAULT_ORDER
from hbp.planning.packs import Int, Lengths, PackCost, Schedule, numbered, predicted_seconds
from hbp.planning.settings import Choice, Wanted, every_length


@dataclass(frozen=True)
class Problem:
    """What a strategy is given."""

    lengths: Lengths
    """Of the whole data set, tokens."""
    dropped: Int
    """Samples that are longer than the static group's capacity; the others are to be scheduled."""
    static: Group
    """The one setting of strategies that have only one."""
    longest: int | None
    """Longest packing length that the user allows; None for no limit but memory's."""
    cost: CostModel
    global_batch_tokens: int
    batch_given: bool
    """Whether the user asked for that global batch, so that no micro-step should exceed it."""
    short_steps: int | None
    """Of the curriculum; None for its default."""
    windows: int | None
    """Pieces of the shuffle that are planned apart; None for the default."""
    rng: np.random.Generator
    order: str = DEFAULT_ORDER
    """Of :data:`hbp.plan_info.ORDERS`."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.cost.world_size

    def pack_cost(self, groups: Sequence[Group]) -> PackCost:
        """Predicted seconds of packs of these groups."""
        return predicted_seconds(self.cost, self.lengths, groups)

    @cached_property
    def sample_ids(self) -> Int:
        """Of the samples to schedule, rising."""
        every = numbered(len(self.lengths))
        return np.delete(every, self.dropped) if len(self.dropped) else every

    @cached_property
    def own_lengths(self) -> Lengths:
        """Of the samples to schedule; the data set's own array where none is left out."""
        return self.lengths[self.sample_ids] if len(self.dropped) else self.lengths


@dataclass(frozen=True)
class Outcome:
    """Packs in their place in the run, and what they were made by."""

    schedule: Schedule
    groups: tuple[Group, ...]
    """That ``schedule.packs.group`` indexes."""
    extra: tuple[Group, ...] = ()
    """Those of them that the strategy did not choose, but made for what filled none."""
    known: tuple[npt.NDArray[np.float32], Lengths] | None = None
    """Predicted seconds ``[P]`` and lengths of the samples pack by pack ``[N]``, of a strategy that knows them already
    and schedules its packs in order of their place."""
    short_steps: int = 0
    windows: int = 1
    details: Mapping[str, float] = field(default_factory=dict)
    """What the strategy knows of its order (:mod:`hbp.planning.mixed.order`)."""
    waiting: Int = field(default_factory=lambda: np.zeros(0, np.int64))
    """Samples left for later, of a stream."""


@dataclass(frozen=True)
class Strategy:
    """A way to plan."""

    name: str
    """As on the command line; every name is in :mod:`hbp.config` too."""
    summary: str
    """One line for ``--help``."""
    plan: Callable[[Problem], Outcome]
    settings: Callable[[Wanted], list[Choice]] = every_length
    """Static settings that it may be planned with, each with seconds that no plan of it can beat; the fastest plan is
    kept."""
    ours: bool = False
    """Not what users have today, which ours are measured against."""
    finds_groups: bool = False
    """Whether it searches groups for the data set, so that :attr:`Problem.static` says nothing but what fits."""
    curriculum: bool = False
    """Whether ``short_steps`` means anything to it."""
    windows: bool = False
    """Whether ``windows`` does,"""
    orders: bool = False
    """and ``order``."""
    slow_above: int | None = None
    """Samples from which on it takes minutes; None where it never does."""

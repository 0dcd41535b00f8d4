"""What a strategy is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel
from hbp.plan import Group
from hbp.planning.packs import Int, Lengths
from hbp.planning.schedule import PackCost, Schedule


@dataclass(frozen=True)
class Problem:
    """What a strategy is given."""

    lengths: Lengths
    """Of the whole data set, tokens."""
    sample_ids: Int
    """Samples to schedule, each within the static group's capacity."""
    static: Group
    """The one setting of strategies that have only one."""
    longest: int | None
    """Longest packing length that the user allows; None for no limit but memory's."""
    cost: CostModel
    pack_cost: Callable[[Sequence[Group]], PackCost]
    world_size: int
    global_batch_tokens: int
    batch_given: bool
    """Whether the user asked for that global batch, so that no micro-step should exceed it."""
    short_steps: int | None
    """Of the curriculum; None for its default."""
    windows: int | None
    """Pieces of the shuffle that are planned apart; None for the default."""
    rng: np.random.Generator

    def own_lengths(self) -> Lengths:
        """Of the samples to schedule; the data set's own array where none is left out."""
        return self.lengths if len(self.sample_ids) == len(self.lengths) else self.lengths[self.sample_ids]


@dataclass(frozen=True)
class Outcome:
    """Packs in their place in the run, and what they were made by."""

    schedule: Schedule
    groups: tuple[Group, ...]
    """That ``schedule.packs.group`` indexes."""
    seconds: npt.NDArray[np.float64] | None = None
    """Predicted, of each pack, where the strategy knows them already ``[P]``."""
    short_steps: int = 0
    windows: int = 1
    details: Mapping[str, float] = field(default_factory=dict)
    """What the strategy knows of its order (:mod:`hbp.planning.composition`)."""
    waiting: Int = field(default_factory=lambda: np.zeros(0, np.int64))
    """Samples left for later, of a stream."""

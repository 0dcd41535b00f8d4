"""What a strategy is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    short_steps: int | None
    """Of the curriculum; None for its default."""
    windows: int | None
    """Pieces of the shuffle that are planned apart; None for the default."""
    rng: np.random.Generator


@dataclass(frozen=True)
class Outcome:
    """Packs in their place in the run, and what they were made by."""

    schedule: Schedule
    groups: tuple[Group, ...]
    """That ``schedule.packs.group`` indexes."""
    short_steps: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else the plan file should say of how it was made."""

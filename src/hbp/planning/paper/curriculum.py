"""Order of the optimizer steps: short groups first, then short and long in turn (paper, Section 4.3).

The first steps come from the groups of the lowest SP degree only, which steadies the start of training; the paper used
500 and found 100 enough. After them every group's steps are spread evenly over the rest of the run, in random order:
the n-th of a group's m steps falls at a random place in the n-th of m equal parts.

Complexity: a sort of the steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MOST_SHORT_STEPS = 500
SHORT_SHARE = 0.1


def default_short_steps(n_steps: int) -> int:
    """The paper's 500, but at most a tenth of a run."""
    return min(MOST_SHORT_STEPS, int(n_steps * SHORT_SHARE))


def order_steps(
    kind_of_step: npt.NDArray[np.int64], short_kinds: set[int], short_steps: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Position of each step in the run, int64 ``[steps]``.

    Args:
        kind_of_step: group of each step.
        short_kinds: groups that may come first.
        short_steps: how many of their steps come first.
        rng: decides the order within each kind.
    """
    n = len(kind_of_step)
    key = np.empty(n)
    for kind in np.unique(kind_of_step):
        steps = rng.permutation(np.flatnonzero(kind_of_step == kind))
        key[steps] = (np.arange(len(steps)) + rng.random(len(steps))) / len(steps)
    order = np.argsort(key, kind="stable")
    short = np.isin(kind_of_step[order], list(short_kinds))
    early = order[short][:short_steps]
    order = np.concatenate([early, order[~np.isin(order, early)]])
    position = np.empty(n, np.int64)
    position[order] = np.arange(n)
    return position

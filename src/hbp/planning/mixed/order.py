"""Micro-steps → optimizer steps that hold the data's mix, and how random the order still is.

Each group's micro-steps of a window are spread evenly over the window, in random order and from a random start, so any
stretch of the sequence holds of each of ``g`` groups its share ``p`` of the stretch, to within ``1 + p (g - 2)``
micro-steps: within one for two groups, never further off than their number. Optimizer steps are cut from it at every
global batch of tokens. The curriculum (paper, Section 4.3) then brings the first steps forward: micro-steps of the
groups of the lowest SP degree, in their order.

What is left of a random order is measured by *drift* (:mod:`hbp.planning.metrics`) and *travel*: how far a sample is
trained on from where the shuffle put it, as a share of the run, the mean over samples. 0 for the shuffle itself; 1/3 if
the two orders have nothing to do with each other.

Complexity: a sort of the micro-steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hbp.plan import close, wanted_steps
from hbp.planning.packs import Float, Int
from hbp.planning.paper.curriculum import default_short_steps
from hbp.planning.paper.steps import cut_evenly


def interleave(kind: Int, window: Int, rng: np.random.Generator) -> Int:
    """Order of micro-steps in which each window's kinds are evenly spread; windows one after the other.

    Args:
        kind: group of each micro-step ``[M]``.
        window: of each micro-step ``[M]``.
        rng: order within a kind, and where in its share of the window each kind starts.

    Returns:
        Micro-steps in the order to run ``[M]``.
    """
    key = np.empty(len(kind))
    for w in np.unique(window):
        inside = window == w
        for k in np.unique(kind[inside]):
            members = rng.permutation(np.flatnonzero(inside & (kind == k)))
            key[members] = w + (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(key, kind="stable")


def cut_steps(order: Int, tokens: Float, batch: float) -> Int:
    """Optimizer step of each micro-step: `order` cut at every `batch` tokens, by the middle of the micro-step.

    Where that makes another number of steps than a run of so many tokens has
    (:mod:`hbp.planning.paper.steps`), cut into equal parts instead.
    """
    ends = np.cumsum(tokens[order])
    step, wanted = np.empty(len(order), np.int64), wanted_steps(float(ends[-1]), batch)
    cut = np.unique(np.floor((ends - tokens[order] / 2) / batch), return_inverse=True)[1]
    step[order] = cut if close(int(cut[-1]) + 1, wanted) else cut_evenly(tokens[order], wanted)
    return step


def shorts_first(
    order: Int, short: npt.NDArray[np.bool_], tokens: Float, batch: float, steps: int | None
) -> tuple[Int, int]:
    """Bring micro-steps of the short groups forward until they fill the first `steps` steps; None for the default."""
    total = float(tokens.sum())
    steps = default_short_steps(max(1, round(total / batch))) if steps is None else steps
    if short.all():
        return order, steps
    ours = order[short[order]]
    early = ours[: int(np.searchsorted(np.cumsum(tokens[ours]), steps * batch, side="right"))]
    return np.concatenate([early, order[~np.isin(order, early)]]), steps

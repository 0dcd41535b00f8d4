"""Micro-steps → optimizer steps that hold the data's mix, and how random the order still is.

Each group's micro-steps of a window are spread evenly over the window, in random order and from a random start, so any
stretch of the sequence holds of each of ``g`` groups its share ``p`` of the stretch, to within ``1 + p (g - 2)``
micro-steps: within one for two groups, never further off than their number. Optimizer steps are cut from it at every
global batch of tokens. The curriculum (paper, Section 4.3) then brings the first steps forward: micro-steps of the
groups of the lowest SP degree, in their order.

Two figures say what is left of a random order:

- *drift*: how far a step's composition is from the data set's: half the sum over octaves of sample length of the
  absolute difference between the step's share of tokens and the data set's, the mean over steps. 0: every step is the
  data set in small; near 1: steps of one kind. Random samples of the same batch size do not reach 0 either.
- *travel*: how far a sample is trained on from where the shuffle put it, as a share of the run, the mean over samples.
  0 for the shuffle itself; 1/3 if the two orders have nothing to do with each other.

Complexity: a sort of the micro-steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.plan import IntArray
from hbp.planning.packs import Int
from hbp.planning.paper.curriculum import default_short_steps

Float = npt.NDArray[np.float64]


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
    """Optimizer step of each micro-step: `order` cut at every `batch` tokens, by the middle of the micro-step."""
    ends = np.cumsum(tokens[order])
    step = np.empty(len(order), np.int64)
    step[order] = np.unique(np.floor((ends - tokens[order] / 2) / batch), return_inverse=True)[1]
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


def drift(step: IntArray, offsets: IntArray, lengths: IntArray, n_steps: int) -> float:
    """Mean distance of a step's composition from the data set's (module docstring).

    Args:
        step: of each pack ``[P]``.
        offsets: of the packs' samples ``[P + 1]``.
        lengths: of the samples, pack by pack.
        n_steps: optimizer steps.
    """
    tokens = _tokens_by_octave(step, offsets, lengths, n_steps)
    whole = tokens.sum(axis=0) / tokens.sum()
    shares = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    return float(np.abs(shares - whole).sum(axis=1).mean() / 2)


@njit(cache=True)
def _tokens_by_octave(step: IntArray, offsets: IntArray, lengths: IntArray, n_steps: int) -> Float:
    """Tokens of each step in samples of 1, 2–3, 4–7, … tokens, ``[steps, 32]``."""
    tokens = np.zeros((n_steps, 32))
    for pack in range(len(step)):
        for i in range(offsets[pack], offsets[pack + 1]):
            octave, rest = 0, lengths[i] >> 1
            while rest:
                octave, rest = octave + 1, rest >> 1
            tokens[step[pack], octave] += lengths[i]
    return tokens

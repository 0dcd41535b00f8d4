"""Which samples an optimizer step holds, before anything is packed.

``random``: the shuffle is cut at every global batch of tokens, as naive packing does; nothing else is looked at, so the
steps of two data sets that are shuffled alike have the same samples but for where tokens end.

``balanced``: every octave of sample length is dealt evenly over the steps, from the longest down, each sample to the
step that lacks most of its share of the octave: what the step has room for, times the octave's share of all that is
still to be dealt. A step that got one long sample more than another gets that much less of what is shorter.

The curriculum (paper, Section 4.3) comes first in both: so many steps of samples that need no long group.

Complexity: a sort of the samples, O(samples · log steps).

Legend: ``N`` samples, ``S`` steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from hbp.planning.kernels import by_falling_length
from hbp.planning.packs import Int, Lengths

Float = npt.NDArray[np.float64]


def cut_shuffle(lengths: Lengths, n_steps: int) -> Int:
    """Step of each sample: equal parts of the tokens in the order given, by the middle of the sample ``[N]``.

    No step is empty: where a sample is longer than a step, there are fewer.
    """
    ends = np.cumsum(lengths, dtype=np.float64)
    if not len(ends):
        return np.zeros(0, np.int64)
    at = np.floor((ends - lengths / 2) * (n_steps / ends[-1]))
    return np.unique(at, return_inverse=True)[1].astype(np.int64)


def deal_evenly(lengths: Lengths, room: Float, rng: np.random.Generator) -> Int:
    """Step of each sample, every octave of length spread over the steps.

    Args:
        lengths: of the samples, tokens ``[N]``.
        room: tokens that each step is to get, at least 0 ``[S]``.
        rng: which samples of a length, and which of the steps that lack as much, come first.

    Returns:
        Step of each sample ``[N]``; some steps may get none.
    """
    order = by_falling_length(lengths, rng)
    falling = lengths[order].astype(np.int64)
    octave = np.frexp(falling)[1]
    begins = np.flatnonzero(np.diff(octave, prepend=-1, append=-1))
    step = np.empty(len(lengths), np.int64)
    step[order] = _deal(falling, begins, room.astype(np.float64), rng.permutation(len(room)))
    return step


@njit(cache=True)
def _deal(lengths: Int, begins: Int, room: Float, steps: Int) -> Int:
    """Deal samples of falling length; an octave is ``lengths[begins[i] : begins[i + 1]]``."""
    step, room = np.empty(len(lengths), np.int64), room.copy()
    left = float(lengths.sum())
    for octave in range(len(begins) - 1):
        begin, end = begins[octave], begins[octave + 1]
        tokens = float(lengths[begin:end].sum())
        lack = np.maximum(room, 0.0) * (tokens / left)
        left -= tokens
        # heap: the step that lacks most first; ties as the random order of steps has them.
        heap = steps[np.argsort(-lack[steps], kind="mergesort")]
        for i in range(begin, end):
            s = heap[0]
            step[i] = s
            lack[s] -= lengths[i]
            room[s] -= lengths[i]
            at, size = 0, len(heap)
            while True:
                child = 2 * at + 1
                if child >= size:
                    break
                if child + 1 < size and lack[heap[child + 1]] > lack[heap[child]]:
                    child += 1
                if lack[heap[at]] >= lack[heap[child]]:
                    break
                heap[at], heap[child] = heap[child], heap[at]
                at = child
    return step

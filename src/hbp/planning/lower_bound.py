"""The lower bound: seconds that no plan can beat.

It is the time of a perfect run: no padding, no rank that waits, every sample at whatever setting is cheapest for it.
docs/lower-bound.md proves that no plan can beat it. In short:

1. Take a rank of an SP group of degree ``d`` that recomputes ``k`` layers, with memory (and the user's leave, where
   `max_length` is given) for packs of ``C(d, k)`` tokens. A pack keeps it for ``max(b, (1 - o) b + F)`` seconds, where
   ``b`` is what the pack computes, ``F`` FSDP's traffic and ``o`` the share of computing that it hides behind; so for
   at least ``(1 - x o) b + x F`` with any ``x`` from 0 to 1.
2. ``b`` is a fixed part and a sum over the documents. A pack holds at most ``C(d, k)`` tokens, so a document of ``l``
   tokens may be charged ``l / C(d, k)`` of the fixed part and of ``F``: the charges never exceed what the pack pays.
3. So a document costs ``d`` ranks together at least the least of that over all settings whose packs can hold it. Sum
   over the documents, divide by the ranks, take the ``x`` that gives most: the bound is concave in ``x``.
4. Optimizer steps come on top, as many as the global batch asks for; and the run is no shorter than its longest sample
   at its fastest setting.

Complexity: (degrees × recomputed layers) array operations over the lengths that occur, for a dozen values of ``x``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.planning.kernels import count_lengths
from hbp.planning.packs import Float, Lengths

BISECTIONS = 12
"""Of ``x``: leave it within 1/4096 of the best one."""


def lower_bound(lengths: Lengths, cost: CostModel, *, steps: int = 0, max_length: int | None = None) -> float:
    """Seconds that no plan for these samples can beat (module docstring).

    Args:
        lengths: of every sample, tokens ``[N]``.
        cost: of the model on the cluster at its world size.
        steps: optimizer steps, each with the cluster's overhead.
        max_length: tokens that no pack may exceed; longer samples are left out, as a plan drops them. None: what memory
            holds.

    Raises:
        HbpError: no samples, or one without tokens, or one that no setting fits into memory.
    """
    lengths = np.asarray(lengths)
    if not len(lengths) or int(lengths.min()) < 1:
        raise HbpError("a bound needs at least one sample, and of each its tokens, 1 or more")
    counts = count_lengths(lengths, int(lengths.max()))
    counts = counts if max_length is None else counts[: max_length + 1]
    if not counts.any():
        raise HbpError(f"every sample is longer than {max_length} tokens; raise max_length to {int(lengths.min())}")
    counts = counts[: int(np.flatnonzero(counts)[-1]) + 1]
    longest = len(counts) - 1
    if all(cost.fewest_gc_layers(longest, degree) is None for degree in cost.degrees()):
        raise HbpError(f"a sample of {longest} tokens fits the memory at no setting; give more GPUs or a max_length")
    alone = _fastest_alone(cost, longest)
    total = rank_seconds(cost, counts, max_length) / cost.world_size
    return max(total, alone) + steps * cost.cluster.step_overhead_s


def _fastest_alone(cost: CostModel, length: int) -> float:
    """Seconds of a sample in a pack of its own, at its fastest setting."""
    work = cost.work(np.array([length]))
    return min(
        float(cost.seconds(degree, int(k)).of(work)[0])
        for degree in cost.degrees()
        for k in np.flatnonzero(cost.longest_packs(degree) >= length)[:1]
    )


def rank_seconds(cost: CostModel, counts: npt.NDArray[np.integer], limit: int | None = None) -> float:
    """Seconds of all ranks together that samples take at least, if ``counts[l]`` of them have length ``l``."""
    values = np.flatnonzero(counts)
    work, weights = cost.work(values), counts[values].astype(np.float64)
    value, slope = _charges(cost, work, weights, limit, 0.0)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS if slope > 0 else 0):  # the bound is concave in x: climb
        middle = (low + high) / 2
        at_middle, slope = _charges(cost, work, weights, limit, middle)
        value = max(value, at_middle)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return value


def _charges(cost: CostModel, work: Work, counts: Float, limit: int | None, x: float) -> tuple[float, float]:
    """The bound at one `x`, and its slope there."""
    best, slope = np.full(len(counts), np.inf), np.zeros(len(counts))
    for degree in cost.degrees():
        longest = np.minimum(cost.longest_packs(degree), limit or np.inf)
        for k, capacity in enumerate(longest):
            if k and capacity == longest[k - 1]:
                continue
            n = int(np.searchsorted(work.tokens, capacity, side="right"))
            spent, share = cost.seconds(degree, k), work.tokens[:n] / max(capacity, 1.0)
            busy = degree * (spent.fixed * share + spent.marginal(work[:n]))
            traffic = degree * spent.fsdp * share
            charge = (1 - x * spent.overlap) * busy + x * traffic
            better = charge < best[:n]
            best[:n][better] = charge[better]
            slope[:n][better] = (traffic - spent.overlap * busy)[better]
    return float((best * counts).sum()), float((slope * counts).sum())  # @ rounds by the number of threads

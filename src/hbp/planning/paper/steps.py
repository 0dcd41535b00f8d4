"""How many optimizer steps, and which micro-steps each holds: the same for every strategy.

Plans are compared at equal numbers of steps, so the tokens of an optimizer step mean the same to all: a run of ``T``
tokens with a global batch of ``B`` has the whole number of steps nearest to ``T / B``, to within
:data:`hbp.plan.CLOSE`, as long as there are so many micro-steps. Where steps of a fixed number of micro-steps come that
near, they are kept: trainers accumulate by counts. Else the sequence is cut where its tokens come nearest to equal
parts.

A step cannot hold less than a micro-step. Where one is larger than its part, the others get less; where there are fewer
micro-steps than steps, each is a step. Both show in the plan's details (:func:`hbp.planning.metrics.measure_order`),
and :func:`hbp.plan.batch_not_kept` says so.

Legend: ``M`` micro-steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hbp.planning.packs import Int


def cut_evenly(tokens: npt.NDArray[np.number], n_steps: int) -> Int:
    """Step of each micro-step: so many steps, all if there are no more, cut nearest to equal parts of the tokens.

    Args:
        tokens: of the micro-steps in order ``[M]``.
        n_steps: at least 1.

    Returns:
        Rising from 0, each step at least once, int64 ``[M]``.
    """
    total = np.cumsum(tokens, dtype=np.float64)
    n = min(n_steps, len(total))
    if n <= 1:
        return np.zeros(len(total), np.int64)
    number = np.arange(1, n)
    at = total[-1] / n * number
    after = np.searchsorted(total, at)  # first micro-step that ends at or beyond the cut
    before = np.where(after > 0, total[after - 1], 0.0)
    cut = after + (total[after] - at < at - before)
    cut = np.maximum.accumulate(cut - number) + number  # no step is empty,
    cut = np.clip(cut, number, len(total) - n + number)  # nor one of those to come
    return np.searchsorted(cut, np.arange(len(total)), side="right").astype(np.int64)


def share_out(n_steps: int, tokens: Sequence[float], micro_steps: Sequence[int]) -> list[int]:
    """Steps of each group: as its tokens have it, at least one and at most one a micro-step; `n_steps` if that can be.

    Args:
        n_steps: of all groups.
        tokens: of each group.
        micro_steps: of each group.
    """
    due = [n_steps * own / sum(tokens) for own in tokens]
    found = [min(max(1, int(share)), most) for share, most in zip(due, micro_steps, strict=True)]
    while sum(found) < min(n_steps, sum(micro_steps)):
        lacks = [
            share - own if own < most else -np.inf for share, own, most in zip(due, found, micro_steps, strict=True)
        ]
        found[int(np.argmax(lacks))] += 1
    while sum(found) > max(n_steps, len(found)):
        over = [own - share if own > 1 else -np.inf for share, own in zip(due, found, strict=True)]
        found[int(np.argmax(over))] -= 1
    return found

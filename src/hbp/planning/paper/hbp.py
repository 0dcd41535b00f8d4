"""`hbp`, the paper's method from top to bottom (arXiv 2503.07680, Section 4).

1. Groups: Algorithm 1 chooses packing lengths, their SP degrees and recomputed layers
   (:mod:`hbp.planning.paper.groups`).
2. Packs: each sample to the smallest group that holds it, best fit, then GreedyFill; Algorithm 2
   (:mod:`hbp.planning.paper.packing`).
3. Steps: balance batching, Algorithm 2's last step: micro-steps of like cost, dealt to steps of one group each.
4. Order: short groups first, then all groups in turn (:mod:`hbp.planning.paper.curriculum`).

The longest packing length is planned at each length that Algorithm 1 has samples for, and the fastest plan is kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hbp.planning.paper.curriculum import default_short_steps, order_steps
from hbp.planning.paper.groups import published_groups
from hbp.planning.paper.packing import balance_batches, hierarchical_packs
from hbp.planning.settings import Choice, Wanted, every_length, least_seconds, micro_step_tokens
from hbp.planning.strategy import Outcome, Problem, Strategy


def hbp(problem: Problem) -> Outcome:
    """Groups, packs, micro-steps, order (module docstring)."""
    lengths, ids = problem.lengths, problem.sample_ids
    groups = published_groups(problem.cost, lengths[ids], problem.static.capacity)
    packs = hierarchical_packs(lengths, ids, groups, problem.rng)
    schedule = balance_batches(
        packs,
        problem.pack_cost(groups),
        groups,
        lengths,
        problem.world_size,
        problem.global_batch_tokens,
        problem.rng,
        counted=not problem.batch_given,
    )
    n_steps = int(schedule.step.max()) + 1
    kind = np.empty(n_steps, np.int64)
    kind[schedule.step] = schedule.packs.group
    lowest = min(group.sp_degree for group in groups)
    short = {i for i, group in enumerate(groups) if group.sp_degree == lowest}
    count = default_short_steps(n_steps) if problem.short_steps is None else problem.short_steps
    position = order_steps(kind, short, count, problem.rng)
    return Outcome(replace(schedule, step=position[schedule.step]), groups, short_steps=count)


def longest_lengths(wanted: Wanted) -> list[Choice]:
    """Longest lengths that Algorithm 1 has samples for; of longer ones it takes a half or a quarter, no more.

    The degree is its own choice, so there is one setting a length.
    """
    cost, lengths, total, most = wanted.cost, wanted.lengths, wanted.total(), int(wanted.lengths.max())
    found: dict[int, Choice] = {}
    for choice in every_length(wanted):
        groups = published_groups(cost, lengths, choice.group.capacity)
        used = len(groups) == 1 or groups[-2].capacity < most
        fits = wanted.batch is None or max(micro_step_tokens(cost, group) for group in groups) <= wanted.batch
        if choice.group.capacity == wanted.longest or (used and fits):
            found.setdefault(choice.group.capacity, replace(choice, seconds=least_seconds(cost, groups, total)))
    return list(found.values())


HBP = Strategy(
    "hbp",
    "the paper's: Algorithm 1's groups, best fit and GreedyFill, micro-steps of like cost, one group a step",
    hbp,
    longest_lengths,
    ours=True,
    curriculum=True,
)

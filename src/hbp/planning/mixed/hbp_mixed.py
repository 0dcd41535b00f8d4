"""`hbp-mixed`, our best plan, from top to bottom.

1. Groups: searched for this data set (:mod:`hbp.planning.mixed.groups`).
2. Windows: the samples are shuffled and the order is cut into windows, each planned apart
   (:mod:`hbp.planning.mixed.windows`).
3. Packs: alike in tokens and in attention cost, in whole micro-steps (:mod:`hbp.planning.mixed.packing`, with
   :mod:`~hbp.planning.mixed.even_fit` and :mod:`~hbp.planning.mixed.finish_together`).
4. Order: all groups interleaved, so that a step holds the mix of the data (:mod:`hbp.planning.mixed.order`).

Steps 2 to 4 are those of the order `fastest`; the others begin with what a step holds
(:mod:`hbp.planning.ordered.orders`).
"""

from __future__ import annotations

from hbp.planning.mixed.groups import search_groups
from hbp.planning.ordered.orders import ORDERED
from hbp.planning.settings import fastest_degree
from hbp.planning.strategy import Outcome, Problem, Strategy


def hbp_mixed(problem: Problem) -> Outcome:
    """Our best: groups searched for the data, packs that are alike, steps that hold the data's mix."""
    lengths = problem.own_lengths
    batch = problem.global_batch_tokens if problem.batch_given else None
    groups = search_groups(problem.cost, lengths, int(lengths.max()), problem.longest, batch)
    return ORDERED[problem.order](problem, groups)


HBP_MIXED = Strategy(
    "hbp-mixed",
    "groups searched for the data, packs that are alike, steps that hold the data's mix of short and long",
    hbp_mixed,
    fastest_degree,
    ours=True,
    finds_groups=True,
    curriculum=True,
    windows=True,
    orders=True,
)

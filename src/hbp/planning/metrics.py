"""How good a plan is: the paper's ratios (Section 3.1), and the share of the best possible.

An *iteration* of the ratios is a micro-step, since that is where ranks wait for each other. Ranks that the plan leaves
idle count with zero.

- DBR: mean over micro-steps of Σ_ranks (T_max − T_i) / (T_max · ranks), T = tokens on the rank.
- ABR: the same with A = Σ len² ÷ degree on the rank.
- PR: unused share of the packs' capacity.
- CR: share of tokens that go through SP communication.
- Ave-T: tokens per optimizer step.
- efficiency: the lower bound over the predicted seconds.

**The lower bound** is the time of a perfect run: every sample alone at its own cheapest (degree, fewest recomputed
layers), nothing fixed per pack or micro-step, no padding, no rank that waits. No plan can beat it: a pack's predicted
seconds are a fixed part ≥ 0 plus a sum over its documents (:class:`hbp.cost.predict.Seconds`), each term at least that
document's at its own cheapest setting (a document in a pack can have no fewer layers recomputed than alone, since the
pack is no shorter); a group of degree d spends d rank-seconds a second; and a micro-step lasts at least the mean over
its ranks. Sum over the run and divide by the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel
from hbp.plan import Plan
from hbp.planning.packs import Lengths

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metrics:
    """The ratios of one plan, and its predicted seconds."""

    pr: float
    dbr: float
    abr: float
    cr: float
    ave_tokens: float
    efficiency: float
    predicted_s: float


def imbalance(per_rank: Float, degree: Float, micro_step: npt.NDArray[np.integer], world_size: int) -> float:
    """Mean over micro-steps of Σ_ranks (max − own) / (max · ranks), for a quantity per rank of each pack ``[P]``."""
    n = int(micro_step[-1]) + 1
    most = np.zeros(n)
    np.maximum.at(most, micro_step, per_rank)
    total = np.bincount(micro_step, weights=per_rank * degree, minlength=n)
    return float(np.mean(1 - total / (np.maximum(most, 1e-300) * world_size)))


def lower_bound_seconds(cost: CostModel, lengths: Lengths) -> float:
    """Seconds that no plan for these samples can beat on this cluster (module docstring)."""
    values, counts = np.unique(lengths, return_counts=True)
    work = cost.work(values)
    best = np.full(len(values), np.inf)
    for degree in cost.degrees():
        gc_layers = np.searchsorted(cost.longest_packs(degree), values)
        for k in np.unique(gc_layers[gc_layers <= cost.model.n_layers]):
            here = gc_layers == k
            seconds = degree * cost.seconds(degree, int(k)).marginal(work[here])
            best[here] = np.minimum(best[here], seconds)
    return float((best * counts).sum() / cost.world_size)


def measure(plan: Plan, cost: CostModel) -> Metrics:
    """Every metric of a plan that holds at least one pack."""
    micro, degree = plan.micro_step_index(), plan.sp_degree.astype(np.float64)
    tokens = plan.tokens().astype(np.float64)
    world = plan.info.world_size
    predicted = float(plan.micro_step_seconds().sum() + plan.n_steps * cost.cluster.step_overhead_s)
    return Metrics(
        pr=float(1 - tokens.sum() / plan.capacity.sum(dtype=np.float64)),
        dbr=imbalance(tokens / degree, degree, micro, world),
        abr=imbalance(plan.sum_squares() / degree, degree, micro, world),
        cr=float(tokens[degree > 1].sum() / tokens.sum()),
        ave_tokens=float(tokens.sum() / plan.n_steps),
        efficiency=lower_bound_seconds(cost, plan.lengths) / predicted,
        predicted_s=predicted,
    )

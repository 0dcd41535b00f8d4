"""How good a plan is: the paper's ratios (Section 3.1), and the share of the best possible.

An *iteration* of the ratios is a micro-step, since that is where ranks wait for each other. Ranks that the plan leaves
idle count with zero.

- DBR: mean over micro-steps of Σ_ranks (T_max − T_i) / (T_max · ranks), T = tokens on the rank.
- ABR: the same with A = Σ len² ÷ degree on the rank.
- PR: unused share of the packs' capacity.
- CR: share of tokens that go through SP communication.
- Ave-T: tokens per optimizer step.
- efficiency: the lower bound over the predicted seconds.

Under ``details`` in plan.json (:func:`measure_order`): time imbalance, the same ratio with predicted seconds; drift,
how far a step's composition is from the data's (:mod:`hbp.planning.mixed.order`).

**The lower bound** is the time of a perfect run (:func:`lower_bound_seconds`): no padding, no rank that waits, every
sample at whatever setting is cheapest for it. docs/lower-bound.md proves that no plan can beat it. In short: take a
rank of an SP group of degree ``d`` that recomputes ``k`` layers, with memory (and the user's leave, where `max_length`
is given) for packs of ``C(d, k)`` tokens. It is
taken for ``max(b, (1 - o) b + F)`` seconds, where ``b`` is what the pack computes, ``F`` FSDP's traffic and ``o`` the
share of computing that it hides behind; so for at least ``(1 - x o) b + x F`` with any ``x`` from 0 to 1. ``b`` is a
fixed part and a sum over the documents; a pack holds at most ``C(d, k)`` tokens, so a document of ``l`` tokens may be
charged ``l / C(d, k)`` of the fixed part and of ``F``, and the charges never exceed what the pack pays. So a document
costs ``d`` ranks together at least the least of that over all settings whose packs can hold it. Sum over the documents,
divide by the ranks, take the ``x`` that gives most. Optimizer steps come on top, as many as the global batch asks for;
and the run is no shorter than its longest sample at its fastest setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.cost.predict import CostModel, Work
from hbp.errors import HbpError
from hbp.plan import Plan, imbalance, ratios
from hbp.planning.kernels import count_lengths
from hbp.planning.mixed.order import drift
from hbp.planning.packs import Lengths

BISECTIONS = 12
FLOAT32 = 1e-6
"""Rounding of predicted seconds in the plan."""
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


def lower_bound(lengths: Lengths, cost: CostModel, *, steps: int = 0, max_length: int | None = None) -> float:
    """Seconds that no plan for these samples can beat (docs/lower-bound.md has the proof).

    Args:
        lengths: of every sample, tokens ``[N]``.
        cost: of the model on the cluster.
        steps: optimizer steps, each with the cluster's overhead.
        max_length: tokens that no pack may exceed; longer samples are left out, as a plan drops them. None: what memory
            holds.

    Raises:
        HbpError: no samples, or one without tokens, or one that no setting fits into memory.
    """
    lengths = np.asarray(lengths)
    lengths = lengths if max_length is None else lengths[lengths <= max_length]
    if not len(lengths) or int(lengths.min()) < 1:
        raise HbpError("a bound needs at least one sample, and of each its tokens, 1 or more")
    longest = int(lengths.max())
    if all(cost.fewest_gc_layers(longest, degree) is None for degree in cost.degrees()):
        raise HbpError(f"a sample of {longest} tokens fits the memory at no setting; give more GPUs or a max_length")
    return lower_bound_seconds(cost, lengths, steps, max_length)


def lower_bound_seconds(cost: CostModel, lengths: Lengths, n_steps: int = 0, limit: int | None = None) -> float:
    """Seconds that no plan for these samples with `n_steps` optimizer steps can beat (module docstring).

    With a `limit` that the user set: no plan whose packs hold at most so many tokens.
    """
    counts = count_lengths(lengths, int(lengths.max()))
    longest = cost.work(np.array([len(counts) - 1]))
    alone = min(
        float(cost.seconds(degree, int(k)).of(longest)[0])
        for degree in cost.degrees()
        for k in np.flatnonzero(cost.longest_packs(degree) >= longest.tokens[0])[:1]
    )
    total = rank_seconds(cost, counts, limit) / cost.world_size
    return max(total, alone) + n_steps * cost.cluster.step_overhead_s


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


def measure(plan: Plan, cost: CostModel, limit: int | None = None) -> Metrics:
    """Every metric of a plan that holds at least one pack; `limit` is the user's, of the tokens of a pack."""
    found = ratios(plan)
    batch = int(plan.info.settings.get("global_batch_tokens", 0)) or 1
    asked = min(plan.n_steps, -(-plan.info.n_tokens // batch))
    efficiency = lower_bound_seconds(cost, plan.lengths, asked, limit) / found["predicted_s"]
    # More than 1 but for rounding would be a fault, and has to show.
    return Metrics(**found, efficiency=1.0 if 1 < efficiency < 1 + FLOAT32 else efficiency)


def measure_order(plan: Plan) -> dict[str, float]:
    """How evenly the ranks of a micro-step finish, and how far a step is from the data set in small."""
    seconds, degree = plan.predicted_s.astype(np.float64), plan.sp_degree.astype(np.float64)
    return {
        "time_imbalance": imbalance(seconds, degree, plan.micro_step_index(), plan.info.world_size),
        "drift": drift(plan.step, plan.sample_offsets, plan.lengths, plan.n_steps),
    }

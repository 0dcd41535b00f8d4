"""How good a plan is: the paper's ratios (Section 3.1), and the share of the best possible.

An *iteration* of the ratios is a micro-step, since that is where ranks wait for each other. Ranks that the plan leaves
idle count with zero.

- DBR: mean over micro-steps of Σ_ranks (T_max − T_i) / (T_max · ranks), T = tokens on the rank.
- ABR: the same with A = Σ len² ÷ degree on the rank.
- PR: unused share of the packs' capacity.
- CR: share of tokens that go through SP communication.
- Ave-T: tokens per optimizer step.
- efficiency: the lower bound (:mod:`hbp.planning.lower_bound`) over the predicted seconds.

Under ``details`` in plan.json (:func:`measure_order`):

- time imbalance: the same ratio with predicted seconds;
- drift: how far a step's composition is from the data set's: half the sum over octaves of sample length of the absolute
  difference between the step's share of tokens and the data set's, the mean over steps. 0: every step is the data set
  in small; near 1: steps of one kind. Random samples of the same batch size do not reach 0 either;
- largest step tokens; and steps off: how far the number of steps is from that of the global batch, as a share of it
  (:mod:`hbp.planning.paper.steps`), 0 where the plan keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from hbp.cost.predict import CostModel
from hbp.plan import IntArray, Plan, imbalance, ratios, wanted_steps
from hbp.planning.lower_bound import lower_bound
from hbp.planning.packs import Float

FLOAT32 = 1e-6
"""Rounding of predicted seconds in the plan."""


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


def measure(plan: Plan, cost: CostModel, limit: int | None = None) -> Metrics:
    """Every metric of a plan that holds at least one pack; `limit` is the user's, of the tokens of a pack."""
    found = ratios(plan)
    asked = min(plan.n_steps, -(-plan.info.n_tokens // _batch(plan)))
    efficiency = lower_bound(plan.lengths, cost, steps=asked, max_length=limit) / found["predicted_s"]
    # More than 1 but for rounding would be a fault, and has to show.
    return Metrics(**found, efficiency=1.0 if 1 < efficiency < 1 + FLOAT32 else efficiency)


def measure_order(plan: Plan) -> dict[str, float]:
    """How evenly the ranks of a micro-step finish, and how far a step is from the data set in small."""
    seconds, degree = plan.predicted_s.astype(np.float64), plan.sp_degree.astype(np.float64)
    return {
        "time_imbalance": imbalance(seconds, degree, plan.micro_step_index(), plan.info.world_size),
        "drift": drift(plan.step, plan.sample_offsets, plan.lengths, plan.n_steps),
        "largest_step_tokens": float(np.bincount(plan.step, plan.tokens()).max()),
        "steps_off": plan.n_steps / wanted_steps(plan.info.n_tokens, _batch(plan)) - 1,
    }


def _batch(plan: Plan) -> int:
    """Tokens of an optimizer step that the plan was made for."""
    return int(plan.info.settings.get("global_batch_tokens", 0)) or 1


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
            octave, rest = 0, lengths[i] >> 1  # floor(log2(length)): how often it can be halved
            while rest:
                octave, rest = octave + 1, rest >> 1
            tokens[step[pack], octave] += lengths[i]
    return tokens

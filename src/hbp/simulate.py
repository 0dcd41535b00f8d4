"""Play a plan by its predicted seconds: when each rank works and waits, and how long the run takes.

Under FSDP a micro-step lasts as long as its slowest pack, on every rank. So a plan's timeline is a running sum of
maxima, and playing 10,000 steps on 1,024 ranks is a few array operations. Rank-by-rank bars are made only for the
window that is drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.plan import Plan

DAY = 86400.0


@dataclass(frozen=True)
class Simulation:
    """What a plan is predicted to take."""

    strategy: str
    world_size: int
    steps: int
    micro_steps: int
    packs: int
    tokens: int
    seconds: float
    tokens_per_s: float
    device_days: float
    utilization: float
    """Share of rank-seconds spent in packs rather than waiting."""
    slowest_step_s: float
    median_step_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def step_seconds(plan: Plan) -> npt.NDArray[np.float64]:
    """Predicted seconds of each optimizer step, the optimizer's own included."""
    index = plan.micro_step_index()
    first_row = np.unique(index, return_index=True)[1]
    overhead = float(plan.info.cluster.get("step_overhead_s", 0.0))
    weights = plan.micro_step_seconds().astype(np.float64)
    return np.bincount(plan.step[first_row], weights, plan.n_steps).astype(np.float64) + overhead


def simulate(plan: Plan) -> Simulation:
    """Predicted time, throughput and utilization of a plan on the cluster that it was made for."""
    steps = step_seconds(plan)
    seconds = float(steps.sum())
    world = plan.info.world_size
    busy = float((plan.predicted_s.astype(np.float64) * plan.sp_degree).sum())
    return Simulation(
        strategy=plan.info.strategy,
        world_size=world,
        steps=plan.n_steps,
        micro_steps=len(plan.micro_step_seconds()),
        packs=plan.n_packs,
        tokens=plan.info.n_tokens,
        seconds=seconds,
        tokens_per_s=plan.info.n_tokens / seconds if seconds else 0.0,
        device_days=seconds * world / DAY,
        utilization=busy / (seconds * world) if seconds else 0.0,
        slowest_step_s=float(steps.max(initial=0.0)),
        median_step_s=float(np.median(steps)) if len(steps) else 0.0,
    )

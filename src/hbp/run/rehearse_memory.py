"""Does a plan fit? The fullest pack of each of its groups, run once on one device as a rank of the plan's whole world.

What a rank holds is as large as in the run: its shards of parameters, gradients and AdamW's moments, what FSDP gathers,
and the activations of its slice of the pack with its recomputed layers. So one device says of 32 whether a model fits
on them. The first and the last rank of a pack's group run, since beyond the heads their slices differ. Not in it: what
the allocator keeps beside what it gave out, the driver's context and NCCL's buffers, for which a budget leaves room.

Cost: two micro-steps a group, unrecorded but for memory.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from dataclasses import dataclass
from typing import Any

import torch

from hbp.plan import Plan
from hbp.progress import Progress
from hbp.run.rehearse import MOMENTS, RandomTokens, rehearsed_model, run_once
from hbp.simulator import plan_cost_model
from hbp.train.batch import make_micro_batch
from hbp.train.measure.fake_world import fake_world
from hbp.train.measure.micro_batch import heaviest_rows, hold_gradients
from hbp.train.model import local_parameter_bytes


@dataclass(frozen=True)
class GroupMemory:
    """The fullest pack of a group."""

    capacity: int
    sp_degree: int
    gc_layers: int
    tokens: int
    """Of the pack."""
    peak_bytes: float
    """Measured, of its fuller rank; infinite where this device has not the memory."""
    predicted_bytes: float


@dataclass(frozen=True)
class MemoryCheck:
    """What a plan needs on each rank, and what there is."""

    world_size: int
    device: str
    groups: tuple[GroupMemory, ...]
    budget_bytes: float
    """That the plan was made for, or what this device has, whichever is less."""
    state_bytes: float
    """Of it parameters, gradients and AdamW's moments."""

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(group.peak_bytes for group in self.groups)

    @property
    def fits(self) -> bool:
        """Within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain data; null for what did not fit on this device."""
        data = dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes, "fits": self.fits}
        for holder in (data, *data["groups"]):
            holder["peak_bytes"] = holder["peak_bytes"] if math.isfinite(holder["peak_bytes"]) else None
        return data


def check_memory(
    plan: Plan,
    model: str,
    device: torch.device,
    *,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    compiled: bool = False,
    offload_activations: bool = False,
) -> MemoryCheck:
    """Run the fullest pack of each group of a plan once, as a rank of its world.

    Args:
        plan: for any world.
        model: as for :func:`~hbp.run.rehearse.rehearse`, and so the rest.
        device: this process's.

    Raises:
        HbpError: the plan carries no cost model, or was made for another model.
    """
    found = []
    with fake_world(plan.info.world_size):
        own = rehearsed_model(model, [plan], device, compute_dtype, attention, compiled)
        lm, mesh = own
        lm.offload_activations = offload_activations
        state = local_parameter_bytes(lm) + (1 + MOMENTS) * hold_gradients(lm)
        cost, samples = plan_cost_model(plan), RandomTokens.of(plan, int(lm.lm.config.vocab_size))
        assert cost is not None  # rehearsed_model has looked
        rows = sorted(heaviest_rows(plan).items())
        with Progress("memory", len(rows)) as progress:
            for group, row in rows:
                first, tokens = int(plan.rank_start[row]), int(plan.tokens()[row])
                ends = sorted({first, first + group.sp_degree - 1})
                batches = [make_micro_batch(plan, row, samples, mesh, rank, device) for rank in ends]
                peak = max(run_once(lm, batch, device) for batch in batches)
                predicted = float(cost.bytes(tokens, group.sp_degree, group.gc_layers))
                found.append(GroupMemory(**dataclasses.asdict(group), tokens=tokens, peak_bytes=peak + state,
                                         predicted_bytes=predicted))  # fmt: skip
                progress.advance(f"{tokens} tokens SP{group.sp_degree} GC{group.gc_layers}")
        del own, lm
        gc.collect()
    budget, name = cost.cluster.memory_bytes, "cpu"
    if device.type == "cuda":
        budget = min(budget, torch.cuda.get_device_properties(device).total_memory)
        name = torch.cuda.get_device_name(device)
    return MemoryCheck(plan.info.world_size, name, tuple(found), float(budget), float(state))

"""The steps of a plan as a data set: an item is one optimizer step, the list of this rank's micro-batches.

So a trainer's "batch" is an optimizer step, and nothing of it has to know that ranks run packs of other sizes, at other
degrees, or none at all. Items are numbered, so a run that goes on skips the steps that are done without reading them.
The next item is made in a thread while one is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from hbp.integrations.rows import Rows
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.plan import Plan
from hbp.train.batch import MicroBatch, make_micro_batch, pinned, rows_of_rank
from hbp.train.loss import MeanStep, global_batches

Item = dict[str, Any]


class PlanSteps(Dataset[Item]):
    """The plan of the current epoch, step by step, for this rank."""

    def __init__(self, plans: Sequence[Plan], rows: Rows, device: torch.device, heads: int, loss: str) -> None:
        """Make the process groups of all the plans' degrees: a collective, all ranks call alike.

        Args:
            plans: of each epoch; the last one goes on for those after it.
            rows: the samples.
            device: of this rank.
            heads: attention heads of the model.
            loss: of the configuration's ``train.loss``.
        """
        self.plans, self.source, self.device, self.loss = plans, rows, device, loss
        self.rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        degrees = {int(degree) for plan in plans for degree in set(plan.sp_degree.tolist())}
        if world_size > 1:
            self.mesh = make_mesh(world_size, degrees, device.type, heads)
        else:
            self.mesh = ParallelMesh(None, heads)  # type: ignore[arg-type]  # nothing to communicate with
        self._thread = ThreadPoolExecutor(1, "plan-steps")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self._current: Plan | None = None
        self._mean = MeanStep.of(plans[0], rows.loss_tokens)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Give the steps of an epoch's plan from now on."""
        plan = self.plans[min(epoch, len(self.plans) - 1)]
        if plan is not self._current:
            self._current, self.rows = plan, rows_of_rank(plan, self.rank)
            self.batches = global_batches(plan, self.source.loss_tokens, self.loss, self._mean)
            self.samples = np.bincount(plan.step, np.diff(plan.sample_offsets), plan.n_steps).astype(np.int64)
            self._ahead = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Item:
        ready = self._ahead.pop(step, None) or self._thread.submit(self._make, step)
        self._ahead = {step + 1: self._thread.submit(self._make, step + 1)} if step + 1 < len(self) else {}
        return {
            "micro_batches": ready.result(),
            "tokens": self.batches[step].tokens,
            "samples": int(self.samples[step]),
        }

    def _make(self, step: int) -> list[MicroBatch]:
        assert self._current is not None
        cpu, batch = torch.device("cpu"), self.batches[step]
        made = [
            make_micro_batch(self._current, row, self.source, self.mesh, self.rank, cpu, batch)
            for row in self.rows[step]
        ]
        return [pinned(item) for item in made] if self.device.type == "cuda" else made


def loader_of(steps: PlanSteps) -> DataLoader[Item]:
    """One item at a time, in order; accelerate knows how to skip items of it."""
    return DataLoader(steps, batch_size=1, collate_fn=lambda items: items[0])

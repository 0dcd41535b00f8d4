"""Plan row → the tensors of this rank.

A row's samples are laid end to end, labels are shifted within each document *before* the pack is cut into ranks (so
that the last token of a slice still has its label), and each rank of the SP group takes its contiguous slice. At most
``sp_degree − 1`` tokens without loss round the pack up to a multiple of the degree. Nothing is padded to the capacity.

The work of a step is a few numpy copies of this rank's own tokens, read from the memory-mapped store; finding a rank's
rows is done once for the whole plan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbp.parallel.mesh import ParallelMesh
from hbp.parallel.ulysses import PackLayout
from hbp.parallel.varlen import make_documents
from hbp.plan import Plan
from hbp.train.loss import IGNORE

IDLE = -1
"""Row number of a micro-step in which the plan leaves this rank without work."""


class SampleSource(Protocol):
    """What a trainer needs of the token store."""

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and loss mask of one sample."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One micro-step of one rank. ``T`` tokens of this rank."""

    row: int
    input_ids: Tensor  # [1, T] int64
    position_ids: Tensor  # [1, T] int64, from 0 in each document
    labels: Tensor  # [T] int64, shifted, -100 without loss
    layout: PackLayout
    gc_layers: int


def rows_of_rank(plan: Plan, rank: int) -> list[list[int]]:
    """Rows that a rank runs: ``[step][micro_step]``, :data:`IDLE` where the plan gives it nothing."""
    micro = plan.micro_step_index()
    n_micro = int(micro[-1]) + 1 if len(micro) else 0
    rows = np.full(n_micro, IDLE, np.int64)
    mine = np.flatnonzero((plan.rank_start <= rank) & (rank < plan.rank_start + plan.sp_degree))
    rows[micro[mine]] = mine
    step_of_micro = np.zeros(n_micro, np.int64)
    step_of_micro[micro] = plan.step
    bounds = np.searchsorted(step_of_micro, np.arange(plan.n_steps + 1))
    return [rows[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def make_micro_batch(
    plan: Plan, row: int, samples: SampleSource, mesh: ParallelMesh, rank: int, device: torch.device
) -> MicroBatch:
    """The tensors of one rank for one row of the plan (:data:`IDLE` gives a one-token pack without loss)."""
    if row == IDLE:
        return micro_batch_of([(np.zeros(1, np.int32), np.zeros(1, np.uint8))], IDLE, 1, 0, 0, mesh, device)
    ids, _ = plan.samples(row)
    degree, start = int(plan.sp_degree[row]), int(plan.rank_start[row])
    documents = [samples.sample(int(i)) for i in ids]
    return micro_batch_of(documents, row, degree, rank - start, int(plan.gc_layers[row]), mesh, device)


def micro_batch_of(
    documents: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]],
    row: int,
    degree: int,
    sp_rank: int,
    gc_layers: int,
    mesh: ParallelMesh,
    device: torch.device,
) -> MicroBatch:
    """The slice of rank `sp_rank` of a pack of documents, each given as token ids and loss mask."""
    lengths = [len(ids) for ids, _ in documents]
    spare = -sum(lengths) % degree
    if spare:  # a document of its own, so that no real token can see it
        documents = [*documents, (np.zeros(spare, np.int32), np.zeros(spare, np.uint8))]
        lengths.append(spare)
    total = sum(lengths)
    tokens = np.concatenate([ids for ids, _ in documents])
    labels = np.concatenate([_shifted_labels(ids, mask) for ids, mask in documents])
    positions = np.arange(total) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    mine = slice(sp_rank * total // degree, (sp_rank + 1) * total // degree)

    def put(array: npt.NDArray[np.integer]) -> Tensor:
        tensor = torch.from_numpy(array[mine].astype(np.int64))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    layout = PackLayout(make_documents(tuple(lengths), device), degree, mesh.sp_group(degree))
    return MicroBatch(row, put(tokens)[None], put(positions)[None], put(labels), layout, gc_layers)


def _shifted_labels(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[:-1] = np.where(mask[1:] != 0, ids[1:], IGNORE)
    return labels

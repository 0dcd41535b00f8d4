"""Plan row → the tensors of this rank.

A row's samples are laid end to end, labels are shifted within each document *before* the pack is cut into ranks (so
that the last token of a slice still has its label), and each rank of the SP group takes its contiguous slice. At most
``sp_degree − 1`` tokens without loss round the pack up to a multiple of the degree. Nothing is padded to the capacity.

Beyond the degrees that the heads allow, a rank takes two slices (:mod:`hbp.parallel.gather_kv`).

The work of a micro-step is a few numpy copies of this rank's own tokens, read from the memory-mapped store; finding a
rank's rows is done once for the whole plan. :func:`micro_batches` does it in a thread, ahead of the device, which
copies from pinned memory while it computes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbp.errors import HbpError
from hbp.parallel.gather_kv import make_gather, token_multiple, tokens_of_rank
from hbp.parallel.mesh import ParallelMesh
from hbp.parallel.ulysses import PackLayout
from hbp.parallel.varlen import make_documents
from hbp.plan import Plan
from hbp.train.loss import IGNORE, GlobalBatch, global_batches

IDLE = -1
"""Row number of a micro-step in which the plan leaves this rank without work."""
AHEAD = 2
"""Micro-batches prepared before they are asked for."""


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
    weights: Tensor | None = None  # [T] float32, what each token counts in the loss; none: 1
    token_share: float = 0.0
    """What a token counts in the mean of router losses (:attr:`GlobalBatch.token_share`); 0: no router loss."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, PackLayout, Tensor | None, float]:
        """What the model takes, in order."""
        return self.input_ids, self.position_ids, self.labels, self.layout, self.weights, self.token_share

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device; does not wait for the copy. Call it where the model runs."""
        if device.type == "cpu":
            return self
        ids, positions, labels = (
            x.to(device, non_blocking=True) for x in (self.input_ids, self.position_ids, self.labels)
        )
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        moved = replace(self, input_ids=ids, position_ids=positions, labels=labels, weights=weights)
        return replace(moved, layout=self.layout.to(device))


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
    plan: Plan,
    row: int,
    samples: SampleSource,
    mesh: ParallelMesh,
    rank: int,
    device: torch.device,
    step: GlobalBatch | None = None,
) -> MicroBatch:
    """The tensors of one rank for one row of the plan (:data:`IDLE` gives a one-token pack without loss).

    Args:
        plan: of this world size.
        row: of the plan.
        samples: token ids and loss masks by the plan's sample ids.
        mesh: holds the groups of the row's degree.
        rank: global rank.
        device: of this rank.
        step: the row's global batch, which gives the tokens their weights; none: they count 1.
    """
    if row == IDLE:
        nothing = (np.zeros(1, np.int32), np.zeros(1, np.uint8))
        return micro_batch_of([nothing], IDLE, 1, 0, 0, mesh, device, step)
    ids, _ = plan.samples(row)
    degree, start = int(plan.sp_degree[row]), int(plan.rank_start[row])
    documents = [samples.sample(int(i)) for i in ids]
    return micro_batch_of(documents, row, degree, rank - start, int(plan.gc_layers[row]), mesh, device, step)


def micro_batches(
    plan: Plan,
    work: Iterable[tuple[int, GlobalBatch | None]],
    samples: SampleSource,
    mesh: ParallelMesh,
    rank: int,
    device: torch.device,
    ahead: int = AHEAD,
) -> Iterator[MicroBatch]:
    """The micro-batches of some rows in order, as :func:`make_micro_batch`, each made before it is asked for.

    Args:
        plan: of this world size.
        work: rows, each with its global batch.
        samples: read from another thread, one at a time.
        mesh: holds the groups of the rows' degrees.
        rank: global rank.
        device: of this rank; a CUDA device gets its copies from pinned memory.
        ahead: how many wait in host memory.
    """

    def stage(row: int, step: GlobalBatch | None) -> MicroBatch:
        batch = make_micro_batch(plan, row, samples, mesh, rank, torch.device("cpu"), step)
        return pinned(batch) if device.type == "cuda" else batch

    with ThreadPoolExecutor(1, "micro-batches") as thread:
        waiting: deque[Future[MicroBatch]] = deque()
        for item in work:
            waiting.append(thread.submit(stage, *item))
            if len(waiting) > ahead:
                yield waiting.popleft().result().to(device)
        while waiting:
            yield waiting.popleft().result().to(device)


def steps(
    plan: Plan,
    samples: SampleSource,
    mesh: ParallelMesh,
    device: torch.device | str = "cpu",
    *,
    loss: str = "ave-token",
    start: int = 0,
) -> Iterator[list[MicroBatch]]:
    """The whole of a plan on this rank: for each optimizer step its micro-batches, as many on every rank.

    A rank that the plan leaves idle in a micro-step gets one token without loss, so that all ranks' collectives match.
    Over all ranks and micro-batches of a step the sum of ``batch.weights`` × cross entropy is its loss, whatever the
    packing (but for `token-mean`); where gradients are averaged over the ranks (FSDP, DDP), multiply it by the world
    size. The collectives that make the mesh's groups are in the call itself, so all ranks call alike.

    Args:
        plan: made for this world size.
        samples: token ids and loss masks by the plan's sample ids; where it has ``loss_tokens`` (targets of each, int
            ``[N]``), they are not counted first.
        mesh: of :func:`~hbp.parallel.mesh.make_mesh`; gets the groups of the plan's degrees that it lacks.
        device: of this rank.
        loss: of :data:`~hbp.config.LOSSES`.
        start: first step to give, for a run that goes on.

    Yields:
        The micro-batches of one optimizer step, each read from disk ahead of its turn.

    Raises:
        HbpError: the plan is of another world size, or there is no such loss.
    """
    rank, world_size = mesh.world.get_rank(), mesh.world.size()
    if plan.info.world_size != world_size:
        raise HbpError(
            f"the plan was made for {plan.info.world_size} ranks but {world_size} are running; "
            f"make one with `hbp plan --gpus {world_size}`"
        )
    mesh.prepare(plan.sp_degree.tolist())
    batches, rows = global_batches(plan, count_loss_tokens(plan, samples), loss), rows_of_rank(plan, rank)
    work = ((row, batches[step]) for step in range(start, plan.n_steps) for row in rows[step])
    flat = micro_batches(plan, work, samples, mesh, rank, torch.device(device))
    return (list(itertools.islice(flat, len(rows[step]))) for step in range(start, plan.n_steps))


def count_loss_tokens(plan: Plan, samples: SampleSource) -> npt.NDArray[np.integer[Any]]:
    """Targets of each sample after the shift within it, int ``[N]``: what the source says, or else counted."""
    known = getattr(samples, "loss_tokens", None)
    if known is not None:
        return np.asarray(known)
    counts = np.zeros(plan.info.n_samples, np.int32)
    for sample in plan.sample_ids.tolist():
        counts[sample] = int(np.count_nonzero(samples.sample(sample)[1][1:]))
    return counts


def pinned(batch: MicroBatch) -> MicroBatch:
    """The same in pinned host memory, which a CUDA device copies from while it computes."""
    weights = None if batch.weights is None else batch.weights.pin_memory()
    ids, positions, labels = (x.pin_memory() for x in (batch.input_ids, batch.position_ids, batch.labels))
    layout = batch.layout.pinned()
    return replace(batch, input_ids=ids, position_ids=positions, labels=labels, weights=weights, layout=layout)


def micro_batch_of(
    documents: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]],
    row: int,
    degree: int,
    sp_rank: int,
    gc_layers: int,
    mesh: ParallelMesh,
    device: torch.device,
    step: GlobalBatch | None = None,
) -> MicroBatch:
    """The slice of rank `sp_rank` of a pack of documents, each given as token ids and loss mask."""
    groups, lengths = mesh.groups(degree), [len(ids) for ids, _ in documents]
    weights = None
    if step is not None:
        targets = [int(mask[1:].sum()) for _, mask in documents]
        weights = np.repeat([step.token_weight(count, sum(targets), degree) for count in targets], lengths)
    filler = -sum(lengths) % token_multiple(groups)
    if filler:  # a document of its own, so that no real token can see it
        documents = [*documents, (np.zeros(filler, np.int32), np.zeros(filler, np.uint8))]
        lengths.append(filler)
        weights = None if weights is None else np.append(weights, np.zeros(filler))
    total = sum(lengths)
    tokens = np.concatenate([ids for ids, _ in documents])
    labels = np.concatenate([_shifted_labels(ids, mask) for ids, mask in documents])
    positions = np.arange(total) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    mine = tokens_of_rank(lengths, groups, sp_rank)

    def put(array: npt.NDArray[Any], dtype: npt.DTypeLike = np.int64) -> Tensor:
        return torch.from_numpy(np.concatenate([array[run] for run in mine]).astype(dtype))

    cpu = torch.device("cpu")
    layout = PackLayout(
        make_documents(tuple(lengths), cpu),
        degree,
        groups.ulysses_group,
        make_gather(lengths, groups, sp_rank, cpu),
        sp_rank,
        filler if row != IDLE else total,
    )
    return MicroBatch(
        row,
        put(tokens)[None],
        put(positions)[None],
        put(labels),
        layout,
        gc_layers,
        None if weights is None else put(weights, np.float32),
        0.0 if step is None else step.token_share,
    ).to(device)


def _shifted_labels(ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[:-1] = np.where(mask[1:] != 0, ids[1:], IGNORE)
    return labels

"""The properties that a family must have, each a plan that four ranks run, and the runs themselves.

Every plan covers the same documents in one optimizer step, so that all give the same loss and gradients. The longest
documents are several windows long; some ranks idle, some packs leave a remainder at their degree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.train.batch import IDLE, micro_batch_of
from hbp.train.check.reference import Document, Run
from hbp.train.check.tiny import VOCAB
from hbp.train.loop import forward_backward
from hbp.train.loss import GlobalBatch
from hbp.train.model import CausalLMWithLoss, load_sharded

WORLD = 4
LENGTHS = (37, 5, 1, 50, 23, 11, 3, 19, 8, 29)
CPU = torch.device("cpu")
ALL = 99
"""Recomputed layers: as many as there are"""

RankRun = tuple[Tensor, dict[str, tuple[int, Tensor]]]
"""Of one rank: its part of the loss, and of each gradient the dimension that is sharded and its part"""
Pack = tuple[int, int, int, list[int]]
"""First rank, SP degree, recomputed layers, documents"""
Plan = Sequence[Sequence[Pack]]
"""Micro-steps"""


@dataclass(frozen=True)
class Property:
    """What is checked, how, and what it means if it does not hold."""

    name: str
    plan: Plan
    why: str
    few_heads: bool = False
    dtype: torch.dtype = torch.float32


OUTSIDE = (
    "documents of a pack are not told apart: a mask, a rotary embedding or a state is made elsewhere than in the "
    "attention interface"
)
MIXED: Plan = [
    [(0, 2, 1, [0, 7, 2]), (2, 1, ALL, [1, 6]), (3, 1, 0, [5])],
    [(0, 4, 2, [3, 4])],
    [(0, 1, 0, [8]), (2, 2, ALL, [9])],  # rank 1 idles
]
PROPERTIES = (
    Property(
        "alone",
        [[(rank, 1, 0, [4 * step + rank]) for rank in range(min(4, 10 - 4 * step))] for step in range(3)],
        "even single documents come out otherwise: the loss is more than a projection of the last hidden states, or a "
        "mask is made elsewhere than in the attention interface",
    ),
    Property(
        "packed",
        [
            [(0, 1, 0, [0]), (1, 1, 0, [1, 2, 3]), (2, 1, 0, [4]), (3, 1, 0, [5, 6])],
            [(0, 1, 0, [9]), (1, 1, 0, [8, 7])],
        ],
        OUTSIDE,
    ),
    Property(
        "SP 2",
        [[(0, 2, 0, [0, 1, 2]), (2, 2, 0, [3, 4])], [(0, 2, 0, [5, 6, 7]), (2, 2, 0, [8, 9])]],
        "layers other than attention look at more than one token",
    ),
    Property(
        "SP 4",
        [[(0, 4, 0, [9, 8, 7, 6, 5])], [(0, 4, 0, [0, 1, 2])], [(0, 4, 0, [3, 4])]],
        "attention's heads do not divide over four ranks",
    ),
    Property(
        "beyond the heads",
        [[(0, 4, 0, [9, 8, 7, 6, 5])], [(0, 4, 0, [0, 1, 2])], [(0, 4, 0, [3, 4])]],
        "attention over gathered keys and values differs",
        few_heads=True,
    ),
    Property(
        "recomputation",
        [[(0, 4, ALL, [9, 8, 7, 6, 5, 2])], [(0, 4, 1, [0, 1, 3, 4])]],
        "layers cannot be run again in backward",
    ),
    Property("mixed", MIXED, "ranks with other work, or none, disturb each other"),
    Property("bfloat16", MIXED, "bfloat16 loses more than it does in the unpacked model", dtype=torch.bfloat16),
)
NEIGHBOUR = "neighbour unseen"
NAMES = (*(each.name for each in PROPERTIES), NEIGHBOUR)

BESIDE: Plan = [[(0, 2, 0, [3, 0, 8]), (2, 1, 0, [9, 4])], [(0, 4, 0, [7, 5])]]
"""Documents 3, 9 and 7 come first in their packs, as strangers to those behind."""
STRANGERS = (3, 9, 7)


def documents(seed: int = 0) -> list[Document]:
    """Random tokens, about two thirds of them with loss."""
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, VOCAB, n).astype(np.int32), (rng.random(n) < 0.67).astype(np.uint8)) for n in LENGTHS]


def with_strangers(seed: int) -> list[Document]:
    """The same documents, but strangers have tokens of a seed and no loss."""
    other = documents(seed)
    return [
        (other[i][0], np.zeros(len(ids), np.uint8)) if i in STRANGERS else (ids, mask)
        for i, (ids, mask) in enumerate(documents())
    ]


def in_plan(plan: Plan, given: Sequence[Document]) -> list[Document]:
    """The documents that a plan runs."""
    return [given[i] for micro_step in plan for _, _, _, ids in micro_step for i in ids]


def run_plan(
    model: CausalLMWithLoss,
    mesh: ParallelMesh,
    rank: int,
    plan: Plan,
    given: Sequence[Document],
    balanced: bool = True,
) -> RankRun:
    """Loss and gradients of one optimizer step on this rank, its shards of them, on the trainer's own path.

    Args:
        model: sharded over the mesh.
        mesh: with the groups of degrees 1, 2 and 4.
        rank: of this process.
        plan: to run.
        given: token ids and loss masks of all documents.
        balanced: with router losses, where the model has them.
    """
    run = in_plan(plan, given)
    counts = [int(mask[1:].sum()) for _, mask in run]
    step = GlobalBatch("ave-token", sum(len(ids) for ids, _ in run), sum(counts), sum(count > 0 for count in counts))
    loss = torch.zeros(())
    nothing = (np.zeros(1, np.int32), np.zeros(1, np.uint8))
    for micro_step in plan:
        mine = [pack for pack in micro_step if pack[0] <= rank < pack[0] + pack[1]]
        for start, degree, gc, ids in mine or [(rank, 1, 0, [])]:
            gc = min(gc, len(model.layers))
            held = [given[i] for i in ids] or [nothing]
            row = 0 if ids else IDLE
            batch = micro_batch_of(held, row, degree, rank - start, gc, mesh, CPU, step)
            batch = batch if balanced else replace(batch, token_share=0.0)
            loss += forward_backward(model, batch, WORLD)
    shards = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad  # sharded as the parameter is
        if gradient is not None:
            shards[name.removeprefix("lm.")] = (gradient.placements[0].dim, gradient.to_local().clone())
    model.zero_grad(set_to_none=True)
    return loss, shards


def put_together(ranks: Sequence[RankRun]) -> Run:
    """The loss of all ranks and whole gradients, of their runs of one plan."""
    gradients = {
        name: torch.cat([shards[name][1] for _, shards in ranks], dim=dim) for name, (dim, _) in ranks[0][1].items()
    }
    return torch.stack([loss for loss, _ in ranks]).sum(), gradients


def run_properties(
    rank: int, world: int, folders: Mapping[str, tuple[str, str]]
) -> dict[tuple[str, str], RankRun | str]:
    """All properties of some models on this rank.

    Args:
        rank: of this process.
        world: four.
        folders: of each name, a tiny model and one with few heads.

    Returns:
        By name and property the run, or what was raised.
    """
    results: dict[tuple[str, str], RankRun | str] = {}
    for name, pair in folders.items():
        for few in (False, True):
            results |= {(name, key): run for key, run in _run_model(rank, world, pair[few], few).items()}
    return results


def _run_model(rank: int, world: int, folder: str, few_heads: bool) -> dict[str, RankRun | str]:
    from hbp.train.model import read_config

    mesh = make_mesh(world, [1, 2, 4], "cpu", read_config(folder).num_attention_heads)
    load = partial(load_sharded, folder, mesh.world, CPU)
    loaded: dict[torch.dtype, CausalLMWithLoss] = {}

    def attempt(dtype: torch.dtype, run: Callable[[CausalLMWithLoss], RankRun]) -> RankRun | str:
        try:
            if dtype not in loaded:
                loaded[dtype] = load(compute_dtype=dtype)
            return run(loaded[dtype])
        except Exception as error:  # whatever a family raises is what is reported
            loaded.pop(dtype, None)
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    results: dict[str, RankRun | str] = {}
    for each in PROPERTIES:
        if each.few_heads == few_heads:
            run: Any = partial(run_plan, mesh=mesh, rank=rank, plan=each.plan, given=documents())
            results[each.name] = attempt(each.dtype, run)
    if not few_heads:
        for seed in (1, 2):
            given = with_strangers(seed)
            run = partial(run_plan, mesh=mesh, rank=rank, plan=BESIDE, given=given, balanced=False)
            results[f"{NEIGHBOUR} {seed}"] = attempt(torch.float32, run)
    return results

"""A step that runs out of memory: from then on plans count on less of it, and what is left is planned again.

Every plan's fullest packs are tried before they are trained on (:mod:`hbp.run.fit_memory`), but later a device may have
less than it had then: another process, a fragmented allocator, a kernel's workspace. A rank that runs out of memory in
the middle of a step leaves the others waiting in collectives that it will never enter, so no rank can go on as it is.
It writes ``memory.json`` in the strategy's folder and all ranks end; whoever starts them again, the launcher
(:mod:`hbp.train.launch`) or a user, gets a run that goes on from the last checkpoint, with the samples that are left
planned for less memory: more recomputed layers, or a higher degree.

How much less: a tenth of what the fullest packs took when they were tried, or of the budget, whichever is less. So the
pack that did not fit is no longer what a plan may hold; three times make it 27 % less.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hbp.config import Config
from hbp.cost.cluster import GIB, load_cluster
from hbp.disk import patiently, write_whole

MEMORY = "memory.json"
LOWERED = 0.9
ALLOCATORS_SAY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
"""What a plain RuntimeError of torch's CPU allocator, cuBLAS or NCCL says where there is too little."""


@dataclass(frozen=True)
class LessMemory:
    """What ``memory.json`` says."""

    budget_bytes: float
    """That plans count on."""
    configured_bytes: float
    """The budget that was configured when it happened; another one now, and the user has decided."""
    why: str
    """For people."""


def ran_out(error: BaseException | None) -> bool:
    """Whether an error says that there was too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATORS_SAY)


def configured_bytes(config: Config) -> float:
    """The budget of one process or GPU that a configuration asks for."""
    gib = config.cluster.memory_gib
    return load_cluster(config.cluster.name).memory_bytes if gib is None else gib * GIB


def count_on_less(folder: Path, config: Config, budget_bytes: float, peak_bytes: float, why: str) -> LessMemory:
    """Write ``memory.json``; several ranks may, and write the same.

    Args:
        folder: of the strategy.
        config: of the run.
        budget_bytes: that the plan counted on.
        peak_bytes: that its fullest packs took when they were tried; 0 where that is not known.
        why: what happened.
    """
    most = min(budget_bytes, peak_bytes) if peak_bytes > 0 else budget_bytes
    less = LessMemory(LOWERED * most, configured_bytes(config), why)
    write_whole(folder / MEMORY, json.dumps(asdict(less)) + "\n")
    return less


def read_less(folder: Path, config: Config) -> LessMemory | None:
    """What plans are to count on; None where nothing happened, or the configured budget has changed since."""
    try:
        less = LessMemory(**json.loads(patiently((folder / MEMORY).read_text)))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None
    return less if less.configured_bytes == configured_bytes(config) else None

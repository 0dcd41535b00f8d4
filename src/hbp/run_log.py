"""The log of a run: ``steps.jsonl``, a line for every optimizer step, and ``eval.jsonl``, one for every evaluation.

Like the plan file it stands between two halves: training writes it, the report, benchmarks and a resumed run read it,
and nothing else knows what a line looks like. A line is one JSON object, the fields of its record. The last line may
have been cut off with its run, and a disk may have put zeros in any: a line that is no record is passed over. So are
fields of another version, and those that a line lacks have their defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np

from hbp.disk import patiently, write_whole


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one optimizer step did, the same on all ranks. Its size is that of no cluster."""

    FILE: ClassVar[str] = "steps.jsonl"

    step: int
    """Of the plan."""
    loss: float | None
    """Of the global batch, as `train.loss` defines it; None of one in which nothing is learnt, or that was skipped."""
    grad_norm: float | None
    """Before it was clipped; None: not finite."""
    lr: float
    tokens: int
    loss_tokens: int
    started_s: float
    """Seconds since training began, by rank 0's clock."""
    seconds: float
    tokens_per_s: float
    group: str
    """The packing groups that the step ran."""
    skew: float
    """Busy seconds of the busiest rank minus those of the idlest, over the former; on CUDA that of the wall times."""
    slowest_rank: int
    """The busiest rank."""
    mean_wall_s: float = 0.0
    """Seconds from the start of the first micro-step to the end of the last, mean over ranks."""
    mean_busy_s: float = 0.0
    """The part of it that the rank computed; the rest it waited for others. On CUDA equal to the wall time."""
    memory_bytes: int = 0
    """Of the rank that used most: peak of CUDA's allocator in this step; on CPU the process's resident memory."""
    reserved_bytes: int = 0
    """Likewise, what CUDA's allocator held of the device, given out or not; 0 on CPU."""
    alloc_retries: int = 0
    """Likewise, how often since the run began it gave cached blocks back to find room: with any, memory is tight."""
    rank_wall_s: list[list[float]] = field(default_factory=list)
    """``[rank][micro_step]``: from the start of a micro-step to the start of the next; of the first ranks and the first
    micro-steps of a plan, as far as the report draws them, and empty after that."""
    rank_busy_s: list[list[float]] = field(default_factory=list)
    """The part of it that the rank computed."""
    tflops: float | None = None
    """Model FLOPs (forward and backward, without recomputation) a second of each rank, in 10¹²."""
    mfu: float | None = None
    """The same over the device's peak, 0 to 1."""
    signal: int = 0
    """Number of a signal that some rank had received when the step ended, 0 for none."""
    skipped: str = ""
    """What was not finite, so that no parameter was changed; empty: the step was taken."""
    lost: bool = False
    """The step's own line was lost: a checkpoint says that it was done, and the plan its tokens; no more is known."""


@dataclass(frozen=True, slots=True)
class EvalRecord:
    """What one evaluation found."""

    FILE: ClassVar[str] = "eval.jsonl"

    run_step: int
    """Steps of the whole run that were done."""
    tokens: int
    """Tokens of the whole run that were done."""
    eval_loss: float | None
    """Mean cross entropy over the loss tokens of the held-out samples; None if they have none."""
    eval_loss_by_source: dict[str, float | None] = field(default_factory=dict)
    """The same of each source."""


Record = TypeVar("Record", StepRecord, EvalRecord)


def read_log(folder: Path, kind: type[Record]) -> list[Record]:
    """The whole lines of a folder's log, none where there is no log.

    Args:
        folder: of a strategy, or of a part of its run.
        kind: of the records.
    """
    log, records = folder / kind.FILE, list[Record]()
    number, *more = (field.name for field in dataclasses.fields(kind))
    for line in patiently(log.read_bytes).splitlines() if log.is_file() else ():
        try:
            data = json.loads(line)
            if type(data[number]) is int and data[number] >= 0:
                records.append(kind(**{name: data[name] for name in (number, *more) if name in data}))
        except (ValueError, TypeError, KeyError):  # cut off with its run, or damaged
            continue
    return records


def append_record(folder: Path, record: StepRecord | EvalRecord) -> None:
    """One line more."""
    with (folder / record.FILE).open("a") as log:
        log.write(_line(record))


def sync_log(folder: Path, kind: type[Record]) -> None:
    """Make what was logged outlast a power cut, as the checkpoint does that is about to be saved."""
    with suppress(FileNotFoundError), (folder / kind.FILE).open("rb") as log:
        os.fsync(log.fileno())


def rewrite_log(folder: Path, kind: type[Record], records: Iterable[Record]) -> None:
    """These records and no others; no file for none."""
    lines = "".join(map(_line, records))
    if lines:
        write_whole(folder / kind.FILE, lines)
    else:
        (folder / kind.FILE).unlink(missing_ok=True)


def _line(record: StepRecord | EvalRecord) -> str:
    return json.dumps(dataclasses.asdict(record), allow_nan=False) + "\n"


def without_timeline(record: StepRecord) -> StepRecord:
    """The same without the seconds of single micro-steps, which are for the report and most of a record's size."""
    return dataclasses.replace(record, rank_wall_s=[], rank_busy_s=[])


def by_group(records: Sequence[StepRecord]) -> dict[str, dict[str, float | None]]:
    """Speed, utilisation, skew and memory of each packing group's steps whose lines are not lost."""
    table: dict[str, dict[str, float | None]] = {}
    records = [record for record in records if not record.lost]
    for name in sorted({record.group for record in records}):
        own = [record for record in records if record.group == name]
        seconds = sum(record.seconds for record in own)
        known = [record.mfu * record.seconds for record in own if record.mfu is not None]
        table[name] = {
            "steps": len(own),
            "tokens": sum(record.tokens for record in own),
            "seconds": seconds,
            "tokens_per_s": sum(record.tokens for record in own) / seconds,
            "mfu": sum(known) / seconds if known else None,
            "skew": float(np.median([record.skew for record in own])),
            "memory_bytes": max(record.memory_bytes for record in own),
        }
    return table

"""Proof from plans and logs that each sample was trained on exactly once an epoch. Reads alone, without torch.

What was to be trained is ``samples.npy`` of a run's first part: the token store's ids, as often as they are seen in an
epoch. What was trained is every line of every part's ``steps.jsonl``, by the samples that the part's plan has in that
step. Both are counted and compared, epoch by epoch, so a step that was logged twice, a part that was left out and a
plan that was changed afterwards all show; so does an epoch of a finished run of which nothing is left. A step that was
skipped, since its numbers were not finite, has trained on nothing: its samples are missing, and named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError
from hbp.plan import JSON_NAME, read_plan
from hbp.run.identity import RUN, Record, read_record
from hbp.run_log import StepRecord, read_log

SHOWN = 20
"""Sample ids that are named."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochAudit:
    """What an epoch's plans and logs say. Counts are of samples, each as often as it is seen."""

    epoch: int
    """From 0."""
    trained: int
    """Samples of steps that were done."""
    missing: int
    """To be trained, and neither trained nor dropped."""
    twice: int
    """Trained more often than they are to be."""
    dropped: int
    """Left out by the plans, which say why."""
    missing_ids: list[int]
    """The first of them: the token store's ids."""
    twice_ids: list[int]
    skipped: int
    """Of those missing, that steps were skipped with."""
    skipped_ids: list[int]
    unlogged: int
    """Of those trained, in steps whose lines of the log are lost: a checkpoint says that they were done."""
    under_way: bool
    """The run is not finished and this is its last epoch: what is missing, but for what was skipped, may come yet."""

    @property
    def holds(self) -> bool:
        """Each sample exactly once, or, where the epoch is under way, at most once."""
        return not self.twice and not self.skipped and (not self.missing or self.under_way)


def audit_run(run: Path) -> list[EpochAudit]:
    """Every epoch that a run has begun.

    Args:
        run: folder of a run, or of one strategy in it.

    Raises:
        HbpError: no run there, or a part whose files are missing or damaged.
    """
    folder, epochs = _strategy_folder(run)
    parts = [folder, *sorted(folder.glob("part-*[0-9]"), key=lambda path: int(path.name.rpartition("-")[2]))]
    parts = [part for part in parts if (part / "part.json").is_file()]
    if not parts:
        raise HbpError(f"{folder} has not begun to train; audit it once it has")
    wanted = _ids(parts[0])
    size = int(wanted.max(initial=-1)) + 1
    trained: dict[int, Counts] = {}
    skipped: dict[int, Counts] = {}
    dropped: dict[int, Counts] = {}
    unlogged: dict[int, int] = {}
    for part in parts:
        epoch = _epoch(part)
        ids = _ids(part)
        if int(ids.max(initial=-1)) >= size:
            raise HbpError(f"{part / 'samples.npy'} names samples that {parts[0] / 'samples.npy'} does not have")
        plan, records = read_plan(part / "plan"), read_log(part, StepRecord)
        if len(ids) <= int(plan.sample_ids.max(initial=-1)):
            raise HbpError(f"the plan in {part} is of more samples than its samples.npy ({len(ids)})")
        steps = np.array([record.step for record in records], np.int64)
        if int(steps.max(initial=-1)) >= plan.n_steps:
            raise HbpError(f"{part / StepRecord.FILE} has step {steps.max()} but its plan has {plan.n_steps} steps")
        taken = np.array([not record.skipped for record in records], bool)
        step_of_sample = np.repeat(plan.step, np.diff(plan.sample_offsets))
        done, passed = (
            np.bincount(ids[plan.sample_ids], np.bincount(own, minlength=plan.n_steps)[step_of_sample], size)
            for own in (steps[taken], steps[~taken])
        )
        lost = np.isin(step_of_sample, [record.step for record in records if record.lost and not record.skipped])
        unlogged[epoch] = unlogged.get(epoch, 0) + int(lost.sum())
        left_out = np.array([sample for sample, _ in plan.info.dropped if sample < len(ids)], np.int64)
        trained[epoch] = trained.get(epoch, np.zeros(size, np.int64)) + done.astype(np.int64)
        skipped[epoch] = skipped.get(epoch, np.zeros(size, np.int64)) + passed.astype(np.int64)
        dropped[epoch] = dropped.get(epoch, np.zeros(size, np.int64)) + np.bincount(ids[left_out], minlength=size)
    to_train, last = np.bincount(wanted, minlength=size), max(*trained, epochs - 1)
    return [
        _compared(
            epoch,
            to_train,
            *(counts.get(epoch, np.zeros_like(to_train)) for counts in (trained, skipped, dropped)),
            unlogged=unlogged.get(epoch, 0),
            under_way=epoch == last and not epochs,
        )
        for epoch in range(last + 1)
    ]


def _compared(
    epoch: int, wanted: Counts, trained: Counts, skipped: Counts, dropped: Counts, *, unlogged: int, under_way: bool
) -> EpochAudit:
    # What was planned anew may drop again what a plan before has dropped: at most what is not trained is dropped.
    dropped = np.minimum(dropped, np.maximum(wanted - trained, 0))
    missing, twice = np.maximum(wanted - trained - dropped, 0), np.maximum(trained - wanted, 0)
    skipped = np.minimum(skipped, missing)
    return EpochAudit(
        epoch,
        trained=int(trained.sum()),
        missing=int(missing.sum()),
        twice=int(twice.sum()),
        dropped=int(dropped.sum()),
        missing_ids=np.flatnonzero(missing)[:SHOWN].tolist(),
        twice_ids=np.flatnonzero(twice)[:SHOWN].tolist(),
        skipped=int(skipped.sum()),
        skipped_ids=np.flatnonzero(skipped)[:SHOWN].tolist(),
        unlogged=unlogged,
        under_way=under_way,
    )


def _strategy_folder(run: Path) -> tuple[Path, int]:
    """The folder of what a run trains, and the epochs that it is finished after; 0: it is not finished."""
    if not run.is_dir():
        raise HbpError(f"no folder {run}; give one that `hbp train` wrote")
    if (run / "part.json").is_file():
        return run, _epochs_done(read_record(run.parent / RUN))
    record = read_record(run / RUN)
    if record is not None and (run / record.folder / "plan" / JSON_NAME).is_file():
        return run / record.folder, _epochs_done(record)
    found = sorted(path.parent for path in run.glob("*/part.json"))
    if len(found) != 1:
        what = "no run" if not found else f"several ({', '.join(path.name for path in found)}); name one of them"
        raise HbpError(f"{run} holds {what}; give a folder that `hbp train` wrote")
    return found[0], _epochs_done(record)


def _epochs_done(record: Record | None) -> int:
    """Of a run that is trained to its end; 0 of another."""
    if record is None or not record.trained:
        return 0
    return max(1, int(record.identity.get("train.epochs", 1)))


def _ids(part: Path) -> npt.NDArray[np.int64]:
    try:
        ids = np.load(part / "samples.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise HbpError(f"cannot read {part / 'samples.npy'} ({error}); it says which samples were planned") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0:
        raise HbpError(f"{part / 'samples.npy'} does not hold sample ids")
    return np.asarray(ids, np.int64)


def _epoch(part: Path) -> int:
    try:
        data: dict[str, Any] = json.loads((part / "part.json").read_text())
        return int(data["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        raise HbpError(f"{part / 'part.json'} cannot be read; it says which epoch the part is of") from None

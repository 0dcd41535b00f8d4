"""What was logged of the steps that a checkpoint says are done; where lines of the log are lost, that they were done.

A log may lack lines that a checkpoint is ahead of: the file was removed, cut short, or a disk has put zeros in it. The
state is whole all the same, so the run goes on. What is left of the log is kept beside it, and a line is put in for
each step that was lost: which step, and how many tokens, by the plan. So a count of what was trained on stays right,
and nobody takes the run for a shorter one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hbp.disk import free_name
from hbp.plan import Plan, read_plan
from hbp.progress import say
from hbp.run.resume import part_folder, read_turn
from hbp.run.steps.odd import FOLDER, evidence_name
from hbp.run_log import StepRecord, read_log, rewrite_log
from hbp.train.checkpoint import Position
from hbp.train.records import groups_of_steps


def done_steps(folder: Path, at: Position) -> list[list[StepRecord]]:
    """The records of all steps that are done, part by part up to the checkpoint's. Rank 0; mends the logs.

    Args:
        folder: of the strategy.
        at: of the checkpoint.
    """
    folders = [part_folder(folder, number) for number in range(at.part + 1)]
    logged = [read_log(here, StepRecord) for here in folders]
    logged[-1] = [record for record in logged[-1] if record.step < at.step]
    before = at.run_step - at.step
    if all(map(_in_order, logged)) and len(logged[-1]) == at.step and sum(map(len, logged[:-1])) == before:
        return logged
    run_step = 0
    for number, here in enumerate(folders):
        plan = read_plan(here / "plan")
        count = at.step if number == at.part else _done_before(folder, number, plan)
        logged[number] = _mended(folder, here, plan, logged[number], count, run_step)
        run_step += count
    return logged


def _in_order(records: Sequence[StepRecord]) -> bool:
    return all(record.step == number for number, record in enumerate(records))


def _done_before(folder: Path, number: int, plan: Plan) -> int:
    """Steps of a part that another one follows: all, or those before what was planned again."""
    here, following = (part_folder(folder, n) for n in (number, number + 1))
    if read_turn(here) != read_turn(following):
        return plan.n_steps
    left = len(np.load(following / "samples.npy", allow_pickle=False))
    first = int(np.searchsorted(plan.sample_offsets, len(plan.sample_ids) - left))  # row from which so many are left
    return int(plan.step[first]) if first < plan.n_packs else plan.n_steps


def _mended(
    folder: Path, here: Path, plan: Plan, logged: Sequence[StepRecord], count: int, run_step: int
) -> list[StepRecord]:
    """A part's log with a line for each of `count` steps; `run_step` steps of the run were done before it."""
    known = {record.step: record for record in logged if record.step < count}
    lost = [step for step in range(count) if step not in known]
    if not lost:
        return [known[step] for step in range(count)]
    kept = "nothing is left of it"
    if (here / StepRecord.FILE).is_file():
        aside = free_name(here / f"{StepRecord.FILE}.damaged")
        shutil.copy2(here / StepRecord.FILE, aside)
        kept = f"what is left of it is kept as {aside}"
    say(
        f"{here / StepRecord.FILE} has no line of {len(lost)} of the {count} steps that the checkpoint says are done, "
        f"such as step {lost[0]}: their losses and seconds are lost, their samples count as trained on; {kept}"
    )
    tokens = np.bincount(plan.step, weights=plan.tokens(), minlength=plan.n_steps).astype(np.int64)
    groups = groups_of_steps(plan)
    began = 0.0
    for step in range(count):
        if step not in known:
            problem = _skipped(folder, here, step, run_step + step + 1)
            known[step] = StepRecord(
                step=step,
                loss=None,
                grad_norm=None,
                lr=0.0,
                tokens=int(tokens[step]),
                loss_tokens=0,
                started_s=began,
                seconds=0.0,
                tokens_per_s=0.0,
                group=groups[step],
                skew=0.0,
                slowest_rank=0,
                skipped=problem,
                lost=True,
            )
        began = known[step].started_s + known[step].seconds
    records = [known[step] for step in range(count)]
    rewrite_log(here, StepRecord, records)
    return records


def _skipped(folder: Path, here: Path, step: int, run_step: int) -> str:
    """Why a step was skipped, if evidence of that is kept."""
    try:
        evidence = json.loads((folder / FOLDER / evidence_name(run_step)).read_text())
        same = evidence["step"] == step and part_folder(folder, int(evidence["part"])) == here
        return str(evidence["problem"]) if same else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""

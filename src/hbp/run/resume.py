"""Going on with a run: whose checkpoints a folder holds, how far they came, what is left to train on.

A run is a row of *parts*, each following one plan: one part an epoch (or one for each piece of a stream that the user
planned), and one more for what was left of a part when the number of ranks changed, or an option whose effect is that
what is left is planned again. Part 0 lives in the strategy's folder, part n in ``part-n`` in it: ``plan``,
``steps.jsonl`` and ``samples.npy``, the token store's ids of what the plan's sample ids mean. A checkpoint says which
part it belongs to and how many of its steps are done, so with the same number of ranks the same plan goes on, bit for
bit.

With another number of ranks the plan does not fit. The samples of its remaining steps, and only they, are planned again
for the ranks that there are (a new part); steps that are done stay done, so every sample is trained on exactly once.

What a folder holds is used, set aside whole as ``before-1`` and so on (a run folder like any other), or refused in one
line. Only `train.resume=never` deletes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from hbp.config import Config, kinds
from hbp.data.samples import Samples
from hbp.disk import is_disk_fault, let_faults_through, patiently, write_whole
from hbp.errors import HbpError
from hbp.plan import JSON_NAME, Plan, hash_lengths, read_plan
from hbp.progress import say
from hbp.run.fit_memory import own_plans
from hbp.run.identity import RUN, Record, compare, identity, read_record, versions, write_record
from hbp.run.steps.less_memory import MEMORY
from hbp.train.checkpoint import (
    POSITION,
    Checkpoint,
    Position,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    read_position,
)
from hbp.train.launch import rank_zero_first

CHECKPOINTS = "checkpoints"
ADOPTING = ".adopting"
SUMMARY = "summary.json"
PART = "part.json"
OF_A_RUN = (RUN, SUMMARY, "profile.json", "profile.html", "report.html", "report.json", "lengths.npy")
LOGS = ("steps.jsonl", "eval.jsonl")


@dataclass(frozen=True, eq=False)
class Part:
    """A stretch of a run that follows one plan."""

    number: int
    epoch: int
    samples: Samples
    """What the plan's sample ids mean."""
    plan: Plan
    folder: Path
    peak_bytes: float = 0.0
    """Of the fullest packs of this part and those before, as measured before they were trained on."""
    piece: int = 0
    """Of the stream of plans that the user made; 0 where there is one plan an epoch."""
    run_step: int = 0
    """Steps of the run that were done before it."""

    @property
    def turn(self) -> tuple[int, int]:
        """Epoch and piece."""
        return self.epoch, self.piece


@dataclass(frozen=True)
class Found:
    """What a run begins with."""

    kind: Literal["new", "finished", "go on", "adopt"]
    record: Record
    """Whose run it is from now on."""
    aside: bool = False
    """What the folder holds is another run's, which is set aside first."""
    source: Path | None = None
    """The checkpoint that `train.resume` names."""
    checkpoint: Checkpoint | None = None
    """To go on from."""
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Options that changed since it was saved: their values before and now."""


def decide(config: Config, folder: str, store_fingerprint: str) -> Found:
    """What is to be done with what `run_dir` holds. Reads alone, in one process.

    Args:
        config: of the run.
        folder: that the strategy would have in a new run.
        store_fingerprint: of the data.

    Raises:
        HbpError: it is another run's, or cannot be used.
    """
    run = Path(config.run_dir)
    wanted = identity(config, store_fingerprint, own_plans(config))
    new = Found("new", Record(wanted, uuid.uuid4().hex, folder))
    if config.train.resume == "never":
        return new
    try:
        there = _record_of(run)
    except OSError as error:
        raise HbpError(f"cannot read {error.filename or run} ({error.strerror}); mend that and run again") from None
    if config.train.resume != "auto":
        given = Path(config.train.resume).resolve()
        if there is None or there.adopted != str(given):  # else it has been gone on with already
            read_position(given)
            whose = read_record(given / POSITION) or read_record(given.parents[2] / RUN)
            if whose is None:
                raise HbpError(f"{given} does not say whose run it is of, nor does {given.parents[2] / RUN}")
            compare(whose.identity, wanted, str(given))
            name = whose.folder or given.parents[1].name
            return Found("adopt", replace(new.record, folder=name, adopted=str(given)), holds_run(run), given)
    if there is None:
        return replace(new, aside=holds_run(run))
    there = replace(there, folder=there.folder or folder)
    checkpoints = list_checkpoints(run / there.folder / CHECKPOINTS)
    if there.trained:
        return _finished(run, there, wanted, bool(checkpoints))
    if checkpoints:
        newest = read_record(checkpoints[0] / POSITION) or there
        compare(newest.identity, wanted, str(checkpoints[0]))
        return Found("go on", replace(there, identity=wanted))
    same = there.identity == wanted and there.folder == folder
    return replace(new, record=replace(new.record, id=there.id)) if same else replace(new, aside=holds_run(run))


def _finished(run: Path, there: Record, wanted: Mapping[str, Any], saved: bool) -> Found:
    """What is to be done with a run that is trained to its end."""
    changed = compare(there.identity, wanted, str(run))
    before, now = changed.pop("train.epochs", (0, 0))
    if changed and now <= before:
        name, (was, value) = next(iter(changed.items()))
        raise HbpError(
            f"{run} holds this run, finished: nothing is left that {name} (was {was!r}, now {value!r}) could change; "
            "give another run_dir, or train.resume=never"
        )
    if now < before:
        raise HbpError(f"{run} holds this run, finished after {before} epochs, now {now}; give another run_dir")
    if now == before and read_summary(run) is not None:
        return Found("finished", there)
    if not saved:
        what = f"train.epochs was {before}, now {now}" if now else f"its {SUMMARY} is missing or damaged"
        raise HbpError(
            f"{run} holds this run, finished, but no checkpoint to go on from ({what}); give another run_dir, or "
            "train.resume=never"
        )
    return Found("go on", replace(there, identity=wanted, trained=False))


def _record_of(run: Path) -> Record | None:
    """Of ``run.json``; where that is missing or damaged, of the newest checkpoint that says it."""
    record = read_record(run / RUN)
    if record is not None:
        return record
    saved = [path for folder in run.glob(f"*/{CHECKPOINTS}") for path in list_checkpoints(folder)]
    newest = sorted(saved, key=lambda path: path.name, reverse=True)
    return next((found for path in newest if (found := read_record(path / POSITION))), None)


def holds_run(run: Path) -> bool:
    """Whether a folder holds a run, or says that it does."""
    return (run / RUN).exists() or bool(strategy_folders(run))


def strategy_folders(run: Path) -> list[Path]:
    """The folders in which a run keeps what one of its strategies planned and trained."""
    planned = sorted(path.parent.parent for path in run.glob(f"*/plan/{JSON_NAME}"))
    return [folder for folder in planned if any((folder / name).exists() for name in (PART, CHECKPOINTS, *LOGS))]


def find(config: Config, folder: str, store_fingerprint: str) -> Found:
    """What the run begins with: what `run_dir` holds is used, set aside or refused. A collective.

    Raises:
        HbpError: what is there is another run's, or cannot be used.
        RankFailed: a checkpoint cannot be read.
    """
    run, found = Path(config.run_dir), list[Any]([None])
    with rank_zero_first() as first:
        if first:
            _end_adoption(run)
            found = [decide(config, folder, store_fingerprint)]
    dist.broadcast_object_list(found)
    start: Found = found[0]
    if start.kind == "adopt":
        start = _adopted(config, start)
    elif start.aside:
        with rank_zero_first() as first:
            if first:
                set_aside_run(run, config)
    if start.kind in ("new", "finished"):
        return start
    checkpoint = newest_checkpoint(run / start.record.folder / CHECKPOINTS)
    if checkpoint is None:
        raise HbpError(f"{run / start.record.folder / CHECKPOINTS} is empty by now; is another run at work in {run}?")
    before = read_record(checkpoint.folder / POSITION) or start.record
    changed = compare(before.identity, start.record.identity, str(checkpoint.folder))
    _say_versions(before)
    return replace(start, kind="go on", checkpoint=checkpoint, changed=changed)


def _say_versions(before: Record) -> None:
    now = versions()
    other = [f"{name} {old} (now {now.get(name, 'none')})" for name, old in before.versions.items()]
    other = [text for text, (name, old) in zip(other, before.versions.items(), strict=True) if now.get(name) != old]
    if other:
        say(f"the checkpoint was saved under {', '.join(other)}: what follows may differ in its last digits")


def _adopted(config: Config, start: Found) -> Found:
    """Bring another run's parts and the checkpoint over; what the folder held is set aside. A collective."""
    run, given = Path(config.run_dir), start.source
    assert given is not None
    damage = find_damage(given)
    if damage is not None:
        raise HbpError(f"{given} is damaged ({damage}); give another checkpoint")
    with rank_zero_first() as first:
        if first:
            adopting = run / ADOPTING
            shutil.rmtree(adopting, ignore_errors=True)  # half of an earlier attempt, all of it copies
            target = adopting / start.record.folder
            target.mkdir(parents=True)
            source = given.parents[1]
            last = read_position(given).part
            kept = [source / name for name in ("plan", "samples.npy", PART, MEMORY, *LOGS)]
            kept += [part_folder(source, number) for number in range(1, last + 1)]
            for path in kept:
                if path.is_dir():
                    shutil.copytree(path, target / path.name)
                elif path.is_file():
                    shutil.copy2(path, target / path.name)
            shutil.copytree(given, target / CHECKPOINTS / given.name, copy_function=_link)
            write_record(adopting, start.record)
            _end_adoption(run, config)
    return start


def _link(source: str, target: str) -> None:
    """A second name of a file that nobody changes, or a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _end_adoption(run: Path, config: Config | None = None) -> None:
    """Put what was adopted in its place, also where a kill came between; until it is whole nothing has changed."""
    adopting = run / ADOPTING
    if not (adopting / RUN).is_file():
        return
    record = read_record(adopting / RUN)
    if record is not None and (adopting / record.folder).is_dir():
        if holds_run(run):
            set_aside_run(run, config)
        (adopting / record.folder).rename(run / record.folder)
    (adopting / RUN).rename(run / RUN)
    shutil.rmtree(adopting, ignore_errors=True)


def set_aside_run(run: Path, config: Config | None = None) -> Path:
    """Move the run that a folder holds into ``before-1``, or the next number, in it: a run folder like any other.

    Data and token store stay, since whoever comes next may use them. Rank 0.

    Raises:
        HbpError: the plan that is to be run is in what would be moved.
    """
    folders = strategy_folders(run)
    plan = None if config is None or config.plan.path is None else Path(config.plan.path).resolve()
    if plan is not None and any(plan.is_relative_to(folder.resolve()) for folder in folders):
        raise HbpError(f"plan.path {plan} lies in another run's folder; copy it out of {run}, or give another run_dir")
    number = 1
    while (aside := run / f"before-{number}").exists():
        number += 1
    aside.mkdir()
    for path in [*folders, *(run / name for name in OF_A_RUN)]:  # run.json stays longest: it says whose this is
        if path.name != RUN and path.exists():
            path.rename(aside / path.name)
    if (run / RUN).exists():
        (run / RUN).rename(aside / RUN)
    say(f"what {run} held of another run is now in {aside}")
    return aside


def read_summary(run: Path) -> dict[str, Any] | None:
    """What came out of a run that is finished; None where the file is missing or damaged."""
    try:
        summary: dict[str, Any] = json.loads(patiently((run / SUMMARY).read_text))
        return summary if summary["results"] else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def last_position(strategy_folder: Path) -> Position | None:
    """Of the newest checkpoint that can be read. A run that is finished needs none, so nothing is said of damage."""
    for saved in list_checkpoints(strategy_folder / CHECKPOINTS):
        try:
            return read_position(saved)
        except HbpError:
            continue
    return None


def part_folder(strategy_folder: Path, number: int) -> Path:
    """Where a part is kept."""
    return strategy_folder if number == 0 else strategy_folder / f"part-{number}"


def damaged_name(plan: Path) -> Path:
    """Where a damaged plan waits until another has been made that is it."""
    return plan.with_name(f"{plan.name}.damaged")


def put_back_damaged(plan: Path) -> None:
    """A damaged plan in its place again, in that of what was made. Rank 0."""
    if damaged_name(plan).exists():
        shutil.rmtree(plan, ignore_errors=True)
        damaged_name(plan).rename(plan)


def damage_of_plan(plan: Path) -> str | None:
    """What is wrong with a plan's files, in a line; None where they can be read."""
    try:
        read_plan(plan)
    except HbpError as error:
        if is_disk_fault(error):
            raise
        return str(error)
    return None


def write_part(part: Part) -> None:
    """Keep what a part needs beside its plan, which is there already. Rank 0."""
    write_array(part.folder / "samples.npy", part.samples.ids)
    more = {"epoch": part.epoch, "piece": part.piece, "peak_bytes": part.peak_bytes, "plan": fingerprint(part.plan)}
    write_whole(part.folder / PART, json.dumps(more) + "\n")


def kept_plan(folder: Path) -> str | None:
    """Fingerprint of the plan of the part in a folder; None where that is not known (an earlier version's)."""
    try:
        more = json.loads(patiently((folder / PART).read_text))
        return None if more.get("plan") is None else str(more["plan"])
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None


def read_turn(folder: Path) -> tuple[int, int]:
    """Epoch and piece of the part in a folder."""
    more = json.loads(patiently((folder / PART).read_text))
    return int(more["epoch"]), int(more.get("piece", 0))


def write_array(path: Path, array: np.ndarray) -> None:
    """As ``.npy``, whole."""
    data = io.BytesIO()
    np.save(data, array)
    write_whole(path, data.getvalue())


def read_part(strategy_folder: Path, position: Position, samples: Samples, seed: int | None = None) -> Part:
    """The part that a checkpoint belongs to.

    Args:
        strategy_folder: of the run.
        position: of the checkpoint.
        samples: of an epoch; what a part of all of them lacks is told by its plan.
        seed: of the run, if its plans are made here.

    Raises:
        HbpError: its files are missing, or its plan is not the one that the checkpoint was made under.
    """
    folder = part_folder(strategy_folder, position.part)
    plan = read_plan(folder / "plan")
    try:
        ids = _read_ids(folder, plan, samples)
        epoch, peak_bytes, piece = _read_more(folder, plan, seed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        let_faults_through(error)
        raise HbpError(
            f"{folder} lacks what its checkpoint needs (samples.npy, {PART}), and the plan does not tell it; put a "
            "copy back, or use train.resume=never to start anew"
        ) from None
    if fingerprint(plan) != position.plan:
        raise HbpError(
            f"the plan in {folder / 'plan'} has changed since the checkpoint of step {position.run_step}; "
            "restore it, or use train.resume=never to start anew"
        )
    before = position.run_step - position.step
    return Part(position.part, epoch, Samples(samples.store, ids), plan, folder, peak_bytes, piece, before)


def _read_ids(folder: Path, plan: Plan, samples: Samples) -> np.ndarray:
    """What a plan's sample ids mean: as it was kept; where that is damaged, all samples if the plan is of them."""
    try:
        ids: np.ndarray = patiently(lambda: np.load(folder / "samples.npy", allow_pickle=False))
        return ids
    except (OSError, ValueError) as error:
        let_faults_through(error)
        if plan.info.lengths_sha256 != hash_lengths(samples.lengths):
            raise
    say(f"{folder / 'samples.npy'} is missing or damaged; the plan there is of all samples of an epoch, so it is they")
    return samples.ids


def _read_more(folder: Path, plan: Plan, seed: int | None) -> tuple[int, float, int]:
    """Epoch, peak bytes and piece of a part: as kept; where that is damaged, by the seed of its plan."""
    try:
        more = json.loads(patiently((folder / PART).read_text))
        return int(more["epoch"]), float(more.get("peak_bytes", 0.0)), int(more.get("piece", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        let_faults_through(error)
        if seed is None or plan.info.seed < seed:
            raise
    epoch = plan.info.seed - seed  # each epoch's is one more
    say(f"{folder / PART} is missing or damaged; by its plan's seed the part is of epoch {epoch + 1}")
    return epoch, 0.0, 0


def remaining(part: Part, step: int) -> Samples:
    """The samples of a part's steps from `step` on, in the token store's order."""
    first = int(np.searchsorted(part.plan.step, step))
    left = part.plan.sample_ids[part.plan.sample_offsets[first] :]
    return Samples(part.samples.store, np.sort(part.samples.ids[left]))


def fingerprint(plan: Plan) -> str:
    """Tells plans apart by their rows."""
    return plan.fingerprint()


def say_where(found: Found, part: Part, left: int | None = None) -> None:
    """A line on what is gone on with, and one on what an option that changed does; `left` samples are planned again."""
    assert found.checkpoint is not None
    folder, at = found.checkpoint
    where = f"resuming from {folder}: step {at.run_step}, {at.tokens:,} of {at.tokens_total:,} tokens done"
    again = (
        f"the {left:,} samples of epoch {part.epoch + 1} that are not trained on yet are planned again, each once"
        if left
        else f"no sample of epoch {part.epoch + 1} is left"
    )
    if at.world_size != dist.get_world_size():
        where += f"; {at.world_size} ranks before, {dist.get_world_size()} now: {again}"
    elif left is not None:
        where += f"; {again}"
    say(where)
    for name, (was, now) in found.changed.items():
        say(f"{name} was {was!r}, now {now!r}: {kinds()[name]['effect']}")

"""Going on with a run: whose checkpoints a folder holds, how far they came, what is left to train on.

A run is a row of *parts*, each following one plan: one part an epoch (or one for each piece of a stream that the user
planned), and one more for what was left of a part when the number of ranks changed. Part 0 lives in the strategy's
folder, part n in ``part-n`` in it: ``plan``, ``steps.jsonl`` and ``samples.npy``, the token store's ids of what the
plan's sample ids mean. A checkpoint says which part it belongs to and how many of its steps are done, so with the same
number of ranks the same plan goes on, bit for bit.

With another number of ranks the plan does not fit. The samples of its remaining steps, and only they, are planned again
for the ranks that there are (a new part); steps that are done stay done, so every sample is trained on exactly once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from hbp.config import Config
from hbp.data.samples import Samples
from hbp.errors import HbpError
from hbp.plan import Plan, read_plan
from hbp.progress import say
from hbp.train.checkpoint import Checkpoint, Position, list_checkpoints, newest_checkpoint, read_position
from hbp.train.launch import rank_zero_first

RUN = "run.json"
CHECKPOINTS = "checkpoints"
FREE = (
    "run_dir", "cluster.processes", "data.processes", "data.ray", "data.cache", "data.source", "data.eval_source",
    "data.tokenizer", "data.streaming", "plan.baseline", "plan.baseline_full", "train.resume", "train.save_minutes",
    "train.save_steps", "train.keep_checkpoints", "train.eval_steps", "train.eval_tokens", "train.trace_steps",
    "train.export", "train.hang_minutes", "train.max_skipped", "train.max_minutes", "train.max_steps", "log.",
)  # fmt: skip
"""Options that may change between a run and its resumption: nothing that is trained depends on them, or it is told by
the store's fingerprint, as what the sources and the tokenizer hold is."""


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

    @property
    def turn(self) -> tuple[int, int]:
        """Epoch and piece."""
        return self.epoch, self.piece


def identity(config: Config, store_fingerprint: str) -> dict[str, Any]:
    """Everything that decides what a run trains, by option name."""
    flat: dict[str, Any] = {"data": store_fingerprint}
    for section, values in config.model_dump(mode="json").items():
        if isinstance(values, dict):
            flat |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            flat[section] = values
    return {name: value for name, value in flat.items() if not name.startswith(FREE)}


def is_trained(config: Config, store_fingerprint: str) -> bool:
    """Whether `run_dir` holds the run that is asked for with its strategy trained, and this may be made use of."""
    there = _read(Path(config.run_dir) / RUN)
    if config.train.resume != "auto" or there is None or not there["trained"]:
        return False
    return _changed(there["identity"], identity(config, store_fingerprint)) is None


def find(config: Config, strategy: str, store_fingerprint: str) -> Checkpoint | None:
    """The checkpoint to go on from, None to start anew. A collective.

    Raises:
        HbpError: an unfinished run of another configuration, plan or data; or no such checkpoint.
    """
    run, wanted = Path(config.run_dir), identity(config, store_fingerprint)
    if config.train.resume == "never":
        return None
    if config.train.resume != "auto":
        given = Path(config.train.resume).resolve()
        position = read_position(given)
        _refuse_change(_read(given.parents[2] / RUN), wanted, given)
        return Checkpoint(_adopt(given, run / strategy), position)
    there = _read(run / RUN)
    if there is None or there["trained"]:
        return None
    for folder in sorted(run.glob(f"*/{CHECKPOINTS}")):  # of whatever strategy: nothing unfinished is thrown away
        for checkpoint in list_checkpoints(folder)[:1]:
            _refuse_change(there, wanted, checkpoint)
    return newest_checkpoint(run / strategy / CHECKPOINTS)


def may_resume(config: Config) -> bool:
    """Whether `run_dir` may hold something to go on from, before any process is started."""
    there = _read(Path(config.run_dir) / RUN)
    return config.train.resume != "never" and there is not None and not there["trained"]


def write_run(config: Config, store_fingerprint: str, *, trained: bool) -> None:
    """Note whose run the folder holds. Rank 0."""
    path = Path(config.run_dir) / RUN
    run = {
        "identity": identity(config, store_fingerprint),
        "trained": trained,
        "id": run_id(config) or uuid.uuid4().hex,
    }
    text = json.dumps(run, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.rename(path)


def run_id(config: Config) -> str | None:
    """Names the run that the folder holds, to whoever it is logged to, however often it is resumed."""
    there = _read(Path(config.run_dir) / RUN)
    return None if there is None else there.get("id")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text())
        return data if isinstance(data["identity"], dict) and isinstance(data["trained"], bool) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_change(there: Mapping[str, Any] | None, wanted: Mapping[str, Any], checkpoint: Path) -> None:
    if there is None:
        raise HbpError(f"{checkpoint.parents[2]} does not say whose run it holds ({RUN}); use train.resume=never")
    name = _changed(there["identity"], wanted)
    if name is not None:
        what = f"{name} was {there['identity'][name]!r}, now {wanted[name]!r}"
        what = "its data or tokenizer has changed" if name == "data" else what
        raise HbpError(
            f"{checkpoint} is of another run: {what}; restore that, give another run_dir, or train.resume=never"
        )


def _changed(before: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first option that differs; one that an earlier version did not have yet is no change."""
    return next((name for name in wanted if name in before and before[name] != wanted[name]), None)


def _adopt(checkpoint: Path, strategy_folder: Path) -> Path:
    """Bring another run's parts over, and forget the checkpoints that are newer than the one given."""
    source = checkpoint.parents[1]
    with rank_zero_first() as first:
        if first and source.resolve() != strategy_folder.resolve():
            shutil.rmtree(strategy_folder, ignore_errors=True)
            shutil.copytree(source, strategy_folder, ignore=shutil.ignore_patterns(CHECKPOINTS, "model"))
        if first:
            for newer in list_checkpoints(strategy_folder / CHECKPOINTS):
                if newer.name > checkpoint.name:
                    shutil.rmtree(newer)
    return checkpoint


def part_folder(strategy_folder: Path, number: int) -> Path:
    """Where a part is kept."""
    return strategy_folder if number == 0 else strategy_folder / f"part-{number}"


def write_part(part: Part) -> None:
    """Keep what a part needs beside its plan, which is there already. Rank 0."""
    np.save(part.folder / "samples.npy", part.samples.ids)
    more = {"epoch": part.epoch, "piece": part.piece, "peak_bytes": part.peak_bytes}
    (part.folder / "part.json").write_text(json.dumps(more) + "\n")


def read_part(strategy_folder: Path, position: Position, samples: Samples) -> Part:
    """The part that a checkpoint belongs to.

    Raises:
        HbpError: its files are missing, or its plan is not the one that the checkpoint was made under.
    """
    folder = part_folder(strategy_folder, position.part)
    try:
        ids = np.load(folder / "samples.npy", allow_pickle=False)
        more = json.loads((folder / "part.json").read_text())
        epoch, peak_bytes, piece = int(more["epoch"]), float(more.get("peak_bytes", 0.0)), int(more.get("piece", 0))
    except (OSError, ValueError, KeyError, TypeError):
        raise HbpError(f"{folder} lacks what its checkpoint needs; use train.resume=never to start anew") from None
    plan = read_plan(folder / "plan")
    if fingerprint(plan) != position.plan:
        raise HbpError(
            f"the plan in {folder / 'plan'} has changed since the checkpoint of step {position.run_step}; "
            "restore it, or use train.resume=never to start anew"
        )
    return Part(position.part, epoch, Samples(samples.store, ids), plan, folder, peak_bytes, piece)


def remaining(part: Part, step: int) -> Samples:
    """The samples of a part's steps from `step` on, in the token store's order."""
    first = int(np.searchsorted(part.plan.step, step))
    left = part.plan.sample_ids[part.plan.sample_offsets[first] :]
    return Samples(part.samples.store, np.sort(part.samples.ids[left]))


def fingerprint(plan: Plan) -> str:
    """Tells plans apart by their rows."""
    digest = hashlib.sha256(f"{plan.info.world_size} {plan.info.lengths_sha256}".encode())
    where = (plan.step, plan.micro_step, plan.rank_start)
    columns = [*where, plan.sp_degree, plan.gc_layers, plan.sample_offsets, plan.sample_ids]
    for column in columns:
        digest.update(np.ascontiguousarray(column, "<i8").data)
    return digest.hexdigest()


def say_where(checkpoint: Checkpoint, part: Part, left: int) -> None:
    """One line on what is gone on with."""
    at = checkpoint.position
    where = f"resuming from {checkpoint.folder}: step {at.run_step}, {at.tokens:,} of {at.tokens_total:,} tokens done"
    if at.world_size == dist.get_world_size():
        say(where)
    else:
        say(
            f"{where}; {at.world_size} ranks before, {dist.get_world_size()} now: the {left:,} samples of epoch "
            f"{part.epoch + 1} that are not trained on yet are planned again, each once"
        )

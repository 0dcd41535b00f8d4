"""Checkpoints: written while training goes on, whole or not at all, loaded by any number of ranks.

``torch.distributed.checkpoint`` saves each rank's shards and reshards them on loading, so a run may go on with another
number of ranks. :meth:`Checkpoints.save` copies the state to host memory, which is all that training waits for; the
files are written by a thread of each rank, with a process group of its own (so that its messages never mix with those
of training) into ``step-….partial``. When every rank has written, rank 0 adds ``position.json`` with the size and
checksum of every file and renames the folder. A folder without the suffix is therefore whole, whenever the run was
killed, and a file that was damaged later is found before it is loaded.

A checkpoint holds what training changes: trained parameters, AdamW's states, every rank's random state, and the
:class:`Position`. Frozen parameters (under LoRA, the whole base model) are not in it.

Cost: one copy of the state in host memory while it is written, and the disk's time in the background.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from hbp.errors import HbpError
from hbp.progress import say
from hbp.train.lora import frozen_names

POSITION = "position.json"
PARTIAL = ".partial"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)
CHUNK = 1 << 24


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    part: int
    """Which of the run's plans was being followed."""
    step: int
    """Steps of that plan that are done."""
    run_step: int
    """Steps of the whole run that are done."""
    tokens: int
    """Tokens of the whole run that are done; the learning rate follows them."""
    tokens_total: int
    """Tokens that the run is to see, for the learning rate."""
    plan: str
    """Fingerprint of the plan."""
    world_size: int


class Checkpoint(NamedTuple):
    """A whole checkpoint."""

    folder: Path
    position: Position


@dataclass(frozen=True)
class _Written(WriteResult):
    crc32: int = 0
    """Of the whole file that the entry is in."""


class _AtomicWriter(FileSystemWriter):
    """Writes beside the final folder and renames when all ranks are done; deletes checkpoints beyond the last few."""

    def __init__(self, folder: Path, position: Position, keep: int) -> None:
        # The state is in host memory already. To copy ahead, the writing thread would take a CUDA context on device 0.
        super().__init__(folder.with_name(folder.name + PARTIAL), per_thread_copy_ahead=0)
        self.folder, self.position, self.keep = folder, position, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        checksums = {name: _crc32(Path(self.path) / name) for name in names}
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(
            [
                _Written(r.index, r.size_in_bytes, r.storage_data, crc32=checksums[r.storage_data.relative_path])
                for r in results
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Of rank 0, after all ranks have written."""
        super().finish(metadata, results)
        partial = Path(self.path)
        written = cast(list[_Written], [result for of_rank in results for result in of_rank])
        checksums = {r.storage_data.relative_path: r.crc32 for r in written}
        checksums[".metadata"] = _crc32(partial / ".metadata")
        files = {name: [(partial / name).stat().st_size, crc] for name, crc in sorted(checksums.items())}
        (partial / POSITION).write_text(json.dumps({**dataclasses.asdict(self.position), "files": files}) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        partial.rename(self.folder)
        for old in list_checkpoints(self.folder.parent)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a run under training."""

    def __init__(self, folder: Path, keep: int) -> None:
        """A collective: makes the process group that saving in the background uses."""
        self.folder, self.keep = folder, keep
        if dist.get_rank() == 0:
            for stale in folder.glob(f"step-*{PARTIAL}"):  # of a run that was killed while it saved
                shutil.rmtree(stale, ignore_errors=True)
        self.group = dist.new_group(backend="gloo")
        self.saving: Future[Metadata] | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
        """Save in the background; waits only for a save that is still under way. A collective.

        Raises:
            HbpError: the save before this one failed.
        """
        self.wait()
        state = {**_state(model, optimizer), "rng": _rng_state()}
        writer = _AtomicWriter(self.folder / f"step-{position.run_step:08d}", position, self.keep)
        self.folder.mkdir(parents=True, exist_ok=True)
        saving = async_save(state, storage_writer=writer, process_group=self.group)
        self.saving = cast("Future[Metadata]", saving)

    def wait(self) -> None:
        """Until the last save is whole on disk.

        Raises:
            HbpError: it failed.
        """
        if self.saving is None:
            return
        try:
            self.saving.result()
        except (Exception, CheckpointException) as error:
            raise HbpError(
                f"cannot save a checkpoint in {self.folder}: {_one_line(error)}; mend that and resume"
            ) from None
        finally:
            self.saving = None

    def close(self) -> None:
        """Wait for the last save and give the process group back."""
        self.wait()
        dist.destroy_process_group(self.group)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, newest first."""
    found = [path for path in folder.glob("step-*") if not path.suffix and path.is_dir()]
    return sorted(found, reverse=True)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint, on every rank; damaged ones are named. A collective."""
    names: list[Any] = [[path.name for path in list_checkpoints(folder)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, src=0)
    for number, name in enumerate(names[0]):
        path = folder / name
        damage = _find_damage(path)
        if damage is None:
            return Checkpoint(path, read_position(path))
        after = "the one before is used" if number + 1 < len(names[0]) else "there is none before it: starting anew"
        say(f"checkpoint {path} is damaged ({damage}); {after}")
        if dist.get_rank() == 0:  # out of the way of later checkpoints, but not lost
            path.rename(path.with_suffix(".damaged"))
    return None


def read_position(checkpoint: Path) -> Position:
    """How far the run had come.

    Raises:
        HbpError: not a checkpoint.
    """
    try:
        data = json.loads((checkpoint / POSITION).read_text())
        return Position(**{field.name: data[field.name] for field in dataclasses.fields(Position)})
    except (OSError, ValueError, KeyError, TypeError):
        raise HbpError(f"{checkpoint} is not a whole checkpoint ({POSITION} cannot be read); give another") from None


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Load parameters, optimizer and random states in place. A collective.

    Args:
        checkpoint: folder.
        model: sharded over the world.
        optimizer: of the model's trained parameters.
        seed: of the random state of ranks that the checkpoint does not know.

    Raises:
        HbpError: it does not fit the model.
    """
    state = _state(model, optimizer)
    reader = FileSystemReader(checkpoint)
    known = reader.read_metadata().state_dict_metadata
    mine = {name: value for name, value in _rng_state().items() if f"rng.{name}" in known}
    if mine:
        state["rng"] = mine
    try:
        load(state, storage_reader=reader)
    except CheckpointException as error:
        raise HbpError(f"cannot load {checkpoint}: {_one_line(error)}; is it of another model?") from None
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=OPTIONS
    )
    if mine:
        _set_rng_state(mine)
    else:
        torch.manual_seed(seed + dist.get_rank())


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    parameters, states = get_state_dict(model, optimizer, options=OPTIONS)
    frozen = frozen_names(model)
    return {"model": {name: x for name, x in parameters.items() if name not in frozen}, "optimizer": states}


def _rng_state() -> dict[str, Tensor]:
    rank = dist.get_rank()
    states = {f"cpu_{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"cuda_{rank}"] = torch.cuda.get_rng_state()
    return states


def _set_rng_state(states: Mapping[str, Tensor]) -> None:
    for name, state in states.items():
        (torch.cuda.set_rng_state if name.startswith("cuda") else torch.set_rng_state)(state)


def _find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, each checked by one rank; the same on every rank. A collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: str | None = None
    try:
        files = json.loads((checkpoint / POSITION).read_text())["files"]
        read_position(checkpoint)
        for name, (size, crc) in list(files.items())[rank::world_size]:
            path = checkpoint / name
            if not path.is_file():
                found = f"{name} is missing"
            elif path.stat().st_size != size:
                found = f"{name} has {path.stat().st_size} bytes, should have {size}"
            elif _crc32(path) != crc:
                found = f"{name} does not match its checksum"
            if found:
                break
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HbpError):
        found = f"{POSITION} cannot be read"
    every: list[str | None] = [None] * world_size
    dist.all_gather_object(every, found)
    return next((damage for damage in every if damage), None)


def _one_line(error: BaseException) -> str:
    """What the first rank that failed said."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc

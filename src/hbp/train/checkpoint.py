"""Checkpoints: written while training goes on, whole or not at all, loaded by any number of ranks.

``torch.distributed.checkpoint`` saves each rank's shards and reshards them on loading, so a run may go on with another
number of ranks. :meth:`Checkpoints.save` copies the state to host memory, which is all that training waits for; the
files are written by a thread of each rank, with a process group of its own (so that its messages never mix with those
of training) into ``step-….partial``. When every rank has written, rank 0 adds ``position.json`` with the size and
checksum of every file and renames the folder. A folder without the suffix is therefore whole, whenever the run was
killed, and a file that was damaged later is found before it is loaded. A file that cannot be read is no damage: it is
tried again, and then the run stops with all checkpoints where they are.

A checkpoint holds what training changes: trained parameters, AdamW's states, every rank's random state, the
:class:`Position`, and whose run it is of. Frozen parameters (under LoRA, the whole base model) are not in it.

Nothing in it is unpickled. torch keeps where each tensor lies in ``.metadata``, a pickle, which could run anything: it
is written for torch's own tools and never read here; ``tensors.json`` says the same. Values are read as
``weights_only``.

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
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, set_element  # type: ignore[attr-defined]
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from hbp.disk import (
    PARTIAL,
    free_name,
    is_disk_fault,
    let_faults_through,
    patiently,
    sync_folder,
    write_whole,
)
from hbp.errors import HbpError, RankFailed
from hbp.progress import say
from hbp.train.lora import frozen_names

POSITION = "position.json"
TENSORS = "tensors.json"
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

    def __init__(self, folder: Path, position: Position, keep: int, run: Mapping[str, Any] | None = None) -> None:
        # The state is in host memory already. To copy ahead, the writing thread would take a CUDA context on device 0.
        super().__init__(folder.with_name(folder.name + PARTIAL), per_thread_copy_ahead=0)
        self.folder, self.position, self.keep, self.run = folder, position, keep, run or {}

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
        # torch 2.11 does so to a copy of its own.
        metadata.storage_data = {result.index: result.storage_data for of_rank in results for result in of_rank}
        partial = Path(self.path)
        write_whole(partial / TENSORS, json.dumps(_tensors_to_json(metadata)))
        written = cast(list[_Written], [result for of_rank in results for result in of_rank])
        checksums = {r.storage_data.relative_path: r.crc32 for r in written}
        checksums |= {name: _crc32(partial / name) for name in (".metadata", TENSORS)}
        files = {name: [(partial / name).stat().st_size, crc] for name, crc in sorted(checksums.items())}
        position = {**dataclasses.asdict(self.position), "files": files, "run": dict(self.run)}
        write_whole(partial / POSITION, json.dumps(position) + "\n")
        replaced = free_name(self.folder.with_name(f"{self.folder.name}.replaced{PARTIAL}"))
        if self.folder.exists():
            self.folder.rename(replaced)
        partial.rename(self.folder)
        sync_folder(self.folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        for old in list_checkpoints(self.folder.parent)[self.keep :]:  # never half of one under a whole one's name
            old.rename(gone := free_name(old.with_name(old.name + PARTIAL)))
            shutil.rmtree(gone, ignore_errors=True)


def _tensors_to_json(metadata: Metadata) -> dict[str, Any]:
    """Where each tensor's pieces lie, and which other values there are."""
    tensors, values = dict[str, Any](), list[str]()
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks = [[list(chunk.offsets), list(chunk.sizes)] for chunk in entry.chunks]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
        else:
            values.append(name)
    places = [
        (
            *(index.fqn, None if index.offset is None else list(index.offset), index.index),
            *(info.relative_path, info.offset, info.length),
        )
        for index, info in cast(Mapping[MetadataIndex, _StorageInfo], metadata.storage_data).items()
    ]
    return {"tensors": tensors, "values": values, "places": places}


def _tensors_from_json(data: Mapping[str, Any]) -> Metadata:
    """What :func:`_tensors_to_json` wrote.

    Raises:
        ValueError: a file outside of the checkpoint, or a type that torch does not have.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, tensor in data["tensors"].items():
        dtype = getattr(torch, tensor["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no type {tensor['dtype']}")
        chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor["chunks"]]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["size"]), chunks)
    entries |= {name: BytesStorageMetadata() for name in data["values"]}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, offset, index, file, begin, length in data["places"]:
        if Path(file).name != file:
            raise ValueError(f"{file} is outside of the checkpoint")
        places[MetadataIndex(name, offset, index)] = _StorageInfo(file, int(begin), int(length))
    return Metadata(entries, storage_data=places)


class _Reader(FileSystemReader):
    """Knows where tensors lie from ``tensors.json`` alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / TENSORS
        try:
            return _tensors_from_json(json.loads(patiently(path.read_text)))
        except FileNotFoundError:
            raise HbpError(
                f"{path.parent} has no {TENSORS}: an earlier version of hbp wrote it, which is to end that run"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HbpError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); give another") from None


class _LoadPlanner(DefaultLoadPlanner):
    """Reads values that are no tensors without unpickling anything but plain ones."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


class Checkpoints:
    """The checkpoints of a run under training."""

    def __init__(self, folder: Path, keep: int, run: Mapping[str, Any] | None = None) -> None:
        """A collective: makes the process group that saving in the background uses.

        Args:
            folder: of the checkpoints.
            keep: newest ones that are kept.
            run: whose they are; kept in each.
        """
        self.folder, self.keep, self.run = folder, keep, run or {}
        if dist.get_rank() == 0:
            for stale in folder.glob(f"step-*{PARTIAL}*"):  # of a run that was killed while it saved
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
        writer = _AtomicWriter(self.folder / f"step-{position.run_step:08d}", position, self.keep, self.run)
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
    """The newest undamaged checkpoint, on every rank; damaged ones are named and set aside. A collective.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        HbpError: all are damaged.
        RankFailed: a file of one cannot be read.
    """
    names: list[Any] = [[path.name for path in list_checkpoints(folder)] if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, src=0)
    damaged: list[str] = []
    for name in names[0]:
        path = folder / name
        damage = find_damage(path)
        if damage is None:
            if dist.get_rank() == 0:
                for other in damaged:  # out of the way of later checkpoints, but not lost
                    (folder / other).rename(free_name(folder / f"{other}.damaged"))
            dist.barrier()
            return Checkpoint(path, read_position(path))
        say(f"checkpoint {path} is damaged ({damage}){'; the one before is used' if name != names[0][-1] else ''}")
        damaged.append(name)
    if damaged:
        raise HbpError(
            f"no checkpoint in {folder} is whole ({len(damaged)} are damaged); restore one, or train.resume=never"
        )
    return None


def read_position(checkpoint: Path) -> Position:
    """How far the run had come.

    Raises:
        HbpError: not a checkpoint.
    """
    try:
        return _position(json.loads(patiently((checkpoint / POSITION).read_text)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        let_faults_through(error)
        raise HbpError(f"{checkpoint} is not a whole checkpoint ({POSITION} cannot be read); give another") from None


def _position(data: Mapping[str, Any]) -> Position:
    return Position(**{field.name: data[field.name] for field in dataclasses.fields(Position)})


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
    reader = _Reader(checkpoint)
    known = reader.read_metadata().state_dict_metadata
    mine = {name: value for name, value in _rng_state().items() if f"rng.{name}" in known}
    if mine:
        state["rng"] = mine
    try:
        load(state, storage_reader=reader, planner=_LoadPlanner())
    except CheckpointException as error:
        if any(is_disk_fault(of_rank) for of_rank, _ in error.failures.values()):
            raise RankFailed(f"cannot read {checkpoint}: {_one_line(error)}; mend that and run again") from None
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


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, each checked by one rank; the same on every rank. A collective.

    Raises:
        RankFailed: a rank could not read one, however often it tried; nobody knows then whether it is damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: tuple[str | None, str | None] = (None, None)
    try:
        data = json.loads(patiently((checkpoint / POSITION).read_text))
        files, _ = data["files"], _position(data)
        mine = map(partial(_harm, checkpoint), list(files.items())[rank::world_size])
        found = next(filter(None, mine), None), None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        found = f"{POSITION} cannot be read", None
    except OSError as error:
        found = None, f"rank {rank} cannot read {error.filename or checkpoint} ({error.strerror})"
    every: list[tuple[str | None, str | None]] = [found] * world_size
    dist.all_gather_object(every, found)
    unread = next((unread for _, unread in every if unread), None)
    if unread:
        raise RankFailed(f"{unread}; nothing was changed: mend the file system and run again")
    return next((damage for damage, _ in every if damage), None)


def _harm(checkpoint: Path, file: tuple[str, tuple[int, int]]) -> str | None:
    """What is wrong with one file."""
    name, (size, crc) = file
    path = checkpoint / name
    if Path(name).name != name or not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes, should have {size}"
    return None if patiently(partial(_crc32, path)) == crc else f"{name} does not match its checksum"


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

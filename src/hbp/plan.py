"""The plan file: what the planning half writes and the training half (or any other trainer) reads.

A plan is a folder with two files:

- ``plan.parquet``: one row is one pack, the unit that one sequence-parallel (SP) group runs in one micro-step.
- ``plan.json``: how the plan was made, for which lengths, model and cluster, its metrics, and what was dropped.

Invariants, checked on write and on read (:func:`validate`):

1. every sample of the data set is in exactly one pack, or listed under ``dropped`` with its reason (in a piece of a
   stream, at most once: the others are in other pieces);
2. the lengths of a pack sum to at most its ``capacity`` and are its samples' lengths;
3. in each micro-step the SP groups lie inside the world, aligned to their degree, and no rank is used twice;
4. steps run from 0 without a gap, and so do the micro-steps of a step, so every rank counts the same number;
5. the same input and seed give the same bytes.

A rank that no row of a micro-step covers is idle there: the trainer keeps it in step with a one-token pack that
carries no loss, and every metric counts it as waiting.

In memory the list columns are flat arrays with offsets (the Arrow layout), so a plan of 100 million samples is a
handful of numpy arrays. Legend: ``P`` packs, ``N`` samples in the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.errors import HbpError

SCHEMA_VERSION = 1
PARQUET_NAME = "plan.parquet"
JSON_NAME = "plan.json"

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("micro_step", pa.int16(), nullable=False),
        pa.field("rank_start", pa.int32(), nullable=False),
        pa.field("sp_degree", pa.int16(), nullable=False),
        pa.field("gc_layers", pa.int16(), nullable=False),
        pa.field("capacity", pa.int32(), nullable=False),
        pa.field("sample_ids", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
        pa.field("lengths", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("predicted_s", pa.float32(), nullable=False),
    ]
)
PACKS_AT_A_TIME = 1 << 17
SCALAR_COLUMNS = ("step", "micro_step", "rank_start", "sp_degree", "gc_layers", "capacity", "predicted_s")

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, order=True)
class Group:
    """A packing group: how long its packs are and how they are run (paper, Section 4.1)."""

    capacity: int
    """Packing length in tokens."""
    sp_degree: int
    """Ranks that share one pack."""
    gc_layers: int
    """Layers whose activations are recomputed."""

    def __str__(self) -> str:
        return f"{self.capacity} tokens, SP {self.sp_degree}, GC {self.gc_layers}"


@dataclass(frozen=True)
class PlanInfo:
    """Everything about a plan that is not a row: the contents of ``plan.json``."""

    strategy: str
    seed: int
    world_size: int
    groups: tuple[Group, ...]
    n_samples: int
    """Samples in the data set, dropped ones included; of a piece of a stream, those that had come by then."""
    n_tokens: int
    """Tokens in the plan."""
    lengths_sha256: str
    """:func:`hash_lengths` of the data set that the plan was made for; of a piece of a stream, of the samples that it
    packs, in order of their ids."""
    dropped: tuple[tuple[int, str], ...] = ()
    """Pairs of sample id and reason."""
    model: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    cost_model: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    """Further figures: time imbalance, composition drift, travel from random order (docs/plan-format.md)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options that shaped the plan (global batch, curriculum, longest packing length, windows). ``stream`` is there in
    a piece of a stream: its number and the stream's steps before it."""

    @property
    def is_piece(self) -> bool:
        """Whether the plan holds only some samples of a stream, numbered as the stream numbers them."""
        return "stream" in self.settings


@dataclass(frozen=True, eq=False)
class Plan:
    """Rows of a plan as columns, sorted by (step, micro_step, rank_start), and its :class:`PlanInfo`."""

    info: PlanInfo
    step: IntArray  # [P] int32
    micro_step: IntArray  # [P] int16
    rank_start: IntArray  # [P] int32
    sp_degree: IntArray  # [P] int16
    gc_layers: IntArray  # [P] int16
    capacity: IntArray  # [P] int32
    predicted_s: FloatArray  # [P] float32
    sample_offsets: IntArray  # [P + 1] int64: pack p holds sample_ids[sample_offsets[p]:sample_offsets[p + 1]]
    sample_ids: IntArray  # [N] int64
    lengths: IntArray  # [N] int32

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read and validate a plan folder (:func:`read_plan`).

        Raises:
            HbpError: a file is missing, damaged, of another schema version, or breaks an invariant.
        """
        return read_plan(Path(folder))

    def save(self, folder: str | Path) -> None:
        """Validate and write a plan folder (:func:`write_plan`).

        Raises:
            HbpError: an invariant does not hold.
        """
        write_plan(self, Path(folder))

    @property
    def n_packs(self) -> int:
        """Number of rows."""
        return len(self.step)

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps."""
        return int(self.step[-1]) + 1 if self.n_packs else 0

    def samples(self, row: int) -> tuple[IntArray, IntArray]:
        """Sample ids and lengths of one pack, in order of concatenation."""
        piece = slice(int(self.sample_offsets[row]), int(self.sample_offsets[row + 1]))
        return self.sample_ids[piece], self.lengths[piece]

    def tokens(self) -> IntArray:
        """Tokens of each pack, int64 ``[P]``."""
        return self._sums(lambda lengths: lengths, np.int64)

    def sum_squares(self) -> FloatArray:
        """Sum of squared document lengths of each pack, float64 ``[P]``: attention cost in the paper's unit."""
        return self._sums(lambda lengths: np.square(lengths, dtype=np.float64), np.float64)

    def _sums(self, value: Callable[[IntArray], npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Sum of a value of each sample's length over each pack, a piece at a time to bound memory."""
        result = np.zeros(self.n_packs, dtype)
        for a in range(0, self.n_packs, PACKS_AT_A_TIME):
            offsets = self.sample_offsets[a : a + PACKS_AT_A_TIME + 1]
            values = value(self.lengths[offsets[0] : offsets[-1]])
            if len(values):
                result[a : a + PACKS_AT_A_TIME] = np.add.reduceat(values, offsets[:-1] - offsets[0], dtype=dtype)
        return result

    def micro_step_index(self) -> IntArray:
        """Number of each row's micro-step counted over the whole plan, int64 ``[P]``, from 0."""
        if not self.n_packs:
            return np.zeros(0, np.int64)
        new = (np.diff(self.step, prepend=self.step[0]) != 0) | (
            np.diff(self.micro_step, prepend=self.micro_step[0]) != 0
        )
        return np.cumsum(new)

    def micro_step_seconds(self) -> FloatArray:
        """Predicted seconds of each micro-step, float64: those of its slowest pack, since its ranks wait for it."""
        index = self.micro_step_index()
        seconds = np.zeros(int(index[-1]) + 1 if len(index) else 0)
        np.maximum.at(seconds, index, self.predicted_s.astype(np.float64))
        return seconds


def hash_lengths(lengths: IntArray) -> str:
    """SHA-256 of the data set's lengths as little-endian int32: ties a plan to its data."""
    return hashlib.sha256(np.ascontiguousarray(lengths, dtype="<i4").data).hexdigest()


def validate(plan: Plan) -> None:
    """Check every invariant of the contract.

    Raises:
        HbpError: the first invariant that does not hold, with the row and the values that break it.
    """
    p, info = plan.n_packs, plan.info
    offsets = plan.sample_offsets
    if len(offsets) != p + 1 or int(offsets[0]) != 0 or int(offsets[-1]) != len(plan.sample_ids):
        raise HbpError("plan is damaged: its list columns do not line up; make it again with `hbp plan`")
    if (np.diff(offsets) < 1).any():
        raise HbpError("plan is damaged: a row holds no samples; make it again with `hbp plan`")
    if len(plan.sample_ids) != len(plan.lengths):
        raise HbpError(
            f"plan is damaged: {len(plan.sample_ids)} sample ids but {len(plan.lengths)} lengths; make it again"
        )
    if int(plan.lengths.min(initial=1)) < 1:
        raise HbpError("plan is damaged: a sample has no tokens; make it again with `hbp plan`")
    _check_samples(plan)
    tokens = plan.tokens()
    over = np.flatnonzero(tokens > plan.capacity)
    if len(over):
        row = int(over[0])
        raise HbpError(f"plan row {row} holds {tokens[row]} tokens, over its capacity of {plan.capacity[row]}")
    wrong = np.flatnonzero(~(plan.predicted_s >= 0) | np.isinf(plan.predicted_s) | (plan.gc_layers < 0))
    if len(wrong):
        row = int(wrong[0])
        layers, seconds = plan.gc_layers[row], plan.predicted_s[row]
        raise HbpError(
            f"plan row {row} has {layers} recomputed layers and {seconds} predicted seconds; make the plan again"
        )
    if info.n_tokens != int(tokens.sum()):
        raise HbpError(f"plan.json counts {info.n_tokens} tokens but the rows hold {int(tokens.sum())}")
    if p:
        _check_tiling(plan)


def _check_samples(plan: Plan) -> None:
    info = plan.info
    dropped = np.fromiter((sample for sample, _ in info.dropped), np.int64, len(info.dropped))
    for ids in (plan.sample_ids, dropped):
        if len(ids) and (ids.min() < 0 or ids.max() >= info.n_samples):
            bad = int(ids[(ids < 0) | (ids >= info.n_samples)][0])
            raise HbpError(f"plan names sample {bad}, but its data set has {info.n_samples} samples (ids from 0)")
    count = len(plan.sample_ids) + len(dropped)
    if info.is_piece:
        ids, times = np.unique(np.concatenate([plan.sample_ids, dropped]), return_counts=True)
        if len(ids) < count:
            twice = int(times.argmax())
            raise HbpError(f"plan holds sample {int(ids[twice])} {int(times[twice])} times; each must be there once")
        if hash_lengths(plan.lengths[np.argsort(plan.sample_ids)]) != info.lengths_sha256:
            raise HbpError("plan is damaged: its rows' lengths are not those of its samples; make it again")
        return
    if count == info.n_samples:
        lengths = np.zeros(count, np.int32)
        lengths[plan.sample_ids] = plan.lengths
        lengths[dropped] = 1  # theirs are not known here
        if lengths.all():  # as many as there are, and none left out: each once
            if not info.dropped and hash_lengths(lengths) != info.lengths_sha256:
                raise HbpError("plan is damaged: its rows' lengths are not those of its data set; make it again")
            return
    first = min(info.n_samples, count + 1)  # more samples than these leave a gap among these already
    times = np.zeros(first, np.int64)
    for ids in (plan.sample_ids, dropped):
        times += np.bincount(ids[ids < first], minlength=first)
    wrong = np.flatnonzero(times != 1)
    sample = int(wrong[0])
    raise HbpError(
        f"plan holds sample {sample} {int(times[sample])} times; each must be packed or dropped exactly once "
        f"({len(wrong)} samples are wrong)"
    )


def _check_tiling(plan: Plan) -> None:
    world = plan.info.world_size
    start, degree = plan.rank_start.astype(np.int64), plan.sp_degree.astype(np.int64)
    bad = np.flatnonzero((degree < 1) | (start < 0) | (start + degree > world) | (start % np.maximum(degree, 1) != 0))
    if len(bad):
        row = int(bad[0])
        raise HbpError(
            f"plan row {row} runs on ranks {start[row]} to {start[row] + degree[row] - 1} at SP degree "
            f"{degree[row]}, which does not lie aligned inside a world of {world} ranks"
        )
    step, micro = plan.step.astype(np.int64), plan.micro_step.astype(np.int64)
    if (np.diff(step) < 0).any() or ((np.diff(step) == 0) & (np.diff(micro) < 0)).any():
        raise HbpError("plan rows are not sorted by step and micro_step; make the plan again with `hbp plan`")
    step_jump = np.diff(step, prepend=-1)
    new_step = step_jump > 0
    micro_jump = np.diff(micro, prepend=0)
    if step[0] != 0 or (step_jump > 1).any() or (micro[new_step] != 0).any() or (micro_jump[~new_step] > 1).any():
        raise HbpError("plan skips a step or a micro-step: both must run from 0 without a gap")
    same = np.diff(plan.micro_step_index()) == 0
    overlap = np.flatnonzero(same & (start[1:] < start[:-1] + degree[:-1]))
    if len(overlap):
        row = int(overlap[0]) + 1
        raise HbpError(
            f"plan rows {row - 1} and {row} overlap or are out of order: both reach rank {start[row]} in step "
            f"{step[row]}, micro-step {micro[row]}"
        )


def write_plan(plan: Plan, folder: Path) -> None:
    """Validate and write a plan folder; equal plans give equal bytes."""
    validate(plan)
    if len(plan.sample_ids) > np.iinfo(np.int32).max:
        raise HbpError(f"{len(plan.sample_ids)} samples are more than one plan file can index; plan the data in parts")
    folder.mkdir(parents=True, exist_ok=True)
    # Repeated values are few bytes under zstd with no dictionary; ids do not repeat, but their differences are short.
    options = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False}
    options["column_encoding"] = {"sample_ids.list.element": "DELTA_BINARY_PACKED"}
    with pq.ParquetWriter(folder / PARQUET_NAME, SCHEMA, **options) as writer:
        for begin in range(0, max(plan.n_packs, 1), PACKS_AT_A_TIME):  # no copy of the whole
            writer.write_batch(_rows(plan, slice(begin, begin + PACKS_AT_A_TIME)))
    (folder / JSON_NAME).write_text(json.dumps(_info_to_json(plan.info), indent=1, sort_keys=True) + "\n")


def _rows(plan: Plan, rows: slice) -> pa.RecordBatch:
    """Some rows of a plan in Arrow."""
    offsets = plan.sample_offsets[rows.start : rows.stop + 1]
    samples, counted = slice(offsets[0], offsets[-1]), _arrow(offsets - offsets[0], pa.int32())

    def column(field: pa.Field) -> pa.Array:
        values = getattr(plan, field.name)
        if field.name in SCALAR_COLUMNS:
            return _arrow(values[rows], field.type)
        return pa.ListArray.from_arrays(counted, _arrow(values[samples], field.type.value_type), field.type)

    return pa.record_batch([column(field) for field in SCHEMA], schema=SCHEMA)


def _arrow(array: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """An array without a copy, and without pa.array's import of pandas, which costs half a second."""
    values = np.ascontiguousarray(array, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def read_plan(folder: Path) -> Plan:
    """Read and validate a plan folder.

    Raises:
        HbpError: a file is missing, damaged, of another schema version, or breaks an invariant.
    """
    info = read_info(folder)
    path = folder / PARQUET_NAME
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        missing = set(SCHEMA.names).difference(table.column_names)
    except FileNotFoundError:
        raise HbpError(f"no {PARQUET_NAME} in {folder}; make a plan with `hbp plan --out {folder}`") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is not UTF-8
        raise HbpError(f"cannot read {path} ({_one_line(error)}); make the plan again") from None
    if missing:
        raise HbpError(f"{path} lacks the columns {', '.join(sorted(missing))}; make the plan again with `hbp plan`")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        scalars = {name: table.column(name).to_numpy() for name in SCALAR_COLUMNS}
        ids, lengths = (_list_column(table.column(name)) for name in ("sample_ids", "lengths"))
    except (pa.ArrowException, ValueError) as error:
        raise HbpError(f"{path} does not fit the plan's schema ({_one_line(error)}); make it again") from None
    if not np.array_equal(ids[0], lengths[0]):
        raise HbpError(f"{path} is damaged: a row has more sample ids than lengths; make the plan again")
    plan = Plan(info, sample_offsets=ids[0], sample_ids=ids[1], lengths=lengths[1], **scalars)
    validate(plan)
    return plan


def _list_column(column: pa.ChunkedArray) -> tuple[IntArray, IntArray]:
    """Offsets (from 0) and values of a list column, whatever slices its chunks are."""
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    values = [chunk.flatten().to_numpy() for chunk in column.chunks]
    offsets = np.concatenate([np.zeros(1, np.int64), *(c.astype(np.int64) for c in counts)]).cumsum()
    empty = np.zeros(0, column.type.value_type.to_pandas_dtype())
    return offsets, np.concatenate([empty, *values])


def read_info(folder: Path) -> PlanInfo:
    """Read ``plan.json`` alone.

    Raises:
        HbpError: missing, not JSON, of another schema version, or without a required key.
    """
    path = folder / JSON_NAME
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise HbpError(f"no plan in {folder} ({JSON_NAME} is missing); make one with `hbp plan`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HbpError(f"cannot read {path} ({_one_line(error)}); make the plan again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise HbpError(f"{path} has schema version {version}, this hbp reads {SCHEMA_VERSION}; make the plan again")
    if data.get("checksum", _checksum(data)) != _checksum(data):  # plans of other tools need not have one
        raise HbpError(
            f"{path} is not as it was written; make the plan again, or take `checksum` out if you changed it"
        )
    try:
        return _info_from_json(data)
    except (KeyError, TypeError, ValueError) as error:
        raise HbpError(f"{path} is damaged ({_one_line(error)}); make the plan again") from None


def _info_to_json(info: PlanInfo) -> dict[str, Any]:
    data: dict[str, Any] = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    data["schema_version"] = SCHEMA_VERSION
    data["groups"] = [dataclasses.asdict(group) for group in info.groups]
    data["dropped"] = [{"sample_id": sample, "reason": reason} for sample, reason in info.dropped]
    data["checksum"] = _checksum(data)
    return data


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in plan.json."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _info_from_json(data: Mapping[str, Any]) -> PlanInfo:
    values = {f.name: data[f.name] for f in dataclasses.fields(PlanInfo) if f.name != "details"}
    values["details"] = data.get("details", {})  # plans of other tools need not have it
    for name in ("seed", "world_size", "n_samples", "n_tokens"):
        _whole(data, name)
    for name in ("strategy", "lengths_sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is not a text")
    for name in ("model", "cluster", "cost_model", "metrics", "details", "settings"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} is not an object")
    for name, value in [*values["metrics"].items(), *values["details"].items()]:
        if type(value) not in (int, float):
            raise ValueError(f"{name} is not a number")
    values["groups"] = tuple(
        Group(*(_whole(group, name) for name in ("capacity", "sp_degree", "gc_layers"))) for group in data["groups"]
    )
    values["dropped"] = tuple((_whole(entry, "sample_id"), str(entry["reason"])) for entry in data["dropped"])
    return PlanInfo(**values)


def _whole(data: Mapping[str, Any], name: str) -> int:
    if type(data[name]) is not int or not 0 <= data[name] < 2**63:
        raise ValueError(f"{name} is not a whole number from 0 up")
    return int(data[name])


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"

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

What another program's ``plan.json`` leaves out is filled in from the rows on reading (:mod:`hbp.plan_info`).

In memory the list columns are flat arrays with offsets (the Arrow layout), so a plan of 100 million samples is a
handful of numpy arrays. Legend: ``P`` packs, ``N`` samples in the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.disk import beside, let_faults_through, patiently, write_whole
from hbp.errors import HbpError
from hbp.plan_info import (
    JSON_NAME,
    RATIOS,
    SCHEMA_VERSION,
    TOLD_BY_SAMPLES,
    Group,
    PlanInfo,
    info_from_json,
    info_to_json,
    one_line,
    read_json,
)

CLOSE = 0.01
"""Share by which the number of steps may be off: two plans differ by at most twice that."""
LARGER_STEP = 1.5
"""Times the tokens that were asked for, from which a step's are pointed out."""

__all__ = ["JSON_NAME", "PARQUET_NAME", "SCALAR_COLUMNS", "SCHEMA", "SCHEMA_VERSION", "Group", "Plan", "PlanInfo"]
__all__ += ["completed", "hash_lengths", "imbalance", "ratios", "read_info", "read_plan", "validate", "write_plan"]

PARQUET_NAME = "plan.parquet"

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

    def groups_of_rows(self) -> tuple[tuple[Group, ...], IntArray]:
        """The groups of a plan, and which of them each row is of.

        Returns:
            The groups that ``plan.json`` names, in its order, then any others that rows have (another program's plan
            may name none), rising; and the index of each row's group, int64 ``[P]``.
        """
        # Three columns in one number: 31 bits of capacity over 16 of degree over 16 of recomputed layers.
        capacity, degree, layers = (
            column.astype(np.int64) for column in (self.capacity, self.sp_degree, self.gc_layers)
        )
        keys, of_row = np.unique(capacity << 32 | degree << 16 | layers, return_inverse=True)
        used = [Group(key >> 32, key >> 16 & 0xFFFF, key & 0xFFFF) for key in keys.tolist()]
        groups = list(dict.fromkeys([*self.info.groups, *used]))
        number = np.array([groups.index(group) for group in used], np.int64)
        return tuple(groups), number[of_row]

    def fingerprint(self) -> str:
        """Tells plans apart by their rows."""
        digest = hashlib.sha256(f"{self.info.world_size} {self.info.lengths_sha256}".encode())
        where = (self.step, self.micro_step, self.rank_start)
        for column in (*where, self.sp_degree, self.gc_layers, self.sample_offsets, self.sample_ids):
            digest.update(np.ascontiguousarray(column, "<i8").data)
        return digest.hexdigest()

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
    """Validate and write a plan folder, each file whole; equal plans give equal bytes."""
    validate(plan)
    if len(plan.sample_ids) > np.iinfo(np.int32).max:
        raise HbpError(f"{len(plan.sample_ids)} samples are more than one plan file can index; plan the data in parts")
    folder.mkdir(parents=True, exist_ok=True)
    # Repeated values are few bytes under zstd with no dictionary; ids do not repeat, but their differences are short.
    options = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": False}
    options["column_encoding"] = {"sample_ids.list.element": "DELTA_BINARY_PACKED"}
    with beside(folder / PARQUET_NAME) as partial, pq.ParquetWriter(partial, SCHEMA, **options) as writer:
        for begin in range(0, max(plan.n_packs, 1), PACKS_AT_A_TIME):  # no copy of the whole
            writer.write_batch(_rows(plan, slice(begin, begin + PACKS_AT_A_TIME)))
    write_whole(folder / JSON_NAME, json.dumps(info_to_json(plan.info), indent=1, sort_keys=True) + "\n")


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
    """Read and validate a plan folder; what another program's plan does not say is filled in (module docstring).

    Raises:
        HbpError: a file is missing, damaged, of another schema version, or breaks an invariant.
    """
    data, path = read_json(folder), folder / PARQUET_NAME
    try:
        table = patiently(lambda: pq.read_table(path, page_checksum_verification=True))
        missing = set(SCHEMA.names).difference(table.column_names)
    except FileNotFoundError:
        raise HbpError(f"no {PARQUET_NAME} in {folder}; make a plan with `hbp plan --out {folder}`") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is not UTF-8
        let_faults_through(error)
        raise HbpError(f"cannot read {path} ({one_line(error)}); make the plan again") from None
    if missing:
        raise HbpError(f"{path} lacks the columns {', '.join(sorted(missing))}; make the plan again with `hbp plan`")
    try:
        table = table.select(SCHEMA.names).cast(SCHEMA).combine_chunks()
        scalars = {name: table.column(name).to_numpy() for name in SCALAR_COLUMNS}
        ids, lengths = (_list_column(table.column(name)) for name in ("sample_ids", "lengths"))
    except (pa.ArrowException, ValueError) as error:
        raise HbpError(f"{path} does not fit the plan's schema ({one_line(error)}); make it again") from None
    if not np.array_equal(ids[0], lengths[0]):
        raise HbpError(f"{path} is damaged: a row has more sample ids than lengths; make the plan again")
    info = info_from_json(folder, {**_told_by_samples(ids[1], lengths[1], data), **data})
    plan = Plan(info, sample_offsets=ids[0], sample_ids=ids[1], lengths=lengths[1], **scalars)
    validate(plan)
    whole = "checksum" in data and info.groups and info.metrics.keys() >= RATIOS  # as ours are; spares a look
    return plan if whole else completed(plan)


def _told_by_samples(ids: IntArray, lengths: IntArray, data: Mapping[str, Any]) -> dict[str, Any]:
    """What plan.json may leave out, from the samples that the rows hold. Without a hash of lengths that are not all
    known (some samples are dropped) it stays empty."""
    if data.keys() >= TOLD_BY_SAMPLES:
        return {}
    dropped = data.get("dropped", [])
    told = {"n_samples": len(ids) + (len(dropped) if isinstance(dropped, list) else 0), "n_tokens": int(lengths.sum())}
    known = not dropped and len(ids) and ids.min() >= 0 and ids.max() < len(ids)
    in_order = np.zeros(len(ids), np.int32)
    if known:
        in_order[ids] = lengths
    return told | {"lengths_sha256": hash_lengths(in_order) if known else ""}


def completed(plan: Plan) -> Plan:
    """With the groups and ratios that its rows tell, where it does not list them."""
    info, groups = plan.info, plan.groups_of_rows()[0]
    metrics = info.metrics if info.metrics.keys() >= RATIOS or not plan.n_packs else {**ratios(plan), **info.metrics}
    return dataclasses.replace(plan, info=dataclasses.replace(info, groups=groups, metrics=metrics))


def ratios(plan: Plan) -> dict[str, float]:
    """The paper's ratios (Section 3.1) and the predicted seconds of a plan that holds at least one pack.

    An *iteration* is a micro-step, since that is where ranks wait for each other; a rank that it leaves idle counts
    with zero. ``pr``: unused share of the packs' capacity. ``dbr``, ``abr``: :func:`imbalance` of tokens and of squared
    lengths between ranks. ``cr``: share of tokens in packs of several ranks. ``ave_tokens``: of an optimizer step.
    """
    micro, degree = plan.micro_step_index(), plan.sp_degree.astype(np.float64)
    tokens, world = plan.tokens().astype(np.float64), plan.info.world_size
    overhead = plan.info.cluster.get("step_overhead_s", 0.0)
    return {
        "pr": float(1 - tokens.sum() / plan.capacity.sum(dtype=np.float64)),
        "dbr": imbalance(tokens / degree, degree, micro, world),
        "abr": imbalance(plan.sum_squares() / degree, degree, micro, world),
        "cr": float(tokens[degree > 1].sum() / tokens.sum()),
        "ave_tokens": float(tokens.sum() / plan.n_steps),
        "predicted_s": float(plan.micro_step_seconds().sum() + plan.n_steps * overhead),
    }


def imbalance(per_rank: FloatArray, degree: FloatArray, micro_step: IntArray, world_size: int) -> float:
    """Mean over micro-steps of Σ_ranks (max − own) / (max · ranks), for a quantity per rank of each pack ``[P]``."""
    n = int(micro_step[-1]) + 1
    most = np.zeros(n)
    np.maximum.at(most, micro_step, per_rank)
    total = np.bincount(micro_step, weights=per_rank * degree, minlength=n)
    return float(np.mean(1 - total / (np.maximum(most, 1e-300) * world_size)))


def wanted_steps(tokens: float, batch: float) -> int:
    """The whole number of steps nearest to `tokens` in steps of `batch`."""
    return max(1, round(tokens / batch))


def close(n_steps: int, wanted: int) -> bool:
    """Whether so many steps are as good as those wanted."""
    return abs(n_steps - wanted) <= CLOSE * wanted


def batch_not_kept(plan: Plan) -> str | None:
    """Why the steps are not those of the global batch that was asked for; None where they are, or nothing was asked."""
    asked = (plan.info.settings.get("asked") or {}).get("global_batch_tokens")
    if not asked:
        return None
    tokens, wanted = plan.tokens(), wanted_steps(plan.info.n_tokens, asked)
    largest = int(np.bincount(plan.step, tokens).max())
    micro_step = int(np.bincount(plan.micro_step_index(), tokens).max())
    why = f"one micro-step of {plan.info.world_size} GPUs holds {micro_step:,}"
    if not close(plan.n_steps, wanted):
        mean = plan.info.n_tokens / plan.n_steps
        return f"{plan.n_steps:,} steps of {mean:,.0f} tokens, asked {asked:,} ({wanted:,} steps): {why}"
    return f"steps hold up to {largest:,} tokens, asked {asked:,}: {why}" if largest > LARGER_STEP * asked else None


def piece_folders(folder: Path) -> list[Path]:
    """Folders of the pieces of a planned stream, in order; empty where the folder is none."""
    return sorted(path.parent for path in folder.glob(f"piece-*/{JSON_NAME}"))


def _list_column(column: pa.ChunkedArray) -> tuple[IntArray, IntArray]:
    """Offsets (from 0) and values of a list column, whatever slices its chunks are."""
    counts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    values = [chunk.flatten().to_numpy() for chunk in column.chunks]
    offsets = np.concatenate([np.zeros(1, np.int64), *(c.astype(np.int64) for c in counts)]).cumsum()
    empty = np.zeros(0, column.type.value_type.to_pandas_dtype())
    return offsets, np.concatenate([empty, *values])


def read_info(folder: Path) -> PlanInfo:
    """Read ``plan.json`` alone; the rows too where it leaves to them what they tell.

    Raises:
        HbpError: missing, not JSON, of another schema version, without ``world_size``, or of values that do not fit.
    """
    data = read_json(folder)
    return info_from_json(folder, data) if data.keys() >= TOLD_BY_SAMPLES else read_plan(folder).info

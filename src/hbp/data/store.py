"""The token store: tokenized samples in memory-mapped Arrow files, with their lengths beside them.

Folder: ``shards/*.arrow`` (Arrow IPC, uncompressed: columns ``input_ids``, ``loss_mask``, ``loss_tokens``, ``line``,
``part``), each made of one piece of the data and named after its content; ``index.parquet`` (``length``,
``loss_tokens``, ``source``, ``line`` and ``part`` of each sample); ``store.json`` (which shards in which order, what
was left out of each source, fingerprint, tokenizer). A sample is a view into a memory map: no rank ever loads the data
set, and the ranks of a node share one copy in the page cache. Planning reads the index alone.

A shard is written beside its place, flushed to disk and renamed, and ``store.json`` is written last, so nothing
half-written is ever mistaken for a whole; and a store that was interrupted goes on from the shards that are there.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.data.record import Encoded
from hbp.disk import let_faults_through, patiently
from hbp.errors import HbpError

FORMAT = 2
BATCH_TOKENS = 1 << 20
SHARDS, PARTIAL = "shards", ".partial-"
OPEN_SHARDS = 4096
"""Memory maps that are held at a time."""
SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("loss_mask", pa.large_list(pa.uint8())),
        ("loss_tokens", pa.int32()),
        ("line", pa.int32()),
        ("part", pa.int8()),
    ]
)
ALONE, CHOSEN, REJECTED = 0, 1, 2
"""What a sample is (``part``): one by itself, or a side of a preference pair; the rejected one follows the chosen."""


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says of itself."""

    samples: int
    lines: int
    """Lines or rows of the piece that it was made of."""
    highest_id: int
    """Of its tokens."""
    bad: int = 0
    """Records that were left out."""
    bad_first: tuple[tuple[int, str], ...] = ()
    """Line within the piece and reason, of the first of them."""
    notes: tuple[tuple[str, int], ...] = ()
    """What is worth saying of its records, and of how many."""


@dataclass(frozen=True)
class ShardEntry:
    """A shard's place in a store."""

    name: str
    """File in ``shards/``."""
    samples: int
    """How many of its samples, from the first, are in the store."""
    source: int
    file: str
    """Where the records stand."""
    first: int
    """Number there of the first line or row of its piece."""
    unit: str
    """``line`` or ``row``."""


@dataclass(frozen=True)
class SourceEntry:
    """What a store holds of one source."""

    name: str
    held_out: bool = False
    """For evaluation only."""
    times: float | None = None
    """How often each sample is seen in an epoch; None: by `weight`."""
    weight: float | None = None
    """Its share of an epoch's samples, relative to the other sources' weights."""
    highest_id: int = 0
    """Of its tokens."""
    bad: int = 0
    """Records that were left out."""
    bad_first: tuple[str, ...] = ()
    """Place and reason of the first of them."""
    notes: tuple[tuple[str, int], ...] = ()
    """What is worth saying of its records, and of how many."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What a store's samples are pieces of, where long ones were cut."""

    sample: npt.NDArray[np.int64]  # [N]
    begin: npt.NDArray[np.int64]  # [N] first token of the piece


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open store. ``N`` samples, ``S`` shards."""

    folder: Path
    lengths: npt.NDArray[np.int32]  # [N] tokens
    loss_tokens: npt.NDArray[np.int32]  # [N] targets after the shift within the document
    fingerprint: str
    tokenizer: str
    vocab_size: int
    """One more than the tokenizer's highest id."""
    sources: tuple[SourceEntry, ...]
    shards: tuple[ShardEntry, ...]
    first: npt.NDArray[np.int64]  # [S] first sample of each shard
    opened: dict[int, _OpenShard] = field(default_factory=dict, repr=False)
    cut: Cut | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids int32 ``[T]`` and loss mask uint8 ``[T]`` of one sample, views into the memory map."""
        if self.cut is None:
            return self._whole(index)
        begin = int(self.cut.begin[index])
        ids, mask = self._whole(int(self.cut.sample[index]))
        piece = slice(begin, begin + int(self.lengths[index]))
        return ids[piece], mask[piece]

    def _whole(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        shard = self.opened.get(number)
        if shard is None:
            if len(self.opened) >= OPEN_SHARDS:
                self.opened.clear()
            shard = self.opened[number] = _open_shard(self.folder / SHARDS / self.shards[number].name)
        row = index - int(self.first[number])
        batch = int(np.searchsorted(shard.first, row, side="right")) - 1
        ids, mask = (_slice(shard.batches[batch].column(i), row - int(shard.first[batch])) for i in (0, 1))
        return ids, mask

    def place(self, index: int) -> str:
        """File and line of the record that a sample was made of."""
        shard = self.shard_of(index)
        return f"{shard.file} {shard.unit} {int(self.line[index])}" if shard.file else f"sample {index}"

    def shard_of(self, index: int) -> ShardEntry:
        """The shard that holds a sample."""
        whole = index if self.cut is None else int(self.cut.sample[index])
        return self.shards[int(np.searchsorted(self.first, whole, side="right")) - 1]

    @cached_property
    def source(self) -> npt.NDArray[np.int16]:
        """Which of `sources` each sample is from ``[N]``."""
        return self._column("source")

    @cached_property
    def line(self) -> npt.NDArray[np.int64]:
        """Line (from 1) or row (from 0) of each sample in its file ``[N]``."""
        return self._column("line")

    @cached_property
    def part(self) -> npt.NDArray[np.int8]:
        """:data:`ALONE`, or :data:`CHOSEN` and :data:`REJECTED`, of each sample ``[N]``."""
        return self._column("part")

    def _column(self, name: str) -> npt.NDArray[Any]:
        column = pq.read_table(self.folder / "index.parquet", columns=[name]).column(name).to_numpy()
        return column if self.cut is None else column[self.cut.sample]


@dataclass(frozen=True, eq=False)
class _OpenShard:
    batches: tuple[pa.RecordBatch, ...]
    first: npt.NDArray[np.int64]
    info: ShardInfo


@dataclass(frozen=True, eq=False)
class Row:
    """A sample on its way into a shard."""

    encoded: Encoded
    line: int = 0
    """Within the piece."""
    part: int = ALONE


def _slice(column: pa.Array, row: int) -> npt.NDArray[Any]:
    offsets = np.frombuffer(column.buffers()[1], np.int64)
    begin, end = offsets[column.offset + row], offsets[column.offset + row + 1]
    return column.values.slice(begin, end - begin).to_numpy()


# Shards


def write_shard(path: Path, rows: Iterable[Row], said: Callable[[], Mapping[str, Any]] = dict) -> ShardInfo:
    """Write samples in order and put the file in its place whole. Holds :data:`BATCH_TOKENS` at a time.

    Args:
        path: of the shard.
        rows: the samples.
        said: more fields of :class:`ShardInfo`, asked for once the rows are through.

    Raises:
        HbpError: a sample without a token.
    """
    samples, highest = 0, -1
    partial = path.with_name(f"{path.name}{PARTIAL}{socket.gethostname()}-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                for batch in _batched(rows):
                    writer.write_batch(_record_batch(batch))
                    samples += len(batch)
                    highest = max(highest, *(int(row.encoded.input_ids.max()) for row in batch))
                info = ShardInfo(samples, **{"lines": samples, "highest_id": highest, **said()})
                writer.write_batch(
                    pa.RecordBatch.from_pylist([], schema=SCHEMA), custom_metadata={"hbp": json.dumps(asdict(info))}
                )
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return info


def read_shard_info(path: Path) -> ShardInfo | None:
    """What a shard says of itself; None if there is none or it is damaged."""
    try:
        return _open_shard(path).info
    except HbpError:
        return None


def shard_parts(path: Path) -> npt.NDArray[np.int8]:
    """``part`` of each sample of a shard."""
    return np.concatenate([np.zeros(0, np.int8), *(b.column("part").to_numpy() for b in _open_shard(path).batches)])


def _open_shard(path: Path) -> _OpenShard:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        last = reader.num_record_batches - 1
        batches = tuple(reader.get_batch(i) for i in range(last))
        _, metadata = reader.get_batch_with_custom_metadata(last)
        said = json.loads(metadata["hbp"])
        pairs = {key: tuple((a, b) for a, b in said[key]) for key in ("bad_first", "notes")}
        info = ShardInfo(**{**said, **pairs})
        first = np.cumsum([0, *(batch.num_rows for batch in batches)])
        if reader.schema != SCHEMA or int(first[-1]) != info.samples:
            raise ValueError("its parts disagree")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        let_faults_through(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HbpError(f"the token store's shard {path} is damaged ({reason}); delete it and run again") from None
    return _OpenShard(batches, first[:-1], info)


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    tokens = 0
    for row in rows:
        if not len(row.encoded.input_ids):
            raise HbpError(f"sample {row.line} has no tokens; remove it or check the chat template")
        batch.append(row)
        tokens += len(row.encoded.input_ids)
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _record_batch(batch: list[Row]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0, *(len(row.encoded.input_ids) for row in batch)]), pa.int64())
    ids = pa.array(np.concatenate([row.encoded.input_ids for row in batch]), pa.int32())
    mask = pa.array(np.concatenate([row.encoded.loss_mask for row in batch]), pa.uint8())
    lists = [pa.LargeListArray.from_arrays(offsets, values) for values in (ids, mask)]
    targets = pa.array([int(np.count_nonzero(row.encoded.loss_mask[1:])) for row in batch], pa.int32())
    line, part = pa.array([row.line for row in batch], pa.int32()), pa.array([row.part for row in batch], pa.int8())
    return pa.record_batch([*lists, targets, line, part], schema=SCHEMA)


# The whole


def write_index(
    folder: Path,
    shards: Sequence[ShardEntry],
    sources: Sequence[SourceEntry],
    *,
    fingerprint: str,
    tokenizer: str,
    vocab_size: int,
    details: Mapping[str, Any] | None = None,
) -> TokenStore:
    """Make a store of shards that are in its folder, in this order, and open it.

    Args:
        folder: of the store.
        shards: those with samples.
        sources: that the shards are numbered by.
        fingerprint: of everything that it was made of.
        tokenizer: its name.
        vocab_size: one more than its highest id.
        details: kept in ``store.json`` for whoever made it.

    Raises:
        HbpError: no samples.
    """
    if not shards:
        raise HbpError("the data holds no samples; give a source with at least one")
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [
            ("length", pa.int32()),
            ("loss_tokens", pa.int32()),
            ("source", pa.int16()),
            ("line", pa.int64()),
            ("part", pa.int8()),
        ],
        metadata={"fingerprint": fingerprint},
    )
    n_tokens, at = 0, folder / f"index.parquet{PARTIAL}{socket.gethostname()}-{os.getpid()}"
    with pq.ParquetWriter(at, schema) as writer:
        for entry in shards:
            for table in _index_rows(folder, entry, schema):
                n_tokens += int(np.sum(table.column(0).to_numpy(), dtype=np.int64))
                writer.write_table(table, row_group_size=1 << 20)
    meta = {
        "format": FORMAT,
        "n_samples": sum(entry.samples for entry in shards),
        "n_tokens": n_tokens,
        "fingerprint": fingerprint,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "sources": [asdict(source) for source in sources],
        "shards": [asdict(entry) for entry in shards],
        **(details or {}),
    }
    written = folder / f"store.json{PARTIAL}{socket.gethostname()}-{os.getpid()}"
    written.write_text(json.dumps(meta) + "\n")
    at.rename(folder / "index.parquet")
    written.rename(folder / "store.json")
    used = {entry.name for entry in shards}
    for shard in (folder / SHARDS).iterdir():
        if shard.name not in used and PARTIAL not in shard.name:
            shard.unlink()
    return open_store(folder)


def _index_rows(folder: Path, entry: ShardEntry, schema: pa.Schema) -> Iterator[pa.Table]:
    left = entry.samples
    for batch in _open_shard(folder / SHARDS / entry.name).batches:
        n = min(left, batch.num_rows)
        left -= n
        if n:
            offsets = np.frombuffer(batch.column(0).buffers()[1], np.int64)[: n + 1]
            columns = [
                np.diff(offsets).astype(np.int32),
                batch.column("loss_tokens").to_numpy()[:n],
                np.full(n, entry.source, np.int16),
                batch.column("line").to_numpy()[:n].astype(np.int64) + entry.first,
                batch.column("part").to_numpy()[:n],
            ]
            yield pa.Table.from_arrays([pa.array(column) for column in columns], schema=schema)


def write_store(
    folder: Path, encoded: Iterable[Encoded], *, fingerprint: str, tokenizer: str, vocab_size: int
) -> TokenStore:
    """Write samples in order and open the result; replaces an older store.

    Raises:
        HbpError: no samples, or one without a token.
    """
    name = f"{fingerprint[:40]}.arrow"
    rows = (Row(sample, number) for number, sample in enumerate(encoded))
    info = write_shard(folder / SHARDS / name, rows)
    entry = ShardEntry(name, info.samples, 0, "", 0, "row")
    return write_index(
        folder,
        [entry] if info.samples else [],
        [SourceEntry("data", times=1.0, highest_id=info.highest_id)],
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
    )


def read_details(folder: Path) -> dict[str, Any]:
    """What ``store.json`` holds; nothing where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "store.json").read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else {}


def open_store(folder: str | Path) -> TokenStore:
    """Open a store for reading.

    Raises:
        HbpError: missing, half-written or damaged.
    """
    folder = Path(folder)
    for name in ("store.json", "index.parquet", SHARDS):
        if not (folder / name).exists():
            raise HbpError(f"{folder} is not a token store ({name} is missing)")
    try:
        meta = json.loads(patiently((folder / "store.json").read_text))
        if meta["format"] != FORMAT:
            raise HbpError(f"{folder} has store format {meta['format']}, this hbp reads {FORMAT}; delete it")
        n_samples, shards = int(meta["n_samples"]), tuple(ShardEntry(**entry) for entry in meta["shards"])
        sources = tuple(
            SourceEntry(
                **{
                    **entry,
                    "bad_first": tuple(entry["bad_first"]),
                    "notes": tuple((note, count) for note, count in entry["notes"]),
                }
            )
            for entry in meta["sources"]
        )
        index = pq.read_table(folder / "index.parquet", columns=["length", "loss_tokens"])
        first = np.cumsum([0, *(entry.samples for entry in shards)])
        store = TokenStore(
            folder,
            index.column("length").to_numpy(),
            index.column("loss_tokens").to_numpy(),
            str(meta["fingerprint"]),
            str(meta["tokenizer"]),
            int(meta["vocab_size"]),
            sources,
            shards,
            first[:-1],
        )
        marked = (index.schema.metadata or {}).get(b"fingerprint", b"").decode()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        let_faults_through(error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HbpError(f"the token store {folder} is damaged ({reason}); delete it and run again") from None
    missing = [entry.name for entry in shards if not (folder / SHARDS / entry.name).is_file()]
    if missing:
        raise HbpError(f"the token store {folder} is damaged ({missing[0]} is missing); delete it and run again")
    if not int(first[-1]) == n_samples == len(store) or marked != store.fingerprint:
        raise HbpError(f"the token store {folder} is damaged (its files disagree); delete it and run again")
    return store


def read_lengths(path: Path) -> npt.NDArray[np.int32]:
    """Lengths of samples from ``.npy``, or from ``.parquet`` with a column ``length`` (or ``lengths``, or only one).

    Raises:
        HbpError: missing, not of these formats, empty, or not whole numbers from 1 up.
    """
    try:
        if path.suffix == ".npy":
            lengths = np.load(path, allow_pickle=False)
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            named = [name for name in ("length", "lengths") if name in table.column_names] or table.column_names
            if len(named) != 1:
                raise HbpError(f"{path} has columns {table.column_names}; name the one with lengths `length`")
            lengths = table.column(named[0]).to_numpy()
        else:
            raise HbpError(f"{path} is neither .npy nor .parquet; give lengths in one of them, or samples as --data")
    except FileNotFoundError:
        raise HbpError(f"no file {path}; give --lengths an .npy or .parquet file") from None
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        raise HbpError(f"cannot read lengths from {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(lengths, np.ndarray) or lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise HbpError(f"{path} does not hold a flat list of whole numbers, one length a sample")
    if not len(lengths):
        raise HbpError(f"{path} is empty; give at least one length")
    if lengths.min() < 1 or lengths.max() >= 2**31:
        bad = int(np.flatnonzero((lengths < 1) | (lengths >= 2**31))[0])
        raise HbpError(f"{path}: sample {bad} has length {int(lengths[bad])}; lengths run from 1 to {2**31 - 1}")
    return lengths.astype(np.int32)

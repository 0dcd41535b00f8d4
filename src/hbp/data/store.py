"""The token store: tokenized samples in one memory-mapped Arrow file, with their lengths beside it.

Folder: ``tokens.arrow`` (Arrow IPC, uncompressed:
columns ``input_ids`` and ``loss_mask``), ``index.parquet`` (``length``
and ``loss_tokens`` of each sample), ``store.json`` (counts, fingerprint, tokenizer). A sample is a view into the memory
map, found by binary search over the record batches: no rank ever loads the data set, and the ranks of a node share one
copy in the page cache. Planning reads the index alone.

The folder is written beside its place and renamed, so a half-written store is never mistaken for a whole one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hbp.data.chat import Encoded
from hbp.errors import HbpError

FORMAT = 1
BATCH_TOKENS = 1 << 20
SCHEMA = pa.schema([("input_ids", pa.large_list(pa.int32())), ("loss_mask", pa.large_list(pa.uint8()))])


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open store. ``N`` samples."""

    folder: Path
    lengths: npt.NDArray[np.int32]  # [N] tokens
    loss_tokens: npt.NDArray[np.int32]  # [N] targets after the shift within the document
    fingerprint: str
    tokenizer: str
    vocab_size: int
    batches: tuple[pa.RecordBatch, ...]
    first: npt.NDArray[np.int64]  # first sample of each batch

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids int32 ``[T]`` and loss mask uint8 ``[T]`` of one sample, views into the memory map."""
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        row = index - int(self.first[number])
        batch = self.batches[number]
        ids, mask = (_slice(batch.column(i), row) for i in (0, 1))
        return ids, mask


def _slice(column: pa.Array, row: int) -> npt.NDArray[Any]:
    offsets = np.frombuffer(column.buffers()[1], np.int64)
    begin, end = offsets[column.offset + row], offsets[column.offset + row + 1]
    return column.values.slice(begin, end - begin).to_numpy()


def write_store(
    folder: Path, encoded: Iterable[Encoded], *, fingerprint: str, tokenizer: str, vocab_size: int
) -> TokenStore:
    """Write samples in order and open the result; replaces an older store in one rename.

    Raises:
        HbpError: no samples, or one without a token.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lengths: list[int] = []
    loss_tokens: list[int] = []
    with pa.OSFile(str(partial / "tokens.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for batch in _batched(encoded):
            for sample in batch:
                if not len(sample.input_ids):
                    raise HbpError(f"sample {len(lengths)} has no tokens; remove it or check the chat template")
                lengths.append(len(sample.input_ids))
                loss_tokens.append(int(sample.loss_mask[1:].sum()))
            writer.write_batch(_record_batch(batch))
    if not lengths:
        raise HbpError("the data holds no samples; give a source with at least one")
    index = pa.table({"length": pa.array(lengths, pa.int32()), "loss_tokens": pa.array(loss_tokens, pa.int32())})
    pq.write_table(index, partial / "index.parquet")
    meta = {
        "format": FORMAT,
        "n_samples": len(lengths),
        "n_tokens": sum(lengths),
        "fingerprint": fingerprint,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
    }
    (partial / "store.json").write_text(json.dumps(meta, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return open_store(folder)


def _batched(encoded: Iterable[Encoded]) -> Iterator[list[Encoded]]:
    batch: list[Encoded] = []
    tokens = 0
    for sample in encoded:
        batch.append(sample)
        tokens += len(sample.input_ids)
        if tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _record_batch(batch: list[Encoded]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0, *(len(s.input_ids) for s in batch)]), pa.int64())
    ids = pa.array(np.concatenate([s.input_ids for s in batch]), pa.int32())
    mask = pa.array(np.concatenate([s.loss_mask for s in batch]), pa.uint8())
    columns = [pa.LargeListArray.from_arrays(offsets, values) for values in (ids, mask)]
    return pa.record_batch(columns, schema=SCHEMA)


def open_store(folder: str | Path) -> TokenStore:
    """Open a store for reading.

    Raises:
        HbpError: missing, half-written or damaged.
    """
    folder = Path(folder)
    for name in ("store.json", "index.parquet", "tokens.arrow"):
        if not (folder / name).is_file():
            raise HbpError(f"{folder} is not a token store ({name} is missing)")
    try:
        meta = json.loads((folder / "store.json").read_text())
        if meta["format"] != FORMAT:
            raise HbpError(f"{folder} has store format {meta['format']}, this hbp reads {FORMAT}; delete it")
        n_samples = int(meta["n_samples"])
        index = pq.read_table(folder / "index.parquet")
        reader = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow")))
        batches = tuple(reader.get_batch(i) for i in range(reader.num_record_batches))
        store = TokenStore(
            folder,
            index.column("length").to_numpy(),
            index.column("loss_tokens").to_numpy(),
            str(meta["fingerprint"]),
            str(meta["tokenizer"]),
            int(meta["vocab_size"]),
            batches,
            np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1],
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HbpError(f"the token store {folder} is damaged ({reason}); delete it and run again") from None
    if sum(batch.num_rows for batch in batches) != len(store) or n_samples != len(store):
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

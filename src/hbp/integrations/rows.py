"""Rows of a tokenized data set as a plan's samples: row *i* is sample *i*.

Anything with ``sample(i)`` (a token store) is taken as it is. Of a `datasets.Dataset`, or of any sequence of rows, the
column ``input_ids`` is read, and ``labels`` where there is one: -100 has no loss, anything else must be the token that
stands there (labels are shifted by the trainer, within each sample, before a pack is cut into ranks). What a mask has 0
for (``completion_mask``, ``assistant_masks``, ``loss_mask``: TRL's columns and ours) is not learnt either. Without any
of them every token is.

Lengths and targets are counted once, for the plan to be checked against and for the loss: in a `datasets.Dataset` on
Arrow buffers, elsewhere row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError
from hbp.plan import Plan, hash_lengths
from hbp.train.batch import SampleSource
from hbp.train.loss import IGNORE

COUNTED_AT_A_TIME = 1000
"""Rows"""

MASKS = ("loss_mask", "completion_mask", "assistant_masks")
PADDING = "attention_mask"

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples with their counts, for ``N`` rows."""

    source: SampleSource
    lengths: npt.NDArray[np.int32]  # [N] tokens
    loss_tokens: npt.NDArray[np.int32]  # [N] targets after the shift
    largest_id: int = 0
    """Of all tokens, where they were read to be counted."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[Ids, Mask]:
        """Token ids and loss mask of one row."""
        return self.source.sample(index)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Any sequence of rows with ``input_ids`` and maybe ``labels`` or masks."""

    rows: Any

    def sample(self, index: int) -> tuple[Ids, Mask]:
        row: Mapping[str, Any] = self.rows[index]
        ids = np.asarray(row["input_ids"]).astype(np.int32)
        learnt = np.ones(len(ids), bool)
        for name in ("labels", *MASKS, PADDING):
            if name not in row or row[name] is None:
                continue
            values = np.asarray(row[name])
            if len(values) != len(ids):
                raise HbpError(f"row {index} has {len(values)} {name} for {len(ids)} input_ids; give one for each")
            learnt &= values != (IGNORE if name == "labels" else 0)
            if name == "labels" and not np.array_equal(values[learnt], ids[learnt]):
                raise HbpError(
                    f"row {index}: a label is neither {IGNORE} nor the token in its place; give labels as they are "
                    "before the shift, one for each of input_ids"
                )
            if name == PADDING and not values.all():
                raise HbpError(_padded(index))
        return ids, learnt.astype(np.uint8)


def _padded(row: int) -> str:
    return f"row {row} has padding ({PADDING} 0); leave it out, a pack has none"


def as_rows(dataset: Any) -> Rows:
    """The rows of a data set as samples.

    Args:
        dataset: with ``sample(i)``, or a `datasets.Dataset` or sequence of rows with ``input_ids``.

    Raises:
        HbpError: no length, no column ``input_ids``, a row without tokens or with padding, labels that are shifted
            already, or nothing that is learnt.
    """
    if not hasattr(dataset, "__len__") and not hasattr(dataset, "lengths"):
        raise HbpError("a plan names its samples by number, so the data set must have a length: it cannot be a stream")
    if hasattr(dataset, "sample"):
        return rows_of_source(dataset)
    names: list[str] = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    if "input_ids" not in names:
        raise HbpError(
            f"the data set has the columns {', '.join(names) or '(none)'}; tokenize it first: a plan is made for "
            "lengths in tokens, and follows rows of input_ids (and labels)"
        )
    if hasattr(dataset, "with_format"):
        columns = ["input_ids", *(name for name in ("labels", *MASKS, PADDING) if name in names)]
        counted = _count_arrow(dataset, columns)
        rows = Rows(_Columns(dataset.with_format("numpy", columns=columns)), *counted)
    else:
        rows = rows_of_source(_Columns(dataset), len(dataset))
    if len(rows) and not rows.loss_tokens.any():
        raise HbpError("no row has a token to learn; look at labels and masks")
    return rows


def rows_of_source(source: Any, count: int | None = None) -> Rows:
    """Of anything with ``sample(i)``: counts as it says them, or else counted."""
    lengths, loss_tokens = getattr(source, "lengths", None), getattr(source, "loss_tokens", None)
    if lengths is None or loss_tokens is None:
        read = (source.sample(i) for i in range(len(source) if count is None else count))
        counts = [(len(ids), int(np.count_nonzero(mask[1:])), int(ids.max(initial=0))) for ids, mask in read]
        lengths, loss_tokens, largest = np.array(counts, np.int32).reshape(-1, 3).T
    else:
        largest = np.zeros(1, np.int32)
    return Rows(source, _all_with_tokens(np.asarray(lengths)), np.asarray(loss_tokens), int(largest.max(initial=0)))


def check_ids(rows: Rows, vocabulary: int) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
        HbpError: there is one.
    """
    if rows.largest_id >= vocabulary:
        raise HbpError(
            f"the data set has the token {rows.largest_id}, but the model embeds {vocabulary}; tokenize it with the "
            "model's own tokenizer, or resize the model's embeddings first"
        )


def _count_arrow(dataset: Any, columns: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
    """Tokens and targets of each row, and the largest token."""
    import pyarrow.compute as pc

    lengths, targets, largest = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], 0
    for number, table in enumerate(dataset.with_format("arrow", columns=columns).iter(batch_size=COUNTED_AT_A_TIME)):
        size = pc.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)
        lengths.append(_all_with_tokens(size, number * COUNTED_AT_A_TIME))
        largest = max(largest, pc.max(pc.list_flatten(table.column("input_ids"))).as_py())
        ends = np.cumsum(size)
        learnt = np.ones(ends[-1], bool)
        for name in columns[1:]:
            values = pc.list_flatten(table.column(name)).to_numpy()
            if len(values) != len(learnt):
                raise HbpError(f"a row has more or fewer {name} than input_ids; give one for each")
            learnt &= values != (IGNORE if name == "labels" else 0)
            if name == PADDING and not values.all():
                at = int(np.searchsorted(ends, values.astype(bool).argmin(), side="right"))
                raise HbpError(_padded(number * COUNTED_AT_A_TIME + at))
        before = np.concatenate([[0], np.cumsum(learnt)])
        targets.append(before[ends] - before[ends - size + 1])  # all but the first
    return np.concatenate(lengths).astype(np.int32), np.concatenate(targets).astype(np.int32), largest


def _all_with_tokens(lengths: npt.NDArray[Any], first: int = 0) -> npt.NDArray[Any]:
    if len(lengths) and int(lengths.min()) < 1:
        raise HbpError(f"row {first + int(lengths.argmin())} has no tokens; leave it out")
    return lengths


def check_made_for(plan: Plan, lengths: npt.NDArray[np.integer[Any]], world_size: int) -> None:
    """Refuse a plan that was made for other data or another number of ranks.

    Raises:
        HbpError: it was.
    """
    info = plan.info
    if info.world_size != world_size:
        raise HbpError(
            f"the plan was made for {info.world_size} ranks but {world_size} are running; "
            f"make one with `hbp plan --gpus {world_size}`"
        )
    whole = info.is_piece or info.lengths_sha256 == hash_lengths(lengths)
    if not whole or info.n_samples > len(lengths) or not np.array_equal(plan.lengths, lengths[plan.sample_ids]):
        raise HbpError(
            f"the plan was made for other data ({info.n_samples} samples) than this ({len(lengths)} rows): lengths "
            "differ; make it again with `hbp plan` of these rows, in this order"
        )

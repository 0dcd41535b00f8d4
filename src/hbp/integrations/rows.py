"""Rows of a tokenized data set as a plan's samples: row *i* is sample *i*.

Anything with ``sample(i)`` (a token store) is taken as it is. Of a `datasets.Dataset`, or of any sequence of rows, the
column ``input_ids`` is read, and ``labels`` where there is one: -100 has no loss, anything else must be the token that
stands there (labels are shifted by the trainer, within each sample, before a pack is cut into ranks). Without labels
every token is learnt.

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

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Rows:
    """Samples with their counts, for ``N`` rows."""

    source: SampleSource
    lengths: npt.NDArray[np.int32]  # [N] tokens
    loss_tokens: npt.NDArray[np.int32]  # [N] targets after the shift

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[Ids, Mask]:
        """Token ids and loss mask of one row."""
        return self.source.sample(index)


@dataclass(frozen=True, eq=False)
class _Columns:
    """Any sequence of rows with ``input_ids`` and maybe ``labels``."""

    rows: Any

    def sample(self, index: int) -> tuple[Ids, Mask]:
        row: Mapping[str, Any] = self.rows[index]
        ids = np.asarray(row["input_ids"]).astype(np.int32)
        if "labels" not in row or row["labels"] is None:
            return ids, np.ones(len(ids), np.uint8)
        labels = np.asarray(row["labels"])
        learnt = labels != IGNORE
        if len(labels) != len(ids) or not np.array_equal(labels[learnt], ids[learnt]):
            raise HbpError(
                f"row {index}: a label is neither {IGNORE} nor the token in its place; give labels as they are before "
                "the shift, one for each of input_ids"
            )
        return ids, learnt.astype(np.uint8)


def as_rows(dataset: Any) -> Rows:
    """The rows of a data set as samples.

    Args:
        dataset: with ``sample(i)``, or a `datasets.Dataset` or sequence of rows with ``input_ids``.

    Raises:
        HbpError: no length, no column ``input_ids``, a row without tokens, or labels that are shifted already.
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
    columns = ["input_ids", "labels"] if "labels" in names else ["input_ids"]
    if hasattr(dataset, "with_format"):
        counted = _count_arrow(dataset, columns)
        return Rows(_Columns(dataset.with_format("numpy", columns=columns)), *counted)
    return rows_of_source(_Columns(dataset), len(dataset))


def rows_of_source(source: Any, count: int | None = None) -> Rows:
    """Of anything with ``sample(i)``: counts as it says them, or else counted."""
    lengths, loss_tokens = getattr(source, "lengths", None), getattr(source, "loss_tokens", None)
    if lengths is None or loss_tokens is None:
        read = (source.sample(i) for i in range(len(source) if count is None else count))
        counts = [(len(ids), int(np.count_nonzero(mask[1:]))) for ids, mask in read]
        lengths, loss_tokens = np.array(counts, np.int32).reshape(-1, 2).T
    return Rows(source, _all_with_tokens(np.asarray(lengths)), np.asarray(loss_tokens))


def _count_arrow(dataset: Any, columns: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Tokens and targets of each row."""
    import pyarrow.compute as pc

    lengths, targets = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for number, table in enumerate(dataset.with_format("arrow", columns=columns).iter(batch_size=COUNTED_AT_A_TIME)):
        size = pc.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)
        lengths.append(_all_with_tokens(size, number * COUNTED_AT_A_TIME))
        if "labels" not in columns:
            targets.append(size - 1)
            continue
        learnt = pc.list_flatten(table.column("labels")).to_numpy() != IGNORE
        ends = np.cumsum(size)
        if len(learnt) != ends[-1]:
            raise HbpError("a row has more or fewer labels than input_ids; give one for each")
        before = np.concatenate([[0], np.cumsum(learnt)])
        targets.append(before[ends] - before[ends - size + 1])  # all but the first
    return np.concatenate(lengths).astype(np.int32), np.concatenate(targets).astype(np.int32)


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

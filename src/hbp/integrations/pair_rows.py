"""Preference pairs as a plan's samples: row *i* is samples 2 *i* (chosen) and 2 *i* + 1 (rejected).

From a token store of pairs, or from TRL's columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``: the answers are
learnt, prompts are not. A plan must keep a pair's two sides in one pack, side by side (:func:`check_pairs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.data.store import ALONE, CHOSEN
from hbp.errors import HbpError
from hbp.integrations.rows import COUNTED_AT_A_TIME, Ids, Mask, Rows, rows_of_source
from hbp.plan import Plan

SIDES = ("chosen_ids", "rejected_ids")
PAIR_COLUMNS = ("prompt_ids", *SIDES)
"""As TRL tokenizes preferences."""


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Any sequence of rows with :data:`PAIR_COLUMNS`; ``N`` is twice the rows."""

    rows: Any
    lengths: npt.NDArray[np.int32]  # [N] tokens
    loss_tokens: npt.NDArray[np.int32]  # [N] targets after the shift

    def sample(self, index: int) -> tuple[Ids, Mask]:
        row: Mapping[str, Any] = self.rows[index // 2]
        prompt, answer = (np.asarray(row[name]).astype(np.int32) for name in ("prompt_ids", SIDES[index % 2]))
        return np.concatenate([prompt, answer]), np.repeat(np.array([0, 1], np.uint8), [len(prompt), len(answer)])


def as_pair_rows(dataset: Any) -> Rows:
    """The rows of a data set of preference pairs as samples, two of each.

    Args:
        dataset: a token store, or a `datasets.Dataset` or sequence of rows with :data:`PAIR_COLUMNS`.

    Raises:
        HbpError: neither, a row without an answer, or a store with samples that are no pairs.
    """
    if hasattr(dataset, "sample"):
        rows, part = rows_of_source(dataset), getattr(dataset, "part", None)
        alone = np.flatnonzero(np.asarray([] if part is None else part) == ALONE)
        if len(alone) or len(rows) % 2:
            which = f"sample {alone[0]}" if len(alone) else "the last sample"
            raise HbpError(f"{which} is no side of a preference pair; give a store of pairs alone")
        return rows
    lengths, columns = pair_lengths(dataset)[0], list(PAIR_COLUMNS)
    rows = dataset.with_format("numpy", columns=columns) if hasattr(dataset, "with_format") else dataset
    prompts = _list_lengths(dataset, PAIR_COLUMNS[0]).repeat(2)
    learnt = lengths - np.maximum(prompts, 1)  # the first token of a sample is no target
    return Rows(_Pairs(rows, lengths, learnt), lengths, learnt)


def pair_lengths(dataset: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Lengths of the samples of a data set of pairs, and which of them are chosen ones: what a plan is made for.

    Args:
        dataset: a `datasets.Dataset` or sequence of rows with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Returns:
        Tokens int32 ``[2 rows]`` and bool ``[2 rows]``, for :func:`hbp.planning.pairs.plan_with_pairs`.

    Raises:
        HbpError: no length, no such columns, or a row without an answer.
    """
    if not hasattr(dataset, "__len__"):
        raise HbpError("a plan names its samples by number, so the data set must have a length: it cannot be a stream")
    names: list[str] = getattr(dataset, "column_names", None) or (list(dataset[0]) if len(dataset) else [])
    if missing := set(PAIR_COLUMNS) - set(names):
        raise HbpError(
            f"the data set has the columns {', '.join(names) or '(none)'} and lacks {', '.join(sorted(missing))}; "
            "tokenize it first, as TRL does: a plan is made for lengths in tokens"
        )
    prompt, *answers = (_list_lengths(dataset, name) for name in PAIR_COLUMNS)
    for side in answers:
        if len(side) and int(side.min()) < 1:
            raise HbpError(f"row {int(side.argmin())} has an answer without tokens; leave it out")
    lengths = np.stack([prompt + side for side in answers], axis=1).reshape(-1)
    return lengths.astype(np.int32), np.tile([True, False], len(dataset))


def _list_lengths(dataset: Any, column: str) -> npt.NDArray[np.int32]:
    if hasattr(dataset, "with_format"):
        import pyarrow.compute as pc

        tables = dataset.with_format("arrow", columns=[column]).iter(batch_size=COUNTED_AT_A_TIME)
        counts = [pc.list_value_length(table.column(column)).to_numpy() for table in tables]
        return np.concatenate([np.zeros(0, np.int32), *counts]).astype(np.int32)
    return np.array([len(row[column]) for row in dataset], np.int32)


def check_pairs(plan: Plan, rows: Rows) -> None:
    """Refuse a plan in which a pair's sides are not side by side, chosen first.

    Raises:
        HbpError: names the first such sample.
    """
    part = getattr(rows.source, "part", None)
    chosen = np.arange(len(rows)) % 2 == 0 if part is None else np.asarray(part) == CHOSEN
    place = np.arange(len(plan.sample_ids)) - np.repeat(plan.sample_offsets[:-1], np.diff(plan.sample_offsets))
    first = place % 2 == 0
    after = np.append(plan.sample_ids[1:], -1)
    whole = np.where(first, chosen[plan.sample_ids] & (after == plan.sample_ids + 1), ~chosen[plan.sample_ids])
    if not whole.all() or (np.diff(plan.sample_offsets) % 2).any():
        wrong = plan.sample_ids[int(whole.argmin())] if not whole.all() else plan.sample_ids[-1]
        raise HbpError(
            f"the plan parts the pair of sample {wrong} from its other side; make it with `hbp plan --data` of the "
            "pairs, or hbp.planning.pairs.plan_with_pairs"
        )

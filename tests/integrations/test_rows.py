"""Rows of a tokenized data set teach what their labels and masks say, or are refused by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbp.errors import HbpError
from hbp.integrations.rows import as_rows, check_ids

IDS = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
_ = -100
COMPLETIONS = {"completion_mask": [[0, 0, 1, 1], [1, 1, 1], [0, 1]]}
ASSISTANT = {"assistant_masks": [[0, 1, 0, 1], [0, 0, 1], [1, 1]]}
CASES: dict[str, tuple[dict[str, list[list[int]]], list[list[int]]]] = {
    "nothing": ({}, IDS),
    "labels": ({"labels": [[_, 6, 7, _], [9, 10, 11], [_, _]]}, [[_, 6, 7, _], [9, 10, 11], [_, _]]),
    "completions": (COMPLETIONS, [[_, _, 7, 8], [9, 10, 11], [_, 13]]),
    "assistant": (ASSISTANT, [[_, 6, _, 8], [_, _, 11], [12, 13]]),
    "both": ({**COMPLETIONS, **ASSISTANT}, [[_, _, _, 8], [_, _, 11], [_, 13]]),
}
"""Columns, and the labels that SFTTrainer (TRL 1.16, ``completion_only_loss``) builds from them."""


def kinds_of(rows: list[dict[str, Any]]) -> list[Any]:
    """As a list, and as a data set on Arrow buffers."""
    datasets = pytest.importorskip("datasets")
    return [rows, datasets.Dataset.from_list(rows)]


def rows_with(**columns: list[list[int]]) -> list[dict[str, Any]]:
    return [{"input_ids": ids, **{name: column[i] for name, column in columns.items()}} for i, ids in enumerate(IDS)]


@pytest.mark.parametrize("case", CASES)
def test_what_is_learnt(case: str) -> None:
    columns, wanted = CASES[case]
    for dataset in kinds_of(rows_with(**columns)):
        rows = as_rows(dataset)
        for index, labels in enumerate(wanted):
            ids, mask = rows.sample(index)
            assert np.where(mask != 0, ids, -100).tolist() == labels
            assert rows.loss_tokens[index] == sum(label != -100 for label in labels[1:])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [[1, 1, 1, 1], [1, 1, 0], [1, 1]]}, r"row 1 has padding \(attention_mask 0\)"),
        ({"labels": [[-100] * 4, [9, -100, -100], [-100] * 2]}, "no row has a token to learn"),
        ({"assistant_masks": [[0] * 4, [0] * 3, [0] * 2]}, "no row has a token to learn"),
        ({"completion_mask": [[0, 1, 1], [1, 1, 1], [1, 1]]}, "completion_mask"),
    ],
)
def test_refused(columns: dict[str, list[list[int]]], message: str) -> None:
    for dataset in kinds_of(rows_with(**columns)):
        with pytest.raises(HbpError, match=message):
            as_rows(dataset)


def test_a_mask_of_ones_changes_nothing() -> None:
    for dataset in kinds_of(rows_with(attention_mask=[[1] * len(ids) for ids in IDS])):
        assert as_rows(dataset).loss_tokens.tolist() == [3, 2, 1]


def test_tokens_that_the_model_does_not_embed() -> None:
    for dataset in kinds_of(rows_with()):
        rows = as_rows(dataset)
        check_ids(rows, 14)
        with pytest.raises(HbpError, match="has the token 13, but the model embeds 13"):
            check_ids(rows, 13)

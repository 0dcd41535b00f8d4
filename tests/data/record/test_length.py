"""What becomes of samples that are longer than the longest pack."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbp.data.record import Encoded, fit_length
from hbp.errors import HbpError


def sample(length: int) -> Encoded:
    return Encoded(np.arange(length, dtype=np.int32), (np.arange(length) % 2).astype(np.uint8))


@given(st.integers(1, 40), st.integers(1, 40))
def test_one_sample(length: int, longest: int) -> None:
    whole = sample(length)
    pieces = fit_length([whole], longest, "split")
    assert all(1 <= len(piece.input_ids) <= longest for piece in pieces)
    np.testing.assert_array_equal(np.concatenate([p.input_ids for p in pieces]), whole.input_ids)
    np.testing.assert_array_equal(np.concatenate([p.loss_mask for p in pieces]), whole.loss_mask)
    (cut,) = fit_length([whole], longest, "truncate")
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:longest])
    np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:longest])
    assert len(fit_length([whole], longest, "drop")) == (length <= longest)


def test_a_pair_stays_together() -> None:
    pair = [sample(3), sample(9)]
    assert fit_length(pair, 9, "split") == pair
    assert fit_length(pair, 8, "drop") == []
    assert [len(one.input_ids) for one in fit_length(pair, 8, "truncate")] == [3, 8]
    with pytest.raises(HbpError, match="a preference pair of 9 tokens, which cannot be split at 8"):
        fit_length(pair, 8, "split")

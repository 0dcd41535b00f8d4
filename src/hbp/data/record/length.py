"""Samples longer than the longest pack: dropped, cut at their end, or cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hbp.data.record.encode import Encoded
from hbp.errors import HbpError

TooLong = Literal["drop", "truncate", "split"]


def fit_length(samples: Sequence[Encoded], max_length: int, too_long: TooLong) -> list[Encoded]:
    """The samples of one record with at most ``max_length`` tokens each.

    Args:
        samples: one, or the chosen and the rejected of a pair.
        max_length: tokens.
        too_long: ``drop`` a sample that is longer (a pair if either is), keep its first tokens (``truncate``), or
            ``split`` it into pieces of ``max_length``, of which the last is shorter.

    Returns:
        Samples in order, empty where dropped. A piece may hold nothing that is learnt.

    Raises:
        HbpError: a pair would have to be split.
    """
    if all(len(sample.input_ids) <= max_length for sample in samples):
        return list(samples)
    if too_long == "drop":
        return []
    if too_long == "truncate":
        return [_piece(sample, 0, max_length) for sample in samples]
    if len(samples) > 1:
        longest = max(len(sample.input_ids) for sample in samples)
        raise HbpError(
            f"is a preference pair of {longest} tokens, which cannot be split at {max_length}; set data.too_long to "
            "drop or truncate"
        )
    (sample,) = samples
    return [_piece(sample, at, max_length) for at in range(0, len(sample.input_ids), max_length)]


def _piece(sample: Encoded, begin: int, length: int) -> Encoded:
    return Encoded(sample.input_ids[begin : begin + length], sample.loss_mask[begin : begin + length])

"""Packs as flat arrays: which samples each holds, and which group runs it. Legend: ``P`` packs, ``N`` samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Lengths = npt.NDArray[np.integer]


def numbered(n: int) -> Int:
    """0..n−1, in int32 where that can count them: half the memory of a large data set."""
    kind: Any = np.int32 if n < 2**31 else np.int64
    return np.arange(n, dtype=kind)


@dataclass(frozen=True, eq=False)
class Packs:
    """Pack ``p`` holds ``sample_ids[offsets[p]:offsets[p + 1]]``."""

    offsets: Int  # [P + 1]
    sample_ids: Int  # [N]
    group: Int  # [P] index into the plan's groups

    def __len__(self) -> int:
        return len(self.group)

    def take(self, order: npt.NDArray[np.integer]) -> Packs:
        """These packs in another order (or some of them)."""
        counts = np.diff(self.offsets)[order]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        source = np.repeat(self.offsets[:-1][order] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Packs(offsets, self.sample_ids[source], self.group[order])

    def sum(self, per_sample: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Sum of a per-sample quantity over each pack, ``[P]``."""
        total: npt.NDArray[Any] = np.concatenate(
            [np.zeros(1, per_sample.dtype), np.cumsum(per_sample[self.sample_ids])]
        )
        sums: npt.NDArray[Any] = total[self.offsets[1:]] - total[self.offsets[:-1]]
        return sums


def packs_of(pack_of_sample: Int, sample_ids: Int, group: int = 0, n_packs: int | None = None) -> Packs:
    """Packs from the number of the pack of each sample; samples keep their order within a pack."""
    count = int(pack_of_sample.max()) + 1 if n_packs is None and len(pack_of_sample) else n_packs or 0
    sizes = np.bincount(pack_of_sample, minlength=count)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int64)
    order = np.argsort(pack_of_sample, kind="stable")
    return Packs(offsets, sample_ids[order], np.full(count, group, np.int64))


def join(parts: Sequence[Packs]) -> Packs:
    """All packs of all parts, in order."""
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)])
    return Packs(
        np.cumsum(counts),
        np.concatenate([np.zeros(0, np.int64), *(part.sample_ids for part in parts)]),
        np.concatenate([np.zeros(0, np.int64), *(part.group for part in parts)]),
    )

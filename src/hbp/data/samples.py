"""Which samples of a token store are trained on, how often, and which are held out: what a plan's sample ids mean.

An epoch has each sample as often as its source says (`repeat`, or `weight` shared out over as many samples as the
sources have together); a fraction is drawn by the seed. Samples over the longest packing length are dropped by the
planner, which lists them, or cut here (`truncate` keeps the start, `split` makes samples of all of it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hbp.data.store import ALONE, REJECTED, Cut, TokenStore
from hbp.errors import HbpError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a token store, numbered from 0. ``n`` of them; one of the store may be among them repeatedly."""

    store: TokenStore
    ids: Ids  # [n] the store's numbers

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each ``[n]``."""
        return self.store.lengths[self.ids]

    @cached_property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        """Targets of each ``[n]``."""
        return self.store.loss_tokens[self.ids]

    @cached_property
    def sources(self) -> npt.NDArray[np.int16]:
        """Which of the store's sources each is from ``[n]``."""
        return self.store.source[self.ids]

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and loss mask."""
        return self.store.sample(int(self.ids[index]))


def cut_to(store: TokenStore, max_length: int, too_long: str) -> TokenStore:
    """The store with samples over `max_length` tokens cut.

    Args:
        store: not cut yet.
        max_length: tokens.
        too_long: ``truncate``: their start alone; ``split``: every piece is a sample.

    Raises:
        HbpError: preference pairs are among them, which are never cut.
    """
    if (store.part != ALONE).any():
        raise HbpError(f"too_long {too_long} would part preference pairs; leave it out: long ones are dropped whole")
    long = np.flatnonzero(store.lengths > max_length)
    if not len(long):
        return store
    pieces = np.ones(len(store), np.int64)
    if too_long == "split":
        pieces[long] = -(-store.lengths[long].astype(np.int64) // max_length)
    sample = np.repeat(np.arange(len(store)), pieces)
    number = np.arange(len(sample)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = number * max_length
    lengths = np.minimum(store.lengths[sample] - begin, max_length).astype(np.int32)
    loss_tokens = store.loss_tokens[sample].copy()
    is_long = np.zeros(len(store), bool)
    is_long[long] = True
    for piece in np.flatnonzero(is_long[sample]):
        _, mask = store.sample(int(sample[piece]))
        a = int(begin[piece])
        loss_tokens[piece] = np.count_nonzero(mask[a + 1 : a + int(lengths[piece])])
    return replace(store, lengths=lengths, loss_tokens=loss_tokens, cut=Cut(sample, begin), opened={})


def planned_lengths(store: TokenStore) -> npt.NDArray[np.int64]:
    """Tokens of what each sample is planned as: its own, or those of both sides of its pair, which is one pack's."""
    begins = store.part != REJECTED  # a chosen one stands right before its rejected one
    unit = np.cumsum(begins) - 1
    together = np.zeros(int(begins.sum()), np.int64)
    np.add.at(together, unit, store.lengths)
    return together[unit]


def times_seen(counts: Sequence[int], weights: Sequence[float | None], repeats: Sequence[float | None]) -> list[float]:
    """How often each sample of each source is seen in an epoch.

    With weights, an epoch has as many samples as the sources together, shared out by weight.

    Args:
        counts: samples of each source.
        weights: of each source, or None for all.
        repeats: of each source where there are no weights; None: 1.
    """
    if not any(weight is not None for weight in weights):
        return [1.0 if repeat is None else repeat for repeat in repeats]
    shares = [weight or 0.0 for weight in weights]
    total, whole = sum(shares), sum(counts)
    return [share / total * whole / count if count else 0.0 for share, count in zip(shares, counts, strict=True)]


def draw_epoch(ids: Ids, source: npt.NDArray[np.integer], times: Mapping[int, float], rng: np.random.Generator) -> Ids:
    """The samples of an epoch, rising, each as often as its source is seen.

    Args:
        ids: of the samples to draw from ``[n]``, rising.
        source: of each ``[n]``.
        times: by source.
        rng: draws which samples a fraction adds.
    """
    count = np.zeros(len(ids), np.int64)
    for number, seen in times.items():
        mine = np.flatnonzero(source == number)
        whole, part = divmod(round(seen * len(mine)), len(mine)) if len(mine) else (0, 0)
        count[mine] = whole
        count[rng.permutation(mine)[:part]] += 1
    return np.repeat(ids, count)


def split_samples(store: TokenStore, *, seed: int, eval_samples: int, max_length: int | None) -> tuple[Ids, Ids]:
    """Ids of an epoch's samples and of those held out.

    Held out are the samples of sources for evaluation; without such, `eval_samples` drawn among those short enough to
    be trained on.

    Raises:
        HbpError: none is left to train on, or to evaluate with.
    """
    every, limit = np.arange(len(store)), max_length or int(store.lengths.max())
    for_evaluation = [number for number, source in enumerate(store.sources) if source.held_out]
    if for_evaluation:
        held_out = np.isin(store.source, for_evaluation)
        eval_ids = every[held_out & (store.lengths <= limit)]
        train_ids = every[~held_out]
        if not len(eval_ids):
            raise HbpError(f"every sample of data.eval_source is longer than data.max_length={limit}; raise it")
    else:
        train_ids, eval_ids = _held_out(store.lengths, seed, eval_samples, limit, max_length)
    if all(source.times == 1.0 for source in store.sources):
        return train_ids, eval_ids
    fits = store.lengths[train_ids] <= limit
    too_long, train_ids = train_ids[~fits], train_ids[fits]  # the planner drops them by name: once each will do
    source, trained = store.source[train_ids], [n for n in range(len(store.sources)) if n not in for_evaluation]
    counts = [int(np.count_nonzero(source == n)) for n in trained]
    weights, repeats = ([getattr(store.sources[n], name) for n in trained] for name in ("weight", "times"))
    times = dict(zip(trained, times_seen(counts, weights, repeats), strict=True))
    train_ids = draw_epoch(train_ids, source, times, np.random.default_rng([seed, 1]))
    train_ids = np.sort(np.concatenate([train_ids, too_long]))
    if not len(train_ids):
        raise HbpError("data.sources leave no samples to train on; raise a weight, repeat or max_samples")
    return train_ids, eval_ids


def _held_out(
    lengths: npt.NDArray[np.int32], seed: int, held: int, limit: int, max_length: int | None
) -> tuple[Ids, Ids]:
    n = len(lengths)
    if held >= n:
        raise HbpError(f"data.eval_samples={held} leaves none of the {n} samples to train on; lower it")
    order = np.random.default_rng(seed).permutation(n)
    fits = lengths[order] <= limit
    if not fits.any():
        raise HbpError(f"all {n} samples are longer than data.max_length={max_length}; raise it")
    if held >= fits.sum():
        raise HbpError(
            f"data.eval_samples={held} leaves none to train on of the {fits.sum()} samples of up to "
            f"{max_length} tokens; lower it or raise data.max_length"
        )
    eval_ids = order[fits][:held]
    return np.setdiff1d(np.arange(n), eval_ids), np.sort(eval_ids)

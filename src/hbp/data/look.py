"""What is in a token store: counts by source, what is left out and why, and single samples with what is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from hbp.data.samples import cut_to, planned_lengths
from hbp.data.store import TokenStore, read_details


@dataclass(frozen=True)
class Counts:
    """Of one source, or of all."""

    samples: int = 0
    """That are used."""
    tokens: int = 0
    loss_tokens: int = 0
    """Tokens that are learnt."""
    without_loss: int = 0
    """Samples without any."""
    dropped: int = 0
    """Samples over the longest length, and records that could not be used."""
    dropped_tokens: int = 0
    """Of samples that are dropped, and what is cut off of those that are truncated."""
    truncated: int = 0
    """Samples that lost their end."""
    longest: int = 0
    """Tokens of the longest sample that is used."""
    longest_at: str = ""
    """Where it stands."""

    @property
    def dropped_share(self) -> float:
        """Of all tokens."""
        return self.dropped_tokens / max(self.tokens + self.dropped_tokens, 1)


def count(store: TokenStore, max_length: int | None = None, too_long: str = "drop") -> dict[str, Counts]:
    """Counts by source.

    Args:
        store: not cut.
        max_length: longest sample that is used, tokens; None: any.
        too_long: ``drop``, ``truncate`` or ``split`` longer ones.
    """
    lengths, targets = store.lengths, store.loss_tokens
    limited = planned_lengths(store)
    if max_length is not None and too_long != "drop":
        store = cut_to(store, max_length, too_long)
    by_source = {}
    for number, source in enumerate(store.sources):
        whole = lengths if len(store.sources) == 1 else lengths[_of(store, number, cut=False)]
        if store.cut is None:
            used = (limited <= (max_length or np.inf)) & (_of(store, number) if len(store.sources) > 1 else True)
            ids, own, learnt = np.flatnonzero(used), lengths[used], targets[used]
        else:
            ids = np.flatnonzero(_of(store, number))
            own, learnt = store.lengths[ids], store.loss_tokens[ids]
        tokens = int(own.sum(dtype=np.int64))
        longest = int(ids[own.argmax()]) if len(own) else None
        by_source[source.name] = Counts(
            samples=len(own),
            tokens=tokens,
            loss_tokens=int(learnt.sum(dtype=np.int64)),
            without_loss=int(np.count_nonzero(learnt == 0)),
            dropped=source.bad + (len(whole) - len(own) if store.cut is None else 0),
            dropped_tokens=int(whole.sum(dtype=np.int64)) - tokens,
            truncated=int(np.count_nonzero(whole > max_length)) if max_length and too_long == "truncate" else 0,
            longest=0 if longest is None else int(own.max()),
            longest_at="" if longest is None else store.place(longest),
        )
    return by_source


def _of(store: TokenStore, source: int, *, cut: bool = True) -> Any:
    mine = store.source == source
    if cut or store.cut is None:
        return mine
    return mine[np.flatnonzero(store.cut.begin == 0)]


def total(by_source: Mapping[str, Counts]) -> Counts:
    """All sources together."""
    every = list(by_source.values())
    longest = max(every, key=lambda counts: counts.longest)
    added = {f.name: sum(getattr(counts, f.name) for counts in every) for f in fields(Counts) if f.type == "int"}
    return Counts(**{**added, "longest": longest.longest, "longest_at": longest.longest_at})


def summary(by_source: Mapping[str, Counts], store: TokenStore) -> Iterator[str]:
    """A few lines for people: all of it, each of several sources, what is left out and the first reasons."""
    every = total(by_source)
    if layout := layout_of(store):
        yield f"data: {layout}"
    yield f"data: {_line(every)}; longest {every.longest:,} tokens ({every.longest_at})"
    if len(by_source) > 1:
        for name, counts in by_source.items():
            yield f"data: {name}: {_line(counts)}"
    if every.dropped or every.truncated:
        cut = f", {every.truncated:,} truncated" if every.truncated else ""
        share = f"{every.dropped_share:.1%} of the tokens"
        yield f"data: left out: {every.dropped:,} samples{cut}, {share}"
    for source in store.sources:
        if source.bad:
            yield f"data: {source.name}: {source.bad:,} records cannot be used, the first: {source.bad_first[0]}"
        for note, times in source.notes:
            yield f"data: {source.name}: {note} ({times:,} records)"


def layout_of(store: TokenStore) -> str:
    """Which chat template laid the conversations out, in a line; nothing where that is not known."""
    return str(read_details(store.folder).get("layout") or "")


def _line(counts: Counts) -> str:
    share = counts.loss_tokens / max(counts.tokens, 1)
    without = f", {counts.without_loss:,} samples without any" if counts.without_loss else ""
    return f"{counts.samples:,} samples, {counts.tokens:,} tokens, {share:.0%} of them learnt{without}"


@dataclass(frozen=True)
class Run:
    """A stretch of a sample's text."""

    text: str
    learnt: bool


def runs_of(store: TokenStore, index: int, tokenizer: Any) -> list[Run]:
    """The text of a sample, cut where learning begins and ends."""
    ids, mask = store.sample(index)
    edges = [0, *(np.flatnonzero(np.diff(mask != 0)) + 1).tolist(), len(ids)]
    return [Run(tokenizer.decode(ids[a:b].tolist()), bool(mask[a])) for a, b in pairwise(edges) if b > a]


def sample_json(store: TokenStore, index: int, tokenizer: Any) -> dict[str, Any]:
    """A sample as `hbp data --json` prints it."""
    ids, mask = store.sample(index)
    shard = store.shard_of(index)
    return {
        "id": index,
        "source": shard.file,
        "line": int(store.line[index]),
        "name": store.sources[shard.source].name,
        "input_ids": ids.tolist(),
        "loss_mask": mask.tolist(),
        "text": tokenizer.decode(ids.tolist()),
        "learnt": [run.text for run in runs_of(store, index, tokenizer) if run.learnt],
    }


def spread(store: TokenStore, limit: int, max_length: int | None = None) -> Sequence[int]:
    """Which samples to show: of those used the first of each source, as many of each as the limit allows."""
    used = np.flatnonzero(planned_lengths(store) <= (max_length or np.inf))
    if len(store.sources) == 1 or not limit:
        return used[:limit].tolist()
    source = store.source[used]
    each = [used[source == n][:limit].tolist() for n in range(len(store.sources))]
    in_turn = [ids[k] for k in range(limit) for ids in each if k < len(ids)]
    return sorted(in_turn[:limit])

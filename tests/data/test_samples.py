"""Which samples are trained on, how often, what is held out, and how long ones are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.data.record import Encoded
from hbp.data.samples import Samples, cut_to, draw_epoch, split_samples, times_seen
from hbp.data.store import SHARDS, Row, ShardEntry, SourceEntry, TokenStore, write_index, write_shard
from hbp.errors import HbpError


def store_of(folder: Path, counts: dict[SourceEntry, int], lengths: list[int] | None = None) -> TokenStore:
    entries, n = [], 0
    for number, (_, count) in enumerate(counts.items()):
        own = range(n, n + count)
        n += count
        rows = []
        for i in own:
            length = lengths[i] if lengths else 1 + i % 5
            ids = np.arange(100 * i, 100 * i + length, dtype=np.int32)
            rows.append(Row(Encoded(ids, (np.arange(length) % 3 != 0).astype(np.uint8)), i))
        write_shard(folder / SHARDS / f"{number}", rows)
        entries.append(ShardEntry(f"{number}", count, number, "a.jsonl", 1, "line"))
    return write_index(folder, entries, list(counts), fingerprint="f", tokenizer="t", vocab_size=9)


def split(store: TokenStore, **options: int | None) -> tuple[list[int], list[int]]:
    asked = {"seed": 0, "eval_samples": 3, "max_length": None, **options}
    train, held_out = split_samples(store, **asked)  # type: ignore[arg-type]
    return train.tolist(), held_out.tolist()


ONCE = SourceEntry("one", times=1.0)


def test_held_out_samples_are_drawn_by_the_seed_among_those_short_enough(tmp_path: Path) -> None:
    store = store_of(tmp_path, {ONCE: 20})
    train, held_out = split(store)
    assert sorted(train + held_out) == list(range(20)) and len(held_out) == 3
    assert split(store) == (train, held_out) and split(store, seed=1) != (train, held_out)
    assert split(store, eval_samples=0) == (list(range(20)), [])
    _, short = split(store, max_length=2)
    assert all(store.lengths[i] <= 2 for i in short)
    for options in ({"eval_samples": 20}, {"eval_samples": 8, "max_length": 2}):
        with pytest.raises(HbpError, match="leaves none"):
            split(store, **options)


def test_sources_for_evaluation_are_what_is_held_out(tmp_path: Path) -> None:
    store = store_of(tmp_path, {ONCE: 4, SourceEntry("eval", held_out=True, times=1.0): 6})
    assert split(store) == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])
    assert split(store, max_length=4)[1] == [5, 6, 7, 8]
    with pytest.raises(HbpError, match=r"every sample of data\.eval_source is longer than data\.max_length=8"):
        split_samples(
            store_of(tmp_path / "b", {ONCE: 1, SourceEntry("eval", held_out=True, times=1.0): 2}, [1, 9, 9]),
            seed=0, eval_samples=0, max_length=8,
        )  # fmt: skip


def test_repeat_is_how_often_a_sample_is_seen(tmp_path: Path) -> None:
    twice, half = SourceEntry("twice", times=2.0), SourceEntry("half", times=0.5)
    train, _ = split(store_of(tmp_path, {twice: 6, half: 10, ONCE: 3}), eval_samples=0)
    count = np.bincount(train, minlength=19)
    assert count[:6].tolist() == [2] * 6 and sorted(count[6:16]) == [0] * 5 + [1] * 5
    assert count[16:].tolist() == [1] * 3


def test_weights_share_out_as_many_samples_as_there_are(tmp_path: Path) -> None:
    a, b = SourceEntry("a", weight=3.0), SourceEntry("b", weight=1.0)
    train, _ = split(store_of(tmp_path, {a: 10, b: 30}), eval_samples=0)
    count = np.bincount(train, minlength=40)
    assert count[:10].tolist() == [3] * 10 and count[10:].sum() == 10 and count[10:].max() == 1


def test_weights_share_out_what_is_trained_on(tmp_path: Path) -> None:
    """Samples too long to be trained on took their part of a source's share with them."""
    a, b = SourceEntry("a", weight=1.0), SourceEntry("b", weight=1.0)
    store = store_of(tmp_path, {a: 10, b: 10}, [1] * 5 + [9] * 5 + [2] * 10)
    train, _ = split(store, eval_samples=0, max_length=8)
    used = [i for i in train if store.lengths[i] <= 8]
    assert np.bincount(np.array(used) // 10).tolist() == [8, 8]  # halves of the 15 that there are, rounded
    assert [i for i in train if store.lengths[i] > 8] == [5, 6, 7, 8, 9]  # to be dropped by name


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 5)), min_size=1, max_size=4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_sample_as_often_as_its_source_says(drawn: list[tuple[int, float]], weighted: bool) -> None:
    counts, numbers = [n for n, _ in drawn], [x for _, x in drawn]
    none: list[float | None] = [None] * len(drawn)
    times = times_seen(counts, numbers if weighted else none, none if weighted else numbers)
    source = np.repeat(np.arange(len(counts)), counts)
    ids = 10 * np.arange(len(source))
    epoch = draw_epoch(ids, source, dict(enumerate(times)), np.random.default_rng(0))
    assert (np.diff(epoch) >= 0).all() and set(epoch.tolist()) <= set(ids.tolist())
    count = np.bincount(epoch // 10, minlength=len(ids))
    for n, (own, seen) in enumerate(zip(counts, times, strict=True)):
        mine = count[source == n]
        assert mine.sum() == round(seen * own) and mine.max() - mine.min() <= 1
    if weighted:
        assert sum(seen * own for own, seen in zip(counts, times, strict=True)) == pytest.approx(len(ids))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_split_keeps_every_token_and_truncate_the_start(lengths: list[int], most: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), {ONCE: len(lengths)}, lengths)
        pieces, starts = cut_to(store, most, "split"), cut_to(store, most, "truncate")
        assert np.concatenate([pieces.sample(i)[0] for i in range(len(pieces))]).tolist() == [
            100 * i + k for i, n in enumerate(lengths) for k in range(n)
        ]
        assert [starts.sample(i)[0].tolist() for i in range(len(starts))] == [
            [100 * i + k for k in range(min(n, most))] for i, n in enumerate(lengths)
        ]
        for cut in (pieces, starts):
            assert cut.lengths.max() <= most
            for i in range(len(cut)):
                ids, mask = cut.sample(i)
                assert len(ids) == len(mask) == cut.lengths[i]
                assert cut.loss_tokens[i] == mask[1:].sum()  # the first token of a piece has nothing before it
                assert cut.line[i] == 1 + ids[0] // 100 and cut.place(i) == f"a.jsonl line {1 + ids[0] // 100}"


def test_samples_are_numbered_anew(tmp_path: Path) -> None:
    store = store_of(tmp_path, {ONCE: 5, SourceEntry("two", times=1.0): 5})
    samples = Samples(store, np.array([7, 2, 7]))
    assert samples.lengths.tolist() == [3, 3, 3] and samples.sources.tolist() == [1, 0, 1]
    assert samples.sample(1)[0].tolist() == [200, 201, 202]
    assert samples.loss_tokens.tolist() == [2, 2, 2]

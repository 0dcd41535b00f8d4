"""The token store gives back what was written, and is whole, old or absent: never half."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.data import store as store_module
from hbp.data.record import Encoded
from hbp.data.store import (
    SHARDS,
    Row,
    ShardEntry,
    SourceEntry,
    TokenStore,
    open_store,
    read_lengths,
    read_shard_info,
    write_index,
    write_shard,
    write_store,
)
from hbp.errors import HbpError

FILES = ("store.json", "index.parquet", SHARDS)


def encoded(ids: Iterable[int], mask: Iterable[int] | None = None) -> Encoded:
    ids = np.array(list(ids), np.int32)
    return Encoded(ids, np.ones(len(ids), np.uint8) if mask is None else np.array(list(mask), np.uint8))


def write(folder: Path, samples: Iterable[Encoded], fingerprint: str = "f") -> TokenStore:
    return write_store(folder, samples, fingerprint=fingerprint, tokenizer="tok", vocab_size=300)


def check(store: TokenStore, samples: list[Encoded]) -> None:
    assert len(store) == len(samples)
    assert store.lengths.dtype == np.int32
    assert store.lengths.tolist() == [len(s.input_ids) for s in samples]
    # The first token of a document has no target.
    assert store.loss_tokens.tolist() == [int(s.loss_mask[1:].sum()) for s in samples]
    for i, sample in enumerate(samples):
        ids, mask = store.sample(i)
        assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)
        np.testing.assert_array_equal(ids, sample.input_ids)
        np.testing.assert_array_equal(mask, sample.loss_mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def refusal(folder: Path) -> str:
    with pytest.raises(HbpError) as caught:
        open_store(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


tokens = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), min_size=1, max_size=12)


@given(st.lists(tokens, min_size=1, max_size=12), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_round_trip_over_any_number_of_batches(drawn: list[list[tuple[int, int]]], batch_tokens: int) -> None:
    samples = [encoded((i for i, _ in s), (m for _, m in s)) for s in drawn]
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "BATCH_TOKENS", batch_tokens)
        written = write(Path(root) / "store", iter(samples))
        check(written, samples)
        again = open_store(Path(root) / "store")
        check(again, samples)
        assert (again.fingerprint, again.tokenizer, again.vocab_size) == ("f", "tok", 300)
        assert len(again.opened[0].batches) == len(written.opened[0].batches) <= len(samples)


def test_samples_are_views_into_the_memory_map(folder: Path) -> None:
    write(folder, [encoded(range(2_000_000)), encoded(range(3))])
    before = pa.total_allocated_bytes()
    store = open_store(folder)
    ids, _ = store.sample(0)
    assert not ids.flags.owndata and not ids.flags.writeable
    assert pa.total_allocated_bytes() - before < 100_000


def test_no_samples_or_one_without_tokens(folder: Path) -> None:
    with pytest.raises(HbpError, match="holds no samples"):
        write(folder, [])
    with pytest.raises(HbpError, match="sample 1 has no tokens"):
        write(folder, [encoded([1]), encoded([])])
    assert "is not a token store" in refusal(folder)


def interrupted() -> Iterator[Encoded]:
    yield from (encoded([9] * 5) for _ in range(5))
    raise KeyboardInterrupt


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_interrupted_write_leaves_the_old_store_or_none(
    folder: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BATCH_TOKENS", batch_tokens)
    samples = [encoded([1, 2]), encoded([3])]
    with pytest.raises(KeyboardInterrupt):
        write(folder, interrupted())
    assert "is not a token store" in refusal(folder)
    write(folder, samples)
    with pytest.raises(KeyboardInterrupt):
        write(folder, interrupted(), "new")
    store = open_store(folder)
    check(store, samples)
    assert store.fingerprint == "f"
    check(write(folder, samples[::-1], "new"), samples[::-1])  # what the interrupted one left does not disturb
    assert open_store(folder).fingerprint == "new"
    assert sorted(p.name for p in folder.rglob("*")) == ["index.parquet", "new.arrow", SHARDS, "store.json"]


def test_interrupted_between_index_and_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, [encoded([1])])
    rename = Path.rename

    def once(path: Path, target: Path) -> None:
        if target.name == "store.json":
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", once)
        write(folder, [encoded([2])], "new")
    assert "its files disagree" in refusal(folder)
    check(write(folder, [encoded([3])], "newer"), [encoded([3])])


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    write(folder, [encoded([1])])
    shutil.rmtree(folder / name) if name == SHARDS else (folder / name).unlink()
    assert refusal(folder) == f"{folder} is not a token store ({name} is missing)"


def test_missing_shard_is_named(folder: Path) -> None:
    write(folder, [encoded([1])])
    (folder / SHARDS / "f.arrow").unlink()
    assert "is damaged (f.arrow is missing)" in refusal(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe" * 99, b"[1]", None])
def test_damaged_store(folder: Path, name: str, content: bytes | None) -> None:
    write(folder, [encoded([1, 2, 3])])
    file = folder / SHARDS / "f.arrow" if name == SHARDS else folder / name
    cut = file.read_bytes()[:-9]
    file.write_bytes(cut if content is None else content)
    if name != SHARDS:
        assert f"the token store {folder} is damaged" in refusal(folder)
        return
    assert read_shard_info(file) is None
    with pytest.raises(HbpError, match=r"shard .*f.arrow is damaged") as caught:
        open_store(folder).sample(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["store.json", "index.parquet"])
def test_files_of_two_stores(folder: Path, name: str, tmp_path: Path) -> None:
    write(folder, [encoded([1, 2, 3])])
    write(tmp_path / "other", [encoded([1]), encoded([2])], "other")
    shutil.copy(tmp_path / "other" / name, folder / name)
    assert "is damaged" in refusal(folder)


def test_several_shards_of_several_sources_are_one_store(folder: Path) -> None:
    samples = [encoded([i] * (i + 1), [0] + [1] * i) for i in range(9)]
    for name, own in (("a", samples[:4]), ("b", samples[4:])):
        info = write_shard(folder / SHARDS / name, (Row(s, 2 * n, n % 3) for n, s in enumerate(own)))
        assert (info.samples, info.highest_id) == (len(own), max(s.input_ids.max() for s in own))
    entries = [
        ShardEntry("a", 4, 0, "x.jsonl", 1, "line"),
        ShardEntry("b", 3, 1, "y.parquet", 100, "row"),  # only its first three are used
        ShardEntry("a", 4, 1, "x.jsonl", 50, "line"),
    ]
    sources = [SourceEntry("one", times=1.0), SourceEntry("two", held_out=True)]
    store = write_index(folder, entries, sources, fingerprint="f", tokenizer="t", vocab_size=9)
    check(store, [*samples[:4], *samples[4:7], *samples[:4]])
    assert store.source.tolist() == [0] * 4 + [1] * 7
    assert store.line.tolist() == [1, 3, 5, 7, 100, 102, 104, 50, 52, 54, 56]
    assert store.part.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 2, 0]
    assert store.place(5) == "y.parquet row 102" and store.place(8) == "x.jsonl line 52"
    assert store.sources == tuple(sources) and open_store(folder).sources == tuple(sources)


def test_other_format_and_lost_keys(folder: Path) -> None:
    write(folder, [encoded([1])])
    meta = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps({**meta, "format": 99}))
    assert "store format 99" in refusal(folder)
    for key in ("format", "n_samples", "fingerprint", "tokenizer", "vocab_size"):
        (folder / "store.json").write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
        assert "damaged" in refusal(folder)


# Lengths alone


@given(st.lists(st.integers(1, 2**31 - 1), min_size=1), st.sampled_from([np.int32, np.uint32, np.int64, np.uint64]))
@settings(max_examples=30, deadline=None)
def test_lengths_round_trip(drawn: list[int], dtype: type) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, values = Path(name), np.array(drawn, dtype)
        np.save(root / "a.npy", values)
        pq.write_table(pa.table({"lengths": values}), root / "a.parquet")
        pq.write_table(pa.table({"id": values[::-1], "length": values}), root / "b.parquet")
        pq.write_table(pa.table({"n": values}), root / "c.parquet")
        for file in ("a.npy", "a.parquet", "b.parquet", "c.parquet"):
            lengths = read_lengths(root / file)
            assert lengths.dtype == np.int32
            assert lengths.tolist() == drawn


def test_index_of_a_store_is_a_list_of_lengths(folder: Path) -> None:
    write(folder, [encoded([1, 2]), encoded([3])])
    assert read_lengths(folder / "index.parquet").tolist() == [2, 1]


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1.0, 2.0]), "whole numbers"),
        (np.array([True]), "whole numbers"),
        (np.array(["1"]), "whole numbers"),
        (np.array([], np.int64), "is empty"),
        (np.array([4, 7, 0]), "sample 2 has length 0"),
        (np.array([4, -1]), "sample 1 has length -1"),
        (np.array([2**31]), "sample 0 has length 2147483648"),
    ],
)
def test_wrong_lengths(tmp_path: Path, suffix: str, values: Any, message: str) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(file, values)
    else:
        pq.write_table(pa.table({"length": values}), file)
    with pytest.raises(HbpError, match=message) as caught:
        read_lengths(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_length_files(tmp_path: Path) -> None:
    np.save(tmp_path / "grid.npy", np.ones((2, 2), int))
    np.save(tmp_path / "pickle.npy", np.array([None]), allow_pickle=True)
    pq.write_table(pa.table({"length": pa.array([1, None])}), tmp_path / "null.parquet")
    pq.write_table(pa.table({"a": [1], "b": [1]}), tmp_path / "two.parquet")
    for name in ("junk.npy", "junk.parquet", "a.txt", "empty.npy", "empty.parquet"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"12\n")
    for name, message in (
        ("grid.npy", "flat list"),
        ("pickle.npy", "cannot read"),
        ("null.parquet", "whole numbers"),
        ("two.parquet", r"columns \['a', 'b'\]; name the one with lengths `length`"),
        ("junk.npy", "cannot read"),
        ("junk.parquet", "cannot read"),
        ("empty.npy", "cannot read"),
        ("empty.parquet", "cannot read"),
        ("a.txt", "neither .npy nor .parquet"),
        ("none.npy", "no file"),
        ("none.parquet", "no file"),
    ):
        with pytest.raises(HbpError, match=message) as caught:
            read_lengths(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)

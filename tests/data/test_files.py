"""Every kind of file gives the same records with the same line numbers, however it is cut; damage is named by line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.data import files
from hbp.data.files import content_of, has_records, line_number, parsed, piece_bytes, pieces_of, records_of
from hbp.errors import HbpError

RECORDS: list[Any] = [{"text": f"Grüße {i} 😀", "n": [{"i": i, "a": None}]} for i in range(40)]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(records)).encode()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def packed(data: bytes, suffix: str) -> bytes:
    kinds = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
    return kinds[suffix](data) if suffix in kinds else data


def array(records: list[Any]) -> bytes:
    return json.dumps(records, indent=1, ensure_ascii=False).encode()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lambda records: b"\xef\xbb\xbf" + lines(records),  # a byte order mark
    "a.json": lines,
    "windows.jsonl": lambda records: lines(records).replace(b"\n", b"\r\n"),
    "unended.jsonl": lambda records: lines(records)[:-1],
    "a.jsonl.gz": lambda records: gzip.compress(lines(records)),
    "joined.jsonl.gz": lambda records: gzip.compress(lines(records[:3])) + gzip.compress(lines(records[3:])),
    "a.jsonl.zst": lambda records: zstd(lines(records)),
    "a.jsonl.bz2": lambda records: bz2.compress(lines(records)),
    "a.jsonl.xz": lambda records: lzma.compress(lines(records)),
    "array.json": array,
    "marked.json": lambda records: b"\xef\xbb\xbf \n" + array(records),
    "array.json.gz": lambda records: gzip.compress(array(records)),
    "tight.json": lambda records: json.dumps(records, separators=(",", ":")).encode(),
}


def read(path: Path, size: int | None = None) -> list[Any]:
    return [parsed(raw) for piece in pieces_of(path, size) for _, raw in records_of(piece)]


def numbered(path: Path, size: int | None = None) -> list[int]:
    return [line_number(piece, number) for piece in pieces_of(path, size) for number, _ in records_of(piece)]


def refusal(path: Path, size: int | None = None) -> str:
    with pytest.raises(HbpError) as caught:
        read(path, size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 100, 700, None])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_text_gives_the_records(name: str, size: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(WRITERS[name](RECORDS))
    assert read(tmp_path / name, size) == RECORDS
    pieces = list(pieces_of(tmp_path / name, size))
    assert (len(pieces) > 1) is (size is not None)
    assert sum(piece.progress for piece in pieces) == (tmp_path / name).stat().st_size
    if "json" in name and "array" not in name and name not in ("marked.json", "tight.json"):
        assert numbered(tmp_path / name, size) == list(range(1, 41))


@pytest.mark.parametrize("name", WRITERS)
def test_names_in_capitals_are_the_same_names(name: str, tmp_path: Path) -> None:
    path = tmp_path / name.upper()
    path.write_bytes(WRITERS[name](RECORDS))
    assert has_records(path) and read(path) == RECORDS


def test_elements_of_an_array_are_numbered_by_the_line_they_begin_on(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\n[\n {"a": [1,\n 2]},\n\n {"b": "x\\ny"}, {"c": 3}\n]\n')
    assert read(tmp_path / "a.json", 1) == [{"a": [1, 2]}, {"b": "x\ny"}, {"c": 3}]
    assert numbered(tmp_path / "a.json", 1) == [3, 6, 6]


@pytest.mark.parametrize("rows_a_group", [1, 7, 100])
@pytest.mark.parametrize("size", [1, 300, None])
def test_parquet(rows_a_group: int, size: int | None, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=rows_a_group)
    assert read(tmp_path / "a.parquet", size) == RECORDS
    assert numbered(tmp_path / "a.parquet", size) == list(range(40))


@pytest.mark.parametrize("size", [1, 2000, None])
def test_arrow_files_of_saved_data_sets(size: int | None, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    assert read(tmp_path / "a.arrow", size) == RECORDS
    assert numbered(tmp_path / "a.arrow", size) == list(range(40))
    assert len(list(pieces_of(tmp_path / "a.arrow", size))) == {1: 6, 2000: 2, None: 1}[size]


@given(st.lists(st.one_of(st.just(""), st.text(max_size=30)), max_size=30), st.integers(1, 200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_blank_lines_are_passed_over_but_counted(texts: list[str], size: int, packed: bool) -> None:
    """Against reading the file whole."""
    content = "\n".join(json.dumps(text, ensure_ascii=False) if text else " " * (len(texts) % 3) for text in texts)
    wanted = [(number, json.loads(line)) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.jsonl.gz" if packed else "a.jsonl")
        path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
        assert list(zip(numbered(path, size), read(path, size), strict=True)) == wanted


@given(
    st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9), st.lists, max_leaves=9)
)
@settings(max_examples=60, deadline=None)
def test_any_array_is_read_as_json_reads_it(value: Any) -> None:
    records = value if isinstance(value, list) else [value]
    for indent in (None, 1):
        elements = list(files._elements("a.json", json.dumps(records, indent=indent).encode(), []))
        assert [json.loads(element) for _, element in elements] == records


def test_an_element_longer_than_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 16)
    (tmp_path / "a.json").write_bytes(array(RECORDS))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(lines(RECORDS)))
    (tmp_path / "c.jsonl").write_bytes(lines(RECORDS))
    for name in ("a.json", "b.jsonl.xz", "c.jsonl"):
        assert read(tmp_path / name, 50) == RECORDS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2", "a.json"])
def test_a_line_over_the_limit_is_refused_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a small compressed file unpacks to: never more than the limit is in memory."""
    monkeypatch.setattr(files, "LINE_BYTES", 3 << 20)
    long = json.dumps({"a": "x" * (9 << 20)}).encode()
    text = b"[" + long + b"]" if name == "a.json" else b'{"a": 1}\n' + long + b"\n"
    (tmp_path / name).write_bytes(packed(text, Path(name).suffix))
    line = 1 if name == "a.json" else 2
    assert f"{tmp_path / name} line {line} is longer than 3 MiB" in refusal(tmp_path / name, 1)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_a_small_file_that_unpacks_to_much_is_never_in_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 MiB in one line where a line may have 2: less than half of it is ever there (xz has a window of 8)."""
    monkeypatch.setattr(files, "LINE_BYTES", 2 << 20)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed(b"x" * (40 << 20), suffix))
    assert (tmp_path / f"a.jsonl{suffix}").stat().st_size < 64 << 10
    tracemalloc.start()
    try:
        assert "line 1 is longer than 2 MiB" in refusal(tmp_path / f"a.jsonl{suffix}", 1)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "value"), [("a.jsonl", [RECORDS[0]]), ("a.jsonl", RECORDS[0]), ("a.json", RECORDS[0])]
)
def test_indented_json_where_lines_are_records_says_what_to_do(name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(value, indent=1))
    assert "one record a line, or a JSON array in a file whose name ends in .json" in refusal(tmp_path / name)


def test_what_is_not_json_or_not_text_says_so() -> None:
    for raw, said in (
        (b"{'a': 1}", "is not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"{", "is not JSON"),
        (b'"\xff"', "is not UTF-8 text"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": 1, "b": {"c": 2, "c": 3}}', "has the field `c` twice; keep one of them"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read (Exceeds the limit"),
        ('{"a": "x"}'.encode("utf-16-le"), "is not JSON"),  # never guessed to be another encoding
    ):
        with pytest.raises(HbpError) as caught:
            parsed(raw)
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a.jsonl.gz", b"plain text", "cannot be read"),
        ("a.jsonl.gz", b"", "cannot be read (it is empty"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:40] + b"\0" * 99, "cannot be read"),
        ("a.jsonl.zst", zstd(lines(RECORDS))[:-3], "cannot be read"),
        ("a.jsonl.bz2", bz2.compress(lines(RECORDS))[:-3], "cannot be read"),
        ("a.jsonl.xz", lzma.compress(lines(RECORDS))[:-3], "cannot be read"),
        ("a.json", array(RECORDS)[:-30], "is not JSON"),
        ("a.json", b'[{"a": 1}\n,\n{"b": x}]', "line 3 is not JSON"),
        ("a.json", b'["\xff"]', "is not UTF-8 text"),
        ("a.json", array(RECORDS) + b"\n\n" + array(RECORDS), "goes on behind the end of the array"),
        ("a.json", b'[{"a": 1}]\n\nx', "line 3 goes on behind the end of the array"),
        ("a.json.gz", gzip.compress(array(RECORDS)) + gzip.compress(array(RECORDS)), "goes on behind the end"),
        ("a.json", b"[1,\n" + b"9" * 5000 + b"]", "line 2 cannot be read (Exceeds the limit"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.parquet", b"", "as Parquet"),
        ("a.parquet", b"PAR1" * 9, "as Parquet"),
        ("a.arrow", b"ARROW" * 9, "cannot be read"),
    ],
)
def test_damaged_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert str(tmp_path / name) in said and message in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_piece_is_named_by_its_content_alone(name: str, tmp_path: Path) -> None:
    def write(path: Path, records: list[Any]) -> list[str]:
        path.parent.mkdir(exist_ok=True)
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=10)
        else:
            path.write_bytes(WRITERS[name](records))
        return [content_of(piece) for piece in pieces_of(path, 1 if name == "a.parquet" else 500)]

    before = write(tmp_path / name, RECORDS)
    assert len(set(before)) == len(before) > 2
    assert write(tmp_path / "elsewhere" / name, RECORDS) == before
    grown = write(tmp_path / name, [*RECORDS, *RECORDS[:9]])
    assert grown[: len(before) - 1] == before[:-1]  # what stood there keeps its name
    changed = write(tmp_path / name, [RECORDS[1], *RECORDS[1:]])
    assert changed[0] != before[0]


def test_a_file_that_grows_keeps_its_pieces() -> None:
    assert [piece_bytes(size << 20) for size in (0, 200, 257, 1024, 1025, 9999, 1 << 30)] == [
        1 << 20, 1 << 20, 4 << 20, 4 << 20, 16 << 20, 64 << 20, 64 << 20,
    ]  # fmt: skip

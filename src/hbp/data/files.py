"""Files of records, cut into pieces that can be read apart: the unit of parallel work, of resuming and of the cache.

JSON Lines, JSON arrays, Parquet and the Arrow files of a saved `datasets` folder; JSON also compressed (gz, zst, bz2,
xz). A piece is some mebibytes of text, a row group of Parquet or a run of Arrow record batches, cut at the same places
whatever the number of processes, and has the hash of its content for a name: what was made of a piece once is found
again wherever the same piece stands. Plain JSON Lines, Parquet and Arrow pieces are read by whoever works on them; what
can only be read from the front (compressed files, arrays, streams from a hub) is cut by one reader, who hands the
lines on. Nothing longer than a piece and one line is ever in memory.

A line may hold :data:`LINE_BYTES`, which also bounds what a compressed file can unpack to at a time.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hbp.errors import HbpError

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (*TEXT_SUFFIXES, *(text + packed for text in TEXT_SUFFIXES for packed in COMPRESSED), ".parquet")
LINE_BYTES = 64 << 20
"""Longest line or array element, bytes once unpacked."""
READ_BYTES = 1 << 20
SMALLEST_PIECE, LARGEST_PIECE = 1 << 20, 64 << 20
PIECES_A_FILE = 256
"""A file is cut into about so many pieces, whose size is a power of four MiB so that a file that grows keeps them."""

Record = tuple[int, Any]
"""Number of a record's line or row within its piece, from 0, and the record: bytes of JSON, or an object."""


@dataclass(frozen=True)
class Piece:
    """Part of a file."""

    file: str
    kind: str
    """``text`` (bytes `begin` to `end` of a plain file), ``parquet`` (row groups), ``arrow`` (bytes of record batches
    after the schema), ``lines`` (already read)."""
    begin: int = 0
    end: int = 0
    first: int | None = None
    """Number of its first line (from 1) or row (from 0) in the file; None: known once the pieces before are read."""
    lines: tuple[tuple[int, bytes], ...] = ()
    progress: int = 0
    """Bytes of the file that it stands for."""

    @property
    def unit(self) -> str:
        """What its records are numbered by."""
        return "row" if self.kind in ("parquet", "arrow") else "line"


def has_records(path: Path) -> bool:
    """Whether a file's name says that it holds records."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _suffix(path: Path) -> str:
    """Of a file's name, in small letters: ``A.JSONL`` and ``a.jsonl`` are alike."""
    return path.suffix.lower()


def piece_bytes(file_bytes: int) -> int:
    """Size of the pieces of a file."""
    size = SMALLEST_PIECE
    while size < LARGEST_PIECE and size * PIECES_A_FILE < file_bytes:
        size *= 4
    return size


def pieces_of(path: Path, size: int | None = None) -> Iterator[Piece]:
    """The pieces of a file in order.

    Args:
        path: of a kind in :data:`SUFFIXES`, or an Arrow file of a saved data set.
        size: bytes of a piece; None: :func:`piece_bytes`.

    Raises:
        HbpError: not such a file, damaged, or with a line over :data:`LINE_BYTES`; names the file and the line.
    """
    size = size or piece_bytes(path.stat().st_size)
    if _suffix(path) == ".parquet":
        yield from _row_groups(path, size)
    elif _suffix(path) == ".arrow":
        try:
            yield from _record_batches(path, size)
        except (OSError, pa.ArrowException) as error:
            raise HbpError(_cannot_read(str(path), error)) from None
    elif _suffix(path) in COMPRESSED or _is_array(path):
        yield from in_pieces(numbered_lines(path), str(path), size, path.stat().st_size)
    else:
        yield from _byte_ranges(path, size)


def in_pieces(lines: Iterable[tuple[int, int, bytes]], file: str, size: int, file_bytes: int = 0) -> Iterator[Piece]:
    """Pieces of what can only be read from the front, given as progress in bytes, number and text of each line."""
    waiting: list[tuple[int, bytes]] = []
    held, first, done = 0, 0, 0
    for at, number, line in lines:
        if not waiting:
            first = number
        waiting.append((number - first, line))
        held += len(line)
        if held >= size:
            yield Piece(file, "lines", first=first, lines=tuple(waiting), progress=at - done)
            waiting, held, done = [], 0, at
    if waiting:
        yield Piece(file, "lines", first=first, lines=tuple(waiting), progress=max(file_bytes - done, 0))


def content_of(piece: Piece) -> str:
    """Hash of a piece's content and of how it is read; not of where it stands."""
    digest = hashlib.blake2b(piece.kind.encode(), digest_size=20)
    if piece.kind == "lines":
        for number, line in piece.lines:
            digest.update(b"%d:%d:" % (number, len(line)))
            digest.update(line)
        return digest.hexdigest()
    spans = [(piece.begin, piece.end)]
    if piece.kind == "parquet":
        with _parquet(piece.file) as file:
            digest.update(str(file.schema_arrow).encode())
            spans = [_span_of(file, group) for group in range(piece.begin, piece.end)]
    elif piece.kind == "arrow":
        digest.update(str(_arrow_schema(piece.file)[0]).encode())
    with Path(piece.file).open("rb") as raw:
        for begin, end in spans:
            raw.seek(begin)
            while begin < end and (read := raw.read(min(READ_BYTES, end - begin))):
                digest.update(read)
                begin += len(read)
    return digest.hexdigest()


def records_of(piece: Piece, count: Callable[[int], None] = lambda lines: None) -> Iterator[Record]:
    """The records of a piece; `count` is told how many lines or rows it has once they are read.

    Raises:
        HbpError: the file cannot be read (its name alone; a record that is no JSON is found by :func:`parsed`).
    """
    try:
        if piece.kind == "lines":
            yield from piece.lines
            count(piece.lines[-1][0] + 1 if piece.lines else 0)
        elif piece.kind == "text":
            with Path(piece.file).open("rb") as file:
                file.seek(piece.begin)
                text = file.read(piece.end - piece.begin)
            lines = _without_mark(text, piece).split(b"\n")
            count(len(lines) - (not lines[-1]))
            yield from ((number, line) for number, line in enumerate(lines) if line.strip())
        else:
            batches = _parquet_batches(piece) if piece.kind == "parquet" else _arrow_batches(piece)
            number = 0
            for batch in batches:
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
            count(number)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise HbpError(_cannot_read(piece.file, error)) from None


def parsed(record: Any) -> Any:
    """A record as an object.

    Raises:
        HbpError: it is not JSON in UTF-8, says a field twice, or is over :data:`LINE_BYTES`; does not name the place.
    """
    if not isinstance(record, bytes):
        return record
    if len(record) > LINE_BYTES:
        raise HbpError(f"is longer than {LINE_BYTES >> 20} MiB; cut it or remove it")
    try:
        return DECODER.decode(record.decode())
    except json.JSONDecodeError as error:
        if record.strip() in (b"{", b"[", b"[{"):
            raise HbpError(
                "is not JSON: what it begins goes on over more lines; write one record a line, or a JSON array in a "
                "file whose name ends in .json"
            ) from None
        raise HbpError(f"is not JSON ({error.msg} at column {error.colno}); mend or remove it") from None
    except UnicodeDecodeError as error:
        raise HbpError(f"is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except ValueError as error:  # a number of thousands of digits
        raise HbpError(f"cannot be read ({str(error).split(';')[0]}); mend or remove it") from None
    except RecursionError:
        raise HbpError("is nested too deeply; mend or remove it") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no field is said twice: JSON's readers keep the last and drop the others in silence."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HbpError(f"has the field `{twice}` twice; keep one of them")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _cannot_read(file: str, error: Exception) -> str:
    return f"{file} cannot be read ({' '.join(str(error).split())[:160] or type(error).__name__}); mend the file"


# Text


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4096)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise HbpError(f"{path} is UTF-16 text; save it as UTF-8")
        return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[") and _suffix(path) == ".json"


def _without_mark(text: bytes, piece: Piece) -> bytes:
    return text.removeprefix(codecs.BOM_UTF8) if not piece.begin else text


def _byte_ranges(path: Path, size: int) -> Iterator[Piece]:
    """Cut at the first end of a line at or after every `size` bytes."""
    end_of_file, begin = path.stat().st_size, 0
    with path.open("rb") as file:
        while begin < end_of_file:
            end = min(begin + size, end_of_file)
            file.seek(end - 1)
            longest = end + LINE_BYTES
            while end < end_of_file:
                read = file.read(READ_BYTES)
                at = read.find(b"\n")
                if at >= 0:
                    end = file.tell() - len(read) + at + 1
                    break
                end = file.tell()
                if end > longest:
                    raise HbpError(_too_long(str(path), _lines_before(path, end)))
            yield Piece(str(path), "text", begin, end, 1 if not begin else None, progress=end - begin)
            begin = end


def _lines_before(path: Path, end: int) -> int:
    """Number of the line that byte `end` is in, from 1."""
    count, at = 1, 0
    with path.open("rb") as file:
        while at < end and (read := file.read(min(READ_BYTES, end - at))):
            count += read.count(b"\n")
            at += len(read)
    return count


def line_number(piece: Piece, number: int) -> int:
    """Number in the file of a line or row of a piece; reads what stands before it where that is not known."""
    first = piece.first if piece.first is not None else _lines_before(Path(piece.file), piece.begin)
    return first + number


def _too_long(file: str, number: int) -> str:
    return f"{file} line {number} is longer than {LINE_BYTES >> 20} MiB, the most that is read; cut it or remove it"


def numbered_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Lines of a text file that is compressed, or elements of an array: bytes of the file read so far, number, text.

    Raises:
        HbpError: damaged, or a line is over :data:`LINE_BYTES`.
    """
    try:
        with path.open("rb") as raw:
            if _suffix(path) in COMPRESSED and not path.stat().st_size:
                raise EOFError("it is empty, which no compressed file is")
            stream = _unpacked(raw, _suffix(path))
            start = stream.read(READ_BYTES).removeprefix(codecs.BOM_UTF8)
            is_array = start.lstrip().startswith(b"[") and ".json" in map(str.lower, path.suffixes)
            rest = iter(lambda: stream.read(READ_BYTES), b"")
            split = _elements if is_array else _lines
            for number, line in split(str(path), start, rest):
                yield raw.tell(), number, line
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise HbpError(_cannot_read(str(path), error)) from None


def _unpacked(raw: IO[bytes], suffix: str) -> Any:
    if suffix not in COMPRESSED:
        return raw
    return lzma.open(raw) if suffix == ".xz" else pa.CompressedInputStream(pa.PythonFile(raw), COMPRESSED[suffix])


def _lines(file: str, start: bytes, rest: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    number, held = 1, [start]
    for read in rest:
        before, newline, after = read.rpartition(b"\n")
        if not newline:
            held.append(read)
            if sum(map(len, held)) > LINE_BYTES + READ_BYTES:
                raise HbpError(_too_long(file, number + b"".join(held).count(b"\n")))
            continue
        for line in b"".join([*held, before]).split(b"\n"):
            if line.strip():
                yield number, line
            number += 1
        held = [after]
    for line in b"".join(held).split(b"\n"):
        if line.strip():
            yield number, line
        number += 1


BETWEEN = re.compile(r"[\s,]*")


def _elements(file: str, start: bytes, rest: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Elements of a JSON array as they stand, each with the line that it begins on.

    An element is parsed to find its end, again from its start whenever twice as much of it has been read.
    """
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
    reads, more, number = iter(rest), True, 1
    try:
        text = decode.decode(start)
        at = text.index("[") + 1
        number += text.count("\n", 0, at)
        while True:
            begin = _after_blanks(text, at)
            number += text.count("\n", at, begin)
            at = begin
            if text[at : at + 1] == "]":
                _nothing_behind(file, number, text[at + 1 :], (decode.decode(read) for read in reads))
                return
            try:
                _, end = decoder.raw_decode(text, at)
                if end < len(text) or not more:  # else it may go on, as a number does
                    yield number, text[at:end].encode()
                    number += text.count("\n", at, end)
                    at = end
                    continue
            except json.JSONDecodeError as error:
                if not more:
                    line = number + text.count("\n", at, error.pos)
                    raise HbpError(f"{file} line {line} is not JSON ({error.msg}); mend the array") from None
            except RecursionError:
                raise HbpError(f"{file} line {number} is nested too deeply; mend the array") from None
            except ValueError as error:
                raise HbpError(f"{file} line {number} cannot be read ({str(error).split(';')[0]})") from None
            text, at = text[at:], 0
            if len(text) > LINE_BYTES:
                raise HbpError(_too_long(file, number))
            grown = list(_at_least(reads, max(len(text), READ_BYTES)))
            more = bool(grown)
            text += "".join(map(decode.decode, grown)) + ("" if more else decode.decode(b"", True))
    except UnicodeDecodeError as error:
        raise HbpError(f"{file} after line {number} is not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _nothing_behind(file: str, number: int, text: str, rest: Iterable[str]) -> None:
    """An array ends its file: two that were joined end to end are half as many records as they look.

    Raises:
        HbpError: something follows; names the line.
    """
    for part in chain((text,), rest):
        if part.strip():
            number += part.count("\n", 0, len(part) - len(part.lstrip()))
            raise HbpError(
                f"{file} line {number} goes on behind the end of the array; make it one array, or write one record a "
                "line (.jsonl)"
            )
        number += part.count("\n")


def _after_blanks(text: str, at: int) -> int:
    found = BETWEEN.match(text, at)
    return found.end() if found else at


def _at_least(reads: Iterator[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (read := next(reads, b"")):
        size -= len(read)
        yield read


# Tables


def _parquet(file: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=READ_BYTES)
    except (OSError, pa.ArrowException) as error:
        raise HbpError(f"cannot read {file} as Parquet: {str(error).splitlines()[0]}") from None


def _row_groups(path: Path, size: int) -> Iterator[Piece]:
    with _parquet(str(path)) as file:
        metadata = file.metadata
        begin, row, first, held = 0, 0, 0, 0
        for group in range(metadata.num_row_groups):
            held += _span_of(file, group)[1] - _span_of(file, group)[0]
            row += metadata.row_group(group).num_rows
            if held >= size or group == metadata.num_row_groups - 1:
                yield Piece(str(path), "parquet", begin, group + 1, first, progress=held)
                begin, first, held = group + 1, row, 0


def _span_of(file: pq.ParquetFile, group: int) -> tuple[int, int]:
    """Bytes of a row group within its file."""
    rows = file.metadata.row_group(group)
    columns = [rows.column(i) for i in range(rows.num_columns)]
    begins = [min(c.dictionary_page_offset or c.data_page_offset, c.data_page_offset) for c in columns]
    ends = [begin + c.total_compressed_size for begin, c in zip(begins, columns, strict=True)]
    return min(begins, default=0), max(ends, default=0)


def _parquet_batches(piece: Piece) -> Iterator[pa.RecordBatch]:
    with _parquet(piece.file) as file:
        try:
            yield from file.iter_batches(256, row_groups=range(piece.begin, piece.end), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise HbpError(f"cannot read {piece.file} as Parquet: {str(error).splitlines()[0]}") from None


def _arrow_schema(file: str) -> tuple[pa.Schema, int]:
    """Schema of an Arrow stream file and the byte at which its record batches begin."""
    with pa.memory_map(file) as source:
        schema = pa.ipc.read_schema(source)
        return schema, source.tell()


def _record_batches(path: Path, size: int) -> Iterator[Piece]:
    schema, begin = _arrow_schema(str(path))
    row = first = 0
    with pa.memory_map(str(path)) as source:
        source.seek(begin)
        while True:
            at = source.tell()
            batch = _next_batch(source, schema)
            if (batch is None or at - begin >= size) and row > first:
                yield Piece(str(path), "arrow", begin, at, first, progress=at - begin)
                begin, first = at, row
            if batch is None:
                return
            row += batch.num_rows


def _next_batch(source: Any, schema: pa.Schema) -> pa.RecordBatch | None:
    try:
        message = pa.ipc.read_message(source)
    except EOFError:
        return None
    return pa.ipc.read_record_batch(message, schema)


def _arrow_batches(piece: Piece) -> Iterator[pa.RecordBatch]:
    schema, _ = _arrow_schema(piece.file)
    with pa.memory_map(piece.file) as source:
        source.seek(piece.begin)
        while source.tell() < piece.end and (batch := _next_batch(source, schema)) is not None:
            yield from (batch.slice(i, 256) for i in range(0, batch.num_rows, 256))


def arrow_files(folder: Path) -> list[Path]:
    """Data files of a data set that `datasets` saved.

    Raises:
        HbpError: its ``state.json`` is damaged or names files that are not there.
    """
    try:
        state: Mapping[str, Any] = json.loads((folder / "state.json").read_text())
        files = [folder / str(entry["filename"]) for entry in state["_data_files"]]
        indices = state.get("_indices_data_files") or state.get("_indices_files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise HbpError(f"cannot load the saved data set {folder}: {reason}; save it again") from None
    missing = [file for file in files if not file.is_file()]
    if missing or indices:
        what = f"{missing[0].name} is missing" if missing else "it is a selection by indices"
        raise HbpError(f"cannot load the saved data set {folder}: {what}; save it again with this `datasets`")
    return files

"""Where samples come from: JSONL, Parquet, saved `datasets` folders, hub names. All become conversations.

A record has ``messages`` (a list of role and content), ``conversations`` (ShareGPT's from and value), or ``prompt`` and
``completion`` (texts, or lists of messages). Files are read as a stream; an error names the file and the line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from hbp.errors import HbpError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


Conversation = list[Message]


def read_conversations(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[Conversation]:
    """Stream the conversations of a file, a folder of files, a saved `datasets` folder, or a hub data set.

    Raises:
        HbpError: no such source, no records in it, or a record that is not a conversation (names its place).
    """
    empty = True
    for place, record in _records(source, split, subset):
        empty = False
        yield to_conversation(record, place)
    if empty:
        raise HbpError(f"{source} holds no records; give a source with at least one sample")


def source_fingerprint(source: str, split: str = "train", subset: str | None = None) -> str:
    """Changes when the source does: names, sizes and times of local files, or the name of a hub set."""
    parts = [source, split, str(subset)]
    path = Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    for file in files:
        stat = file.stat()
        parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _records(source: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    path = Path(source)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        yield from _saved_dataset(path, split)
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
        if not files:
            raise HbpError(f"{source} has no {', '.join(SUFFIXES)} files; give a folder of them")
        for file in files:
            yield from _file(file)
    elif path.is_file():
        yield from _file(path)
    elif source.endswith(SUFFIXES) or source.startswith(("/", ".")):
        raise HbpError(f"no file or folder {source}; give JSONL, Parquet, a saved `datasets` folder or a hub name")
    else:
        yield from _hub(source, split, subset)


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(1024):
                    for record in batch.to_pylist():
                        yield f"{path} row {number}", record
                        number += 1
        except (OSError, pa.ArrowException) as error:
            raise HbpError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise HbpError(
                f"{path} line {number} is not JSON ({error.msg} at column {error.colno}); mend or remove it"
            ) from None
        except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise HbpError(f"{path} after line {number} cannot be read ({error}); mend the file") from None


def _saved_dataset(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise HbpError(f"{path} has no split {split!r}; it has {', '.join(loaded)}")
            loaded = loaded[split]
    except (OSError, ValueError, KeyError) as error:
        raise HbpError(f"cannot load the saved data set {path}: {' '.join(str(error).split())[:200]}") from None
    for number, record in enumerate(loaded):
        yield f"{path} row {number}", record


def _hub(name: str, split: str, subset: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no data
        reason = " ".join(str(error).split())[:200]
        raise HbpError(
            f"no file or folder {name!r}, and no hub data set by that name could be loaded: {reason}"
        ) from None
    for number, record in enumerate(loaded):
        yield f"{name} row {number}", record


def to_conversation(record: Any, place: str) -> Conversation:
    """A record of any known shape as a list of messages.

    Raises:
        HbpError: of another shape; says which fields it has and where it stands.
    """
    if not isinstance(record, Mapping):
        raise HbpError(f"{place} is not an object; write one JSON object a line")
    if isinstance(record.get("messages"), list):
        turns = record["messages"]
    elif isinstance(record.get("conversations"), list):
        turns = [
            {"role": SHAREGPT_ROLES.get(str(t["from"]), t["from"]), "content": t.get("value")}
            if isinstance(t, Mapping) and "from" in t
            else t
            for t in record["conversations"]
        ]
    elif "prompt" in record and "completion" in record:
        turns = [*_side(record["prompt"], "user"), *_side(record["completion"], "assistant")]
    else:
        raise HbpError(
            f"{place} has fields {', '.join(map(str, record)) or 'none'}; it needs `messages`, or `prompt` "
            "and `completion`"
        )
    messages: Conversation = []
    for turn in turns:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise HbpError(f"{place} has a message without a text `role` and `content`: {str(turn)[:80]!r}")
        messages.append({"role": role, "content": content})
    if not messages:
        raise HbpError(f"{place} has no messages; remove it")
    return messages


def _side(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]

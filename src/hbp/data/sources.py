"""Where samples come from: files, folders of files, saved `datasets` folders, hub sets; one or several of them.

A source is found before anything starts. What is not there is said to be missing: only ``owner/name``, where no folder
``owner`` is, or ``hub:NAME`` is looked up on the hub. A folder whose files are named after splits (``train-00000…``,
``test-…``) gives those of the split that is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hbp.data.files import LINE_BYTES, SUFFIXES, Piece, arrow_files, has_records, in_pieces, pieces_of
from hbp.errors import HbpError
from hbp.progress import say

HUB = "hub:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PIECE = 4 << 20
SPLIT_IN_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[-_.\d])", re.IGNORECASE)

PROSE = re.compile(r"^(README|LICENSE|NOTICE|CITATION)|\.(md|html|py|sh|ya?ml|lock|png|svg|jpe?g|pdf)$", re.IGNORECASE)
"""Files beside data that nobody takes for records."""
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files of `datasets` that say what the others hold."""


@dataclass(frozen=True)
class Source:
    """Some data, and how much of it is used."""

    path: str
    """File, folder, or name on the hub."""
    name: str = "data"
    """For people, and in results by source."""
    split: str = "train"
    """Of a saved `datasets` folder, a hub set, or a folder whose files are named after splits."""
    subset: str | None = None
    """Configuration of a hub set."""
    streaming: bool = False
    """Read a hub set from the hub as it is tokenized, without a copy on disk."""
    weight: float | None = None
    """Its share of an epoch's samples, relative to the other sources' weights."""
    repeat: float | None = None
    """How often each of its samples is seen in an epoch."""
    max_samples: int | None = None
    """Records used, the first ones; None: all."""
    held_out: bool = False
    """For evaluation only."""


def hub_name(path: str) -> str | None:
    """The name of a hub set that a path stands for; None for what should be on this machine."""
    if path.startswith(HUB):
        return path.removeprefix(HUB)
    local = path.lower().endswith(SUFFIXES) or Path(path).exists() or Path(path.split("/")[0]).is_dir()
    return None if local or not HUB_NAME.fullmatch(path) else path


def files_of(source: Source) -> list[Path] | None:
    """The files of a source in the order they are read; None for a hub set.

    Raises:
        HbpError: there is nothing, or nothing that holds records.
    """
    path = Path(source.path).expanduser()
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        return arrow_files(_split_of_saved(path, source.split))
    if path.is_dir():
        return _files_of_folder(path, source.split)
    if path.is_file():
        if not has_records(path):
            raise HbpError(f"{path} is none of {', '.join(SUFFIXES)}; rename or convert it")
        return [path]
    if hub_name(source.path) is None:
        raise HbpError(f"no file or folder {source.path}; a hub data set is given as OWNER/NAME or hub:NAME")
    return None


def _split_of_saved(path: Path, split: str) -> Path:
    if not (path / "dataset_dict.json").is_file():
        return path
    try:
        splits = list(json.loads((path / "dataset_dict.json").read_text())["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HbpError(f"cannot load the saved data set {path}: {' '.join(str(error).split())[:160]}") from None
    if split not in splits:
        raise HbpError(f"{path} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return path / split


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    shown = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    shown = [path for path in shown if path.name not in ABOUT]
    files = [path for path in shown if has_records(path)]
    if not files:
        raise HbpError(f"{folder} has no {', '.join(SUFFIXES)} files; give a folder of them")
    if beside := [path for path in shown if not has_records(path) and not PROSE.search(path.name)]:
        _say_once(
            f"{folder}: left out: {len(beside)} files that hold no records by their names, the first: {beside[0].name}"
        )
    splits = [_split_named(path.relative_to(folder)) for path in files]
    if not all(splits) and len(named := sorted({of for of in splits if of})) > 1:
        _say_once(f"{folder}: all {len(files)} files are read, {' and '.join(named)} alike, since some name no split")
    if not all(splits) or len(set(splits)) == 1:
        return files
    chosen = [path for path, of in zip(files, splits, strict=True) if of == split]
    others = sorted({str(of) for of in splits} - {split})
    if not chosen:
        raise HbpError(f"{folder} has no files of the split {split!r}; it has {', '.join(others)}")
    _say_once(f"{folder}: {len(chosen)} files of the split {split!r}; left out: those of {', '.join(others)}")
    return chosen


@lru_cache(256)
def _say_once(line: str) -> None:
    """A source's files are looked up whenever they are needed; what there is to say of them is said once."""
    say(line)


def _split_named(path: Path) -> str | None:
    for part in (path.name, *path.parts[:-1]):
        if found := SPLIT_IN_NAME.match(part):
            return found[1].lower()
    return None


def pieces_of_source(source: Source, size: int | None = None) -> Iterator[Piece]:
    """The pieces of all files of a source, or of a hub set.

    Raises:
        HbpError: as :func:`files_of` and :func:`hbp.data.files.pieces_of`.
    """
    files = files_of(source)
    if files is None:
        rows = ((0, number, _as_line(source.path, number, row)) for number, row in enumerate(_hub_rows(source)))
        yield from in_pieces(rows, source.path, size or HUB_PIECE)
        return
    for file in files:
        yield from pieces_of(file, size)


def _hub_rows(source: Source) -> Iterator[Any]:
    import datasets

    name = hub_name(source.path)
    try:
        yield from datasets.load_dataset(name, source.subset, split=source.split, streaming=source.streaming)
    except Exception as error:  # the hub's client raises many kinds; all mean that there is no data
        reason = " ".join(str(error).split())[:200]
        raise HbpError(
            f"no file or folder {source.path!r}, and no hub data set by that name could be loaded: {reason}"
        ) from None


def _as_line(name: str, number: int, row: Any) -> bytes:
    try:
        line = json.dumps(row, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise HbpError(f"{name} row {number} holds what is not text, numbers or lists of them ({reason})") from None
    if len(line) > LINE_BYTES:
        raise HbpError(f"{name} row {number} is longer than {LINE_BYTES >> 20} MiB, the most that is read")
    return line


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse sources that say two things, or that are not there.

    Raises:
        HbpError: names the source.
    """
    names = [source.name for source in sources]
    for source in sources:
        if source.weight is not None and source.repeat is not None:
            raise HbpError(f"data.sources: {source.name} has both weight and repeat; give one")
        if names.count(source.name) > 1:
            raise HbpError(f"data.sources: two sources are named {source.name}; give each a name of its own")
        if source.held_out and (source.weight is not None or source.repeat is not None):
            raise HbpError(f"data.eval_source: {source.name} has a weight or repeat; evaluation takes each sample once")
        files_of(source)
    trained = [source for source in sources if not source.held_out]
    weighted = [source for source in trained if source.weight is not None]
    if weighted and len(weighted) < len(trained):
        without = next(source.name for source in trained if source.weight is None)
        raise HbpError(f"data.sources: {without} has no weight while others have; give every source one, or none")

"""Whose run a folder holds: its options, the hashes of what they name, and the file that says so, ``run.json``.

A run is known by content. Data and tokenizer, the model and a plan of the user's own are compared by hashes of what
they hold, so a touched, moved or copied run is the same run. Every other option is of the kind that
:mod:`hbp.config` declares beside it: free to change, changeable on resume with an effect, or fixed.

Every checkpoint carries the same record, so it says itself whose it is, and under which options it was trained: those
are what a resumed run's options are compared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hbp.config import Config, kinds
from hbp.disk import content_hash, patiently, versions_of, write_whole
from hbp.errors import HbpError
from hbp.plan import PARQUET_NAME

RUN = "run.json"
CACHE = "contents.json"
LIBRARIES = ("torch", "transformers", "numpy", "peft")
MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json", "*.py")
"""What decides which model a folder holds; a README beside them does not."""
CONTENTS = {
    "data": "its data or tokenizer has changed",
    "model": "the model in model.path has changed",
    "plan": "the plan in plan.path has changed",
}


@dataclass(frozen=True)
class Record:
    """What ``run.json`` and every checkpoint say of a run."""

    identity: Mapping[str, Any]
    """Options by name, and hashes by :data:`CONTENTS`."""
    id: str
    """Names the run to whoever it is logged to, however often it is resumed."""
    folder: str
    """Of the strategy, in `run_dir`; a changed strategy goes on there."""
    trained: bool = False
    adopted: str | None = None
    """The checkpoint of `train.resume` that the run in this folder began with."""
    versions: Mapping[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Of this code, Python and the libraries that training depends on."""
    return versions_of(*LIBRARIES)


def identity(config: Config, data: str, plans: Sequence[Path]) -> dict[str, Any]:
    """Everything that decides what a run trains: options by name, and hashes of what some of them name.

    Args:
        config: of the run.
        data: the token store's fingerprint.
        plans: folders of the user's own plans.
    """
    flat: dict[str, Any] = {}
    for section, values in config.model_dump(mode="json").items():
        flat |= (
            {f"{section}.{name}": v for name, v in values.items()} if isinstance(values, dict) else {section: values}
        )
    kind = {name: option["kind"] for name, option in kinds().items()}
    if plans:
        kind["plan.strategy"] = "free"  # the plans say it
    cache = _Hashes(Path(config.run_dir) / CACHE)
    contents: dict[str, Any] = {"data": data, "model": _model_content(config.model.path, cache), "plan": None}
    if plans:
        contents["plan"] = [cache.of(plan / PARQUET_NAME) for plan in plans]
    cache.write()
    return contents | {name: value for name, value in flat.items() if kind[name] in ("fixed", "resume")}


class _Hashes:
    """Content hashes, remembered for files whose size and time of change are as they were."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[str, list[Any]]()
        try:
            data = json.loads(path.read_text())
            self.known = {str(name): list(entry) for name, entry in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            pass
        self.before = json.dumps(self.known)

    def of(self, file: Path) -> str:
        """The hash of a file.

        Raises:
            HbpError: it cannot be read.
        """
        try:
            stat = file.stat()
            looks, name = [stat.st_size, stat.st_mtime_ns], str(file.resolve())
            if self.known.get(name, [])[:2] != looks or len(self.known[name]) != 3:
                self.known[name] = [*looks, content_hash(file)]
            return str(self.known[name][2])
        except OSError as error:
            raise HbpError(f"cannot read {file} ({error.strerror}); mend that and run again") from None

    def write(self) -> None:
        """Keep what was found, if it is new and can be kept; nothing depends on it."""
        if self.path.parent.is_dir() and (text := json.dumps(self.known)) != self.before:
            try:
                write_whole(self.path, text)
            except OSError:
                return


def _model_content(name_or_path: str, cache: _Hashes) -> str:
    """Of a folder's configuration and weights, of a file, or a hub's name as it is."""
    path = Path(name_or_path)
    if path.is_file():
        return cache.of(path)
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern)}) if path.is_dir() else []
    if not files:
        return name_or_path
    named = [f"{file.name} {cache.of(file)}" for file in files]
    return hashlib.blake2b("\n".join(named).encode(), digest_size=16).hexdigest()


def read_record(path: Path) -> Record | None:
    """Of a ``run.json``, or of a checkpoint's ``position.json``; None where there is none or it is cut short.

    Raises:
        OSError: it is there and cannot be read, however often it is tried.
    """
    try:
        data = json.loads(patiently(path.read_text))
        data = data.get("run", data) if path.name != RUN else data
        known = {name: data[name] for name in Record.__dataclass_fields__ if name in data}
        record = Record(**{"folder": "", "id": "", **known})
        sound = isinstance(record.identity, dict) and isinstance(record.trained, bool)
        return record if sound and isinstance(record.folder, str) and record.id else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_record(run: Path, record: Record) -> None:
    """Write ``run.json``, whole. Rank 0."""
    write_whole(run / RUN, json.dumps(asdict(replace(record, versions=versions())), indent=1) + "\n")


def compare(before: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> dict[str, tuple[Any, Any]]:
    """The options that changed and may change, each with its value before and now.

    An option that an earlier version did not have yet is no change.

    Raises:
        HbpError: a fixed option changed, or what a path holds; names it, and both values.
    """
    changed = {name: (before[name], wanted[name]) for name in wanted if name in before and before[name] != wanted[name]}
    known = kinds()
    for name, (was, now) in changed.items():
        if name in CONTENTS or known.get(name, {}).get("kind") != "resume":
            what = CONTENTS.get(name, f"{name} was {was!r}, now {now!r}")
            raise HbpError(
                f"{where} is of another run: {what}; restore that, give another run_dir, or train.resume=never"
            )
    return changed


def replans(changed: Mapping[str, Any]) -> bool:
    """Whether one of the changed options is one whose effect is that what is left is planned again."""
    known = kinds()
    return any("planned again" in str(known[name].get("effect")) for name in changed if name in known)

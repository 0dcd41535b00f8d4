"""The cache: shards that runs share, and stores made for planning alone. It has a size and keeps nothing half-written.

A folder (``$HBP_CACHE``, ``data.cache``, or ``hbp`` in the user's cache folder) with ``shards/``, files named after the
content that they were made of, and ``stores/``. A store has its shards as hard links to the cache's where both are on
one file system, as copies where not, so that nothing that leaves the cache is missed by a run. What was used longest
ago leaves first.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter
from pathlib import Path

from hbp.data.store import PARTIAL, SHARDS

STORES = "stores"
OFF = "off"
ABANDONED_S = 24 * 3600.0
"""Age at which another machine's half-written file is taken to be nobody's."""


def share(have: Path, want: Path) -> None:
    """The same file under a second name: a hard link, or a copy on another file system."""
    want.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(have, want)
    except FileExistsError:
        if have.samefile(want):
            return
        want.unlink()  # a damaged one
        share(have, want)
    except OSError:
        partial = want.with_name(f"{want.name}{PARTIAL}{socket.gethostname()}-{os.getpid()}")
        shutil.copyfile(have, partial)
        partial.rename(want)


def clean(folder: Path) -> None:
    """Remove what processes that are no more left half-written in a folder of shards."""
    for path in folder.glob(f"*{PARTIAL}*") if folder.is_dir() else ():
        host, _, process = path.name.rpartition(PARTIAL)[2].rpartition("-")
        try:
            alive = Path(f"/proc/{process}").exists() if host == socket.gethostname() else True
            if not alive or time.time() - path.stat().st_mtime > ABANDONED_S:
                path.unlink()
        except OSError:  # gone meanwhile, or not ours
            continue


def trim(cache: Path, most_bytes: float) -> None:
    """Remove what was used longest ago until the cache has at most so many bytes; hard links count once."""
    units = [path for folder in (SHARDS, STORES) if (cache / folder).is_dir() for path in (cache / folder).iterdir()]
    used: dict[Path, tuple[float, dict[int, int]]] = {}
    for unit in units:
        files = [unit] if unit.is_file() else [path for path in unit.rglob("*") if path.is_file()]
        try:
            stats = [file.stat() for file in files]
        except OSError:
            continue
        newest = max((stat.st_mtime for stat in stats), default=0.0)
        used[unit] = (newest, {stat.st_ino: stat.st_size for stat in stats})
    names = Counter(inode for _, files in used.values() for inode in files)
    total = sum({inode: size for _, files in used.values() for inode, size in files.items()}.values())
    for unit, (_, mine) in sorted(used.items(), key=lambda item: item[1][0]):
        if total <= most_bytes:
            return
        shutil.rmtree(unit, ignore_errors=True) if unit.is_dir() else unit.unlink(missing_ok=True)
        names.subtract(mine.keys())
        total -= sum(size for inode, size in mine.items() if not names[inode])


def is_off() -> bool:
    """Whether ``$HBP_CACHE`` says that there is none, as ``data.cache: off`` does."""
    return os.environ.get("HBP_CACHE") == OFF


def cache_folder() -> Path:
    """Where the cache is if nothing else is said: ``$HBP_CACHE``, or ``hbp`` in the user's cache folder."""
    own, users = os.environ.get("HBP_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own and not is_off():
        return Path(own).expanduser()
    return (Path(users) if users else Path.home() / ".cache") / "hbp"

"""Files that decide something: written whole or not at all, read again where reading fails, known by what they hold.

A file is written beside its place, synced, and renamed, so that a kill or a power cut leaves the old or the new one.
A read that fails for another reason than that nothing is there is tried again before it is believed: a busy network
file system is no damage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from hbp import __version__

PARTIAL = ".partial"
TRIES = 4
PAUSE_S = 0.25
WHOLE_BYTES = 1 << 28
"""Files up to here are hashed whole, larger ones by their size and blocks that are spread over them."""
BLOCKS, BLOCK_BYTES = 64, 1 << 20
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What a file system does of its own: it says nothing of what a file holds, and is no wrong input."""
NOTHING_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Result = TypeVar("Result")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A path beside a file's place for the body to write to; then it is synced and renamed to the place.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file :func:`beside` its place.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    with beside(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Make what was created or renamed in a folder outlast a power cut, where the file system knows how."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def patiently(read: Callable[[], Result]) -> Result:
    """What `read` gives, tried again where it fails for another reason than that nothing is there.

    Raises:
        OSError: nothing is there, or it failed every time.
    """
    for attempt in range(TRIES):
        try:
            return read()
        except NOTHING_THERE:
            raise
        except OSError as error:
            if attempt + 1 == TRIES or error.errno in (errno.EACCES, errno.EPERM):
                raise
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("a loop of no tries")


def let_faults_through(error: BaseException) -> None:
    """Raise an error again that is one of the :data:`FAULTS`: what cannot be read is not damaged."""
    if isinstance(error, OSError) and error.errno in FAULTS:
        raise error


def is_disk_fault(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised for, is one of the :data:`FAULTS`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS:
            return True
        error = error.__cause__ or error.__context__
    return False


def at_home(value: Any) -> Any:
    """A value, or lists and objects of them, with the user's folder where a text begins with ``~/``.

    No shell sees what stands in a file or behind a ``=``, and a folder of the name ``~`` is never meant.
    """
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, dict):
        return {key: at_home(one) for key, one in value.items()}
    return [at_home(one) for one in value] if isinstance(value, list) else value


def free_name(path: Path) -> Path:
    """The path itself if nothing is there, else the first of ``NAME-2``, ``NAME-3``, … that is free."""
    if not os.path.lexists(path):
        return path
    number = 2
    while os.path.lexists(other := path.with_name(f"{path.name}-{number}")):
        number += 1
    return other


def content_hash(path: Path) -> str:
    """Hash of what a file holds: of all of it up to :data:`WHOLE_BYTES`, else of its size and spread blocks.

    Raises:
        OSError: it cannot be read.
    """

    def read() -> str:
        size = path.stat().st_size
        digest = hashlib.blake2b(str(size).encode(), digest_size=16)
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            else:
                for number in range(BLOCKS):  # the first and the last included
                    file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
        return digest.hexdigest()

    return patiently(read)


def versions_of(*libraries: str) -> dict[str, str]:
    """Of this code, Python and these libraries, those that are installed: kept with what they made."""
    found = {"hbp": __version__, "python": platform.python_version()}
    for name in libraries:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found

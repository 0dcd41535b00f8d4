"""Files are whole or as they were; a read is tried again; content alone decides a hash."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hbp import disk
from hbp.data.store import open_store
from hbp.disk import beside, content_hash, free_name, is_disk_fault, patiently, write_whole
from hbp.errors import HbpError
from hbp.plan import read_info, read_plan


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "one")
    with pytest.raises(KeyError), beside(path) as partial:
        partial.write_text("half of anoth")
        assert path.read_text() == "one"
        raise KeyError
    assert path.read_text() == "one"
    write_whole(path, b"two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_reading_is_tried_again_but_nothing_there_is_believed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PAUSE_S", 0.0)
    failures = [OSError(errno.EIO, "Input/output error")] * 2
    tries = []

    def read() -> str:
        tries.append(1)
        if failures:
            raise failures.pop()
        return "read"

    assert patiently(read) == "read"
    assert len(tries) == 3
    for error, count in ((FileNotFoundError(), 1), (OSError(errno.EACCES, "no"), 1), (OSError(errno.EIO, "x"), 4)):
        tries.clear()
        failures[:] = [error] * 10
        with pytest.raises(OSError):
            patiently(read)
        assert len(tries) == count


def test_free_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        names.append(free_name(tmp_path / "step-1.damaged"))
        names[-1].mkdir()
    assert [name.name for name in names] == ["step-1.damaged", "step-1.damaged-2", "step-1.damaged-3"]


@pytest.mark.parametrize("whole", [1 << 20, 0])
def test_content_alone_decides_the_hash(tmp_path: Path, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed whole, and by blocks as a file of hundreds of GB is."""
    monkeypatch.setattr(disk, "WHOLE_BYTES", whole)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 16)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(range(256)) * 40)
    before = content_hash(one)
    shutil.copyfile(one, other)
    os.utime(one, (1, 1))
    assert content_hash(one) == content_hash(other) == before
    for at in (0, -1):  # both ends are always read
        data = bytearray(one.read_bytes())
        data[at] ^= 1
        other.write_bytes(bytes(data))
        assert content_hash(other) != before
    other.write_bytes(one.read_bytes() + b"x")
    assert content_hash(other) != before


def test_a_fault_of_the_disk_is_known_behind_what_was_made_of_it() -> None:
    """It may have been told as a file that cannot be read; what is only not there is no fault."""
    for number, fault in (
        (errno.EIO, True),
        (errno.ENOSPC, True),
        (errno.EFBIG, True),
        (errno.ENOENT, False),
        (errno.EACCES, False),
    ):
        try:
            try:
                raise OSError(number, os.strerror(number), "a.json")
            except OSError as error:
                raise HbpError("cannot read a.json") from (error if number == errno.EIO else None)
        except HbpError as error:
            assert is_disk_fault(error) is fault
    assert not is_disk_fault(None)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan and a token store: the error of the disk comes out, after the file was tried again."""
    monkeypatch.setattr(disk, "PAUSE_S", 0.0)
    for name in ("store.json", "index.parquet", "shards"):
        (tmp_path / name).touch()
    opened: list[Path] = []

    def failing(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path)
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "open", failing)
    for read in (read_plan, read_info, open_store):
        opened.clear()
        with pytest.raises(OSError, match="Input/output error"):
            read(tmp_path)
        assert len(opened) == disk.TRIES

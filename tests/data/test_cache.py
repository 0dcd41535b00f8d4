"""The cache has a size, and keeps nothing that a dead process left half-written."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from hbp.data.cache import STORES, cache_folder, clean, is_off, share, trim
from hbp.data.store import PARTIAL, SHARDS


def unit(path: Path, size: int, used_s_ago: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - used_s_ago,) * 2)
    return path


def test_what_was_used_longest_ago_leaves_first(tmp_path: Path) -> None:
    old, new = unit(tmp_path / SHARDS / "old", 600, 900), unit(tmp_path / SHARDS / "new", 600, 10)
    store = unit(tmp_path / STORES / "a" / "index.parquet", 300, 500).parent
    trim(tmp_path, 2000)
    assert old.exists() and new.exists() and store.exists()
    trim(tmp_path, 1000)
    assert not old.exists() and new.exists() and store.exists()
    trim(tmp_path, 700)
    assert new.exists() and not store.exists()
    trim(tmp_path / "none", 0)


def test_a_file_under_two_names_counts_once_and_is_freed_with_the_last(tmp_path: Path) -> None:
    shard = unit(tmp_path / SHARDS / "a", 600, 900)
    share(shard, tmp_path / STORES / "s" / SHARDS / "a")
    other = unit(tmp_path / SHARDS / "b", 300, 10)
    unit(tmp_path / STORES / "s" / "index.parquet", 50, 500)
    trim(tmp_path, 950)
    assert shard.exists()
    trim(tmp_path, 949)  # taking the oldest shard's name away frees nothing, its store must go too
    assert not shard.exists() and not (tmp_path / STORES / "s").exists() and other.exists()


def test_half_written_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    here = socket.gethostname()
    alive = unit(tmp_path / f"a.arrow{PARTIAL}{here}-{os.getpid()}", 1, 0)
    dead = unit(tmp_path / f"a.arrow{PARTIAL}{here}-{2**22 + 1}", 1, 0)
    elsewhere = unit(tmp_path / f"a.arrow{PARTIAL}other-host-1", 1, 0)
    long_ago = unit(tmp_path / f"b.arrow{PARTIAL}other-host-1", 1, 2 * 24 * 3600)
    whole = unit(tmp_path / "a.arrow", 1, 0)
    clean(tmp_path)
    assert [path.exists() for path in (alive, dead, elsewhere, long_ago, whole)] == [True, False, True, False, True]
    clean(tmp_path / "none")


def test_where_it_is(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HBP_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HBP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hbp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "hbp"
    monkeypatch.setenv("HBP_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"


def test_off_is_no_folder(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """``HBP_CACHE=off`` made a folder of that name where the command was given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HBP_CACHE", "off")
    assert is_off() and cache_folder() == tmp_path / "hbp"  # where what is planned alone lies, as with data.cache=off
    monkeypatch.setenv("HBP_CACHE", str(tmp_path / "off"))
    assert not is_off()

"""One owner of a `run_dir`: two runs in one folder would each undo what the other writes.

The owner holds ``.owner`` in the folder: a lock of the kernel (``flock``, which NFS passes on to its server), which
ends with its process however that ends; and, for file systems that do not pass locks on to other machines, a heartbeat,
the file's time of change, which the owner renews and which is compared by the file system's own clock. The file says
who the owner is: machine, process, and the scheduler's job. It is never removed, so nobody can lock one that is gone.

The launcher of local ranks and its rank 0 hold one each, since ranks may outlive a launcher that is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hbp.errors import ERROR_FILE, HbpError

LAUNCHER, RANKS = ".owner", ".owner-ranks"
BEAT_S = 10.0
SILENT_S = 60.0
"""An owner on another machine that has not renewed its file for so long is gone."""
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)


@contextmanager
def owning(run: Path, *, launcher: bool) -> Iterator[None]:
    """Own a folder while the body runs; made if it is not there.

    Args:
        run: the folder.
        launcher: this process starts the ranks; else it is rank 0, whose launcher owns the folder if it is ours.

    Raises:
        HbpError: another process owns it; names that.
    """
    run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if launcher or ERROR_FILE not in os.environ:
            stack.enter_context(_held(run, LAUNCHER))
        if launcher:
            with _held(run, RANKS):  # ranks of a launcher that was killed may still run
                pass
        else:
            stack.enter_context(_held(run, RANKS))
        yield


@contextmanager
def _held(run: Path, name: str) -> Iterator[None]:
    path = run / name
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    over = threading.Event()
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise _taken(run, _owner(opened)) from None
        # Locked here, or a file system without locks: another machine may have it all the same.
        owner = _owner(opened)
        if owner.get("host", socket.gethostname()) != socket.gethostname() and _age_s(run, path) < SILENT_S:
            raise _taken(run, owner)
        _write(opened, {"host": socket.gethostname(), "pid": os.getpid(), "job": _job(), "since": _now()})
        threading.Thread(target=_beat, args=(opened, over), daemon=True).start()
        try:
            yield
        finally:
            over.set()
            with contextlib.suppress(OSError):
                _write(opened, {})
    finally:
        os.close(opened)


def _beat(opened: int, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(opened)


def _age_s(run: Path, path: Path) -> float:
    """Seconds since a file changed, by the clock of the file system that it lies on."""
    probe = run / f"{path.name}-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _owner(opened: int) -> dict[str, str]:
    try:
        data = json.loads(os.pread(opened, 4096, 0) or b"{}")
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(opened: int, owner: dict[str, object]) -> None:
    os.ftruncate(opened, 0)
    os.pwrite(opened, json.dumps(owner).encode() if owner else b"", 0)
    os.fsync(opened)


def _job() -> str | None:
    return next((f"{name.lower()} {os.environ[name]}" for name in JOBS if os.environ.get(name)), None)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _taken(run: Path, owner: dict[str, str]) -> HbpError:
    job = f", {owner['job']}" if owner.get("job") else ""
    who = f"process {owner['pid']} on {owner['host']}{job}, since {owner['since']}" if owner else "another process"
    return HbpError(f"{run} is in use by {who}; wait for it, end it, or give another run_dir")

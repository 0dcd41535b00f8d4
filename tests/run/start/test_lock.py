"""One owner of a run's folder, who is named; it is free again when the owner is gone, however it went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hbp.errors import ERROR_FILE, HbpError
from hbp.run.start import lock
from hbp.run.start.lock import LAUNCHER, RANKS, SILENT_S, owning

HOLD = """
import pathlib, sys, time
from hbp.run.start.lock import owning
with owning(pathlib.Path(sys.argv[1]), launcher=True):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_owner_is_refused_by_name_and_a_killed_one_leaves_it_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "SLURM_JOB_ID": "4711"}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        for launcher in (True, False):
            said = f"is in use by process {other.pid} on .*, slurm_job_id 4711, since"
            with pytest.raises(HbpError, match=said) as error, owning(run, launcher=launcher):
                pass
            assert "\n" not in str(error.value)
        other.send_signal(signal.SIGKILL)
    with owning(run, launcher=True):
        pass


def test_rank_zero_of_a_launcher_owns_beside_it_and_may_outlive_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with owning(tmp_path, launcher=True):
        with pytest.raises(HbpError, match="is in use"), owning(tmp_path, launcher=False):  # of torchrun
            pass
        monkeypatch.setenv(ERROR_FILE, "somewhere")
        with owning(tmp_path, launcher=False):
            pass
    said = f"is in use by process {os.getpid()} on"  # the launcher is gone, the rank is not
    with owning(tmp_path, launcher=False), pytest.raises(HbpError, match=said), owning(tmp_path, launcher=True):
        pass


def test_an_owner_on_another_machine_counts_while_its_heart_beats(tmp_path: Path) -> None:
    """Where the file system does not pass locks on, which looks here like a lock that nobody holds."""
    owner = {"host": "elsewhere", "pid": 7, "job": None, "since": "2026-01-01 00:00:00"}
    (tmp_path / LAUNCHER).write_text(json.dumps(owner))
    said = "is in use by process 7 on elsewhere, since 2026"
    with pytest.raises(HbpError, match=said), owning(tmp_path, launcher=True):
        pass
    assert json.loads((tmp_path / LAUNCHER).read_text()) == owner  # it is left in peace
    silent = time.time() - SILENT_S - 5
    os.utime(tmp_path / LAUNCHER, (silent, silent))
    with owning(tmp_path, launcher=True):
        assert json.loads((tmp_path / LAUNCHER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LAUNCHER).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAUNCHER, RANKS]


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    with owning(tmp_path, launcher=True):
        os.utime(tmp_path / LAUNCHER, (1, 1))
        deadline = time.monotonic() + 60
        while (tmp_path / LAUNCHER).stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / LAUNCHER).stat().st_mtime < 60

"""Saves that fail: tried again, and then the run ends with the state before."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from jobs import config_of, run_here, steps_of, write_job
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from workers import run_ranks

from hbp.config import Config
from hbp.errors import RankFailed
from hbp.run.steps import saving
from hbp.train.checkpoint import list_checkpoints


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_job(tmp_path_factory.mktemp("saving"), samples=60, train={"save_steps": 2, "export": False})


def full_disk(rank: int, world: int, config: Config, fails: list[int], stop_after: int | None) -> Any:
    """:func:`run_here`, where rank 1 finds the disk full in some of its saves."""
    plain, count = FileSystemWriter.write_data, 0

    def write_data(writer: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if rank == 1 and count in fails:
            raise OSError(28, "No space left on device", str(config.run_dir))
        return plain(writer, *arguments)

    with mock.patch.object(FileSystemWriter, "write_data", write_data), mock.patch.object(saving, "SAVE_AGAIN_S", 0.0):
        try:
            return run_here(rank, world, config, stop_after)
        except RankFailed as failed:  # exit code 1: a fault, and no wrong input
            return str(failed), ""


def test_a_save_that_fails_is_tried_again(job):
    run = job / "again"
    config = config_of(job, f"run_dir={run}", "train.keep_checkpoints=99")
    ((summary, said), _) = run_ranks(full_disk, 2, config, [2], None)
    assert said.count("No space left on device") == 1
    assert "trying again (1 of 3)" in said
    steps = len(steps_of(run / "hbp"))
    assert summary["results"][0]["steps"] == steps
    saved = [int(path.name[5:]) for path in list_checkpoints(run / "hbp" / "checkpoints")]
    # The save of step 4 failed, which is known at step 6: the state of then is saved in its place.
    assert sorted(saved) == [2, *range(6, steps + 1, 2), *([steps] if steps % 2 else [])]


def test_on_a_signal_it_is_tried_again_at_once(job):
    run = job / "signal"
    config = config_of(job, f"run_dir={run}", "train.save_steps=null")
    ((stopped, said), _) = run_ranks(full_disk, 2, config, [1, 2], 3)
    assert stopped.startswith("SIGTERM: stopped after step 3")
    assert "trying again (2 of 3)" in said
    assert [path.name for path in list_checkpoints(run / "hbp" / "checkpoints")] == ["step-00000003"]


def test_saves_that_go_on_failing_end_the_run_with_the_state_before(job):
    run = job / "full"
    ((said, _), (there, _)) = run_ranks(full_disk, 2, config_of(job, f"run_dir={run}"), list(range(2, 99)), None)
    assert said == there
    assert "cannot save a checkpoint in" in said
    assert "No space left on device" in said
    assert [path.name for path in list_checkpoints(run / "hbp" / "checkpoints")] == ["step-00000002"]
    run_ranks(run_here, 2, config_of(job, f"run_dir={run}"))
    assert (run / "summary.json").is_file()

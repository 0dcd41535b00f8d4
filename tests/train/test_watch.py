"""Ranks that fail, die or hang, as the others see it through the store that they met through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from hbp.errors import RankFailed
from hbp.train.watch import watch_others

SCRIPT = """
    import os, sys, time
    import torch.distributed as dist
    from hbp.train.watch import enter, leave, silence_is_fine, watch_others

    rank, doing = int(os.environ["RANK"]), sys.argv[1]
    dist.init_process_group("gloo")
    with watch_others(interval=0.2, silent=5.0) as watch:
        print("watching", flush=True)
        if rank == 1 and doing == "report":
            assert watch.report("rank 1 failed in step 7") is None
            time.sleep(0.5)
            os._exit(3)
        if doing == "disk":  # a fault of one rank, while the other waits for it in a collective
            if rank == 1:
                raise OSError(28, "No space left on device")
            dist.barrier()
        if doing == "stall":  # rank 1 does not get to its second micro-step; its heartbeat goes on
            enter(7, 2 - rank, 1.0)
        if doing == "wait":
            enter(7, 2, 1.0)
            if rank == 1:  # outside of steps for longer than a step may take, then at the same place as the other
                leave()
                time.sleep(3)
                enter(7, 2, 1.0)
            time.sleep(3)
            leave()
        if doing == "quiet" and rank == 1:
            with silence_is_fine():
                print("quiet", flush=True)
                time.sleep(1)
        # One is through long before the other where nothing is wrong.
        time.sleep({"end": 0.2 if rank == 0 else 8.0, "wait": 0, "quiet": 8}.get(doing, 60))
    print("done", flush=True)
    time.sleep(60 if doing in ("report", "hang", "stall") else 0)
"""


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def two_ranks(folder: Path, store: dist.TCPStore, doing: str) -> list[subprocess.Popen[str]]:
    """Two processes that watch each other; returns when both do."""
    script = folder / "ranks.py"
    script.write_text(textwrap.dedent(SCRIPT))
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    environment = {**os.environ, **meeting, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), doing],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "watching\n"
    return started


def test_a_reported_failure_ends_the_others(tmp_path, store):
    first, second = two_ranks(tmp_path, store, "report")
    _, said = first.communicate(timeout=30)
    assert first.returncode == 1
    assert said.splitlines()[-1] == "hbp: rank 0 ends: rank 1 failed in step 7"
    second.communicate(timeout=30)
    assert second.returncode == 3


def test_a_collective_that_broke_off_is_told_as_what_the_other_rank_said(tmp_path, store):
    first, second = two_ranks(tmp_path, store, "disk")
    _, said = first.communicate(timeout=30)
    want = "RankFailed: rank 0 ends, since rank 1 failed: OSError: [Errno 28] No space left on device"
    assert said.splitlines()[-1].endswith(want)
    assert "OSError: [Errno 28]" in second.communicate(timeout=30)[1].splitlines()[-1]


def test_a_collective_that_broke_off_is_one_line_where_the_store_is_gone_too(monkeypatch):
    """As without a launcher, where rank 0 holds the store."""
    gone = mock.Mock(rank=1, **{"report.side_effect": RuntimeError("Broken pipe")})
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with mock.patch.multiple("hbp.train.watch", Watch=mock.Mock(return_value=gone), TCPStore=mock.Mock()):
        for error, kind in (
            (RuntimeError("[gloo/pair.cc:553] Connection closed"), RankFailed),
            (ValueError(), ValueError),
        ):
            with mock.patch("hbp.train.watch.PrefixStore"), pytest.raises(kind) as raised, watch_others():
                raise error
            assert (kind is RankFailed) == ("rank 1 ends, since the rank that the others met" in str(raised.value))


def test_a_rank_that_hangs_is_given_up(tmp_path, store):
    first, second = two_ranks(tmp_path, store, "hang")
    second.send_signal(signal.SIGSTOP)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 1
    assert "rank 1 has not been heard of for 5 s" in said.splitlines()[-1]
    second.kill()
    second.communicate()


def test_ranks_may_end_at_different_times(tmp_path, store):
    for process in two_ranks(tmp_path, store, "end"):
        out, said = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "done\n"), said


def test_a_rank_whose_main_thread_hangs_is_named(tmp_path, store):
    """Its heartbeat goes on, and says that it is behind."""
    first, second = two_ranks(tmp_path, store, "stall")
    for process in (first, second):
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "rank 1 hangs in step 7 after entering 1 of its micro-steps" in said.splitlines()[-1]


def test_ranks_that_wait_outside_of_steps_or_all_alike_are_left_alone(tmp_path, store):
    for process in two_ranks(tmp_path, store, "wait"):
        out, said = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "done\n"), said


def test_a_rank_may_say_that_it_will_be_silent(tmp_path, store):
    first, second = two_ranks(tmp_path, store, "quiet")
    assert second.stdout is not None
    assert second.stdout.readline() == "quiet\n"
    second.send_signal(signal.SIGSTOP)
    time.sleep(7)
    second.send_signal(signal.SIGCONT)
    for process in (first, second):
        out, said = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "done\n"), said

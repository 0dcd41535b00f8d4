"""How errors of ranks reach the user. The commands run for real, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from jobs import hbp, hbp_here, ranks_of, start
from plans import plan_of
from torch.distributed import TCPStore
from workers import LLAMA, run_ranks, write_config

from hbp.data.stdlib_sft import train_tokenizer
from hbp.errors import HbpError, Stopped
from hbp.plan import write_plan
from hbp.train import launch
from hbp.train.launch import handed_on, rank_zero_first, stop_signals, stopped_by_signals

WORLD = 2


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    """A folder with data, tokenizer, model and ``cfg.yaml``."""
    folder = tmp_path_factory.mktemp("job")
    talks = [[("user", f"Say {i}."), ("assistant", f"{i} " * (i % 5 + 1))] for i in range(30)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in talks]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "broken.jsonl").write_text("\n".join([*lines[:3], '{"messages": "cut o']) + "\n")
    train_tokenizer(folder / "data.jsonl", folder / "tokenizer", vocab_size=300)
    config = {
        "run_dir": str(folder / "run"),
        "data": {
            "source": str(folder / "data.jsonl"),
            "tokenizer": str(folder / "tokenizer"),
            "eval_samples": 2,
            "max_length": 256,
        },
        "model": {"path": write_config(folder / "model", LLAMA)},
        "cluster": {"processes": WORLD, "profile": False},
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_a_launcher_wait_for_each_other_no_longer_than_asked(job, rank, tmp_path, monkeypatch) -> None:
    """Rank 0, in which the others meet, may have been killed before they came; torch would wait for half an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    done = hbp_here("train", str(job / "cfg.yaml"), f"run_dir={tmp_path / 'run'}", "train.hang_minutes=0.02")
    assert done.returncode == 1
    assert f"rank {rank} of 2 waited 1 s for the others at 127.0.0.1:{port} (train.hang_minutes)" in done.stderr


def test_a_rank_that_ends_before_it_is_connected_is_waited_for_no_longer_either(job, tmp_path, monkeypatch) -> None:
    """It has met the others, but they do not know yet where it listens; gloo would wait for half an hour."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    other = Thread(target=TCPStore, args=("127.0.0.1", port, 2, False))  # all that the other rank does
    other.start()
    done = hbp_here("train", str(job / "cfg.yaml"), f"run_dir={tmp_path / 'run'}", "train.hang_minutes=0.05")
    other.join()
    assert done.returncode == 1
    assert f"rank 0 of 2 waited 3 s for the others at 127.0.0.1:{port} (train.hang_minutes)" in done.stderr


def test_collectives_keep_their_own_limit(monkeypatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with launch.process_group(0.05) as device:
        backend = dist.group.WORLD._get_backend(device)
        assert backend.options._timeout == dist.default_pg_timeout


def error_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What `hbp train` writes to standard error when it refuses, except for its notices (`hbp: …`, not an error)."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("hbp: error: ")
    return [line for line in lines if not re.match(r"(\S+ \S+ )?hbp: (?!error: )", line)]


def refused(job: Path, *overrides: str) -> list[str]:
    """Before any process is started."""
    return error_of(hbp_here("train", str(job / "cfg.yaml"), *overrides))


@pytest.fixture(scope="module")
def refused_by_ranks(job) -> list[str]:
    """An error that is found only while planning, inside the processes that `hbp train` started."""
    return error_of(hbp("train", str(job / "cfg.yaml"), "cluster.memory_gib=0.0001"))


def test_error_in_the_ranks_ends_the_command(refused_by_ranks):
    assert re.search(r"a pack of \d+ tokens needs .* over the budget", refused_by_ranks[-1])
    assert not any("Traceback" in line for line in refused_by_ranks)


def test_error_in_the_ranks_is_one_line(refused_by_ranks):
    assert len(refused_by_ranks) == 1, "\n".join(refused_by_ranks)


def test_broken_line_is_named(job):
    (message,) = refused(job, f"data.source={job / 'broken.jsonl'}", f"run_dir={job / 'other'}")
    assert message.startswith(f"hbp: error: {job / 'broken.jsonl'} line 4 is not JSON")


def test_plan_for_another_world(job):
    write_plan(plan_of([(0, 0, 0, 1, 0, [0, 1])], np.array([3, 4], np.int32), 4), job / "plan")
    (message,) = refused(job, f"plan.path={job / 'plan'}", f"run_dir={job / 'third'}")
    assert message == ("hbp: error: the plan was made for 4 ranks but 2 are running; make one with `hbp plan --gpus 2`")


def prepare_first(rank: int, world: int, failure: Exception | None) -> tuple[list[str], str]:
    done: list[str] = []
    try:
        with rank_zero_first() as first:
            if first:
                done.append("prepared")
                if failure:
                    raise failure
        done.append("went on")
    except Exception as error:
        return done, f"{type(error).__name__}: {error}"
    return done, ""


@pytest.mark.parametrize(
    ("failure", "here", "there"),
    [
        (None, "", ""),
        (HbpError("line 3 is broken"), "HbpError: line 3 is broken", "HbpError: line 3 is broken"),
        (OSError("disk full"), "OSError: disk full", "RankFailed: rank 0 failed (OSError); its own output says why"),
    ],
)
def test_rank_zero_first(failure: Exception | None, here: str, there: str) -> None:
    rest = [] if failure else ["went on"]
    assert run_ranks(prepare_first, WORLD, failure) == [(["prepared", *rest], here), (rest, there)]


def test_killed_rank_is_named_in_one_line_and_the_others_stop(job: Path) -> None:
    running = start(job, f"run_dir={job / 'killed'}")
    ranks = ranks_of(running, WORLD)
    time.sleep(0.5)
    os.kill(ranks[1], signal.SIGKILL)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "rank 1 was ended by SIGKILL" in errors[0]
    assert "Traceback" not in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_what_can_be_known_before_is_refused_before_data_are_prepared(job, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(job / "none"))
    run = f"run_dir={job / 'refused'}"
    mamba = write_config(job / "mamba", {"model_type": "mamba"})
    (line,) = refused(job, run, f"model.path={mamba}")
    assert line.startswith("hbp: error: mamba models have linear_attention layers, whose state would run from one doc")
    (line,) = refused(job, run, "log.wandb_project=packing")
    assert line.startswith("hbp: error: log.wandb_project needs ")
    assert not (job / "refused").exists()


def test_layers_are_compiled_on_cuda_where_a_compiler_is(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", "gcc-12")
    assert launch.compiles(None, cuda)
    assert not launch.compiles(None, cpu)
    assert not launch.compiles(False, cuda)
    assert launch.compiles(True, cpu)
    monkeypatch.delenv("CC")
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert not launch.compiles(None, cuda)
    assert launch.compiles(True, cuda)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_while_data_are_prepared_is_stopped_not_killed(number: signal.Signals) -> None:
    """The process died of it (143 for SIGTERM), which no scheduler takes for a run to be continued."""
    before = signal.getsignal(number)
    said = f"{number.name}: stopped before there was anything new to save"
    with pytest.raises(Stopped, match=said), stopped_by_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except Exception as error:  # as a record's errors are caught
            raise AssertionError("taken for an error of a record") from error
    assert signal.getsignal(number) == before


def test_a_signal_that_was_taken_for_something_else_is_not_lost() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stopped_by_signals(), suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_nohup_is_obeyed() -> None:
    """torchrun's known trap: its launcher and its ranks ended when the terminal closed, nohup or not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received, stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
        assert received() == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert "SIGHUP" not in handed_on("SIGTERM,SIGHUP") and "SIGTERM" in handed_on()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "SIGHUP" in handed_on()

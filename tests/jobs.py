"""Helpers of the tests that run whole jobs: a small data set, model and configuration in a folder."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from workers import CPU, LLAMA, write_config

from hbp.cli.main import main
from hbp.config import Config, load_config
from hbp.data.stdlib_sft import train_tokenizer
from hbp.errors import HbpError, Stopped
from hbp.run.job import run_job
from hbp.train.launch import Received

WORDS = ("pack", "rank", "step", "token", "plan", "group", "wait")


def write_job(folder: Path, samples: int = 130, **sections: dict[str, Any]) -> Path:
    """Data, tokenizer, model and ``cfg.yaml`` in a folder; about thirty steps on two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as out:
        for i in range(samples):
            said = " ".join(rng.choice(WORDS, 120 if i % 16 == 0 else int(rng.integers(3, 25))))
            turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}) + "\n")
    train_tokenizer(folder / "data.jsonl", folder / "tokenizer", vocab_size=320)
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": {"source": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer"), "eval_samples": 6},
        "model": {"path": write_config(folder / "model", {**LLAMA, "vocab_size": 320})},
        "cluster": {"profile": False},
        "plan": {"strategy": "hbp", "global_batch_tokens": 150},
        "train": {"lr": 1e-2, "save_steps": 2},
    }
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_here(rank: int, world: int, config: Config, stop_after: int | None = None) -> tuple[Any, str]:
    """For :func:`workers.run_ranks`: the whole job; the highest rank gets SIGTERM after some steps.

    Returns:
        The summary, or the error's message or what the run said when it was stopped; and standard error.
    """
    steps = 0

    def signalled(received: Received) -> int:
        nonlocal steps
        steps += 1
        return signal.SIGTERM if rank == world - 1 and steps == stop_after else received.number

    Received.__call__ = signalled  # type: ignore[method-assign]
    torch.manual_seed(1000 + rank)
    with redirect_stderr(io.StringIO()) as said:
        try:
            result: Any = run_job(config, CPU)
        except (Stopped, HbpError) as stop:
            result = str(stop)
    return result, said.getvalue()


def config_of(job: Path, *overrides: str) -> Config:
    """The job's configuration."""
    return load_config(job / "cfg.yaml", overrides)


def hbp(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A whole command, to its end, in processes of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "hbp", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def hbp_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """:func:`hbp` without a process of its own, which costs seconds: for what ends before ranks are started."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), said.getvalue())


def start(job: Path, *overrides: str, arguments: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`hbp train` in a process group of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [*arguments] or [sys.executable, "-m", "hbp"]
    return subprocess.Popen(
        [*command, "train", str(job / "cfg.yaml"), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ranks_of(launcher: subprocess.Popen[str], count: int) -> list[int]:
    """Process ids of the ranks that `hbp train` or torchrun started, once all are there."""
    deadline = time.monotonic() + 240  # on a busy machine
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while time.monotonic() < deadline:
        pids = [int(pid) for pid in children.read_text().split()]
        ranks = [pid for pid in pids if b"-m\0hbp\0train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if len(ranks) == count:
            return ranks
        time.sleep(0.05)
    raise TimeoutError(f"{count} ranks did not start")


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a ``steps.jsonl``."""
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

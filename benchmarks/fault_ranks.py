"""Ranks for `faults.py`: forked from a process that has imported everything, and what is done to them.

A rank counts the phases that it enters (:data:`PHASES`) in memory that it shares with the process that forked it,
which so knows when to kill it, and the faults that were injected into it, so that a mode that never bites shows. Hooks
are put on functions of the package by name: one that was renamed ends the benchmark before anything is measured.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import hbp.disk as disk
import hbp.report.page as page
import hbp.run.fit_memory as fit_memory
import hbp.run.job  # noqa: F401  imported once, by the process that ranks are forked from
import hbp.run.training as training
import hbp.train.checkpoint as checkpoint
import hbp.train.loop as loop
import hbp.train.watch as watch
from hbp.cli.main import main as hbp_main

PHASES: dict[str, tuple[Any, str]] = {
    "planning": (fit_memory, "write_and_read"),
    "loading": (training, "load_checkpoint"),
    "micro-step": (loop, "forward_backward"),
    "update": (loop, "_update"),
    "saving": (checkpoint._AtomicWriter, "write_data"),
    "end of a save": (checkpoint._AtomicWriter, "finish"),
    "evaluation": (training, "evaluate"),
    "export": (training, "export_model"),
    "report": (page, "write_report"),
}
"""Functions that a rank enters."""
INJECTED = len(PHASES)
"""Place of the count of injected faults beside those of the phases."""
MICRO_STEP_S = 0.02
"""Micro-steps take so much longer, as those of any real model would."""
OTHERS_END_S = 30.0
UNREADABLE = ("*.distcp", "position.json", "tensors.json", "steps.jsonl", "run.json", "samples.npy")
"""Files of which `read-errors` makes one unreadable for a whole attempt, now and then."""
PR_SET_PDEATHSIG = 1


@dataclass
class Attempt:
    """Ranks that are running, and what those that have ended ended with."""

    pids: list[int]
    log: Path
    counts: np.ndarray
    """``[rank, phase]``, and the faults injected last; shared with the ranks."""
    launcher: bool = False
    """When a rank has ended badly, end the others, as torchrun does; else they have to notice, as across machines."""
    codes: dict[int, int] = field(default_factory=dict)
    failed_at: float | None = None

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
                if self.codes[pid] not in (0, 85) and self.launcher and self.failed_at is None:
                    self.failed_at = time.monotonic()
                    self.send(signal.SIGTERM, range(len(self.pids)))
        if self.failed_at is not None and time.monotonic() - self.failed_at > OTHERS_END_S:
            self.send(signal.SIGKILL, range(len(self.pids)))
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether all have ended within this time; no longer than until something else is so."""
        end = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < end and not until():
            time.sleep(0.002)
        return self.poll()

    def entered(self, phase: str) -> int:
        """How often a phase was entered, by the rank that did so most often."""
        return int(self.counts[:, list(PHASES).index(phase)].max())

    def injected(self) -> int:
        """Faults, in all ranks."""
        return int(self.counts[:, INJECTED].sum())

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """A signal to those of these ranks that are running."""
        for pid in {self.pids[rank] for rank in ranks} - self.codes.keys():
            os.kill(pid, number)

    def result(self) -> list[int | None]:
        """Of each rank."""
        return [self.codes.get(pid) for pid in self.pids]


def start(arguments: Sequence[str], world: int, log: Path, mode: str, seed: int, run: Path) -> Attempt:
    """One attempt at a run, its ranks forked from here; they meet as those of torchrun do."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    counts = np.frombuffer(mmap.mmap(-1, 8 * world * (len(PHASES) + 1)), np.int64).reshape(world, -1)
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # none outlives the benchmark
            os.setpgid(0, 0)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            meet = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in meet.items()}}
            interfere(mode, random.Random(seed * 10 + rank), counts[rank], run)
            code = hbp_main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Attempt(pids, log, counts)


def interfere(mode: str, chance: random.Random, counts: np.ndarray, run: Path) -> None:
    """Count a rank's phases, and do to it what its mode does, before it begins."""
    watch.watch_others.__wrapped__.__defaults__ = (0.5, watch.SILENT_S)  # heartbeats as often as two steps take
    for number, (owner, name) in enumerate(PHASES.values()):
        _hook(owner, name, _counting(counts, number))
    _hook(loop, "forward_backward", lambda: time.sleep(MICRO_STEP_S))
    if mode == "slow-disk":
        _hook(FileSystemWriter, "write_data", lambda: _slowly(chance, counts))
    if mode == "full-disk":
        _hook(FileSystemWriter, "write_data", lambda: _failing(chance, 0.2, errno.ENOSPC, counts, run))
        _fail_files(run, "wax+", errno.ENOSPC, 0.01, chance, counts)
    if mode == "read-errors":
        disk.PAUSE_S = 0.05
        if chance.random() < 0.15:  # for good; else now and then, so that reading again helps
            _fail_files(run, "r", errno.EIO, 1.0, chance, counts, chance.choice(UNREADABLE))
        else:
            _fail_files(run, "r", errno.EIO, 0.05, chance, counts)


def _counting(counts: np.ndarray, number: int) -> Callable[[], None]:
    def count() -> None:
        counts[number] += 1

    return count


def _hook(owner: Any, name: str, before: Callable[[], None]) -> None:
    """Call `before` whenever a function of a module or class is entered."""
    plain = getattr(owner, name)

    def hooked(*args: Any, **options: Any) -> Any:
        before()
        return plain(*args, **options)

    setattr(owner, name, hooked)


def _slowly(chance: random.Random, counts: np.ndarray) -> None:
    counts[INJECTED] += 1
    time.sleep(chance.uniform(0, 0.6))


def _failing(chance: random.Random, share: float, number: int, counts: np.ndarray, path: Path) -> None:
    if chance.random() < share:
        counts[INJECTED] += 1
        raise OSError(number, os.strerror(number), str(path))


def _fail_files(
    run: Path, modes: str, number: int, share: float, chance: random.Random, counts: np.ndarray, name: str = "*"
) -> None:
    """Opening a file of the strategy's folder, or ``run.json``, fails with an error of the file system."""
    plain = pathlib.Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        ours = path.is_relative_to(run / "hbp") or path.name == "run.json"
        if ours and path.match(name) and set(mode) & set(modes):
            _failing(chance, share, number, counts, path)
        return plain(path, mode, *args, **options)

    pathlib.Path.open = opened  # type: ignore[assignment]
    load = np.load

    def loaded(path: Any, *args: Any, **options: Any) -> Any:
        if "r" in modes and isinstance(path, Path) and path.match(name) and path.is_relative_to(run / "hbp"):
            _failing(chance, share, number, counts, path)
        return load(path, *args, **options)

    np.load = loaded


def tear(run: Path, chance: random.Random) -> int:
    """Damage what a power cut may: the newest checkpoint (never the only one), ``run.json``, the end of the log.

    A half-written checkpoint is left there too. Returns how many files were damaged.
    """
    whole = checkpoint.list_checkpoints(run / "hbp" / "checkpoints")
    if not whole:
        return 0
    shutil.copytree(whole[0], whole[0].with_name(f"step-00009999{disk.PARTIAL}"), dirs_exist_ok=True)
    torn = [run / "run.json"] if chance.random() < 0.3 else []
    if len(whole) > 1:
        torn.append(chance.choice([path for path in sorted(whole[0].rglob("*")) if path.is_file()]))
    for file in torn:
        data = file.read_bytes()
        at = len(data) // 2
        file.write_bytes(chance.choice([data[:at], b"", data[:at] + bytes(len(data) - at)]))
    return len(torn)


@contextmanager
def one_thread() -> Iterator[None]:
    """What a process that forks must be: one thread, and no process group."""
    assert not dist.is_initialized()
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    yield

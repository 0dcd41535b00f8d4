"""Run a function in several local gloo processes on the CPU and return what each returned.

Processes fork from one server that has imported torch and transformers, so that a launch costs no imports. A failure in
one ends all and comes out with its traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

PRELOADED = ["hbp.train.loop", "transformers.models.auto.modeling_auto"]


def run_ranks(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 300,
    preloaded: Sequence[str] = PRELOADED,
) -> list[Any]:
    """``function(rank, world, *args)`` of a module's top level in `world` processes; what each returned.

    Args:
        function: of a module's top level.
        world: processes.
        args: more arguments; they are pickled, and so is what comes back.
        timeout: seconds after which all are ended.
        preloaded: modules that the server imports, when the first ranks of this process start.

    Raises:
        TimeoutError: they still ran then.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.set_forkserver_preload(list(preloaded))
    with TemporaryDirectory() as folder:
        context = start_processes(
            _rank_main, (world, folder, function, args, timeout), world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: ranks still run after {timeout} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank_main(
    rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...], timeout: float
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",  # a file: no port to collide on
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(rank, world, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()

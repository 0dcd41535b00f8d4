"""A trace of chosen steps by PyTorch's own profiler, for Perfetto or ``chrome://tracing``: one file a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule


@contextmanager
def trace(folder: Path, first: int, count: int) -> Iterator[Callable[[], None]]:
    """Trace `count` steps from step `first` on; the caller calls what is yielded at the end of every step.

    Args:
        folder: gets ``rank-0.json`` and so on when the last of them is over.
        first: steps to pass before, from where the run stands. One more before it warms the profiler up.
        count: steps in the trace; 0 for no trace.
    """
    if not count:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    warmup = min(1, first)

    def write(profiled: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(folder / f"rank-{dist.get_rank()}.json"))

    plan = schedule(wait=first - warmup, warmup=warmup, active=count, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiled:
        yield profiled.step

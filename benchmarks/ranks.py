"""Ranks of a benchmark: local processes that meet as torchrun's do, without the seconds that its launcher takes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping


def run_ranks(count: int, *arguments: str, environment: Mapping[str, str] = os.environ) -> None:
    """Run a Python script in `count` ranks, their output on standard error; when one fails, the others are stopped.

    Raises:
        SystemExit: a rank failed; its own output says why.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments], env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}, stdout=sys.stderr
        )
        for i in range(count)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
            time.sleep(0.05)
        failed = [i for i, rank in enumerate(ranks) if rank.returncode]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if failed:
        raise SystemExit(f"rank {failed[0]} of {arguments[0]} failed: its output is above")

"""``hbp``, and ``python -m hbp``, which torchrun starts: ``torchrun --nproc-per-node 8 -m hbp train config.yaml``."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def program() -> NoReturn:
    """Run the command line in this process and end it with the exit code.

    Where torch was loaded the process ends before the interpreter takes itself apart: one of torch's own threads (of
    gloo, of autograd) that lets go of its last tensor just then ends the process by SIGABRT, and a run that saved and
    stopped looks like a fault (https://github.com/pytorch/pytorch/issues/190489).
    """
    ended: list[int] = []
    atexit.register(_end, ended)  # the first one registered runs last, when all threads of Python's own are joined
    from hbp.cli.main import main

    ended.append(main())
    sys.exit(ended[0])


def _end(ended: list[int]) -> None:
    if ended and "torch" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # nobody reads, or closed
                stream.flush()
        os._exit(ended[0])


if __name__ == "__main__":
    program()

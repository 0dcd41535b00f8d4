"""Signals that ask a run to save and end: SIGTERM from a scheduler or a user, SIGUSR1 from SLURM before its limit.

The handler only notes the signal. Every rank reports what it has received with the numbers that are gathered at the end
of each step anyway, so that all ranks learn of it at the same step, whichever of them got it, at no cost.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class Received:
    """The last signal that this process got, 0 for none."""

    number = 0

    def __call__(self) -> int:
        """The signal's number."""
        return self.number

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        self.number = number


@contextmanager
def stop_signals() -> Iterator[Received]:
    """Note :data:`STOPPING` signals while the body runs instead of dying of them."""
    received = Received()
    before = {number: signal.signal(number, received.note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Progress for people, on standard error: a bar on a terminal, a line every few seconds elsewhere. Rank 0 only."""

from __future__ import annotations

import datetime
import os
import sys
import time
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_S = 5.0
QUIET = {
    "KINETO_LOG_LEVEL": "99",  # the memory profiler's own chatter
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # and warnings of torch that say nothing to users
}
"""Environment in which torch, once it is loaded, says nothing of its own on standard error."""


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """One line for people; of a rank, whose lines make the log of a run, with the time before it."""
    if _speaks():
        with suppress(OSError):  # a log that nobody reads, or that finds no space, is no reason to end a run
            print(f"{time_stamp()}hbp: {line}", file=sys.stderr, flush=True)


def time_stamp() -> str:
    """Local time to the second and a blank, in a rank; nothing elsewhere."""
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S ") if "RANK" in os.environ else ""


class Progress:
    """``with Progress("training", total) as p: p.advance("step 3 loss 2.1", tokens)``."""

    def __init__(self, name: str, total: float) -> None:
        self.name, self.total, self.done = name, total, 0.0
        self.began = self.said = time.monotonic()
        self.bar: Bar | None = None
        if _speaks() and sys.stderr.isatty():
            self.bar = Bar(
                TextColumn("{task.fields[name]:>8}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=total, name=name)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def advance(self, text: str, by: float = 1.0) -> None:
        """Say what was done, and how much of the total it was."""
        self.done += by
        if self.bar:
            self.bar.update(self.task, advance=by, description=text)
            return
        now = time.monotonic()
        if self.done and (now - self.said >= LINE_EVERY_S or self.done >= self.total):
            left = (now - self.began) / self.done * (self.total - self.done)
            say(f"{self.name} {self.done / self.total:4.0%}  {text}  {left:.0f} s left")
            self.said = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            with suppress(OSError):  # the terminal may be gone
                self.bar.stop()


class Counter:
    """A line every few seconds: the count so far, its rate and, where the share that is done is known, what is left."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit, self.done = name, unit, 0
        self.began = self.said = time.monotonic()

    def __enter__(self) -> Counter:
        return self

    def advance(self, by: int = 1, share: float | None = None) -> None:
        """Count what was done; `share` of all there is to do, 0 to 1, is then done."""
        self.done += by
        now = time.monotonic()
        if now - self.said >= LINE_EVERY_S:
            left = f", {(now - self.began) * (1 - share) / share:,.0f} s left" if share else ""
            say(f"{self.name}: {self.done:,} {self.unit}, {self.done / (now - self.began):,.0f} a second{left}")
            self.said = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.said = time.monotonic()

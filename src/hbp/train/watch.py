"""Notice that another rank has failed, died or hangs, and end too.

On one machine the launcher sees a rank die. Across machines nobody does: the ranks of the other machines wait in a
collective until its time limit of many minutes. So from the first byte that is loaded to the exported model a thread of
every rank writes a heartbeat into the store through which the ranks met, looks whether anyone has reported a failure
there, and listens to the heartbeat of the next rank. Three small messages a rank every few seconds, none of them on the
way of training.

The thread of a rank that hangs (a dead file system, a deadlock) lives on. So the heartbeat says how far the main thread
is: step and micro-step. Where ranks stand still for long in the midst of a step, but not all at the same place, those
behind are the ones that the others wait for; rank 0 looks and names them. Ranks that all stand at the same place (a
kernel that does not end) cannot be told apart, and outside of steps (loading, evaluation, saving, export) nobody knows
how long a rank may take: there only the collective's own limit ends the job.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from hbp.errors import HbpError, RankFailed, Stopped, report_to_parent

INTERVAL_S = 3.0
SILENT_S = 40.0
"""A rank that is not heard of for so long is given up."""
PATIENCE_S = 2.0
"""How long a rank that failed waits for another that is to blame to report itself."""
FAILED = "failed"
ENDED = "ended"
QUIET = "quiet"
STORE_GONE = (RuntimeError, OSError)


@dataclass(frozen=True)
class _Place:
    """Where the main thread is."""

    step: int
    entered: int
    """Micro-steps of the step that it has entered."""
    limit_s: float
    """How long it may stand there."""
    since: float


class Watch:
    """One rank's end of the line."""

    def __init__(self, store: PrefixStore, rank: int, world_size: int, interval: float, silent: float) -> None:
        self.store, self.rank, self.world_size, self.next = store, rank, world_size, (rank + 1) % world_size
        self.interval, self.silent = interval, silent
        self.place: _Place | None = None
        self.quiet = False
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def report(self, message: str, patience: float = PATIENCE_S) -> str | None:
        """Tell the others that this rank failed; returns what another rank reported before, if one did.

        A rank whose collective broke cannot know who is to blame, so every rank first gives the others a moment.
        """
        until = time.monotonic() + patience
        while (earlier := self._get(FAILED)) is None and time.monotonic() < until:
            time.sleep(0.1)
        if earlier is None:
            self._set(FAILED, message)
        return earlier

    def end(self) -> None:
        """All is over here; silence from now on is no alarm."""
        self.over.set()
        self.thread.join()
        with suppress(*STORE_GONE):
            self._set(f"alive/{self.rank}", ENDED)

    def _set(self, key: str, value: str) -> None:
        with self.lock:
            self.store.set(key, value)

    def _get(self, key: str) -> str | None:
        with self.lock:
            return self.store.get(key).decode() if self.store.check([key]) else None

    def beat(self, count: int) -> None:
        """Write a heartbeat."""
        place = self.place
        at = f" {place.step} {place.entered}" if place else ""
        self._set(f"alive/{self.rank}", QUIET if self.quiet else f"{count}{at}")

    def _listen(self) -> None:
        count, heard, since = 0, None, time.monotonic()
        while not self.over.wait(self.interval):
            try:
                self.beat(count := count + 1)
                now = self._get(f"alive/{self.next}")
                if now != heard or now in (ENDED, QUIET):
                    heard, since = now, time.monotonic()
                if time.monotonic() - since > self.silent:
                    self.report(f"rank {self.next} has not been heard of for {self.silent:.0f} s")
                elif (hangs := self._who_hangs()) is not None:
                    self.report(hangs, patience=0)
                failure = self._get(FAILED)
            except STORE_GONE:
                failure = "the machine that the ranks met through is gone"
            if failure is not None and not self.over.wait(PATIENCE_S):  # rather by its own failure, if it notices
                print(f"hbp: rank {self.rank} ends: {failure}", file=sys.stderr, flush=True)
                report_to_parent(RankFailed(failure))
                os._exit(1)

    def _who_hangs(self) -> str | None:
        """The ranks behind the others, if ranks stand still in a step for longer than they may; rank 0 looks."""
        place = self.place
        if self.rank or place is None or time.monotonic() - place.since <= place.limit_s:
            return None
        with self.lock:
            beats = self.store.multi_get([f"alive/{rank}" for rank in range(self.world_size)])
        places = [tuple(map(int, beat.split()[1:])) for beat in beats]
        lowest = min(places)
        if not lowest or lowest == max(places):  # some rank is outside of steps, or all wait at the same place
            return None
        behind = [rank for rank, at in enumerate(places) if at == lowest]
        who = "rank " + str(behind[0]) if len(behind) == 1 else f"ranks {', '.join(map(str, behind[:8]))}"
        more = f", … {len(behind)} in all" if len(behind) > 8 else ""
        step, entered = lowest
        return (
            f"{who}{more} {'hangs' if len(behind) == 1 else 'hang'} in step {step} after entering {entered} of its "
            f"micro-steps: the others have waited for {place.limit_s:.0f} s (train.hang_minutes)"
        )


_current: Watch | None = None


def current() -> Watch | None:
    """The watch of this process, while there is one."""
    return _current


def enter(step: int, entered: int, limit_s: float) -> None:
    """Say that this rank has entered so many micro-steps of a step, and may stand there for `limit_s` seconds."""
    if _current:
        _current.place = _Place(step, entered, limit_s, time.monotonic())


def leave() -> None:
    """Say that this rank is outside of steps."""
    if _current:
        _current.place = None


@contextmanager
def silence_is_fine() -> Iterator[None]:
    """While the body runs, which may keep the heartbeat's thread from running for as long as it takes."""
    watch = _current
    if watch is None:
        yield
        return
    watch.quiet = True
    with suppress(*STORE_GONE):
        watch.beat(0)
    try:
        yield
    finally:
        watch.quiet = False


def _broke_off(error: BaseException) -> bool:
    """Whether an error is a collective's, which fails where another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def watch_others(interval: float = INTERVAL_S, silent: float = SILENT_S) -> Iterator[Watch | None]:
    """Watch the other ranks while the body runs; None where there are none or no store was given by a launcher."""
    if dist.get_world_size() == 1 or "MASTER_ADDR" not in os.environ:
        yield None
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=silent))
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(PrefixStore(f"hbp/watch/{run}", store), dist.get_rank(), dist.get_world_size(), interval, silent)
    global _current
    _current = watch
    try:
        yield watch
    except Stopped:  # all ranks end alike
        raise
    except BaseException as error:
        patience = 0.0 if isinstance(error, HbpError) else PATIENCE_S  # it is no other rank's doing
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        earlier: str | None = f"the rank that the others met through is gone ({said})"
        with suppress(*STORE_GONE):
            earlier = watch.report(f"rank {watch.rank} failed: {said}", patience)
        if earlier is not None and _broke_off(error):
            raise RankFailed(f"rank {watch.rank} ends, since {earlier}") from error
        raise
    finally:
        _current = None
        watch.end()

"""Notice that another rank has failed, died or hangs, and end too, within a minute.

On one machine the launcher sees a rank die. Across machines nobody does: the ranks of the other machines wait in a
collective until its time limit of many minutes. So while a plan is trained, a thread of every rank writes a heartbeat
into the store through which the ranks met, looks whether anyone has reported a failure there, and listens to the
heartbeat of the next rank. Three small messages a rank every few seconds, none of them on the way of training.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

INTERVAL_S = 3.0
SILENT_S = 40.0
"""A rank that is not heard of for so long is given up."""
PATIENCE_S = 2.0
"""How long a rank that failed waits for another that is to blame to report itself."""
FAILED = "failed"
ENDED = "ended"
STORE_GONE = (RuntimeError, OSError)


class Watch:
    """One rank's end of the line."""

    def __init__(self, store: PrefixStore, rank: int, world_size: int, interval: float, silent: float) -> None:
        self.store, self.rank, self.next = store, rank, (rank + 1) % world_size
        self.interval, self.silent = interval, silent
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def report(self, message: str) -> str | None:
        """Tell the others that this rank failed; returns what another rank reported before, if one did.

        A rank whose collective broke cannot know who is to blame, so every rank first gives the others a moment.
        """
        until = time.monotonic() + PATIENCE_S
        while (earlier := self._get(FAILED)) is None and time.monotonic() < until:
            time.sleep(0.1)
        if earlier is None:
            self._set(FAILED, message)
        return earlier

    def end(self) -> None:
        """Training is over here; silence from now on is no alarm."""
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

    def _listen(self) -> None:
        beat, heard, since = 0, None, time.monotonic()
        while not self.over.wait(self.interval):
            try:
                self._set(f"alive/{self.rank}", str(beat := beat + 1))
                now = self._get(f"alive/{self.next}")
                if now != heard or now == ENDED:
                    heard, since = now, time.monotonic()
                if time.monotonic() - since > self.silent:
                    self.report(f"rank {self.next} has not been heard of for {self.silent:.0f} s")
                failure = self._get(FAILED)
            except STORE_GONE:
                failure = "the machine that the ranks met through is gone"
            if failure is not None and not self.over.wait(PATIENCE_S):  # rather by its own failure, if it notices
                print(f"hbp: rank {self.rank} ends: {failure}", file=sys.stderr, flush=True)
                os._exit(1)


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
    try:
        yield watch
    except BaseException as error:
        with suppress(*STORE_GONE):
            watch.report(f"rank {watch.rank} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    finally:
        watch.end()

"""When the state of a run is saved, and what becomes of a save that fails.

The checkpoint before a save that failed is still there. The next save takes its place with the state of then, after a
while; where a rank was killed meanwhile, its launcher ends the others in that time and names it. Saves that go on
failing end the run, with what was saved before. A state that is not finite is never saved.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass

from hbp.config import TrainConfig
from hbp.errors import HbpError, RankFailed
from hbp.progress import say
from hbp.train.checkpoint import Checkpoints, Position, list_checkpoints
from hbp.train.loop import Learner, not_finite

SAVE_TRIES = 3
"""Saves that may fail in a job before it ends,"""
SAVE_AGAIN_S = 2.0
"""and how long the first is waited for."""


@dataclass
class Saving:
    """The checkpoints of a run, and when the state was last saved."""

    checkpoints: Checkpoints
    run_step: int
    part_s: float = 0.0
    """Seconds of the part."""
    failed: int = 0
    """Saves that failed in this job."""

    def due(self, config: TrainConfig, at: Position, part_s: float) -> bool:
        """By steps or by time."""
        by_steps = config.save_steps is not None and at.run_step % config.save_steps == 0
        return by_steps or (config.save_minutes is not None and part_s - self.part_s >= 60 * config.save_minutes)

    def save(self, learner: Learner, at: Position, part_s: float) -> None:
        """In the background, unless this state is saved already; after a save that failed, this one takes its place.

        Raises:
            RankFailed: saves went on failing, or a parameter is not finite.
        """
        if at.run_step != self.run_step:
            self._try(learner, at)
        self.run_step, self.part_s = at.run_step, part_s

    def save_now(self, learner: Learner, at: Position, part_s: float) -> None:
        """The same, and wait until it is whole on disk; what failed is tried again, with this state."""
        self.save(learner, at, part_s)
        while True:
            try:
                self.checkpoints.wait()
                return
            except HbpError as error:
                self._failed(error)
            self._try(learner, at)

    def _try(self, learner: Learner, at: Position) -> None:
        if bad := not_finite(learner.model.named_parameters(), learner.device):
            with suppress(HbpError):
                self.checkpoints.wait()  # the state before may still be on its way
            saved = list_checkpoints(self.checkpoints.folder)
            before = f"the state before is in {saved[0]}" if saved else "no state was saved before"
            raise RankFailed(
                f"after step {at.run_step} of the run {bad[0]} holds values that are not finite, and is not saved; "
                f"lower train.lr; {before}"
            )
        while True:
            try:
                self.checkpoints.save(learner.model, learner.optimizer, at)  # waits for the one before
                return
            except HbpError as error:
                self._failed(error)

    def _failed(self, error: HbpError) -> None:
        """Once more for all ranks alike, after a while; a launcher ends them meanwhile if one of them was killed."""
        self.failed += 1
        if self.failed > SAVE_TRIES:
            raise RankFailed(str(error)) from None
        say(f"{error}; trying again ({self.failed} of {SAVE_TRIES})")
        time.sleep(SAVE_AGAIN_S * self.failed)

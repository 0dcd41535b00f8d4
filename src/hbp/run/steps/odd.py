"""Steps whose numbers are odd: skipped ones, whose loss or gradients were not finite, and spikes of the loss.

A skipped step changes no parameter. It is said with its packs and samples, what is known of it is kept in
``odd-steps/`` of the strategy's folder, and ``train.max_skipped`` of them in a row end the run with the last state that
was saved, from before them. A spike is only said: a loss that stands out from those of the steps before by six times
their spread (the median distance from the median, as a standard deviation), with the packs that it came from.

The state is the same on every rank, since the losses are; rank 0 speaks and writes.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from hbp.errors import RankFailed
from hbp.progress import say
from hbp.run.resume import Part
from hbp.run_log import StepRecord
from hbp.train.loop import StepLosses

FOLDER = "odd-steps"
HISTORY = 64
"""Steps before that a loss is compared with,"""
LEAST = 16
"""if there are so many."""
SPREADS = 6.0
LEAST_RISE = 0.1
"""Share of the median that a spike is at least above it."""
SHOWN_PACKS, SHOWN_SAMPLES = 3, 6


@dataclass
class OddSteps:
    """What a run has seen of odd steps so far."""

    folder: Path
    """Of the strategy."""
    most_in_a_row: int
    before: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    in_a_row: int = 0
    latest: StepLosses | None = None
    """Of the step that is at hand."""

    @classmethod
    def of(cls, folder: Path, most_in_a_row: int, records: Iterable[StepRecord]) -> OddSteps:
        """Args: `records` of the steps that are done, the same on every rank."""
        odd = cls(folder, most_in_a_row)
        for record in records:
            odd._count(record)
        return odd

    def look(self, losses: StepLosses) -> None:
        """Keep the losses of a step's packs until its record comes."""
        self.latest = losses

    def check(self, part: Part, record: StepRecord, run_step: int, saved: Callable[[], str]) -> None:
        """Say what is odd about a step.

        Args:
            part: of the step.
            record: of the step.
            run_step: steps of the run that are done, with it.
            saved: says where the last state is kept, once it is whole; asked where the run ends.

        Raises:
            RankFailed: too many steps in a row were skipped; on every rank.
        """
        losses, spread = self.latest, self._spike(record.loss)
        self._count(record)
        if losses is None:
            return
        if record.skipped:
            packs = _packs_to_blame(losses, part)
            said = f"step {run_step} of the run was skipped: {record.skipped}; {_named(packs)}"
            evidence = self._keep(losses, part, record, run_step)
            say(f"{said}; kept in {evidence}")
            if self.in_a_row >= self.most_in_a_row:
                raise RankFailed(
                    f"{self.in_a_row} steps in a row were not finite (train.max_skipped), the last: {said}; "
                    f"see {evidence.parent}, lower train.lr or take the samples out; {saved()}"
                )
        elif spread is not None:
            median = float(np.median(self.before))
            packs = _by_mean_loss(losses, part)
            say(
                f"loss {record.loss:.3f} in step {run_step} of the run stands out from the {median:.3f} of those "
                f"before: {_named(packs)}"
            )

    def _count(self, record: StepRecord) -> None:
        self.in_a_row = self.in_a_row + 1 if record.skipped else 0
        if record.loss is not None:
            self.before.append(record.loss)

    def _spike(self, loss: float | None) -> float | None:
        """How far a loss is above those before, in their spreads, if it is a spike."""
        if loss is None or len(self.before) < LEAST:
            return None
        known = np.array(self.before)
        median = float(np.median(known))
        spread = max(1.4826 * float(np.median(np.abs(known - median))), 1e-9)
        rise = loss - median
        return rise / spread if rise > SPREADS * spread and rise > LEAST_RISE * abs(median) else None

    def _keep(self, losses: StepLosses, part: Part, record: StepRecord, run_step: int) -> Path:
        """Rank 0 writes what is known of a skipped step; the file's path."""
        path = self.folder / FOLDER / evidence_name(run_step)
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            evidence = {
                "problem": record.skipped,
                "run_step": run_step,
                "part": part.number,
                "step": record.step,
                "lr": record.lr,
                "gradients_not_finite": list(losses.gradients),
                "packs": [
                    {"row": row, "loss": _shown(loss), "samples": _samples(part, row)}
                    for row, loss in zip(losses.rows, losses.losses, strict=True)
                ],
            }
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(evidence, indent=1, allow_nan=False) + "\n")
            partial.rename(path)
        return path


def evidence_name(run_step: int) -> str:
    """The file in :data:`FOLDER` on a step that was skipped."""
    return f"step-{run_step:08d}.json"


def _shown(loss: float) -> float | str:
    """JSON knows no infinity."""
    return loss if math.isfinite(loss) else str(loss)


def _samples(part: Part, row: int) -> list[int]:
    """The token store's ids of a pack's samples."""
    ids: list[int] = part.samples.ids[part.plan.samples(row)[0]].tolist()
    return ids


Pack = tuple[int, list[int], float | None]
"""Row, samples, and its mean loss if that is known"""


def _packs_to_blame(losses: StepLosses, part: Part) -> list[Pack]:
    """Those whose loss is not finite; all of the step where only gradients are not."""
    bad = [row for row, loss in zip(losses.rows, losses.losses, strict=True) if not math.isfinite(loss)]
    return [(row, _samples(part, row), None) for row in bad or losses.rows]


def _by_mean_loss(losses: StepLosses, part: Part) -> list[Pack]:
    """The packs of a step with something to learn, those first whose tokens have the highest loss."""
    targets = [int(part.samples.loss_tokens[part.plan.samples(row)[0]].sum()) for row in losses.rows]
    rows = [item for item in zip(losses.rows, losses.losses, targets, strict=True) if item[2]]
    total = sum(targets)
    found: list[Pack] = [(row, _samples(part, row), loss * total / own) for row, loss, own in rows]
    return sorted(found, key=lambda pack: -(pack[2] or 0.0))


def _named(packs: Sequence[Pack]) -> str:
    shown = "; ".join(_pack(*pack) for pack in packs[:SHOWN_PACKS])
    more = f"; … {len(packs)} packs in all" if len(packs) > SHOWN_PACKS else ""
    return shown + more


def _pack(row: int, samples: Sequence[int], loss: float | None) -> str:
    names = ", ".join(map(str, samples[:SHOWN_SAMPLES]))
    more = f", … {len(samples)} in all" if len(samples) > SHOWN_SAMPLES else ""
    of = "" if loss is None else f", {loss:.3f} a token"
    return f"pack {row} (samples {names}{more}{of})"


def finite_or_none(values: Any) -> Any:
    """The same numbers, lists and dicts with None for what JSON cannot say."""
    if isinstance(values, float):
        return values if math.isfinite(values) else None
    if isinstance(values, dict):
        return {key: finite_or_none(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite_or_none(value) for value in values]
    return values

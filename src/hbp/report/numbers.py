"""What a run or plan folder holds, and what of it a report says: the numbers of ``report.json``.

Reads what `hbp train` left in a run folder (:mod:`hbp.run.job` says what), or a plan folder alone; whatever is there,
so that a run which is still going, or was killed, is told as far as it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError
from hbp.plan import JSON_NAME, Plan, batch_not_kept, read_plan
from hbp.report.lanes import shared_waiting
from hbp.run_log import EvalRecord, StepRecord, read_log
from hbp.simulator import Simulation, rank_use, simulate, step_seconds

DISTURBED = 0.1
"""Share of the time that no rank works, from which a measurement is no comparison. A quiet machine has up to .03."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run that followed one plan: an epoch, or what was left of one when the number of ranks changed."""

    plan: Plan
    epoch: int
    steps: list[StepRecord]
    """The lines of its log."""
    predicted_s: float
    """Of the steps that were taken, or, of the last stretch, of all."""


@dataclass(frozen=True)
class Part:
    """One strategy of a run. What is drawn and predicted is its first plan."""

    folder: Path
    """Of the plan."""
    plan: Plan
    simulation: Simulation
    parts: Mapping[str, float]
    """Seconds of each part of the mean rank's time."""
    stretches: list[Stretch]
    evaluations: list[EvalRecord]
    """The lines of the log of its held-out losses."""
    result: Mapping[str, Any] | None

    @property
    def steps(self) -> list[StepRecord]:
        """Of all stretches."""
        return [step for stretch in self.stretches for step in stretch.steps]


@dataclass(frozen=True)
class Run:
    """All that a folder holds."""

    folder: Path
    parts: list[Part]
    """In the order of the results."""
    summary: Mapping[str, Any]
    profile: Mapping[str, Any] | None
    lengths: npt.NDArray[np.integer]
    """Of the data set, or of what the first plan holds of it."""


def read_run(target: Path) -> Run:
    """A folder written by `hbp train` or `hbp plan`.

    Raises:
        HbpError: the folder holds neither a run nor a plan, plans that cannot be compared, or a damaged file.
    """
    if not target.is_dir():
        raise HbpError(f"no folder {target}; give one that `hbp train` or `hbp plan` wrote")
    summary = _json(target / "summary.json") or {}
    results = {r["strategy"]: r for r in summary.get("results", [])}
    folders = [target] if (target / JSON_NAME).is_file() else sorted(target.glob(f"*/plan/{JSON_NAME}"))
    folders = [f if f.is_dir() else f.parent for f in folders]
    if not folders:
        raise HbpError(f"{target} holds neither a run nor a plan; make one with `hbp train` or `hbp plan`")
    parts = [_part(folder, results) for folder in folders]
    made_for = {(p.plan.info.lengths_sha256, p.stretches[-1].plan.info.world_size) for p in parts}
    if len(made_for) > 1:
        raise HbpError(f"{target} holds plans for different data or world sizes; report them one by one")
    order = list(results)
    parts.sort(key=lambda p: order.index(p.plan.info.strategy) if p.plan.info.strategy in order else len(order))
    lengths = parts[0].plan.lengths
    if (target / "lengths.npy").is_file():
        lengths = np.load(target / "lengths.npy")
    return Run(target, parts, summary, _json(target / "profile.json"), lengths)


def _part(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> Part:
    plan = read_plan(folder)
    if not plan.n_packs:
        raise HbpError(f"the plan {folder} holds no packs, so there is nothing to report")
    more = folder.parent.glob(f"part-*/plan/{JSON_NAME}") if folder.name == "plan" else ()
    later = sorted((f.parent for f in more), key=lambda f: int(f.parent.name[len("part-") :]))
    plans = [(folder, plan), *((f, read_plan(f)) for f in later)]
    stretches = []
    for f, p in plans:
        steps = read_log(f.parent, StepRecord) if folder.name == "plan" else []
        seconds = step_seconds(p) if f is plans[-1][0] else step_seconds(p)[: len(steps)]
        epoch = (_json(f.parent / "part.json") or {}).get("epoch", 0)
        stretches.append(Stretch(p, epoch, steps, float(seconds.sum())))
    evaluations = read_log(folder.parent, EvalRecord) if folder.name == "plan" else []
    result = results.get(plan.info.strategy)
    return Part(folder, plan, simulate(plan), rank_use(plan).mean_parts(), stretches, evaluations, result)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HbpError(f"cannot read {path} ({error}); remove it or run `hbp train` again") from None


def numbers_of(run: Run) -> dict[str, Any]:
    """The numbers of a report, plain data."""
    parts, summary, profile = run.parts, run.summary, run.profile
    first = parts[0].plan.info
    return {
        "name": run.folder.resolve().name,
        "strategies": [_strategy(part) for part in parts],
        "speedup": summary.get("speedup"),
        "predicted_speedup": _predicted_speedup(parts),
        "memory_budget_bytes": summary.get("memory_budget_bytes") or first.cluster.get("memory_bytes"),
        "baseline_trials": summary.get("baseline_trials", []),
        "world_size": parts[0].stretches[-1].plan.info.world_size,
        "device": profile["device"] if profile else first.cluster.get("device", ""),
        "cost_origin": first.cost_model.get("origin", ""),
        "median_error": profile["median_error"] if profile else None,
        "profile_points": len(profile["points"]) if profile else 0,
        "samples": first.n_samples,
        "tokens": first.n_tokens,
        "dropped": [{"sample_id": sample, "reason": reason} for sample, reason in first.dropped],
        "seed": first.seed,
        "lengths_sha256": first.lengths_sha256,
        "settings": dict(first.settings),
    }


def _strategy(part: Part) -> dict[str, Any]:
    info, done = part.plan.info, part.result or {}
    groups, index = part.plan.groups_of_rows()
    packs = np.bincount(index, minlength=len(groups))
    tokens = np.bincount(index, weights=part.plan.tokens(), minlength=len(groups)).astype(np.int64)
    numbers = {
        "strategy": info.strategy,
        "groups": [
            asdict(group) | {"packs": int(p), "tokens": int(t)}
            for group, p, t in zip(groups, packs, tokens, strict=True)
        ],
        "metrics": dict(info.metrics),
        "batch_not_kept": batch_not_kept(part.plan),
        "predicted": part.simulation.to_json(),
        "parts": dict(part.parts),
        "steps_done": len(part.steps),
        "tokens_done": sum(step.tokens for step in part.steps),
        "predicted_s": sum(stretch.predicted_s for stretch in part.stretches),
        "stretches": [_stretch(stretch) for stretch in part.stretches],
        **{name: done.get(name) for name in MEASURED},
        "busy": _busy(part),
    }
    shared = shared_waiting(part.steps)
    return numbers if shared is None else numbers | {"shared_waiting": shared, "disturbed": shared > DISTURBED}


MEASURED = ("tokens_per_s", "seconds", "final_train_loss", "eval_loss", "peak_bytes")
"""Of a result, in the page."""


def _stretch(stretch: Stretch) -> dict[str, Any]:
    info, steps = stretch.plan.info, stretch.steps
    tokens, seconds = sum(step.tokens for step in steps), sum(step.seconds for step in steps)
    return {
        "epoch": stretch.epoch,
        "world_size": info.world_size,
        "samples": len(stretch.plan.sample_ids),
        "steps": stretch.plan.n_steps,
        "steps_done": len(steps),
        "tokens": tokens,
        "seconds": seconds,
        "predicted_s": stretch.predicted_s,
        "tokens_per_s": sum(step.tokens for step in steps if not step.lost) / seconds if seconds else None,
        "loss": steps[-1].loss if steps else None,
    }


def _busy(part: Part) -> float | None:
    """Measured share of the micro-steps' time that ranks worked."""
    wall = sum(step.mean_wall_s for step in part.steps)  # not in an earlier version's log
    return sum(step.mean_busy_s for step in part.steps) / wall if wall else None


def _predicted_speedup(parts: list[Part]) -> float | None:
    if len(parts) < 2 or not parts[1].simulation.tokens_per_s:
        return None
    if parts[0].plan.info.world_size != parts[1].plan.info.world_size:  # it changed, and the other came after that
        return None
    return parts[0].simulation.tokens_per_s / parts[1].simulation.tokens_per_s

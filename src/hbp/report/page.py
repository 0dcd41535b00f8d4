"""One self-contained HTML page about a run or a plan, and the same numbers as JSON beside it.

Reads what `hbp train` left in a run folder (:mod:`hbp.run.job` says what), or a plan folder alone; draws whatever is
there, so the page of a run that is still going, or was killed, shows how far it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from hbp.errors import HbpError
from hbp.plan import JSON_NAME, Group, Plan, read_plan
from hbp.report import figures
from hbp.report.explorer import explorer_data, measured_lane, predicted_lane, window
from hbp.report.figures import Lane
from hbp.simulator import Simulation, rank_use, simulate, step_seconds

DRAWN_RANKS = 16
DRAWN_MICRO_STEPS = 240


@dataclass(frozen=True)
class Report:
    """What was written."""

    html: Path
    numbers: dict[str, Any]


@dataclass(frozen=True)
class _Stretch:
    """A part of a run that followed one plan: an epoch, or what was left of one when the number of ranks changed."""

    plan: Plan
    epoch: int
    steps: list[dict[str, Any]]
    """The lines of its log."""
    predicted_s: float
    """Of the steps that were taken, or, of the last stretch, of all."""


@dataclass(frozen=True)
class _Part:
    """One strategy of a run. What is drawn and predicted is its first plan."""

    plan: Plan
    simulation: Simulation
    parts: Mapping[str, float]
    """Seconds of each part of the mean rank's time."""
    stretches: list[_Stretch]
    result: Mapping[str, Any] | None

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Of all stretches."""
        return [step for stretch in self.stretches for step in stretch.steps]


def write_report(target: Path, out: Path | None = None) -> Report:
    """Write the page of a run or plan folder; ``report.json`` and ``timelines.svg`` go beside it.

    Args:
        target: a folder written by `hbp train` or `hbp plan`.
        out: the page; ``report.html`` in the folder if None.

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
    profile = _json(target / "profile.json")
    numbers = _numbers(target, parts, summary, profile)
    out = out or target / "report.html"
    groups, lanes, explorer = _timelines(parts)
    pictures = _pictures(target, parts, groups, lanes, profile)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"count": lambda x: f"{x:,.0f}", "gib": lambda x: f"{x / 2**30:.3f}", "percent": _percent}
    page = environment.get_template("page.html").render(
        **numbers,
        pictures={name: Markup(svg) for name, svg in pictures.items()},
        explorer=Markup(json.dumps(explorer).replace("<", "\\u003c")),
        explorer_script=Markup(Path(__file__).with_name("explorer.js").read_text()),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    out.with_name("report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    out.with_name("timelines.svg").write_text(figures.standalone(pictures["timelines"]))
    return Report(out, numbers)


def _part(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> _Part:
    plan = read_plan(folder)
    more = folder.parent.glob(f"part-*/plan/{JSON_NAME}") if folder.name == "plan" else ()
    later = sorted((f.parent for f in more), key=lambda f: int(f.parent.name[len("part-") :]))
    plans = [(folder, plan), *((f, read_plan(f)) for f in later)]
    stretches = []
    for f, p in plans:
        steps = _steps(f.parent / "steps.jsonl") if folder.name == "plan" else []
        seconds = step_seconds(p) if f is plans[-1][0] else step_seconds(p)[: len(steps)]
        epoch = (_json(f.parent / "part.json") or {}).get("epoch", 0)
        stretches.append(_Stretch(p, epoch, steps, float(seconds.sum())))
    return _Part(plan, simulate(plan), rank_use(plan).mean_parts(), stretches, results.get(plan.info.strategy))


def _steps(log: Path) -> list[dict[str, Any]]:
    steps = []
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            steps.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed while it wrote
            break
    return steps


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise HbpError(f"cannot read {path} ({error}); remove it or run `hbp train` again") from None


def _numbers(
    target: Path, parts: list[_Part], summary: Mapping[str, Any], profile: Mapping[str, Any] | None
) -> dict[str, Any]:
    strategies = []
    for part in parts:
        info, done = part.plan.info, part.result
        tokens_per_s = done["tokens_per_s"] if done else None
        strategies.append(
            {
                "strategy": info.strategy,
                "groups": [
                    asdict(g) | {"packs": _packs(part.plan, g), "tokens": _tokens(part.plan, g)} for g in info.groups
                ],
                "metrics": dict(info.metrics),
                "predicted": part.simulation.to_json(),
                "parts": dict(part.parts),
                "steps_done": len(part.steps),
                "tokens_done": sum(step["tokens"] for step in part.steps),
                "predicted_s": sum(stretch.predicted_s for stretch in part.stretches),
                "stretches": [_stretch(stretch) for stretch in part.stretches],
                "tokens_per_s": tokens_per_s,
                "seconds": done["seconds"] if done else None,
                "final_train_loss": done["final_train_loss"] if done else None,
                "eval_loss": done["eval_loss"] if done else None,
                "peak_bytes": done["peak_bytes"] if done else None,
                "busy": _busy(part),
            }
        )
    first = parts[0].plan.info
    return {
        "name": target.resolve().name,
        "strategies": strategies,
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


def _stretch(stretch: _Stretch) -> dict[str, Any]:
    info, steps = stretch.plan.info, stretch.steps
    tokens, seconds = sum(step["tokens"] for step in steps), sum(step["seconds"] for step in steps)
    return {
        "epoch": stretch.epoch,
        "world_size": info.world_size,
        "samples": len(stretch.plan.sample_ids),
        "steps": stretch.plan.n_steps,
        "steps_done": len(steps),
        "tokens": tokens,
        "seconds": seconds,
        "predicted_s": stretch.predicted_s,
        "tokens_per_s": tokens / seconds if seconds else None,
        "loss": steps[-1]["loss"] if steps else None,
    }


def _packs(plan: Plan, group: Group) -> int:
    return int(_rows(plan, group).sum())


def _tokens(plan: Plan, group: Group) -> int:
    return int(plan.tokens()[_rows(plan, group)].sum())


def _rows(plan: Plan, group: Group) -> npt.NDArray[np.bool_]:
    same = (plan.capacity == group.capacity) & (plan.sp_degree == group.sp_degree)
    return np.asarray(same & (plan.gc_layers == group.gc_layers))


def _busy(part: _Part) -> float | None:
    """Measured share of the micro-steps' time that ranks worked."""
    wall = sum(step.get("mean_wall_s", 0.0) for step in part.steps)  # not in an earlier version's log
    return sum(step.get("mean_busy_s", 0.0) for step in part.steps) / wall if wall else None


def _predicted_speedup(parts: list[_Part]) -> float | None:
    if len(parts) < 2 or not parts[1].simulation.tokens_per_s:
        return None
    if parts[0].plan.info.world_size != parts[1].plan.info.world_size:  # it changed, and the other came after that
        return None
    return parts[0].simulation.tokens_per_s / parts[1].simulation.tokens_per_s


def _timelines(parts: list[_Part]) -> tuple[list[Group], list[Lane], dict[str, Any]]:
    """All groups, the lanes of the picture, and the data of the zoomable one."""
    groups: list[Group] = []
    for part in parts:
        groups += [g for g in part.plan.info.groups if g not in groups]
    lanes, zoomable = [], []
    for part in parts:
        every = _group_of(part.plan, groups, *window(part.plan))
        group = _group_of(part.plan, groups, DRAWN_RANKS, DRAWN_MICRO_STEPS)
        lanes.append(_predicted_lane(part, group))
        zoomable.append(predicted_lane(part.plan, f"{part.plan.info.strategy}, predicted", groups))
        if part.stretches[0].steps:
            lanes.append(_measured_lane(part, group))
            zoomable.append(measured_lane(_measured_lane(part, every), zoomable[-1]["step"]))
    return groups, lanes, explorer_data(zoomable, groups)


def _pictures(
    target: Path, parts: list[_Part], groups: list[Group], lanes: list[Lane], profile: Mapping[str, Any] | None
) -> dict[str, str]:
    lengths = parts[0].plan.lengths
    if (target / "lengths.npy").is_file():
        lengths = np.load(target / "lengths.npy")
    pictures = {
        "timelines": figures.timelines(lanes, groups),
        "parts": figures.time_parts([(part.plan.info.strategy, part.parts) for part in parts]),
        "lengths": figures.length_histogram(lengths, parts[0].plan.info.groups),
    }
    curves = {
        part.plan.info.strategy: (
            np.cumsum([s["tokens"] for s in part.steps]).tolist(),
            [s["loss"] for s in part.steps],
        )
        for part in parts
        if part.steps
    }
    if curves:
        pictures["loss"] = figures.loss_curves(curves)
    if profile:
        points = profile["points"]
        seconds = [(p["seconds"], p["predicted_s"], p["sp_degree"]) for p in points]
        gib = [(p["peak_bytes"] / 2**30, p["predicted_bytes"] / 2**30, p["sp_degree"]) for p in points]
        pictures["seconds"] = figures.predicted_against_measured(seconds, "time", "s")
        pictures["memory"] = figures.predicted_against_measured(gib, "peak memory", "GiB")
    return pictures


def _group_of(plan: Plan, groups: list[Group], ranks: int, micro_steps: int) -> npt.NDArray[np.int64]:
    """Index of the group that each drawn rank runs in each drawn micro-step, ``[R, M]``, -1 where it idles."""
    micro = plan.micro_step_index()
    n_micro = min(micro_steps, int(micro[-1]) + 1 if len(micro) else 0)
    table = np.full((min(ranks, plan.info.world_size), n_micro), -1, np.int64)
    number = {(g.capacity, g.sp_degree, g.gc_layers): i for i, g in enumerate(groups)}
    for row in np.flatnonzero((micro < n_micro) & (plan.rank_start < len(table))):
        start, degree = int(plan.rank_start[row]), int(plan.sp_degree[row])
        key = (int(plan.capacity[row]), degree, int(plan.gc_layers[row]))
        if key not in number:
            number[key] = len(groups)
            groups.append(Group(*key))
        table[start : start + degree, micro[row]] = number[key]
    return table


def _predicted_lane(part: _Part, group: npt.NDArray[np.int64]) -> Lane:
    plan = part.plan
    ranks, n_micro = group.shape
    micro = plan.micro_step_index()
    busy = np.zeros(group.shape)
    for row in np.flatnonzero((micro < n_micro) & (plan.rank_start < ranks)):
        busy[plan.rank_start[row] : plan.rank_start[row] + plan.sp_degree[row], micro[row]] = plan.predicted_s[row]
    all_walls = plan.micro_step_seconds()
    walls = all_walls[:n_micro]
    step_of_micro = plan.step[np.unique(micro, return_index=True)[1]][:n_micro]
    overhead = float(plan.info.cluster.get("step_overhead_s", 0.0))
    begin = np.concatenate([[0.0], np.cumsum(walls)[:-1]]) + overhead * step_of_micro if n_micro else walls
    total = float(step_seconds(plan).sum())
    window = "" if n_micro == len(all_walls) else f", first {n_micro} of {len(all_walls):,} micro-steps"
    title = f"{plan.info.strategy}, predicted: {total:.1f} s{window}"
    wide = (ranks, n_micro)
    return Lane(title, np.broadcast_to(begin, wide), busy, np.broadcast_to(walls, wide), group, total)


def _measured_lane(part: _Part, group: npt.NDArray[np.int64]) -> Lane:
    ranks = len(group)
    begin: list[npt.NDArray[np.float64]] = []
    wall: list[npt.NDArray[np.float64]] = []
    busy: list[npt.NDArray[np.float64]] = []
    steps = part.stretches[0].steps
    for step in steps:
        if not step["rank_wall_s"]:  # logged for as much as is drawn
            break
        wall_s = np.array(step["rank_wall_s"], np.float64)[:ranks]
        begin.append(step["started_s"] + np.cumsum(wall_s, axis=1) - wall_s)
        wall.append(wall_s)
        busy.append(np.array(step["rank_busy_s"], np.float64)[:ranks])
    shown = slice(0, group.shape[1])
    begins, busies, walls = (np.concatenate(x, axis=1)[:, shown] for x in (begin, busy, wall))
    total = float(steps[-1]["started_s"] + steps[-1]["seconds"])
    done = "" if len(steps) == part.plan.n_steps else f", {len(steps)} of {part.plan.n_steps} steps"
    which = "" if len(part.stretches) == 1 else f", first of {len(part.stretches)} parts"
    title = f"{part.plan.info.strategy}, measured{which}: {total:.1f} s{done}"
    return Lane(title, begins, busies, walls, group[:, : begins.shape[1]], total)


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"

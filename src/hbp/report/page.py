"""One self-contained HTML page about a run or a plan, and the same numbers as JSON beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from hbp.plan import Group
from hbp.report import figures, lanes
from hbp.report.explorer import explorer_data, measured_lane, predicted_lane, window
from hbp.report.figures import Curve, Mark
from hbp.report.lanes import Lane
from hbp.report.numbers import Part, Run, numbers_of, read_run
from hbp.report.rehearsal import find_rehearsals, rehearsal_numbers, rehearsal_pictures
from hbp.run_log import StepRecord
from hbp.simulator import step_seconds

DRAWN_RANKS = 16
DRAWN_MICRO_STEPS, DRAWN_NARROW = 240, 80
"""Of the timelines, beside text and on a phone."""


@dataclass(frozen=True)
class Report:
    """What was written."""

    html: Path
    numbers: dict[str, Any]


def write_report(target: Path, out: Path | None = None, rehearsal: Path | None = None) -> Report:
    """Write the page of a run or plan folder; ``report.json`` and ``timelines.svg`` go beside it.

    Args:
        target: a folder written by `hbp train` or `hbp plan`.
        out: the page; ``report.html`` in the folder if None.
        rehearsal: a file that `hbp rehearse` kept; None: those beside the plans.

    Raises:
        HbpError: the folder holds neither a run nor a plan, plans that cannot be compared, or a damaged file.
    """
    run = read_run(target)
    numbers, groups = numbers_of(run), lanes.all_groups([part.plan for part in run.parts])
    drawn, rehearsed = pictures(run, groups), find_rehearsals([(p.folder, p.plan) for p in run.parts], rehearsal)
    numbers["rehearsals"] = [rehearsal_numbers(found) for found in rehearsed]
    if rehearsed:
        drawn |= rehearsal_pictures(rehearsed, groups)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            **numbers,
            disturbed=any(s.get("disturbed", False) for s in numbers["strategies"]),
            asked=asked_and_used(numbers["settings"]),
            pictures={name: Markup(svg) for name, svg in drawn.items()},
            explorer=Markup(json.dumps(_explorer(run, groups)).replace("<", "\\u003c")),
            explorer_script=Markup(Path(__file__).with_name("explorer.js").read_text()),
        )
    )
    out = out or target / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    out.with_name("report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    out.with_name("timelines.svg").write_text(figures.standalone(drawn["timelines"]))
    return Report(out, numbers)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "count": lambda x: f"{x:,.0f}",
        "gib": lambda x: f"{x / 2**30:.3f}",
        "percent": _percent,
    }
    return environment


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def asked_and_used(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings of a plan in words: what was used and, beside it, what was asked for; of any program's plan."""
    asked = settings.get("asked")
    lines = []
    for name, used in settings.items():
        if name == "asked" and isinstance(asked, Mapping):
            continue
        text = in_words(used)
        if isinstance(asked, Mapping) and name in asked:
            text += " (its default)" if asked[name] is None else f" ({in_words(asked[name])} asked for)"
        lines.append((name.replace("_", " "), text))
    return lines


def in_words(value: Any) -> str:
    """Plain data for people."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, Mapping):
        if value.keys() == {"capacity", "sp_degree", "gc_layers"}:
            return f"{in_words(value['capacity'])} tokens · SP {value['sp_degree']} · GC {value['gc_layers']}"
        return ", ".join(f"{str(key).replace('_', ' ')} {in_words(item)}" for key, item in value.items())
    return "; ".join(map(in_words, value)) if isinstance(value, list) else str(value)


def pictures(run: Run, groups: list[Group]) -> dict[str, str]:
    """Every picture of the page but the zoomable one, by name."""
    parts = [(part.plan.info.strategy, part.parts) for part in run.parts]
    wide, narrow = (_lanes(run, groups, count) for count in (DRAWN_MICRO_STEPS, DRAWN_NARROW))
    drawn = {
        "timelines": figures.timelines(wide, groups),
        "timelines_narrow": figures.timelines(narrow, groups, narrow=True),
        "parts": figures.time_parts(parts),
        "parts_narrow": figures.time_parts(parts, narrow=True),
        "lengths": figures.length_histogram(run.lengths, run.parts[0].plan.info.groups),
    }
    trained = [(number, part) for number, part in enumerate(run.parts) if part.steps]
    if trained:
        losses = [_curve(number, part, [step.loss for step in part.steps]) for number, part in trained]
        losses += [_evaluations(number, part) for number, part in trained if part.evaluations]
        drawn["loss"] = figures.curves(losses, "loss of the step", "loss")
        rates = [
            _curve(number, part, [None if step.lost else step.lr for step in part.steps]) for number, part in trained
        ]
        drawn["rate"] = figures.curves(rates, "learning rate", "rate")
    if run.profile:
        points = [(p, (p["sp_degree"], p["gc_layers"] > 0)) for p in run.profile["points"]]
        seconds = [Mark(p["seconds"], p["predicted_s"], *kind) for p, kind in points]
        memory = [Mark(p["peak_bytes"] / 2**30, p["predicted_bytes"] / 2**30, *kind) for p, kind in points]
        drawn["seconds"] = figures.scatter(seconds, "seconds of a micro-batch", "seconds")
        drawn["memory"] = figures.scatter(memory, "peak memory, GiB", "memory")
    return drawn


def _curve(number: int, part: Part, values: Sequence[float | None]) -> Curve:
    return Curve(part.plan.info.strategy, np.cumsum([step.tokens for step in part.steps]).tolist(), values, number)


def _evaluations(number: int, part: Part) -> Curve:
    tokens, losses = zip(*((record.tokens, record.eval_loss) for record in part.evaluations), strict=True)
    return Curve(f"{part.plan.info.strategy}, held out", tokens, losses, number, dashed=True)


def _lanes(run: Run, groups: list[Group], micro_steps: int) -> list[Lane]:
    """The first ranks and micro-steps of each strategy, predicted and, where there is a log, measured."""
    found = []
    for part in run.parts:
        plan, name = part.plan, part.plan.info.strategy
        total, count = float(step_seconds(plan).sum()), part.simulation.micro_steps
        cut = "" if count <= micro_steps else f", first {micro_steps} of {count:,} micro-steps"
        title = f"{name}, predicted: {total:.1f} s{cut}"
        found.append(lanes.predicted(plan, title, groups, DRAWN_RANKS, micro_steps, total))
        if _logged(part):
            found.append(lanes.measured(plan, _measured_title(part), groups, DRAWN_RANKS, micro_steps, _log(part)))
    return found


def _log(part: Part) -> list[StepRecord]:
    """As far as no line of it is lost: what is drawn rank by rank begins with the first step."""
    return list(itertools.takewhile(lambda step: not step.lost, part.stretches[0].steps))


def _logged(part: Part) -> bool:
    return any(step.rank_wall_s for step in _log(part))


def _measured_title(part: Part) -> str:
    steps = _log(part)
    total = steps[-1].started_s + steps[-1].seconds
    done = "" if len(steps) == part.plan.n_steps else f", {len(steps)} of {part.plan.n_steps} steps"
    which = "" if len(part.stretches) == 1 else f", first of {len(part.stretches)} parts"
    return f"{part.plan.info.strategy}, measured{which}: {total:.1f} s{done}"


def _explorer(run: Run, groups: list[Group]) -> dict[str, Any]:
    """The data of the zoomable timelines."""
    zoomable = []
    for part in run.parts:
        ranks, count = window(part.plan)
        zoomable.append(predicted_lane(part.plan, f"{part.plan.info.strategy}, predicted", groups))
        if _logged(part):
            lane = lanes.measured(part.plan, _measured_title(part), groups, ranks, count, _log(part))
            zoomable.append(measured_lane(lane, zoomable[-1]["step"]))
    return explorer_data(zoomable, groups)

"""The page of a profile: how well its cost model predicts what was measured, and what it says of lengths and degrees.

Colour is the SP degree; a full line recomputes no layer, a dashed one all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from hbp.cost.cluster import GIB
from hbp.cost.fit import Point
from hbp.cost.predict import CostModel
from hbp.cost.profile_file import Profile, read_profile
from hbp.report.figures import INK, STYLE, Float, Mark, as_svg, count, degree_colours, scatter

SPAN = 64
"""The longest length drawn over the shortest."""
SAMPLES = 200
"""Lengths at which a curve is drawn."""


def cost_pictures(profile: Profile) -> dict[str, str]:
    """Every picture of a profile, by name."""
    points, longest = profile.points, max(sum(point.lengths) for point in profile.points)
    predicted_bytes = [float(point["predicted_bytes"]) for point in profile.data["points"]]
    return {
        "seconds": seconds_scatter(points, profile.held_out_s),
        "memory": memory_scatter(points, predicted_bytes),
        "time_per_token": time_per_token(profile.cost, 2 * longest),
        "memory_over_length": memory_over_length(profile.cost, 2 * longest),
    }


def write_cost_page(profile_file: Path, out: Path | None = None) -> Path:
    """Write the page of a profile file, beside it if no place is given; returns where.

    Raises:
        HbpError: not a profile with its raw points.
    """
    profile = read_profile(profile_file)
    out = out or profile_file.with_suffix(".html")
    data = profile.data
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("profile_page.html").render(
        device=data["device"],
        model=profile.model.name,
        world_size=profile.world_size,
        date=data.get("date", ""),
        n_points=len(profile.points),
        median_error=data["median_error"],
        p90_error=data["p90_error"],
        degrees=data["degrees"],
        pictures={name: Markup(svg) for name, svg in cost_pictures(profile).items()},
    )
    out.write_text(page)
    return out


def seconds_scatter(points: Sequence[Point], predicted_s: Sequence[float]) -> str:
    """Measured against predicted seconds of micro-batches."""
    marks = [Mark(p.seconds, s, p.sp_degree, p.gc_layers > 0) for p, s in zip(points, predicted_s, strict=True)]
    return scatter(marks, "seconds of a micro-batch", "cost-seconds")


def memory_scatter(points: Sequence[Point], predicted_bytes: Sequence[float]) -> str:
    """Measured against predicted peak memory of micro-batches."""
    both = zip(points, predicted_bytes, strict=True)
    marks = [Mark(p.peak_bytes / GIB, b / GIB, p.sp_degree, p.gc_layers > 0) for p, b in both]
    return scatter(marks, "peak memory of a rank, GiB", "cost-memory")


def time_per_token(cost: CostModel, longest: int, degrees: Sequence[int] | None = None) -> str:
    """Rank-microseconds a token of packs of one document, over its length, where they fit memory."""

    def draw(axis: Axes, degree: int, gc_layers: int, tokens: Float, **line: Any) -> None:
        seconds = cost.seconds(degree, gc_layers).of(cost.work(tokens.astype(np.int64)))
        axis.plot(tokens, 1e6 * degree * seconds / tokens, **line)

    with mpl.rc_context(STYLE):
        figure, axis = _over_length(cost, longest, degrees, draw, only_what_fits=True)
        axis.set_ylabel("rank-microseconds a token")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(count))
        axis.yaxis.set_minor_locator(FixedLocator([]))
        return as_svg(figure, "cost-time-per-token")


def memory_over_length(cost: CostModel, longest: int, degrees: Sequence[int] | None = None) -> str:
    """Predicted peak memory of a rank over the tokens of a pack, with the budget."""
    budget = cost.cluster.memory_bytes / GIB

    def draw(axis: Axes, degree: int, gc_layers: int, tokens: Float, **line: Any) -> None:
        axis.plot(tokens, [cost.bytes(int(t), degree, gc_layers) / GIB for t in tokens], **line)

    with mpl.rc_context(STYLE):
        figure, axis = _over_length(cost, longest, degrees, draw, only_what_fits=False)
        axis.axhline(budget, color=INK, linewidth=1)
        axis.text(longest / SPAN, budget * 1.02, " budget", ha="left", va="bottom")
        axis.set_ylabel("peak memory of a rank, GiB")
        axis.set_ylim(0, budget * 1.6)
        return as_svg(figure, "cost-memory-over-length")


def _over_length(
    cost: CostModel, longest: int, degrees: Sequence[int] | None, draw: Any, *, only_what_fits: bool
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axis = figure.subplots()
    colours, shortest = degree_colours(degrees or cost.degrees()), longest // SPAN
    for degree, colour in colours.items():
        fits = cost.longest_packs(degree)
        for gc_layers, dashes in ((0, "-"), (cost.model.n_layers, (0, (4, 2)))):
            most = min(longest, int(fits[gc_layers])) if only_what_fits else longest
            if most > shortest:
                tokens = np.geomspace(shortest, most, SAMPLES)
                draw(axis, degree, gc_layers, tokens, color=colour, linestyle=dashes, linewidth=1.6)
    axis.set_xscale("log", base=2)
    powers = range(shortest.bit_length() - 1, longest.bit_length() + 1)
    axis.xaxis.set_major_locator(FixedLocator([2**i for i in powers]))
    axis.xaxis.set_major_formatter(FuncFormatter(_kibi))
    axis.xaxis.set_minor_locator(FixedLocator([]))
    axis.set_xlim(shortest, longest)
    axis.set_xlabel("tokens of the pack")
    lines = [Line2D([], [], color=c, linewidth=1.6, label=f"SP {d}") for d, c in colours.items()]
    lines += [Line2D([], [], color=INK, linewidth=1.6, label="no GC")]
    lines += [Line2D([], [], color=INK, linewidth=1.6, linestyle=(0, (4, 2)), label="GC of all layers")]
    figure.legend(handles=lines, loc="outside upper left", ncols=4)
    return figure, axis


def _kibi(value: float, _: Any) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"

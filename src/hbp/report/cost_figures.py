"""The pictures of a cost model: how well it predicts what was measured, and what it says of lengths, degrees and GC.

As in :mod:`hbp.report.figures`, every function takes plain data and returns one ``<svg>`` in the page's inks.
Colour is the SP degree; a full line or mark recomputes no layer, a dashed line all of them, a hollow mark some or all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from hbp.cost.cluster import GIB
from hbp.cost.fit import Point
from hbp.cost.predict import CostModel
from hbp.report.figures import FAINT, INK, PALETTE, STYLE, Float, _count, as_svg

SPAN = 64
"""The longest length drawn over the shortest."""
SAMPLES = 200
"""Lengths at which a curve is drawn."""
WITHIN = 0.1
"""The band around equality in the scatters."""


def seconds_scatter(points: Sequence[Point], predicted_s: Sequence[float]) -> str:
    """Measured against predicted seconds of micro-batches, both logarithmic."""
    return _scatter(points, [p.seconds for p in points], predicted_s, "seconds of a micro-batch", "cost-seconds")


def memory_scatter(points: Sequence[Point], predicted_bytes: Sequence[float]) -> str:
    """Measured against predicted peak memory of micro-batches, both logarithmic."""
    measured, predicted = [p.peak_bytes / GIB for p in points], [b / GIB for b in predicted_bytes]
    return _scatter(points, measured, predicted, "peak memory of a rank, GiB", "cost-memory")


def _scatter(
    points: Sequence[Point], measured: Sequence[float], predicted: Sequence[float], quantity: str, name: str
) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axis = figure.subplots()
        both = np.array([*measured, *predicted])
        ends = np.array([both.min() * 0.85, both.max() * 1.18])
        axis.fill_between(ends, ends * (1 - WITHIN), ends * (1 + WITHIN), color=FAINT, alpha=0.6, linewidth=0)
        axis.plot(ends, ends, color=INK, linewidth=1)
        colours = _colours([p.sp_degree for p in points])
        for degree, colour in colours.items():
            for recomputes, face in ((False, colour), (True, "none")):
                mine = [i for i, p in enumerate(points) if p.sp_degree == degree and (p.gc_layers > 0) == recomputes]
                at = ([values[i] for values in (measured, predicted)] for i in mine)
                xs, ys = zip(*at, strict=True) if mine else ((), ())
                style: Any = {
                    "markerfacecolor": face,
                    "markeredgecolor": colour,
                    "markeredgewidth": 1.3,
                    "markersize": 5.5,
                }
                axis.plot(xs, ys, linestyle="", marker="o", alpha=0.9, **style)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(_round_ticks(ends))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(FixedLocator([]))
        axis.set_xlabel(f"measured {quantity}")
        axis.set_ylabel("predicted")
        marks = [Line2D([], [], color=c, marker="o", linestyle="", label=f"SP {d}") for d, c in colours.items()]
        kinds = [("full", "no GC"), ("none", "GC")]
        marks += [
            Line2D([], [], color=INK, marker="o", fillstyle=fill, linestyle="", label=text)  # type: ignore[arg-type]
            for fill, text in kinds
        ]
        axis.legend(handles=marks, loc="upper left")
        return as_svg(figure, name)


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
        axis.yaxis.set_major_formatter(FuncFormatter(_count))
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
    colours, shortest = _colours(degrees or cost.degrees()), longest // SPAN
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


def _colours(degrees: Sequence[int]) -> dict[int, str]:
    return {degree: PALETTE[i % len(PALETTE)] for i, degree in enumerate(sorted(set(degrees)))}


def _round_ticks(ends: Float) -> FixedLocator:
    """1, 2 and 5 times the powers of ten; closer ones where the range holds fewer than three of these."""
    powers = 10.0 ** np.arange(np.floor(np.log10(ends[0])), np.ceil(np.log10(ends[1])) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = np.outer(powers, steps).ravel()
        ticks = ticks[(ticks >= ends[0]) & (ticks <= ends[1])]
        if len(ticks) >= 3:
            break
    return FixedLocator(ticks.tolist())


def _kibi(value: float, _: Any) -> str:
    return f"{value / 1024:g}K" if value >= 1024 else f"{value:g}"

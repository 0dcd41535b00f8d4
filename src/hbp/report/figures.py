"""The pictures of a report, as SVG text that takes its ink from the page's style (and so follows light and dark).

Every function takes plain data and returns one ``<svg>``. Colours that stand for ink and paper are written as stand-ins
and replaced by CSS variables; :func:`standalone` puts fixed ones in, for a picture outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from hbp.plan import Group
from hbp.simulator import PART_NAMES

Float = npt.NDArray[np.float64]

INK, FAINT, WAIT = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--rule)", WAIT: "var(--wait)"}
LIGHT = {INK: "#1c2430", FAINT: "#d5dae1", WAIT: "#f3c6bf"}
PALETTE = ("#2f7fc1", "#e3912f", "#7d5fb8", "#3b9b78", "#c2557f", "#6f7f2e", "#35a0b5", "#9a6a44")
LABEL_WIDTH = 0.13
"""Of a packing length, as a share of the axis."""
PART_COLOURS = {
    "linear": "#2f7fc1",
    "attention": "#7d5fb8",
    "overhead": "#8b97a6",
    "recompute": "#e3912f",
    "alltoall": "#c2557f",
    "fsdp": "#35a0b5",
    "unsplit": "#2f7fc1",
    "waiting": WAIT,
    "optimizer": "#6f7f2e",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Lane:
    """One strategy on some ranks, predicted or measured. ``R`` ranks drawn, ``M`` micro-steps drawn."""

    title: str
    begin_s: Float  # [R, M]
    busy_s: Float  # [R, M]
    wall_s: Float  # [R, M] busy and waiting
    group: npt.NDArray[np.int64]  # [R, M] index into the groups, -1 idle
    end_s: float
    """When the whole run ends, drawn or not."""


def group_name(group: Group) -> str:
    """As legends and tables call it."""
    return f"{group.capacity:,} tokens · SP {group.sp_degree} · GC {group.gc_layers}"


def timelines(lanes: Sequence[Lane], groups: Sequence[Group]) -> str:
    """Ranks over time, one panel a lane, all on one time axis: work in the group's colour, waiting in the pale one."""
    with mpl.rc_context(STYLE):
        heights = [0.35 + 0.26 * len(lane.begin_s) for lane in lanes]
        figure = Figure(figsize=(10, sum(heights) + 0.42 * len(lanes) + 0.75), layout="constrained")
        axes = figure.subplots(len(lanes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        longest = max(float((lane.begin_s + lane.wall_s).max(initial=0.0)) for lane in lanes)
        for axis, lane in zip(axes, lanes, strict=True):
            _draw_lane(axis, lane, longest)
        axes[-1].set_xlabel("seconds")
        axes[0].set_xlim(0, longest * 1.01)
        used = sorted({int(g) for lane in lanes for g in np.unique(lane.group) if g >= 0})
        handles = [Patch(color=_colour(g), label=group_name(groups[g])) for g in used]
        handles.append(Patch(color=WAIT, label="waiting for other ranks"))
        figure.legend(handles=handles, loc="outside lower left", ncols=min(3, len(handles)))
        return as_svg(figure, "timelines")


def _draw_lane(axis: Axes, lane: Lane, longest: float) -> None:
    for rank in range(len(lane.begin_s)):
        spans = np.stack([lane.begin_s[rank], lane.wall_s[rank]], axis=1)
        axis.broken_barh(spans.tolist(), (rank - 0.42, 0.84), facecolors=WAIT, edgecolor="none")
        for g in np.unique(lane.group[rank]):
            here = lane.group[rank] == g
            if g < 0:
                continue
            spans = np.stack([lane.begin_s[rank, here], lane.busy_s[rank, here]], axis=1)
            axis.broken_barh(spans.tolist(), (rank - 0.42, 0.84), facecolors=_colour(int(g)), edgecolor="none")
    axis.set_title(lane.title)
    axis.set_yticks(range(len(lane.begin_s)), [f"rank {r}" for r in range(len(lane.begin_s))])
    axis.set_ylim(len(lane.begin_s) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(length=0)
    if lane.end_s <= longest * 1.001:
        axis.axvline(lane.end_s, color=INK, linewidth=1.2)


def time_parts(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str = "seconds") -> str:
    """What the mean rank's time goes into, one stacked bar a row, all on one axis.

    Args:
        rows: name, and the amount of each part of :data:`hbp.simulator.PART_NAMES` that there is.
        unit: of the amounts.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.9 + 0.36 * len(rows)), layout="constrained")
        axis = figure.subplots()
        at = np.zeros(len(rows))
        for part, name in PART_NAMES.items():
            amounts = np.array([parts.get(part, 0.0) for _, parts in rows])
            if amounts.any():
                axis.barh(range(len(rows)), amounts, left=at, height=0.72, color=PART_COLOURS[part], label=name)
            at += amounts
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.tick_params(length=0)
        axis.set_xlabel(unit)
        figure.legend(loc="outside lower left", ncols=6)
        return as_svg(figure, "parts")


def length_histogram(lengths: npt.NDArray[np.integer], groups: Sequence[Group]) -> str:
    """Share of samples and of tokens over length, with the packing lengths of the groups."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        axis = figure.subplots()
        low, high = max(1, int(lengths.min())), max(int(lengths.max()), max(g.capacity for g in groups))
        bins = np.geomspace(low, high + 1, 40)
        for weights, colour, name in ((None, PALETTE[0], "samples"), (lengths, PALETTE[1], "tokens")):
            counts, _ = np.histogram(lengths, bins, weights=weights)
            share = 100 * counts / counts.sum()
            axis.stairs(share, bins, fill=True, color=colour, alpha=0.25)
            axis.stairs(share, bins, color=colour, label=f"share of {name}", linewidth=1.6)
        label_ends, row = 0.0, 0
        for capacity in sorted({group.capacity for group in groups}):
            axis.axvline(capacity, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            at = np.log(capacity / low) / np.log((high + 1) / low)
            row = 1 - row if at - LABEL_WIDTH < label_ends else 0  # labels that would meet take turns
            label_ends = at
            height = 1.01 + 0.07 * row
            axis.text(capacity, height, f"{capacity:,}", transform=axis.get_xaxis_transform(), ha="center")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("tokens of a sample (dashed: packing lengths)")
        axis.set_ylabel("%")
        figure.legend(loc="outside upper left", ncols=2)
        return as_svg(figure, "lengths")


def loss_curves(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Training loss over tokens, one curve a strategy."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        axis = figure.subplots()
        for index, (name, (tokens, loss)) in enumerate(curves.items()):
            axis.plot(tokens, loss, color=PALETTE[index], linewidth=1.8, label=name, marker="o", markersize=2.5)
        axis.xaxis.set_major_formatter(FuncFormatter(_count))
        axis.set_xlabel("tokens trained on")
        axis.set_ylabel("loss of the step")
        axis.legend()
        return as_svg(figure, "loss")


def predicted_against_measured(points: Sequence[tuple[float, float, int]], quantity: str, unit: str) -> str:
    """Scatter of (measured, predicted, SP degree) with the line on which both are equal."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained")
        axis = figure.subplots()
        values = np.array([p[:2] for p in points])
        ends = 0.0, values.max() * 1.08
        axis.plot(ends, ends, color=INK, linewidth=1)
        axis.fill_between(ends, np.multiply(ends, 0.9), np.multiply(ends, 1.1), color=FAINT, alpha=0.6, linewidth=0)
        for index, degree in enumerate(sorted({p[2] for p in points})):
            mine = np.array([p[:2] for p in points if p[2] == degree])
            axis.scatter(mine[:, 0], mine[:, 1], s=26, color=PALETTE[index], alpha=0.85, label=f"SP {degree}")
        axis.set(xlim=ends, ylim=ends)
        axis.set_xlabel(f"measured {quantity}, {unit}")
        axis.set_ylabel(f"predicted, {unit}")
        axis.legend()
        return as_svg(figure, quantity)


def standalone(svg: str) -> str:
    """The same picture with fixed ink on white, to be shown without the page."""
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(variable, LIGHT[stand_in])
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size
    paper = f'<rect width="{size[1]}" height="{size[2]}" fill="#ffffff"/>'
    head = svg.index(">") + 1
    return svg[:head].replace(" class=", ' font-family="sans-serif" class=') + paper + svg[head:] + "\n"


def _colour(group: int) -> str:
    return PALETTE[group % len(PALETTE)]


def _count(value: float, _: Any) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def as_svg(figure: Figure, name: str) -> str:
    """A figure as the text of one ``<svg class="name">``, in the page's fonts, width and ink."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The page's own fonts and width; ids of different figures must not meet on one page.
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" class="{name}" role="img" '
        r'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )
    text = re.sub(r'id="((?:figure|axes|patch|text|line2d|matplotlib|xtick|ytick|legend|Poly)[^"]*)"', "", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text.strip()

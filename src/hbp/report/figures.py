"""The pictures of a report, as SVG text that takes its ink from the page's style (and so follows light and dark).

Every function takes plain data and returns one ``<svg>``. Colours that stand for ink and paper are written as stand-ins
and replaced by CSS variables; :func:`standalone` puts fixed ones in, for a picture outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hbp.plan import Group
from hbp.report.lanes import Lane
from hbp.simulator import PART_NAMES

Float = npt.NDArray[np.float64]

INK, FAINT, WAIT = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--rule)", WAIT: "var(--wait)"}
LIGHT = {INK: "#1c2430", FAINT: "#d5dae1", WAIT: "#f3c6bf"}
PALETTE = ("#2f7fc1", "#e3912f", "#7d5fb8", "#3b9b78", "#c2557f", "#6f7f2e", "#35a0b5", "#9a6a44")
WIDTHS = (10.0, 4.4)
"""Inches of the main pictures, beside a page's text and on a phone."""
SMALL = (4.8, 3.0)
"""Of those that stand two in a row."""
WITHIN = 0.1
"""The band around equality in the scatters."""
LABEL_WIDTH = 0.17
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
    "text.parse_math": False,  # a strategy may be called $x
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def group_name(group: Group) -> str:
    """As legends and tables call it."""
    return f"{group.capacity:,} tokens · SP {group.sp_degree} · GC {group.gc_layers}"


class Kind(NamedTuple):
    """Groups that have one colour, and one line in a legend."""

    name: str
    colour: str


def kinds_of(groups: Sequence[Group]) -> list[Kind]:
    """Of each group: its own while the colours last; beyond that, one a degree with and one without recomputation."""
    if len(groups) <= len(PALETTE):
        return [Kind(group_name(group), colour) for group, colour in zip(groups, PALETTE, strict=False)]
    hues = degree_colours([group.sp_degree for group in groups])
    kinds = {}
    for key in {(group.sp_degree, group.gc_layers > 0) for group in groups}:
        alike = [group for group in groups if (group.sp_degree, group.gc_layers > 0) == key]
        tokens, layers = (_span([getattr(group, of) for group in alike]) for of in ("capacity", "gc_layers"))
        red, green, blue = to_rgb(hues[key[0]])
        pale = to_hex(((1 + red) / 2, (1 + green) / 2, (1 + blue) / 2))
        kinds[key] = Kind(f"{tokens} tokens · SP {key[0]} · GC {layers}", pale if key[1] else hues[key[0]])
    return [kinds[group.sp_degree, group.gc_layers > 0] for group in groups]


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,}–{most:,}"


def timelines(lanes: Sequence[Lane], groups: Sequence[Group], *, narrow: bool = False) -> str:
    """Ranks over time, one panel a lane, all on one time axis: work in the group's colour, waiting in the pale one.

    Args:
        lanes: to draw.
        groups: that they number.
        narrow: for a phone.
    """
    with mpl.rc_context(STYLE):
        heights = [0.35 + 0.26 * len(lane.begin_s) for lane in lanes]
        kinds = kinds_of(groups)
        numbers = sorted({int(g) for lane in lanes for g in np.unique(lane.group) if g >= 0})
        used = list(dict.fromkeys(kinds[g] for g in numbers))
        columns = 1 if narrow else min(3, len(used) + 1)
        below = 0.3 + 0.25 * -(-(len(used) + 1) // columns)
        figure = Figure(figsize=(WIDTHS[narrow], sum(heights) + 0.42 * len(lanes) + below), layout="constrained")
        axes = figure.subplots(len(lanes), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        longest = max(*(float((lane.begin_s + lane.wall_s).max(initial=0.0)) for lane in lanes), 1e-9)
        for axis, lane in zip(axes, lanes, strict=True):
            _draw_lane(axis, lane, kinds, longest)
            if narrow:  # two lines where one is too wide
                axis.set_title(lane.title.replace(": ", "\n", 1), fontsize=9.5)
        axes[-1].set_xlabel("seconds")
        axes[0].set_xlim(0, longest * 1.01)
        handles = [Patch(color=kind.colour, label=kind.name) for kind in used]
        handles.append(Patch(color=WAIT, label="waiting for other ranks"))
        figure.legend(handles=handles, loc="outside lower left", ncols=columns)
        return as_svg(figure, f"timelines {'narrow' if narrow else 'wide'}")


def _draw_lane(axis: Axes, lane: Lane, kinds: Sequence[Kind], longest: float) -> None:
    for rank in range(len(lane.begin_s)):
        spans = np.stack([lane.begin_s[rank], lane.wall_s[rank]], axis=1)
        axis.broken_barh(spans.tolist(), (rank - 0.42, 0.84), facecolors=WAIT, edgecolor="none")
        for g in np.unique(lane.group[rank]):
            here = lane.group[rank] == g
            if g < 0:
                continue
            spans = np.stack([lane.begin_s[rank, here], lane.busy_s[rank, here]], axis=1)
            axis.broken_barh(spans.tolist(), (rank - 0.42, 0.84), facecolors=kinds[g].colour, edgecolor="none")
    axis.set_title(lane.title)
    axis.set_yticks(range(len(lane.begin_s)), [f"rank {r}" for r in range(len(lane.begin_s))])
    axis.set_ylim(len(lane.begin_s) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.tick_params(length=0)
    if lane.end_s <= longest * 1.001:
        axis.axvline(lane.end_s, color=INK, linewidth=1.2)


def time_parts(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str = "seconds", *, narrow: bool = False) -> str:
    """What the mean rank's time goes into, one stacked bar a row, all on one axis.

    Args:
        rows: name, and the amount of each part of :data:`hbp.simulator.PART_NAMES` that there is.
        unit: of the amounts.
        narrow: for a phone.
    """
    with mpl.rc_context(STYLE):
        shown = [part for part in PART_NAMES if any(parts.get(part) for _, parts in rows)]
        columns = 2 if narrow else 6
        below = 0.65 + 0.25 * -(-len(shown) // columns)
        figure = Figure(figsize=(WIDTHS[narrow], below + 0.36 * len(rows)), layout="constrained")
        axis = figure.subplots()
        at = np.zeros(len(rows))
        for part in shown:
            amounts = np.array([parts.get(part, 0.0) for _, parts in rows])
            axis.barh(range(len(rows)), amounts, left=at, height=0.72, color=PART_COLOURS[part], label=PART_NAMES[part])
            at += amounts
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.tick_params(length=0)
        axis.set_xlabel(unit)
        if shown:
            figure.legend(loc="outside lower left", ncols=columns)
        return as_svg(figure, f"parts {'narrow' if narrow else 'wide'}")


def length_histogram(lengths: npt.NDArray[np.integer], groups: Sequence[Group]) -> str:
    """Share of samples and of tokens over length, with the packing lengths of the groups."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SMALL, layout="constrained")
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
        axis.xaxis.set_major_formatter(FuncFormatter(count))
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("tokens of a sample (dashed: packing lengths)")
        axis.set_ylabel("%")
        figure.legend(loc="outside upper left", ncols=2)
        return as_svg(figure, "lengths")


class Curve(NamedTuple):
    """One line over the tokens trained on."""

    name: str
    tokens: Sequence[float]
    values: Sequence[float | None]
    """None leaves a gap."""
    strategy: int = 0
    """Says the colour."""
    dashed: bool = False


def curves(lines: Sequence[Curve], quantity: str, name: str) -> str:
    """A quantity over tokens: the training loss of each strategy (dashed: of held-out samples), or learning rate."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SMALL, layout="constrained")
        axis = figure.subplots()
        for line in lines:
            style: Any = {"linestyle": (0, (4, 2)), "marker": "s", "markersize": 4} if line.dashed else {}
            colour = PALETTE[line.strategy % len(PALETTE)]
            axis.plot(
                line.tokens, np.array(line.values, float), color=colour, linewidth=1.8, label=_label(line.name),
                **{"marker": "o", "markersize": 2.5, **style},
            )  # fmt: skip
        axis.xaxis.set_major_formatter(FuncFormatter(count))
        axis.set_xlabel("tokens trained on")
        axis.set_ylabel(quantity)
        figure.legend(loc="outside upper left", ncols=2)
        return as_svg(figure, name)


class Mark(NamedTuple):
    """One micro-batch in a scatter."""

    measured: float
    predicted: float
    sp_degree: int
    recomputes: bool


def scatter(marks: Sequence[Mark], quantity: str, name: str) -> str:
    """Predicted over measured, both logarithmic, with the line on which both are equal and a band of ±10 %.

    Colour is the SP degree; a hollow mark recomputes layers.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 4.0), layout="constrained")
        axis = figure.subplots()
        both = np.array([[mark.measured, mark.predicted] for mark in marks])
        ends = np.array([both.min() * 0.85, both.max() * 1.18])
        axis.fill_between(ends, ends * (1 - WITHIN), ends * (1 + WITHIN), color=FAINT, alpha=0.6, linewidth=0)
        axis.plot(ends, ends, color=INK, linewidth=1)
        colours = degree_colours([mark.sp_degree for mark in marks])
        for degree, colour in colours.items():
            for recomputes, face in ((False, colour), (True, "none")):
                mine = [mark for mark in marks if (mark.sp_degree, mark.recomputes) == (degree, recomputes)]
                xs, ys = [mark.measured for mark in mine], [mark.predicted for mark in mine]
                style: Any = {"markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 1.3}
                axis.plot(xs, ys, linestyle="", marker="o", markersize=5.5, alpha=0.9, **style)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(_round_ticks(ends))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(FixedLocator([]))
        axis.set_xlabel(f"measured {quantity}")
        axis.set_ylabel("predicted")
        keys = [Line2D([], [], color=c, marker="o", linestyle="", label=f"SP {d}") for d, c in colours.items()]
        keys.append(Line2D([], [], color=INK, marker="o", linestyle="", label="no GC"))
        keys.append(Line2D([], [], color=INK, marker="o", linestyle="", fillstyle="none", label="GC"))
        axis.legend(handles=keys, loc="upper left")
        return as_svg(figure, name)


def degree_colours(degrees: Sequence[int]) -> dict[int, str]:
    """A colour for each SP degree."""
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


def _label(name: str) -> str:
    """In a legend, which leaves out what begins with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def strategies_over_gpus(rows: Sequence[Mapping[str, Any]]) -> str:
    """Efficiency and speed-up over the first strategy, one line a strategy.

    Args:
        rows: with ``strategy``, ``gpus``, ``efficiency`` and ``speedup``, as `hbp compare --json` has them.
    """
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    sizes = sorted({row["gpus"] for row in rows})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        for axis, quantity, title in zip(
            figure.subplots(1, 2),
            ("efficiency", "speedup"),
            ("share of the best possible speed", f"speed over {names[0]}"),
            strict=True,
        ):
            for index, name in enumerate(names):
                mine = (row for row in rows if row["strategy"] == name and row[quantity] is not None)
                own = {row["gpus"]: row[quantity] for row in mine}
                ours = name.startswith("hbp")
                axis.plot(
                    list(own),
                    list(own.values()),
                    color=INK if index >= len(PALETTE) else PALETTE[index],
                    linewidth=2.2 if ours else 1.3,
                    linestyle="-" if ours else "--",
                    marker="o",
                    markersize=4,
                    label=_label(name),
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.set_xlabel("GPUs")
            axis.set_title(title)
            axis.set_ylim(0, 1.02 if quantity == "efficiency" else None)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
        return as_svg(figure, "strategies")


def standalone(svg: str) -> str:
    """The same picture with fixed ink on white, to be shown without the page."""
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(variable, LIGHT[stand_in])
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size
    paper = f'<rect width="{size[1]}" height="{size[2]}" fill="#ffffff"/>'
    head = svg.index(">") + 1
    return svg[:head].replace(" class=", ' font-family="sans-serif" class=') + paper + svg[head:] + "\n"


def count(value: float, _: Any = None) -> str:
    """A number on an axis, in thousands, millions or billions."""
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

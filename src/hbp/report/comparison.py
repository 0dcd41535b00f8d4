"""The picture of `hbp compare`: strategies over numbers of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from hbp.report.figures import INK, PALETTE, STYLE, as_svg


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
                    label=name,
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

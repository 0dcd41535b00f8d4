"""The pictures and numbers of docs/quality.md, from the results that `quality.py` left. What stands between
``<!-- NAME -->`` and ``<!-- /NAME -->`` in the page is written here; the rest is prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from quality_plans import DEFAULT, UNPACKED
from quality_stats import FIGURES, interval, no_worse, of_setting, paired

from hbp.report.figures import FAINT, INK, PALETTE, STYLE, as_svg, standalone

Row = dict[str, Any]
MIX, STDLIB = "mix", "stdlib"
NOTHING = "Not measured yet.\n"
COLOURS = {UNPACKED: INK, "naive packing": PALETTE[1], "hbp, as published": PALETTE[0], DEFAULT: PALETTE[2]}
PICTURES = {
    "curves": "Held-out loss over tokens and seconds",
    "cosine": "Cosine of a step's gradient with the whole set's",
    "norms": "Gradient norms by loss",
    "curriculum": "Loss with and without a curriculum",
}
SHORT_SECONDS = ("unpacked, ours' seconds", "naive packing, ours' seconds")
PERCENT = ("short_accuracy", "long_accuracy")
HEADER = ("short, accuracy", "long, accuracy", "short, loss", "long, loss")


def draw(rows: Sequence[Row], gradients: Sequence[Row], docs: Path) -> None:
    """Write the pictures into `docs` and the numbers into its page."""
    drawn = pictures(rows, gradients)
    for name, picture in drawn.items():
        (docs / f"quality-{name}.svg").write_text(standalone(picture))
    page = docs / "quality.md"
    text = page.read_text()
    shown = {f"picture {name}": f"![{what}](quality-{name}.svg)\n" * (name in drawn) for name, what in PICTURES.items()}
    for name, table in {**tables(rows, gradients), **shown}.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}{m[2]}", text, flags=re.DOTALL)
        assert found == 1, name
    page.write_text(text)


def pictures(rows: Sequence[Row], gradients: Sequence[Row]) -> dict[str, str]:
    """Those that there are results for."""
    mix = [row for row in rows if row["set"] == MIX]
    found: dict[str, str] = {}
    if mix:
        found["curves"] = curves(mix)
    losses = [name for name in (DEFAULT, "run-token", "token-mean", "sample-mean", "sum") if of_setting(mix, MIX, name)]
    if len(losses) > 1:
        found["norms"] = norms(mix, losses)
    if of_setting(mix, MIX, "curriculum off"):
        found["curriculum"] = curriculum(mix)
    if gradients:
        found["cosine"] = cosines(gradients)
    return found


def tables(rows: Sequence[Row], gradients: Sequence[Row]) -> dict[str, str]:
    """By the name of their place in the page."""
    return {
        "main": figures_table(rows, MIX, lambda row: row["question"] == "main"),
        "goals": goals_table(rows),
        "findings": findings(rows),
        "claims": claims_table(rows),
        "tasks": tasks_table(rows),
        "order": order_table(rows, gradients),
        "loss": figures_table(rows, MIX, beside_ours("loss"), norms=True),
        "curriculum": figures_table(rows, MIX, beside_ours("curriculum")),
        "rate": figures_table(rows, MIX, beside_ours("rate")),
        "stdlib": figures_table(rows, STDLIB, lambda row: True),
        "made": made(rows),
    }


def beside_ours(question: str) -> Callable[[Row], bool]:
    """Which rows answer a question: its settings', and the defaults'."""
    return lambda row: row["question"] == question or row["setting"] == DEFAULT


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every) + "\n"


def number(value: float, half: float, figure: str, *, signed: bool = False) -> str:
    """A mean with half of its interval; shares as percentages."""
    scale, digits, unit = (100, 1, " %") if figure in PERCENT else (1, 3, "")
    sign = "+" if signed else ""
    width = f" ± {scale * half:.{digits}f}" if np.isfinite(half) else ""
    return f"{scale * value:{sign}.{digits}f}".replace("-", "−") + width + unit


def names(rows: Sequence[Row], data: str, wanted: Callable[[Row], bool]) -> list[str]:
    """Settings of a set in the order in which they were run, but for the four of the pictures, which come first."""
    found, ahead = dict.fromkeys(row["setting"] for row in rows if row["set"] == data and wanted(row)), list(COLOURS)
    return sorted(found, key=lambda name: ahead.index(name) if name in ahead else len(ahead))


def figures_table(rows: Sequence[Row], data: str, wanted: Callable[[Row], bool], *, norms: bool = False) -> str:
    """Mean and interval over seeds of each figure, a line a setting."""
    lines = []
    for name in names(rows, data, wanted):
        mine = list(of_setting(rows, data, name).values())
        cells = [number(*mean_half([row[figure] for row in mine]), figure) for figure in FIGURES]
        steps = sorted({row["steps"] for row in mine})
        seconds = interval([row["seconds"] for row in mine]).mean
        more = []
        if norms:
            median, largest, clipped = (
                float(np.mean([row["gradient_norms"][key] for row in mine])) for key in ("median", "largest", "clipped")
            )
            more = [f"{median:.3g}", f"{largest:.3g}", f"{clipped:.0%}"]
        lines.append([name, "–".join(str(s) for s in {steps[0]: 0, steps[-1]: 0}), f"{seconds:.0f}", *cells, *more])
    if not lines:
        return NOTHING
    header = ["setting", "steps", "predicted s", *HEADER, *(["norm, median", "largest", "clipped"] if norms else [])]
    return table(header, lines)


def mean_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its interval."""
    got = interval(values)
    return got.mean, got.half


def goals_table(rows: Sequence[Row]) -> str:
    """Ours against the others, seed by seed: at equal steps, and at equal predicted seconds."""
    lines = []
    pairs = [
        (DEFAULT, UNPACKED, "steps"),
        (DEFAULT, "naive packing", "steps"),
        ("hbp, as published", UNPACKED, "steps"),
    ]
    pairs += [(DEFAULT, name, "seconds") for name in SHORT_SECONDS]
    for mine, other, equal in pairs:
        for data in (MIX, STDLIB):
            got = [paired(rows, data, mine, other, figure) for figure in FIGURES]
            cells = [
                f"{number(g.mean, g.half, f, signed=True)}{'' if no_worse(g, f) else ' **worse**'}"
                for g, f in zip(got, FIGURES, strict=True)
                if g is not None
            ]
            if len(cells) == len(FIGURES):
                lines.append([data, f"{mine} − {other.split(',')[0]}", equal, *cells])
    return table(["set", "difference", "at equal", *HEADER], lines) if lines else NOTHING


def findings(rows: Sequence[Row]) -> str:
    """Which settings differ from the defaults by more than chance, and in what; one line a question."""
    lines = []
    for question in ("order", "curriculum", "loss", "rate"):
        told = []
        for name in dict.fromkeys(row["setting"] for row in rows if row["set"] == MIX and row["question"] == question):
            for figure, label in zip(FIGURES, HEADER, strict=True):
                got = paired(rows, MIX, name, DEFAULT, figure)
                if got is not None and np.isfinite(got.half) and abs(got.mean) > got.half:
                    better = (got.mean < 0) == figure.endswith("loss")
                    amount = number(got.mean, got.half, figure, signed=True)
                    told.append(f"{name} is {'better' if better else 'worse'} in {label} ({amount})")
        seen = any(row["question"] == question for row in rows)
        lines += [
            f"- {question}: {'; '.join(told) or 'no setting differs from the defaults by more than chance'}."
        ] * seen
    return "\n".join(lines) + "\n" if lines else NOTHING


CLAIMS = (
    ("a curriculum helps (Tables 7, 8; Figure 4)", DEFAULT, "curriculum off"),
    ("100 first steps already help", "curriculum 100", "curriculum off"),
    ("Ave-Token over Token-Mean (Table 10)", DEFAULT, "token-mean"),
    ("Ave-Token over Sample-Mean (Table 10)", DEFAULT, "sample-mean"),
    ("Ave-Token over Sum (Table 10)", DEFAULT, "sum"),
    ("HBP learns as well as naive packing with Token-Mean (Table 5)", "hbp, as published", "naive packing, token-mean"),
)
"""What the paper says: the first setting learns no worse, or better, than the second."""


def claims_table(rows: Sequence[Row]) -> str:
    """The paper's claims about learning, as differences here."""
    lines = []
    for claim, mine, other in CLAIMS:
        got = [paired(rows, MIX, mine, other, figure) for figure in FIGURES]
        cells = [number(g.mean, g.half, f, signed=True) for g, f in zip(got, FIGURES, strict=True) if g is not None]
        if len(cells) == len(FIGURES):
            sure = [
                (g.mean < 0) == f.endswith("loss") for g, f in zip(got, FIGURES, strict=True) if abs(g.mean) > g.half
            ]
            verdict = "not shown: within chance" if not sure else "holds" if all(sure) else "**does not hold**"
            lines.append([claim, f"{mine} − {other}", *cells, verdict if all(sure) or not any(sure) else "in part"])
    return table(["claim", "difference", *HEADER, "here"], lines) if lines else NOTHING


def tasks_table(rows: Sequence[Row]) -> str:
    """Accuracy of each task."""
    shown = names(rows, MIX, lambda row: row["question"] == "main")
    if not shown:
        return NOTHING
    tasks = list(next(row for row in rows if row["set"] == MIX)["tasks"])
    lines = []
    for name in shown:
        mine = of_setting(rows, MIX, name).values()
        values = ([row["tasks"][task]["accuracy"] for row in mine] for task in tasks)
        lines.append([name, *(number(*mean_half(v), "short_accuracy") for v in values)])
    return table(["setting", *tasks], lines)


def order_table(rows: Sequence[Row], gradients: Sequence[Row]) -> str:
    """What each order does to steps, gradients and results."""
    lines, whole = [], [row for row in rows if row["setting"] not in SHORT_SECONDS]
    for name in names(whole, MIX, lambda row: row["question"] in ("main", "order")):
        mine = list(of_setting(rows, MIX, name).values())
        drift = float(np.mean([row["plan"]["drift"] for row in mine]))
        least = min(row["plan"]["loss_tokens_least"] for row in mine)
        most = max(row["plan"]["loss_tokens_most"] for row in mine)
        mine_gradients = [row for row in gradients if (row["set"], row["setting"]) == (MIX, name)]
        seen = [
            f"{np.mean([row[key] for row in mine_gradients]):.2f}" if mine_gradients else "–"
            for key in ("cosine", "cosine_least", "noise_ave_token", "noise_run_token")
        ]
        label = f"{name} ({mine[0]['order']})" if name == DEFAULT and mine[0]["order"] else name
        lines.append(
            [
                label,
                f"{interval([row['seconds'] for row in mine]).mean:.0f}",
                f"{drift:.2f}",
                f"{least:,}–{most:,}",
                *seen,
                *(number(*mean_half([row[figure] for row in mine]), figure) for figure in PERCENT),
            ]
        )
    header = ("setting", "predicted s", "drift", "loss tokens of a step", "cosine", "least", "noise, `ave-token`")
    return table([*header, "noise, `run-token`", *HEADER[:2]], lines) if lines else NOTHING


def made(rows: Sequence[Row]) -> str:
    """Of when and what the numbers are."""
    if not rows:
        return NOTHING
    dates = sorted({row["date"] for row in rows})
    seeds = {len(of_setting(rows, row["set"], row["setting"])) for row in rows}
    count = "–".join(str(n) for n in sorted({min(seeds), max(seeds)}))
    return (
        f"*`python benchmarks/quality.py`, {len(rows)} runs of {count} seeds each, {rows[0]['device']}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}; every run's line in `benchmarks/results/quality/`.*\n"
    )


def mean_curve(rows: Sequence[Row], setting: str, along: str, figure: str) -> tuple[list[float], list[float]]:
    """A figure on the way, the mean over seeds, over steps' tokens or seconds."""
    own = [row["curve"] for row in of_setting(rows, MIX, setting).values()]
    n = min(len(curve) for curve in own)
    x, y = ([float(np.mean([curve[i][key] for curve in own])) for i in range(n)] for key in (along, figure))
    return x, y


def curves(rows: Sequence[Row]) -> str:
    """Held-out loss over tokens and over predicted seconds."""
    shown = [name for name in COLOURS if of_setting(rows, MIX, name)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.4), layout="constrained")
        axes = figure.subplots(2, 2, sharey="row")
        for row, size in zip(axes, ("short", "long"), strict=True):
            for axis, along in zip(row, ("tokens", "seconds"), strict=True):
                for name in shown:
                    x, y = mean_curve(rows, name, along, f"{size}_loss")
                    axis.plot(x, y, color=COLOURS[name], label=name, marker="o", ms=3.5)
                axis.set_title(f"{size} samples")
                axis.set_xlabel("tokens" if along == "tokens" else "predicted seconds on the cluster")
                _plain_ticks(axis)
            row[0].set_ylabel("held-out loss")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return as_svg(figure, "quality-curves")


def _plain_ticks(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}K" if x >= 1000 else f"{x:g}"))


def first(rows: Sequence[Row], setting: str) -> Row:
    """The row of the lowest seed."""
    mine = of_setting(rows, MIX, setting)
    return mine[min(mine)]


def norms(rows: Sequence[Row], shown: Sequence[str]) -> str:
    """Gradient norms before clipping, step by step, one panel a loss (the paper's Figure 5)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
        for axis, name in zip(axes, shown, strict=True):
            norm = first(rows, name)["trace"]["norm"]
            axis.plot(range(1, len(norm) + 1), norm, color=PALETTE[2], linewidth=1.2)
            axis.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title("ave-token" if name == DEFAULT else name)
            axis.set_xlabel("step")
        axes[0].set_ylabel("gradient norm")
        return as_svg(figure, "quality-norms")


def curriculum(rows: Sequence[Row]) -> str:
    """Loss with and without a curriculum: of the steps' own tokens, and held-out (the paper's Figure 4)."""
    shown = ["curriculum off", "curriculum 100", DEFAULT, "curriculum 500"]
    colours = dict(zip(shown, (INK, PALETTE[1], PALETTE[2], PALETTE[0]), strict=True))
    shown = [name for name in shown if of_setting(rows, MIX, name)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        axes = figure.subplots(1, 3)
        for name in shown:
            trace, label = first(rows, name)["trace"], "ours (a tenth)" if name == DEFAULT else name
            axes[0].plot(
                range(1, len(trace["loss"]) + 1), trace["loss"], color=colours[name], label=label, linewidth=1.2
            )
            for axis, size in zip(axes[1:], ("short", "long"), strict=True):
                x, y = mean_curve(rows, name, "step", f"{size}_loss")
                axis.plot(x, y, color=colours[name], marker="o", ms=3.5)
        titles = ("loss of the step's own tokens", "held-out loss, short", "held-out loss, long")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.set_xlabel("step")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return as_svg(figure, "quality-curriculum")


def cosines(gradients: Sequence[Row]) -> str:
    """Cosine of each step's gradient with the whole set's, a row of dots a setting."""
    shown = [row for row in gradients if row["set"] == MIX]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.42 * len(shown) + 1.1), layout="constrained")
        axis = figure.subplots()
        for y, row in enumerate(shown):
            axis.plot(row["cosines"], np.full(len(row["cosines"]), y), "o", ms=4.5, color=PALETTE[0], alpha=0.45, mew=0)
            axis.plot([row["cosine"]] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=1.6)
        axis.axvline(0, color=FAINT, linewidth=1)
        axis.set_yticks(range(len(shown)), [row["setting"] for row in shown])
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlim(min(0.0, min(min(row["cosines"]) for row in shown) - 0.02), 1)
        axis.set_xlabel("cosine of a step's gradient with that of the whole set; the line is the mean")
        axis.tick_params(length=0)
        return as_svg(figure, "quality-cosine")

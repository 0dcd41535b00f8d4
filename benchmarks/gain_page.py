"""The pictures and numbers of docs/how-much-will-i-gain.md, from the results that `gain.py`, `paper.py` and
`simulator.py` left. What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in the page is written here; the rest
is prose without figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hbp.planning.planner import STRATEGIES
from hbp.report.figures import INK, PALETTE, STYLE, as_svg, standalone

K = 1024
OURS = [name for name, strategy in STRATEGIES.items() if strategy.ours]
NAMES = {
    "hbp": "HBP, as published",
    "hbp-mixed": "HBP, mixed",
    "bfd": "best fit (reference)",
    "isf": "ISF",
    "dcp": "dynamic context parallelism",
    "flexsp": "FlexSP-style solving",
    "sorted": "sorted batches (LongAlign)",
    "lb": "load balancing (verl)",
    "concat": "concatenation",
}
COLOURS = {"hbp": PALETTE[0], "hbp-mixed": PALETTE[2], "isf": PALETTE[6], "dcp": PALETTE[1], "flexsp": PALETTE[3]}
COLOURS |= {"lb": PALETTE[4], "sorted": PALETTE[5]}
FAR = 0.2
"""Relative differences above it are printed bold."""
SETS = {
    "short-32k": "short samples only",
    "tulu3-longcite": "Tulu3 + LongCite",
    "mix-128k": "5 % long, to 128K",
    "mix-1m": "2 % long, to 1M",
}
Row = dict[str, Any]


def draw(gain: dict[str, Any], docs: Path) -> None:
    """Write the pictures into `docs` and the numbers into its page."""
    rows = gain["rows"]
    for name, picture in (
        ("gain-map", gain_map(rows)),
        ("gain-share", over(rows, "map", "share", "share of long samples")),
        ("gain-gpus", over(rows, "gpus", "gpus", "GPUs")),
        ("gain-contexts", over(rows, "contexts", "context", "longest sample, tokens")),
    ):
        (docs / f"{name}.svg").write_text(standalone(picture))
    page = docs / "how-much-will-i-gain.md"
    results = docs.parent / "benchmarks" / "results"
    tables = {
        "map": map_summary(rows),
        "peers": peers_table(rows),
        "contexts": contexts_table(rows),
        "few": few_summary(rows),
        "paper": paper_table(json.loads((results / "paper.json").read_text())["rows"]),
        "rows": published_rows(json.loads((results / "paper.json").read_text())["rows"]),
        "simulator": simulator_table(json.loads((results / "simulator.json").read_text())),
        "deepseek": deepseek_table(json.loads((results / "paper.json").read_text())["deepseek"]),
        "claims": claims_table(rows),
        "made": made(gain, json.loads((results / "paper.json").read_text())),
    }
    text = page.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.DOTALL)
        assert found == 1, name
    page.write_text(text)


def best_of_ours(rows: Sequence[Row], section: str) -> list[Row]:
    """In each place of a section the fastest of our strategies."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["section"] == section and row["strategy"] in OURS and "speedup" in row:
            place = (row["data"], row["context"], row["gpus"], row["network"], row["share"])
            if place not in best or row["speedup"] > best[place]["speedup"]:
                best[place] = row
    return list(best.values())


def gain_map(rows: Sequence[Row]) -> str:
    """Heat map of the speed-up over share of long samples and speed of the network."""
    best = best_of_ours(rows, "map")
    shares, networks = sorted({r["share"] for r in best}), list(dict.fromkeys(r["network"] for r in best))
    table = np.full((len(networks), len(shares)), np.nan)
    for r in best:
        table[networks.index(r["network"]), shares.index(r["share"])] = r["speedup"]
    colours = LinearSegmentedColormap.from_list("gain", ["#f4f6f8", "#a9c9e6", PALETTE[0], "#123f66"])
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(8.6, 0.55 * len(networks) + 1.5), layout="constrained")
        axis = figure.subplots()
        highest = max(float(np.nanmax(table)), 1.5)
        axis.pcolormesh(
            np.arange(len(shares) + 1), np.arange(len(networks) + 1), table, cmap=colours, vmin=1, vmax=highest
        )
        for (y, x), value in np.ndenumerate(table):
            ink = "#ffffff" if (value - 1) / (highest - 1) > 0.5 else "#1c2430"
            axis.text(x + 0.5, y + 0.5, f"{value:.2f}×", ha="center", va="center", color=ink)
        axis.set_xticks(np.arange(len(shares)) + 0.5, [f"{100 * s:g} %" for s in shares])
        axis.set_yticks(np.arange(len(networks)) + 0.5, networks)
        axis.set_xlabel("share of samples that are long (8K to 128K tokens)")
        axis.set_title("speed-up over best-fit packing with its fastest static setting, 32 H100s")
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        return as_svg(figure, "gain-map")


def over(rows: Sequence[Row], section: str, field: str, label: str) -> str:
    """Speed-up over one quantity, one panel a network, one line a strategy."""
    mine = [r for r in rows if r["section"] == section and "speedup" in r and r["strategy"] != "bfd"]
    networks = ["100 Gb/s a node", "400 Gb/s a GPU", "NVLink throughout"]
    if section == "map":
        networks[0] = "25 Gb/s a GPU"
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, len(networks), sharey=True)
        values = sorted({r[field] for r in mine})
        for axis, network in zip(axes, networks, strict=True):
            axis.axhline(1, color=INK, linewidth=1)
            for strategy, colour in COLOURS.items():
                line = {r[field]: r["speedup"] for r in mine if (r["network"], r["strategy"]) == (network, strategy)}
                if line:
                    at = [values.index(v) for v in sorted(line)]
                    axis.plot(
                        at, [line[v] for v in sorted(line)], color=colour, label=NAMES[strategy], marker="o", ms=3.5
                    )
            axis.set_title(network)
            axis.set_xticks(
                range(len(values)), [_named(v, field) for v in values], rotation=45 if len(values) > 6 else 0
            )
            axis.set_xlabel(label)
        axes[0].set_ylabel("speed-up over best fit")
        lines = {h.get_label(): h for axis in axes for h in axis.get_lines() if not str(h.get_label()).startswith("_")}
        figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=4)
        return as_svg(figure, f"gain-{field}")


def _named(value: float, field: str) -> str:
    if field == "share":
        return f"{100 * value:g} %"
    if field == "context":
        return f"{value / K:g}K" if value < K * K else f"{value / K / K:g}M"
    return f"{value:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def map_summary(rows: Sequence[Row]) -> str:
    """In words: where the gain of the map is least and most."""
    best = sorted(best_of_ours(rows, "map"), key=lambda r: r["speedup"])
    low, high = best[0], best[-1]
    place: Callable[[Row], str] = lambda r: f"{100 * r['share']:g} % long samples, {r['network']}"  # noqa: E731
    return f"From {low['speedup']:.2f}× ({place(low)}) to {high['speedup']:.2f}× ({place(high)})."


def few_summary(rows: Sequence[Row]) -> str:
    """What runs of a few micro-steps gain."""
    found = {r["strategy"]: r for r in rows if r["section"] == "few"}
    ours = found["hbp-mixed"]
    return (
        f"{ours['samples']:,} samples of Tulu3 + LongCite on {ours['gpus']} GPUs, {ours['network']}: `hbp-mixed` "
        f"{ours['speedup']:.2f}×, `hbp` {found['hbp']['speedup']:.2f}× the speed of best fit."
    )


def peers_table(rows: Sequence[Row]) -> str:
    """Every strategy on every set; the fastest of a set in bold."""
    mine = [r for r in rows if r["section"] == "peers" and "speedup" in r]
    sets = [name for name in SETS if any(r["data"] == name for r in mine)]
    if not sets:
        return "Not in the kept results: `python benchmarks/gain.py --sections peers`."
    lines = []
    for strategy in sorted({r["strategy"] for r in mine}, key=lambda s: list(NAMES).index(s) if s in NAMES else 99):
        cells = []
        for data in sets:
            row = next((r for r in mine if (r["data"], r["strategy"]) == (data, strategy)), None)
            top = max(r["speedup"] for r in mine if r["data"] == data)
            text = "–" if row is None else f"{row['speedup']:.2f}× ({row['efficiency']:.2f})"
            cells.append(f"**{text}**" if row and row["speedup"] > top - 0.005 else text)
        here = [r for r in mine if r["strategy"] == strategy]
        lines.append([f"`{strategy}`: {NAMES.get(strategy, strategy)}{_mark(here[0], mine)}", *cells])
    return _table(["strategy", *(SETS[name] for name in sets)], lines)


def contexts_table(rows: Sequence[Row]) -> str:
    """GPU-days of a billion tokens by context, and the gain."""
    mine = [r for r in rows if r["section"] == "contexts" and r["network"] == "400 Gb/s a GPU"]
    mine = [r for r in mine if r["strategy"] in ("bfd", *OURS)]
    lines = []
    for context in sorted({r["context"] for r in mine}):
        here = {r["strategy"]: r for r in mine if r["context"] == context}
        ours = [r for name, r in here.items() if name in OURS and "speedup" in r]
        if not ours:
            why = next((r["error"] for r in here.values() if "error" in r), "")
            lines.append([_named(context, "context"), "–", "–", "–", f"does not fit: {why.split(':')[0]}"])
            continue
        best = max(ours, key=lambda r: r["speedup"])
        lines.append(
            [
                _named(context, "context") + _mark(best, mine),
                f"{here['bfd']['gpu_days_per_billion']:.2f}",
                f"{best['gpu_days_per_billion']:.2f} (`{best['strategy']}`)",
                f"{best['speedup']:.2f}×",
                best["groups"],
            ]
        )
    return _table(["longest sample", "best fit", "ours", "speed-up", "our groups"], lines)


def _mark(row: Row, rows: Sequence[Row]) -> str:
    """On rows of an earlier date than the newest."""
    return " †" if row["date"] < max(r["date"] for r in rows) else ""


def paper_table(rows: Sequence[Row]) -> str:
    """Speed-ups of the paper's Tables 5, 22 and 23 beside ours."""
    lines = []
    for r in rows:
        if r["metric"] == "speedup" and not r["row"].endswith("static setting"):
            published = f"{r['published']:.2f}×" if r["published"] else "–"
            relative = f"{100 * r['relative']:+.0f} %" if "relative" in r else "–"
            others = (f"{r[name]:.2f}×" if r.get(name) else "–" for name in ("same_step", "built_in"))
            lines.append([r["table"], r["row"] + _mark(r, rows), published, f"{r['ours']:.2f}×", relative, *others])
    return _table(["table", "row", "published", "ours", "difference", "same step", "on `h100-nvlink`"], lines)


def published_rows(rows: Sequence[Row]) -> str:
    """Every other figure of the paper beside ours; those far off are bold."""
    lines = []
    for r in rows:
        if r["metric"] != "speedup":
            difference = f"{100 * r['relative']:+.0f} %" if "relative" in r else "–"
            difference = f"**{difference}**" if abs(r.get("relative", 0)) > FAR else difference
            published = "–" if r["published"] is None else f"{r['published']:g}"
            row = f"{r['row']} ({r['groups']})" if r["row"] == "our Algorithm 1" else r["row"]
            lines.append([r["table"], row + _mark(r, rows), r["metric"], published, f"{r['ours']:.4g}", difference])
    return _table(["table", "row", "figure", "published", "ours", "difference"], lines)


SIDES = {True: "as FSDP moves them", False: "in place"}
SOURCES = {"testbed": "the paper's testbed"}


def deepseek_table(rows: Sequence[Row]) -> str:
    """Each naive side of DeepSeek-V2 and ours, what their time goes into, and what ours gain over each."""
    lines = []
    for r in rows:
        parts = r["parts"]
        busy = sum(parts.get(name, 0.0) for name in ("linear", "attention", "overhead", "recompute"))
        shares = [busy, *(parts.get(name, 0.0) for name in ("alltoall", "fsdp", "waiting", "optimizer"))]
        gains = ["–", "–"]
        if r["side"].startswith("naive"):
            degree = r["side"].rpartition("SP")[2]
            here = [x for x in rows if (x["cluster"], x["fsdp"]) == (r["cluster"], r["fsdp"])]
            gains = [f"{x['speedup'][degree]:.2f}×" for s in OURS for x in here if x["side"] == s]
        lines.append(
            [
                SOURCES.get(r["cluster"], f"`{r['cluster']}`"),
                SIDES[r["fsdp"]],
                r["side"],
                f"{r['gpu_days_per_billion']:.1f}",
                *(f"{100 * share:.0f} %" for share in shares),
                *gains,
            ]
        )
    header = ("constants", "parameters", "side", "GPU-days", "compute", "all-to-all", "FSDP", "waiting", "optimizer")
    return _table([*header, *(f"`{name}` over it" for name in OURS)], lines)


CLAIMS = {
    "qwen3-30b-a3b": "1.61× (dynamic CP over CP 4, verl)",
    "llama-3.1-8b": "2.4× (dynamic CP, Nemotron Ultra)",
    "llama-3.1-70b": "2.4× (dynamic CP, Nemotron Ultra)",
}
"""What others publish of a workload like the one that we plan for the model."""
CLAIM_AT = {"qwen3-30b-a3b": "isf-sp4"}
"""The naive side that it is over, where they say."""


def claims_table(rows: Sequence[Row]) -> str:
    """Speed-ups over each static setting of the workloads that others publish figures of."""
    mine = [r for r in rows if r["section"] == "claims"]
    lines = []
    for model, network in dict.fromkeys((r["model"], r["network"]) for r in mine):
        here = {r["strategy"]: r for r in mine if (r["model"], r["network"]) == (model, network)}
        for name, static in here.items():
            if not name.startswith("isf-sp"):
                continue
            work = f"{model}, {SETS.get(static['data'], static['data'])}, up to {_named(static['context'], 'context')}"
            over = "does not fit" if "error" in static else f"ISF, SP {name.removeprefix('isf-sp')}"
            cells = [
                f"{here[s]['tokens_per_s'] / static['tokens_per_s']:.2f}×"
                if "tokens_per_s" in static and "tokens_per_s" in here.get(s, {})
                else "–"
                for s in ("bfd", "dcp", *OURS)
            ]
            published = CLAIMS[model] if CLAIM_AT.get(model, name) == name else "–"
            lines.append([work, f"{static['gpus']}, {network}", over, *cells, published])
    header = ("workload", "GPUs, network", "over", "best fit, fastest setting", "`dcp`", *(f"`{s}`" for s in OURS))
    return _table([*header, "published"], lines)


def made(gain: dict[str, Any], paper: dict[str, Any]) -> str:
    """When each section was planned, and which strategies of it at an earlier date."""
    words = []
    for section in dict.fromkeys(r["section"] for r in gain["rows"]):
        dates: dict[str, dict[str, None]] = {}
        for r in gain["rows"]:
            if r["section"] == section:
                dates.setdefault(r.get("date", gain["date"]), {})[f"`{r['strategy']}`"] = None
        newest, *older = sorted(dates, reverse=True)
        words.append(f"{section} {newest}" + "".join(f" (of {', '.join(dates[d])} rows of {d})" for d in older))
    older = sorted({r["date"] for r in paper["rows"]} - {paper["date"]})
    return (
        f"Planned by `{gain['command']}`, where nothing else is said for {gain['model']}: {', '.join(words)}. "
        f"The paper's tables: `{paper['command']}`, {paper['date']}"
        f"{', rows with † ' + ', '.join(older) if older else ''}."
    )


def simulator_table(result: dict[str, Any]) -> str:
    """Measured and predicted seconds of each strategy by both clocks, and the errors."""
    clocks = ("measured_s", "predicted_s", "busy_measured_s", "busy_predicted_s")
    lines = [
        [
            str(r["processes"]),
            f"`{r['strategy']}`",
            *(f"{r[name]:.2f}" if name in r else "–" for name in clocks),
            f"{100 * r['noise']:.1f} %",
        ]
        for r in result["rows"]
    ]
    table = _table(["processes", "strategy", "measured s", "predicted s", "busy s", "predicted s", "noise"], lines)
    words = []
    for n, s in result["by_processes"].items():
        figures = ", ".join(
            f"{prefix.replace('_', ' ')}{name.replace('_', ' ')} {100 * s[prefix + name]:.1f} %"
            for prefix in ("", "busy_")
            for name in ("step_time_error", "ratio_error")
            if prefix + name in s
        )
        words.append(f"{n} processes{', more than cores' if s['oversubscribed'] else ''}: {figures}.")
    return table + "\n\n" + " ".join(words) + f" Device: {result['device']}, {result['date']}."

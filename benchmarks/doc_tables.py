"""Fill the tables of the documents from the raw results, so that no figure is typed by hand.

A document holds ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between them is replaced by the table of
that name made from ``benchmarks/results/``.

    python benchmarks/doc_tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fault_rows import summary
from goals import exact, verdicts

from hbp.cost.known_models import KNOWN_MODELS
from hbp.plan_info import ORDERS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
STARTUP_S = 1.5
Row = dict[str, Any]


def packing(section: str, wanted: Callable[[Row], bool] = lambda row: True) -> tuple[list[Row], str]:
    """Rows of a section of `packing.json`, and where they came from; `mark` is on those of an earlier date."""
    data = json.loads((RESULTS / "packing.json").read_text())
    rows = [{"date": data["date"], **row} for row in data["rows"] if row["section"] == section and wanted(row)]
    dates = sorted({row["date"] for row in rows})
    rows = [{**row, "mark": " †" if row["date"] < dates[-1] else ""} for row in rows]
    timed = sorted({row["timed"] for row in rows if row.get("timed", row["date"]) != row["date"]})
    when = dates[-1] if dates else data["date"]
    if len(dates) > 1:
        when += f", rows with † {' and '.join(dates[:-1])}"
    if timed:
        when += f", samples/s {' and '.join(timed)}"
    elif len(dates) == 1 and section in data.get("section_s", {}):
        when += f", {data['section_s'][section]:.0f} s"
    source = f"*`{data['command']} --section {section}`, {data['device']}, {when}; raw rows in "
    return rows, source + "`benchmarks/results/packing.json`.*\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = "|---|" + "--:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def count(n: float) -> str:
    """100,000 as 100k, 1,000,000 as 1M."""
    return f"{n / 1e6:g}M" if n >= 1e6 else f"{n / 1e3:g}k"


def packing_fitting() -> str:
    rows, source = packing("fitting")
    cells = [
        (
            f"{r['set']}, {count(r['samples'])}{r['mark']}",
            f"`{r['strategy']}`",
            f"{r['samples_per_s'] / 1e6:.2f}M",
            f"{r['times_best_fit']:.1f}×",
            f"{r['times_even_fit']:.1f}×" if "times_even_fit" in r else "",
            f"{r['padding']:.3%}" + (f", {r['over_capacity']} too full" if r["over_capacity"] else ""),
            f"{r['abr_random_order']:.3f}",
            f"{r['abr_own_order']:.3f}" if "abr_own_order" in r else "",
            f"{r['abr']:.4f}",
        )
        for r in rows
    ]
    header = ("set", "packer", "samples/s", "time over best fit", "over even fit", "padding", "ABR, random order")
    header += ("own order", "by cost")
    return table(header, cells) + "\n" + source


def packing_plans() -> str:
    rows, source = packing("plans")
    place = ("set", "samples", "gpus", "cluster")
    cells = []
    for at in dict.fromkeys(tuple(row[key] for key in place) for row in rows):
        here = {row["strategy"]: row for row in rows if tuple(row[key] for key in place) == at}
        ours, paper = here.pop("hbp-mixed"), here.pop("hbp")
        best = max(here.values(), key=lambda row: float(row["efficiency"]))
        cells.append(
            (
                f"{at[0]}, {count(at[1])}{ours['mark']}",
                f"{at[2]} × {at[3]}",
                f"{best['efficiency']:.3f} `{best['strategy']}`",
                f"{paper['efficiency']:.3f}",
                f"{ours['efficiency']:.4f}",
                f"{ours['padding']:.4%}",
                f"{ours['abr']:.4f}",
                f"{ours['time_imbalance']:.4f}",
                f"{ours['cr']:.3f}",
                f"{ours['cr_least']:.3f}",
                f"{ours['samples_per_s'] / 1e6:.2f}M",
            )
        )
    header = ("set", "ranks", "efficiency of the best baseline", "of `hbp`", "of `hbp-mixed`", "its padding", "ABR")
    return table((*header, "time imbalance", "CR", "CR least", "samples/s"), cells) + "\n" + source


def packing_strategies() -> str:
    """Efficiency of every strategy on every set, for the fewest samples."""
    rows, _ = packing("plans")
    fewest = min(row["samples"] for row in rows)
    rows = [row for row in rows if row["samples"] == fewest]
    marks = {row["set"]: row["mark"] for row in rows}
    sets, cells = list(marks), []
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        here = {row["set"]: row["efficiency"] for row in rows if row["strategy"] == strategy}
        cells.append((f"`{strategy}`", *(f"{here[name]:.3f}" if name in here else "" for name in sets)))
    where = f"Efficiency at {fewest:,} samples on {rows[0]['gpus']} × {rows[0]['cluster']}:\n\n"
    return where + table(("strategy", *(name + mark for name, mark in marks.items())), cells)


def packing_goals() -> str:
    rows, source = packing("plans")
    cells = []
    for goal, case, worst in verdicts(rows):
        value, limit = worst[goal.key], goal.limit(case)
        cells.append(
            (
                goal.name,
                f"{count(case['samples'])} on {case['gpus']} × {case['cluster']}",
                f"{'≤' if goal.most else '≥'} {limit:g}",
                exact(value, limit),
                worst["set"] + worst["mark"],
                "met" if goal.met(value, limit) else "**missed**",
            )
        )
    missed = sum(cell[-1] != "met" for cell in cells)
    lead = f"{len(cells) - missed} of {len(cells)} met, each judged by its worst of all sets:\n\n"
    return lead + table(("goal", "samples and ranks", "limit", "worst", "set", ""), cells) + "\n" + source


def packing_size() -> str:
    rows, source = packing("size")
    cells = [
        (
            f"{r['set']}, {count(r['samples'])}{r['mark']}",
            f"{r['samples_per_s'] / 1e6:.2f}M",
            f"{r['times_read_and_sort']:.0f}×" if "times_read_and_sort" in r else "",
            f"{r['times_read_and_argsort']:.1f}×" if "times_read_and_argsort" in r else "",
            f"{r['peak_gib']:.1f}" if "peak_gib" in r else "",
            f"{r['padding']:.4%}",
            f"{r['efficiency']:.3f}",
        )
        for r in rows
    ]
    header = (
        "set",
        "samples/s, planned and written",
        "time over reading and sorting",
        "over reading and stable argsort",
        "peak GiB",
        "padding",
        "efficiency",
    )
    return table(header, cells) + "\n" + source


def packing_streaming() -> str:
    rows, source = packing("streaming")
    cells = [
        (
            f"{r['set']}, {count(r['samples'])}{r['mark']}",
            count(r["buffer"]),
            f"{r['padding']:.3%}",
            f"{r['abr']:.4f}",
            f"{r['efficiency']:.3f}",
            f"{r['samples_per_s'] / 1e6:.2f}M",
        )
        for r in rows
    ]
    return table(("set", "buffer", "padding", "ABR", "efficiency", "samples/s"), cells) + "\n" + source


def packing_order() -> str:
    rows, source = packing("order")
    cells = [
        (
            f"{r['set']}, {count(r['samples'])}{r['mark']}",
            f"{r['windows']}{' (default)' if r['default'] else ''}",
            f"{r['efficiency']:.4f}",
            f"{r['speed_given_up']:.2%}",
            f"{r['travel']:.3f}",
            f"{r['drift']:.3f}",
            f"{r['drift_random']:.3f}" if "drift_random" in r else "",
            f"{r['abr']:.4f}",
        )
        for r in rows
        if "windows" in r
    ]
    header = ("set", "windows", "efficiency", "speed given up", "travel", "drift", "drift of random packs", "ABR")
    return table(header, cells) + "\n" + source


def packing_drift() -> str:
    rows, source = packing("order")
    rows = [row for row in rows if "global_batch_tokens" in row]
    if not any("order" in row for row in rows):
        return "Not measured yet.\n"
    cells = []
    for name, batch in sorted({(row["set"], row["global_batch_tokens"]) for row in rows}):
        here = {r.get("order", r["strategy"]): r for r in rows if (r["set"], r["global_batch_tokens"]) == (name, batch)}
        cells.append(
            (
                f"{name}, {count(here['fastest']['samples'])}{here['fastest']['mark']}",
                f"{batch / 2**20:g}M tokens",
                *(f"{here[kind]['drift']:.3f}" for kind in ("concat", "isf", *ORDERS)),
                *(f"{here[kind].get('price', 0.0):.1%}" for kind in ORDERS[1:]),
                f"{here['concat']['predicted_s'] / here['fastest']['predicted_s'] - 1:.0%}",
            )
        )
    drifts = tuple(f"of `{kind}`" for kind in ("isf", *ORDERS))
    prices = tuple(f"of `{kind}`" for kind in (*ORDERS[1:], "concat"))
    header = ("set", "global batch", "drift of `concat`", *drifts, f"price {prices[0]}", *prices[1:])
    return table(header, cells) + "\n" + source


def packing_startup() -> str:
    rows, source = packing("startup")
    if not rows:
        return "Not measured yet.\n"
    cells = [
        (
            f"{r['set']}, {count(r['samples'])}{r['mark']}",
            exact(r["seconds"], STARTUP_S),
            f"{r['least_s']:.2f}–{r['most_s']:.2f}",
            "met" if r["seconds"] <= STARTUP_S else "**missed**",
        )
        for r in rows
    ]
    return table(("set", "`hbp plan`, s", "range", f"goal {STARTUP_S:g} s"), cells) + "\n" + source


def packing_readme() -> str:
    sets = ("tulu3-longcite", "mix-128k")
    rows, source = packing("plans", lambda r: r["set"] in sets and (r["samples"], r["gpus"]) == (100_000, 32))
    cells = []
    for name in sets:
        here = [r for r in rows if r["set"] == name]
        first = next(r for r in here if r["strategy"] == "concat")["predicted_s"]
        cells += [
            (
                name,
                f"`{r['strategy']}`",
                f"{'**' * (r['strategy'] == 'hbp-mixed')}{first / r['predicted_s']:.2f}×"
                f"{'**' * (r['strategy'] == 'hbp-mixed')}",
                f"{r['efficiency']:.3f}",
                f"{r['padding']:.3%}",
                f"{r['abr']:.4f}",
                f"{r['cr']:.2f}",
            )
            for r in here
            if r["strategy"] in ("concat", "bfd", "isf", "dcp", "hbp", "hbp-mixed")
        ]
    return table(("set", "strategy", "predicted speed-up", "efficiency", "padding", "ABR", "CR"), cells) + "\n" + source


def quickstart() -> str:
    folder = RESULTS / "quickstart"
    runs = [json.loads((folder / name).read_text()) for name in ("summary.json", "second-run-summary.json")]
    first, second = (run["speedup"] for run in runs)
    results = runs[0]["results"]
    cells = [
        (
            f"`{r['strategy']}`",
            _settings_of(r["groups"]),
            f"{r['tokens_per_s']:,.0f}",
            f"{r['seconds']:.1f}",
            f"{r['final_train_loss']:.3f}",
            f"{r['eval_loss']:.3f}",
            f"{r['peak_bytes'] / 2**30:.3f}",
            f"{r['metrics']['abr']:.3f}",
            f"{r['metrics']['cr']:.2f}",
            f"{r['metrics']['pr']:.1%}",
        )
        for r in results
    ]
    header = (
        "strategy",
        "packing length / SP degree / recomputed layers",
        "tokens/s",
        "seconds",
        "train loss",
        "eval loss",
        "peak GiB",
        "ABR",
        "CR",
        "PR",
    )
    budget, date = runs[0]["memory_budget_bytes"] / 2**30, runs[0]["date"]
    profile = json.loads((folder / "profile.json").read_text())
    lead = (
        f"Measured by `make quickstart` on {results[0]['device']} (two processes, gloo, {budget:.2f} GiB a process, "
        f"{date}): **HBP is {first:.2f}× as fast** ({second:.2f}× in a second run), on "
        f"{results[0]['samples']:,} samples and {results[0]['tokens']:,} tokens; by the cost model that it fitted, "
        f"which is {profile['median_error']:.0%} off on points held out, no plan could be more than "
        f"{1 / results[1]['metrics']['efficiency']:.2f}×. "
        f"{_steps_of(*(r['steps'] for r in results[:2]))}\n\n"
    )
    sweep = [json.loads(file.read_text()) for file in sorted(folder.glob("memory-*.json"))]
    others = ", ".join(f"{run['speedup']:.2f}× at {run['memory_budget_bytes'] / 2**30:.2f} GiB" for run in sweep)
    follows = f"The gain follows the memory budget: {others}. " if others else ""
    tail = f"\n{follows}Raw output in `benchmarks/results/quickstart/`.\n"
    return lead + table(header, cells) + tail


def _settings_of(groups: list[Any]) -> str:
    each = [f"{g['capacity']:,} / SP {g['sp_degree']} / GC {g['gc_layers']}" for g in groups]
    return ", ".join(each) if len(each) <= 8 else f"{len(each)} groups, from {each[0]} to {each[-1]}"


def _steps_of(ours: int, theirs: int) -> str:
    if abs(ours - theirs) <= 0.02 * theirs:
        return f"Both take the steps of the global batch asked for: {ours} and {theirs}."
    return (
        f"Its {ours} steps come nearer to the global batch asked for than the {theirs} of longer packs, so the losses "
        "are not those of the same steps."
    )


def train() -> str:
    data = json.loads((RESULTS / "train.json").read_text())
    cells = []
    for name, mix in data["mixes"].items():
        speeds = [f"{mix[side]['tokens_per_s']:,.0f}" for side in ("hbp", "naive", "trl")]
        ratios = [f"{mix[f'speedup_vs_{side}']:.2f}×" for side in ("naive", "trl")]
        cells.append((f"{name} (`{mix['hbp']['strategy']}`)", *speeds, *ratios, mix["date"]))
    header = ("mix", "ours, tokens/s", "best static naive", "TRL", "over naive", "over TRL", "measured")
    where = f"Two processes of one thread, {data['device']}: `python benchmarks/train.py`.\n\n"
    return where + table(header, cells) + f"\nSwitching degrees costs {data['switch_overhead']:.1%} of a step.\n"


def cost_model() -> str:
    data = json.loads((RESULTS / "cost-model.json").read_text())
    cells = [
        (
            f"{r['model']}, {r['profile']}: {r['quantity']}",
            str(r["n"]),
            f"{100 * r['median_error']:.1f} %",
            f"{100 * r['p90_error']:.1f} %",
        )
        for r in data["rows"]
    ]
    source = f"*`{data['command']}`, two processes, {data['device']}, {data['date']}; raw points in "
    header = ("model, profile, quantity", "points", "median error", "nine in ten below")
    return table(header, cells) + "\n" + source + "`benchmarks/results/cost-model.json`.*\n"


def rehearse() -> str:
    """Measured compute of strategies on clusters that are not there; nothing before it has been measured."""
    file = RESULTS / "rehearse.json"
    if not file.is_file():
        return "*Not measured yet: `python benchmarks/rehearse.py` on a quiet machine.*\n"
    data = json.loads(file.read_text())
    cells = [
        (
            f"{r['ranks']}, {r['strategy']}",
            f"{r['run_s']:.0f} s",
            f"{r['speedup']:.2f}×",
            f"{r['predicted_speedup']:.2f}×",
            f"{r['ratio_error']:+.1%}",
            f"{r['communication_s'] / r['run_s']:.0%}",
            f"{r['idle']:.1%}",
            f"{r['predicted_idle']:.1%}",
            f"{r['peak_gib']:.3f}",
            r["micro_steps"],
        )
        for r in data["rows"]
    ]
    checked = data["validation"]
    header = ("ranks, strategy", "run", "over naive", "predicted", "error", "of it communication (predicted)", "idle")
    header += ("predicted", "peak GiB", "micro-steps")
    return table(header, cells) + (
        f"\nTwo real processes, {checked['packs']} packs: rehearsed compute {checked['compute_error']:+.1%} of what "
        f"their computing threads used (a pack {checked['compute_error_of_a_pack']:.1%}, the median), peak bytes to "
        f"{checked['memory_error']:.1%}; the plan rehearsed again {checked['rehearsed_again']:+.1%}. Constants fitted "
        f"on this processor, held-out error {data['held_out_error']:.1%}.\n\n*`{data['command']}`, {data['device']}, "
        f"torch {data['torch']}, {data['date']}, {data['seconds'] / 60:.0f} minutes; raw rows in "
        "`benchmarks/results/rehearse.json`.*\n"
    )


def rehearse_readme() -> str:
    data = json.loads((RESULTS / "rehearse.json").read_text())
    worlds = sorted({row["ranks"] for row in data["rows"]})
    of = {(row["ranks"], row["strategy"]): row for row in data["rows"]}
    cells = []
    for strategy in dict.fromkeys(row["strategy"] for row in data["rows"] if not row["strategy"].endswith("again")):
        rows = [of[world, strategy] for world in worlds]
        each = [(f"{r['speedup']:.2f}×", f"{r['predicted_speedup']:.2f}×", f"{max(0.0, r['idle']):.0%}") for r in rows]
        name = f"`{strategy}`" if strategy.startswith("hbp") else strategy
        cells.append((name, *(cell for own in each for cell in own)))
    header = ("strategy", *(name for world in worlds for name in (f"{world} ranks", "predicted", "idle")))
    worst = max(abs(row["ratio_error"]) for row in data["rows"])
    return table(header, cells) + (
        f"\nPredicted and measured speed-ups differ by {worst:.1%} at most, and against two real processes rehearsed "
        f"compute by {abs(data['validation']['compute_error']):.1%}. *`{data['command']}`, {data['device']}, "
        f"{data['date']}, raw rows in `benchmarks/results/rehearse.json`.*\n"
    )


def models() -> str:
    data = json.loads((RESULTS / "models.json").read_text())
    names = [each["property"] for each in data["rows"][0]["properties"]]
    cells = [
        (
            f"`{row['model_type']}` ({row['model']})",
            *(_error(each) if each["holds"] else "**fails**" for each in row["properties"]),
        )
        for row in data["rows"]
        if not row["refused"]
    ]
    bounds = ("*bound*", *(_error(each, "bound") for each in data["rows"][0]["properties"]))
    versions = f"torch {data['rows'][0]['torch']}, transformers {data['rows'][0]['transformers']}"
    source = f"*`{data['command']}`, {versions}, {data['device']}, {data['date']}; raw rows in "
    return table(("family", *names), [*cells, bounds]) + "\n" + source + "`benchmarks/results/models.json`.*\n"


def _error(finding: Row, key: str = "error") -> str:
    return f"{finding[key]:.2f}×" if finding["bound"] > 1 else f"{finding[key]:.0e}" if finding[key] else "0"


def models_refused() -> str:
    data = json.loads((RESULTS / "models.json").read_text())
    lines = [f"- `{row['model_type']}` ({row['model']}): {row['refused']}." for row in data["rows"] if row["refused"]]
    return "\n".join(lines) + "\n"


def data() -> str:
    cells, said = [], ""
    for name in ("data", "data-10gib"):
        kept = json.loads((RESULTS / f"{name}.json").read_text())
        for side in dict.fromkeys(run["side"] for run in kept["runs"]):
            own = [run for run in kept["runs"] if run["side"] == side]
            seconds, busy = (statistics.median(run[key] for run in own) for key in ("seconds", "processor_s"))
            cells.append(
                (
                    f"{kept['gib']:.3g} GiB" + (f", median of {len(own)}" if len(own) > 1 else ""),
                    f"`{side.replace(' ', '.', 1)}`" if side != "hbp" else "`hbp`",
                    f"{own[0]['samples']:,}",
                    f"{own[0]['samples'] / seconds:,.0f}",
                    f"{seconds:,.0f}",
                    f"{busy:,.0f}",
                    f"{max(run['peak_rss_gib'] for run in own):.2f} GiB",
                )
            )
        if kept["ratio_to_datasets_map"]:
            said = (
                f"\nSo `hbp` is {kept['ratio_to_datasets_map']:.2f} times as fast as `datasets.map` by the clock and "
                f"{kept['ratio_in_processor_time']:.2f} times in processor time; tokens and masks are "
                f"{'those' if kept['masks_equal'] else '**not** those'} of {kept['reference']}.\n"
            )
    header = ("data", "", "samples", "samples/s", "seconds", "processor seconds", "memory")
    where = f"\n*{kept['processes']} processes on {kept['cpus']} cores, {kept['device']}, {kept['date']}; raw "
    where += "output in `benchmarks/results/data.json` and `data-10gib.json`.*\n"
    return table(header, cells) + said + where


def models_time() -> str:
    data = json.loads((RESULTS / "models-time.json").read_text())
    rows = [row for row in data["rows"] if row["properties"]]
    slowest = max(rows, key=lambda row: row["seconds"])
    return (
        f"`hbp check` took {min(row['seconds'] for row in rows):.0f} to {slowest['seconds']:.0f} s for "
        f"{len(rows)} of the families below (longest: `{slowest['model_type']}`; `{data['command']}`, "
        f"{data['device']}, {data['date']}{data.get('note', '')}).\n"
    )


def models_oldest() -> str:
    data = json.loads((RESULTS / "models-oldest.json").read_text())
    checked = [row for row in data["rows"] if not row["refused"]]
    failing = [f"`{row['model_type']}` ({row['model']})" for row in checked if not row["holds"]]
    first = data["rows"][0]
    return (
        f"With the oldest versions that are supported (torch {first['torch']}, transformers {first['transformers']}), "
        f"{len(checked) - len(failing)} of {len(checked)} hold in every property"
        f"{'; not ' + ', '.join(failing) if failing else ''} ({data['date']}, `benchmarks/results/models-oldest.json`)."
        "\n"
    )


def models_known() -> str:
    families: dict[str, list[str]] = {}
    for name, config in KNOWN_MODELS.items():
        families.setdefault(config["model_type"], []).append(f"`{name}`")
    rows = [f"| `{family}` | {', '.join(names)} |" for family, names in families.items()]
    return "\n".join(["| family | names |", "|---|---|", *rows]) + "\n"


def faults() -> str:
    data = json.loads((RESULTS / "faults.json").read_text())
    modes = summary(data["rows"])
    numbers = ("runs", "kills", "attempts", "injected", "hangs", "wrong")
    cells = [
        (f"`{row['mode']}`", *(f"{row[name]:,}" for name in numbers), f"{row['slowest_end_s']:.1f}") for row in modes
    ]
    totals = [f"**{sum(row[name] for row in modes):,}**" for name in numbers]
    cells.append(("**all**", *totals, f"**{max(row['slowest_end_s'] for row in modes):.1f}**"))
    header = ("mode", "runs", "kills", "starts", "faults", "hangs", "wrong", "slowest end, s")
    worlds = sorted({row["world"] for row in data["rows"]})
    seconds = sum(row["seconds"] for row in data["rows"])
    source = f"*`{data['command']}`, {data['device']}, torch {data['torch']}, {data['date']}; runs of "
    source += f"{', '.join(worlds)} ranks, {seconds / 60:.0f} minutes in all; raw rows in "
    return table(header, cells) + "\n" + source + "`benchmarks/results/faults.json`.*\n"


def faults_phases() -> str:
    modes = summary(json.loads((RESULTS / "faults.json").read_text())["rows"])
    phases: Counter[str] = sum((Counter(row["phases"]) for row in modes), Counter())
    ways: Counter[str] = sum((Counter(row["by"]) for row in modes), Counter())
    kills = sum(count for way, count in ways.items() if way.startswith("SIGKILL"))
    said = ", ".join(f"{phase} {count}" for phase, count in phases.most_common())
    return f"{said}. {kills} were SIGKILL, {ways.total() - kills} SIGTERM, SIGUSR1, SIGINT or SIGHUP.\n"


def soak() -> str:
    if not (RESULTS / "soak.json").exists():
        return "Not measured yet.\n"
    data = json.loads((RESULTS / "soak.json").read_text())
    first, last = data["samples"][len(data["samples"]) // 2], data["samples"][-1]
    cells = [
        (
            f"rank {rank}",
            f"{first['memory_mib'][rank]:.0f}",
            f"{last['memory_mib'][rank]:.0f}",
            f"{data['growth']['memory_kib_per_epoch'][rank]:.1f}",
            f"{last['files'][rank]:.0f}",
            f"{data['growth']['files_per_hour'][rank]:.1f}",
            f"{last['threads'][rank]:.0f}",
            f"{data['growth']['threads_per_hour'][rank]:.1f}",
        )
        for rank in range(len(last["files"]))
    ]
    header = ("", "MiB half-way", "at the end", "KiB an epoch", "files", "more an hour", "threads", "more an hour")
    once = "each sample exactly once an epoch" if data["each_sample_once"] else "**samples lost or trained twice**"
    source = (
        f"*`{data['command']}`: {data['minutes']:.0f} minutes, {data['epochs']:,} epochs, {data['steps']:,} steps, "
    )
    source += f"{once}; growth by a line through the second half. {data['device']}, {data['date']}.*\n"
    picture = "\n![Memory, open files and threads of each rank over time](soak.svg)\n"
    return table(header, cells) + "\n" + source + picture


def trainers() -> str:
    data = json.loads((RESULTS / "trainers.json").read_text())
    runs: dict[tuple[str, str], list[Any]] = {}
    for row in data["rows"]:
        runs.setdefault((row["setting"], row["attention"]), []).append(row)
    cells = [
        (
            setting,
            attention,
            f"{own[0]['steps']}",
            f"{statistics.median(row['tokens_per_s'] for row in own):,.0f}",
            f"{statistics.median(row['tokens_per_busy_s'] for row in own):,.0f}",
            f"{data['summary']['loss_at'][f'{setting} ({attention})']['100%']:.2f}",
        )
        for (setting, attention), own in runs.items()
    ]
    header = ("setting", "attention", "steps", "tokens/s", "tokens a processor second", "loss at the end")
    ratios = data["summary"]["tokens_per_s"]
    said = (
        f"Following the plan is {ratios['over_best_stock']:.2f}× the best stock setting as it comes, "
        f"{ratios['plan_alone']:.2f}× the best with our attention. Of that the way of the integration (a loss in "
        f"chunks, no figures that need logits) is {ratios['plan_bfd_over_packing_bfd']:.2f}×, by a plan of TRL's own "
        f"kind of packs over TRL's, and {ratios['over_plan_bfd']:.2f}× is our packs over those.\n\n"
    )
    source = f"*`python benchmarks/trainers.py`, {data['device']}, {data['date']}; {data['samples']} samples, "
    return said + table(header, cells) + f"\n{source}{data['tokens']:,} tokens, medians of two runs.*\n"


TABLES: dict[str, Callable[[], str]] = {
    "packing-fitting": packing_fitting,
    "packing-plans": packing_plans,
    "packing-strategies": packing_strategies,
    "packing-goals": packing_goals,
    "packing-size": packing_size,
    "packing-streaming": packing_streaming,
    "packing-order": packing_order,
    "packing-drift": packing_drift,
    "packing-startup": packing_startup,
    "packing-readme": packing_readme,
    "quickstart": quickstart,
    "train": train,
    "cost-model": cost_model,
    "rehearse": rehearse,
    "rehearse-readme": rehearse_readme,
    "models": models,
    "models-refused": models_refused,
    "models-time": models_time,
    "models-oldest": models_oldest,
    "models-known": models_known,
    "faults": faults,
    "faults-phases": faults_phases,
    "soak": soak,
    "trainers": trainers,
    "data": data,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a document is out of date")
    check = parser.parse_args().check
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        filled = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if filled != text:
            stale.append(path.name)
            if not check:
                path.write_text(filled)
    if stale:
        print(("out of date: " if check else "filled: ") + ", ".join(stale), file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables for people: what the commands print without ``--json``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hbp.simulator import PART_NAMES

BAR = 10
"""Characters of a full bar."""


class Output(Console):
    """rich's, which would end the process by itself where nobody reads its output any more."""

    def on_broken_pipe(self) -> None:
        """What the command line answers with its exit code."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 0) -> None:
    """One table on standard output; the first column and number `left` are text, the others are numbers."""
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index in (0, left) else "right")
    for row in rows:
        made.add_row(*row)
    Output(width=None if sys.stdout.isatty() else 120).print(made)


def metrics_table(rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, Any]]]) -> None:
    """Plans side by side: name, metrics, simulation. Speed-ups are over the first."""
    first = rows[0][2]["tokens_per_s"]
    cells = [
        (
            name,
            f"{m['pr']:.3%}",
            f"{m['dbr']:.4f}",
            f"{m['abr']:.4f}",
            f"{m['cr']:.3f}",
            f"{m['ave_tokens']:,.0f}",
            f"{m['efficiency']:.3f}" if "efficiency" in m else "–",  # another program's plan
            f"{s['utilization']:.1%}",
            duration(s["seconds"]),
            f"{s['tokens_per_s']:,.0f}",
            f"{s['tokens_per_s'] / first:.2f}×" if first else "–",
        )
        for name, m, s in rows
    ]
    header = (
        "strategy",
        "PR",
        "DBR",
        "ABR",
        "CR",
        "Ave-T",
        "efficiency",
        "utilization",
        "predicted",
        "tokens/s",
        "speed-up",
    )
    table("predicted", header, cells)


def compare_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Strategies side by side, for each number of GPUs; a bar shows the efficiency."""
    cells = [
        (r["strategy"], f"{r['gpus']:,}", *["–"] * 9)
        if "error" in r
        else (
            r["strategy"],
            f"{r['gpus']:,}",
            f"{r['pr']:.3%}",
            f"{r['abr']:.4f}",
            f"{r['cr']:.3f}",
            f"{r['ave_tokens']:,.0f}",
            duration(r["predicted_s"]),
            f"{r['tokens_per_s']:,.0f}",
            "–" if r["speedup"] is None else f"{r['speedup']:.2f}×",
            f"{r['efficiency']:.3f}",
            "█" * round(r["efficiency"] * BAR),
        )
        for r in rows
    ]
    header = ("strategy", "GPUs", "PR", "ABR", "CR", "Ave-T", "predicted", "tokens/s", "speed-up", "efficiency")
    table("predicted", (*header, "of best".ljust(BAR)), cells, left=len(header))
    for message, names in _same_errors(rows).items():
        print(f"{names}: {message}")


def _same_errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Each message once, with the GPUs that it is about and their strategies."""
    found: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        if "error" in row:
            found.setdefault(row["error"], {}).setdefault(row["gpus"], []).append(row["strategy"])
    return {
        message: "; ".join(f"{gpus:,} GPUs, {', '.join(names)}" for gpus, names in sizes.items())
        for message, sizes in found.items()
    }


def parts_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Where the ranks' time goes, by :func:`hbp.simulator.detailed_json`: a column a plan; shares of the mean rank."""
    cells = []
    for part, name in PART_NAMES.items():
        shares = [row["parts"].get(part, 0.0) / max(row["seconds"], 1e-300) for _, row in rows]
        if any(shares):
            cells.append((name, *(f"{share:.1%}" for share in shares)))
    for name, values in zip(
        ("peak GiB", "GPU days", "cost"), zip(*(_rent(row) for _, row in rows), strict=True), strict=True
    ):
        cells.append((name, *values))
    table("where the time goes, mean of all ranks", ("", *(title for title, _ in rows)), cells)


def what_if_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Plans on other hardware. Speed-ups are over the first plan on the same hardware."""
    cells = []
    for row in rows:
        place = (row["plan"], row["cluster"], f"{row['gpus']:,}")
        if "error" in row:
            cells.append((*place, *["–"] * 7))
            continue
        waiting = row["parts"].get("waiting", 0.0) / max(row["seconds"], 1e-300)
        seconds, speed = duration(row["seconds"]), f"{row['tokens_per_s']:,.0f}"
        cells.append((*place, seconds, speed, f"{waiting:.1%}", *_rent(row), f"{row['speedup']:.2f}×"))
    rent = ("peak GiB", "GPU days", "cost")
    table("what if", ("plan", "cluster", "GPUs", "predicted", "tokens/s", "waiting", *rent, "speed-up"), cells)
    for row in rows:
        if "error" in row:
            print(f"{row['plan']} on {row['gpus']} GPUs ({row['cluster']}): {row['error']}")


def _rent(row: Mapping[str, Any]) -> tuple[str, str, str]:
    memory = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "–"
    return memory, f"{row['device_days']:.3g}", f"{row['cost']:,.2f}" if "cost" in row else "–"


def profile_table(profile: Mapping[str, Any]) -> None:
    """What a live profile measured and what the fit says of it, from its file."""
    gib = 2.0**30
    rows = [
        (
            f"{sum(p['lengths']):,}",
            str(len(p["lengths"])),
            str(p["sp_degree"]),
            f"{p['gc_layers']} of {p['n_layers'] or profile['model']['n_layers']}",
            f"{p['seconds']:.3f}",
            f"{p['held_out_s']:.3f}",
            f"{p['held_out_s'] / p['seconds'] - 1:+.0%}",
            f"{p['peak_bytes'] / gib:.3f}",
            f"{p['predicted_bytes'] / gib:.3f}",
        )
        for p in profile["points"]
    ]
    header = ("tokens", "documents", "SP", "GC", "seconds", "held out", "error", "GiB", "predicted")
    table(f"profile of {profile['device']}", header, rows)
    degrees = [(str(d["sp_degree"]), f"{d['seconds']:.3f}", d["source"]) for d in profile["degrees"]]
    table(f"one document of {profile['degrees'][0]['tokens']:,} tokens", ("SP", "predicted seconds", "source"), degrees)
    print(f"held-out error: median {profile['median_error']:.1%}, nine in ten below {profile['p90_error']:.1%}")


def run_table(summary: Mapping[str, Any], *, disturbed: bool = False) -> None:
    """What a run measured, from its ``summary.json``; no comparison where the measurement was disturbed."""
    rows = []
    for r in summary["results"]:
        settings = " ".join(f"{g['capacity']}/SP{g['sp_degree']}/GC{g['gc_layers']}" for g in r["groups"])
        rows.append(
            (
                r["strategy"],
                settings,
                f"{r['tokens_per_s']:,.0f}" if r["tokens_per_s"] else "–",
                f"{r['steps']:,}",
                f"{r['seconds']:.1f}",
                "–" if r["final_train_loss"] is None else f"{r['final_train_loss']:.3f}",
                "–" if r["eval_loss"] is None else f"{r['eval_loss']:.3f}",
                f"{r['peak_bytes'] / 2**30:.3f}",
                f"{r['metrics']['abr']:.3f}",
                f"{r['metrics']['cr']:.2f}",
            )
        )
    header = ("strategy", "groups", "tokens/s", "steps", "seconds", "train loss", "eval loss", "peak GiB", "ABR", "CR")
    table("measured", header, rows)
    if disturbed:
        print(
            "another program used the machine meanwhile (no rank worked for part of the time): speeds compare nothing"
        )
    elif "speedup" in summary:
        ours, theirs = (r["strategy"] for r in summary["results"][:2])
        at_best = _at_best(summary["results"][1])
        print(f"{ours} is {summary['speedup']:.2f}× as fast as {theirs} on the same tokens{at_best}")


def _at_best(baseline: Mapping[str, Any]) -> str:
    """What there was to be gained over a run, from its plan's efficiency (docs/lower-bound.md); empty where unknown."""
    efficiency = baseline["metrics"].get("efficiency")
    return f" (by the cost model, no plan could be more than {1 / efficiency:.2f}×)" if efficiency else ""


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def check_table(result: Mapping[str, Any]) -> None:
    """Properties of a model family, and what the failing ones mean."""
    rows = [
        (
            each["property"],
            "holds" if each["holds"] else "FAILS",
            "–" if each["error"] is None else f"{each['error']:.1e}",
            f"{each['bound']:.1e}",
            each["where"],
        )
        for each in result["properties"]
    ]
    if rows:
        versions = f"torch {result['torch']}, transformers {result['transformers']}"
        title = f"{result['model']} ({result['model_type']}), {versions}"
        table(title, ("property", "", "error", "bound", "largest in"), rows, left=4)
    for each in result["properties"]:
        if not each["holds"]:
            print(f"{each['property']}: {each['why']}")
    print(result["refused"] or ("trains here" if result["holds"] else "does not train here as its documents alone do"))

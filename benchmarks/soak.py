"""One long run of two ranks: resident memory, open files and threads of each over time, drawn.

    python benchmarks/faults.py --soak 120 --out benchmarks/results/soak.json

The run has as many short epochs as fit, each with its own plan, trial of memory, saves and evaluations, so whatever a
rank keeps from an epoch, a save or a step adds up. It ends by `train.max_minutes`, as a scheduler's job would. The
figure is that of rank 0 over the second half of the run, by which everything that is made once has been made: what it
grew by an epoch, as the slope of a least-squares line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from fault_ranks import one_thread, start
from fault_rows import about
from faults import TO_BE_CONTINUED, parts_of, write_job

from hbp.run.audit import audit_run

RANKS, EVERY_S, EPOCHS = 2, 2.0, 100_000
WIDTH, HEIGHT, LEFT, TOP = 720, 150, 64, 26
DOCS = Path(__file__).resolve().parent.parent / "docs" / "soak.svg"
COLOURS = ("#1f6feb", "#d1642b")
MEASURED = {"memory_mib": "resident memory, MiB", "files": "open files", "threads": "threads"}


def look(pid: int) -> dict[str, float] | None:
    """Of a process, now; None where it is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return {"memory_mib": int(status["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(status["Threads"])}
    except (OSError, KeyError):
        return None


def steps_and_epochs(run: Path) -> tuple[int, int]:
    """That were done and begun."""
    logs = [part / "steps.jsonl" for part in parts_of(run)] if (run / "hbp").is_dir() else []
    there = [log for log in logs if log.is_file()]
    return sum(log.read_bytes().count(b"\n") for log in there), len(there)


def run(minutes: float, out: Path | None) -> None:
    """Run it; the JSON goes to `out` with a picture beside it (a kept result's to docs/), or to standard output."""
    with tempfile.TemporaryDirectory(prefix="hbp-soak-") as scratch, one_thread():
        root = Path(scratch)
        config = write_job(root / "job", epochs=EPOCHS, max_minutes=minutes, save_steps=4, keep_checkpoints=2)
        log, folder, began = root / "log.txt", root / "run", time.monotonic()
        attempt = start(["train", str(config), f"run_dir={folder}"], RANKS, log, "soak", 0, folder)
        samples: list[dict[str, Any]] = []
        while not attempt.wait(EVERY_S):
            found = [look(pid) for pid in attempt.pids]
            if all(found):
                ranks = {name: [round(one[name], 2) for one in found if one] for name in MEASURED}
                samples.append({"minutes": round((time.monotonic() - began) / 60, 3), **ranks})
        codes = attempt.result()
        steps, epochs = steps_and_epochs(folder)
        whole = [epoch for epoch in audit_run(folder) if not epoch.under_way]
        result = {
            "command": f"python benchmarks/faults.py --soak {minutes:g}",
            **about(),
            "minutes": samples[-1]["minutes"],
            "codes": codes,
            "steps": steps,
            "epochs": epochs,
            "each_sample_once": all(epoch.holds for epoch in audit_run(folder)) and bool(whole),
            "growth": growth(samples, epochs),
            "samples": thinned(samples),
        }
        if set(codes) != {TO_BE_CONTINUED}:
            sys.exit(f"the run ended with {codes}:\n{log.read_text()[-3000:]}")
    text = json.dumps(result)
    if out is None:
        print(text)
        return
    out.write_text(text.replace('"samples": [', '"samples": [\n').replace("}, {", "},\n{") + "\n")
    drawn = DOCS if out.resolve().parent.name == "results" else out.with_suffix(".svg")
    drawn.write_text(picture(result["samples"]))


def growth(samples: list[dict[str, Any]], epochs: int) -> dict[str, list[float]]:
    """Of each rank in the second half: KiB an epoch of memory, files and threads an hour."""
    half = samples[len(samples) // 2 :]
    minutes = np.array([sample["minutes"] for sample in half])
    slopes = {
        name: [float(np.polyfit(minutes, [sample[name][rank] for sample in half], 1)[0]) for rank in range(RANKS)]
        for name in MEASURED
    }
    an_epoch = samples[-1]["minutes"] / max(1, epochs)
    return {
        "memory_kib_per_epoch": [round(1024 * slope * an_epoch, 2) for slope in slopes["memory_mib"]],
        "memory_mib_per_hour": [round(60 * slope, 2) for slope in slopes["memory_mib"]],
        "files_per_hour": [round(60 * slope, 2) for slope in slopes["files"]],
        "threads_per_hour": [round(60 * slope, 2) for slope in slopes["threads"]],
    }


def thinned(samples: list[dict[str, Any]], most: int = 400) -> list[dict[str, Any]]:
    """At most so many, spread evenly."""
    return [samples[i] for i in sorted({round(i) for i in np.linspace(0, len(samples) - 1, min(most, len(samples)))})]


def picture(samples: list[dict[str, Any]]) -> str:
    """Three panels over the minutes, a line a rank, each from zero."""
    end = samples[-1]["minutes"]
    height = (HEIGHT + TOP + 14) * len(MEASURED) + 24
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 16} {height}" font-size="12" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for panel, (name, title) in enumerate(MEASURED.items()):
        top = TOP + panel * (HEIGHT + TOP + 14)
        most = 1.1 * max(max(sample[name]) for sample in samples)
        drawn.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="bold">{title}</text>')
        for share in (0, 0.5, 1):
            y = top + HEIGHT * (1 - share)
            drawn.append(f'<path d="M{LEFT} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
            drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:.0f}</text>')
        for rank in range(RANKS):
            points = [
                f"{LEFT + WIDTH * sample['minutes'] / end:.1f},{top + HEIGHT * (1 - sample[name][rank] / most):.1f}"
                for sample in samples
            ]
            line = f'<polyline points="{" ".join(points)}" fill="none" stroke="{COLOURS[rank]}" stroke-width="1.5"/>'
            drawn.append(line)
            drawn.append(
                f'<text x="{LEFT + WIDTH - 120 + 64 * rank}" y="{top - 8}" fill="{COLOURS[rank]}">rank {rank}</text>'
            )
    drawn += [
        f'<text x="{LEFT + WIDTH * share:.0f}" y="{height - 10}" text-anchor="middle">{end * share:.0f} min</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return "\n".join([*drawn, "</svg>"]) + "\n"

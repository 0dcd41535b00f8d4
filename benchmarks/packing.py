"""Every strategy's plans on the published length sets: speed, padding, imbalance, efficiency.

Both sides run in this process, one after the other, on the same lengths and cost model. `samples_per_s` is the median
of the repeats of the whole plan (packing, scheduling, metrics; the plan file is not written). Strategies with one
static setting are planned with every setting that fits, and the fastest is kept.

    python benchmarks/packing.py [--quick] [--json] [--out benchmarks/results/packing.json]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import LENGTH_SETS, generate
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import Progress

MODEL, CLUSTER, GPUS = "llama-3.1-8b", "h100-nvlink", (32, 128)
TOO_SLOW_ABOVE = {"lb": 20_000, "dcp": 200_000}
"""Samples above which a strategy's own algorithm would take minutes."""


def measure(name: str, samples: int, gpus: int, strategies: list[str], repeats: int) -> list[dict[str, Any]]:
    """One row a strategy on one set."""
    lengths = generate(name, samples, seed=0)
    cost = CostModel(load_model_spec(MODEL), CLUSTERS[CLUSTER], gpus)
    rows = []
    for strategy in strategies:
        if samples > TOO_SLOW_ABOVE.get(strategy, samples):
            continue
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            plan = make_plan(lengths, cost, strategy=strategy)
            seconds.append(time.perf_counter() - start)
        metrics = plan.info.metrics
        rows.append(
            {
                "strategy": strategy,
                "set": name,
                "samples": samples,
                "gpus": gpus,
                "samples_per_s": samples / statistics.median(seconds),
                "padding": metrics["pr"],
                "abr": metrics["abr"],
                "cr": metrics["cr"],
                "efficiency": metrics["efficiency"],
                "predicted_s": metrics["predicted_s"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10,000 samples of two sets, once")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    args = parser.parse_args()
    sets = ["mix-128k", "tulu3-longcite"] if args.quick else list(LENGTH_SETS)
    samples, repeats = (10_000, 1) if args.quick else (100_000, 3)
    make_plan(generate("mix-128k", 500, 0), CostModel(load_model_spec(MODEL), CLUSTERS[CLUSTER], 32))  # compile
    rows: list[dict[str, Any]] = []
    with Progress("packing", len(GPUS) * len(sets)) as progress:
        for gpus, name in itertools.product(GPUS, sets):
            rows += measure(name, samples, gpus, list(STRATEGIES), repeats)
            progress.advance(f"{name}, {gpus} GPUs")
    result = {
        "command": "python benchmarks/packing.py" + (" --quick" if args.quick else ""),
        "date": datetime.date.today().isoformat(),
        "model": MODEL,
        "cluster": CLUSTER,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    columns = f"{'GPUs':>4} {'set':22} {'strategy':9} {'samples/s':>10} {'padding':>9} {'ABR':>7} {'CR':>6}"
    print(f"{columns} {'efficiency':>10}")
    for r in rows:
        print(
            f"{r['gpus']:4} {r['set']:22} {r['strategy']:9} {r['samples_per_s']:10,.0f} {r['padding']:9.3%} "
            f"{r['abr']:7.4f} {r['cr']:6.3f} {r['efficiency']:10.3f}"
        )


if __name__ == "__main__":
    main()

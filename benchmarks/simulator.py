"""Is the simulator right? Plans run for real on CPU processes, beside what the profile alone predicts of them.

For each number of processes: `hbp profile` measures the cost model's constants on the training engine, plans of several
strategies are made with these, `hbp train` runs each on the embedded data set, and its `steps.jsonl` is laid beside
`hbp.simulate`. Nothing of the runs flows back into the prediction. The first step of each run is left out (allocator
and kernels warm up in it).

- `step_time_error`: median over the steps of |predicted / measured − 1|.
- `ratio_error`: largest |predicted ratio / measured ratio − 1| of two strategies' run times: what a choice between them
  rests on. A strategy's repeats show the noise beneath it (`noise`: the median spread of repeats of one plan).

Where there are more processes than cores, a rank that waits hands its core to the others, which no GPU does; the row
says so (`oversubscribed`) and `shared_*` are the errors after every micro-step is stretched by sharing the cores.

`speed` is how long the simulator itself takes for 10,000 steps on 1,024 ranks.

    python benchmarks/simulator.py [--quick] [--json] [--processes 2,4] [--strategies concat,hbp] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from hbp.cost.cluster import CLUSTERS, load_cluster
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.store import open_store
from hbp.plan import Plan, PlanInfo, write_plan
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import say
from hbp.simulate import rank_use, simulate, step_seconds

ROOT = Path(__file__).parent.parent
MODEL = "examples/quickstart-model"
CONFIG = ROOT / "examples" / "quickstart.yaml"
BASELINES = ("concat", "lb", "dcp")


def run_for_real(processes: int, strategies: list[str], samples: int, repeats: int) -> list[dict[str, Any]]:
    """Profile, plan and train with so many processes; one row a strategy and repeat."""
    with tempfile.TemporaryDirectory() as scratch:
        run, profile = Path(scratch) / "run", Path(scratch) / "profile.json"
        common = [
            f"run_dir={run}",
            f"cluster.processes={processes}",
            f"data.short_samples={samples}",
            "data.long_samples=6",
            "data.eval_samples=0",
            "data.max_length=8192",
            "plan.baseline=null",
            "train.export=false",
        ]
        _hbp("profile", str(CONFIG), *common, "--out", str(profile))
        store = open_store(run / "store")
        lengths = np.asarray(store.lengths)
        spec = dataclasses.replace(load_model_spec(str(ROOT / MODEL)), vocab=store.vocab_size)
        cost = CostModel(spec, load_cluster(str(profile)), processes)
        rows = []
        for strategy in strategies:
            plan = make_plan(lengths, cost, strategy=strategy, max_length=8192, global_batch_tokens=16384)
            write_plan(plan, Path(scratch) / strategy)
            for repeat in range(repeats):
                _hbp("train", str(CONFIG), *common, f"plan.path={Path(scratch) / strategy}")
                log = (run / strategy / "steps.jsonl").read_text().splitlines()
                measured = [json.loads(line)["seconds"] for line in log]
                rows.append(_row(plan, processes, repeat, measured))
                say(f"{processes} processes, {strategy}: {rows[-1]['measured_s']:.1f} s")
        held_out = json.loads(profile.read_text())["median_error"]
    return [row | {"profile_error": held_out} for row in rows]


def _hbp(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "hbp", *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"hbp {' '.join(arguments)} failed:\n{done.stderr}")


def _row(plan: Plan, processes: int, repeat: int, measured: list[float]) -> dict[str, Any]:
    predicted, shared = step_seconds(plan)[1:], _shared_step_seconds(plan, os.cpu_count() or 1)[1:]
    seconds = np.array(measured)[1:]
    return {
        "processes": processes,
        "strategy": plan.info.strategy,
        "repeat": repeat,
        "groups": [dataclasses.asdict(group) for group in plan.info.groups],
        "tokens": plan.info.n_tokens,
        "utilization": simulate(plan).utilization,
        "measured_s": float(seconds.sum()),
        "predicted_s": float(predicted.sum()),
        "shared_s": float(shared.sum()),
        "step_measured_s": [round(s, 4) for s in seconds.tolist()],
        "step_predicted_s": [round(s, 4) for s in predicted.tolist()],
        "step_shared_s": [round(s, 4) for s in shared.tolist()],
    }


def _shared_step_seconds(plan: Plan, cores: int) -> np.ndarray:
    """Predicted seconds of each step where ranks share cores: a rank that is done leaves its share to the others.

    The profile was measured with every rank at work, so that ranks ran at cores ÷ ranks of a core's speed. With fewer
    left they speed up, to at most a whole core each.
    """
    world = plan.info.world_size
    speed = min(1.0, cores / world)
    micro = plan.micro_step_index()
    seconds = np.zeros(plan.n_steps)
    for index in range(int(micro[-1]) + 1):
        rows = np.flatnonzero(micro == index)
        # Work of each rank that runs a pack, in seconds of a whole core, shortest first.
        work = np.sort(np.repeat(plan.predicted_s[rows] * speed, plan.sp_degree[rows]))
        left = np.arange(len(work), 0, -1)
        seconds[plan.step[rows[0]]] += float((np.diff(work, prepend=0.0) / np.minimum(1.0, cores / left)).sum())
    return seconds + float(plan.info.cluster.get("step_overhead_s", 0.0))


def errors(rows: list[dict[str, Any]], prefix: str = "predicted") -> dict[str, float]:
    """Step-time and ratio errors of rows of one number of processes."""
    steps = [
        abs(p / m - 1) for r in rows for p, m in zip(r[f"step_{prefix}_s"], r["step_measured_s"], strict=True) if m > 0
    ]
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["strategy"], []).append(row)
    measured = {name: statistics.median(r["measured_s"] for r in mine) for name, mine in runs.items()}
    predicted = {name: mine[0][f"{prefix}_s"] for name, mine in runs.items()}
    ratios = [
        abs(predicted[a] / predicted[b] / (measured[a] / measured[b]) - 1) for a, b in itertools.combinations(runs, 2)
    ]
    return {
        "step_time_error": statistics.median(steps),
        "run_time_error": max(abs(predicted[name] / measured[name] - 1) for name in runs),
        "ratio_error": max(ratios, default=0.0),
        "median_ratio_error": statistics.median(ratios) if ratios else 0.0,
    }


def noise(rows: list[dict[str, Any]]) -> float | None:
    """Median over strategies of (slowest − fastest) / fastest repeat; None without repeats."""
    spread = []
    for strategy in {r["strategy"] for r in rows}:
        seconds = [r["measured_s"] for r in rows if r["strategy"] == strategy]
        if len(seconds) > 1:
            spread.append(max(seconds) / min(seconds) - 1)
    return statistics.median(spread) if spread else None


def simulator_speed(steps: int, world: int) -> dict[str, Any]:
    """Seconds to play a plan of one pack a rank: time, parts, memory of every rank."""
    rng = np.random.default_rng(0)
    cost = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], world)
    degree = 2 ** rng.integers(0, 4, steps)
    packs = world // degree
    rows = int(packs.sum())
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 6, rows))])
    lengths = rng.integers(100, 3000, offsets[-1]).astype(np.int32)
    info = PlanInfo(
        "benchmark",
        0,
        world,
        (),
        len(lengths),
        int(lengths.sum()),
        "",
        model=cost.model.to_json(),
        cluster=cost.cluster.to_json(),
    )
    plan = Plan(
        info,
        step=np.repeat(np.arange(steps, dtype=np.int32), packs),
        micro_step=np.zeros(rows, np.int16),
        rank_start=((np.arange(rows) - np.repeat(np.cumsum(packs) - packs, packs)) * np.repeat(degree, packs)),
        sp_degree=np.repeat(degree, packs).astype(np.int16),
        gc_layers=np.full(rows, 4, np.int16),
        capacity=np.full(rows, 16384, np.int32),
        predicted_s=rng.uniform(0.5, 1.0, rows).astype(np.float32),
        sample_offsets=offsets,
        sample_ids=np.arange(len(lengths)),
        lengths=lengths,
    )
    start = time.perf_counter()
    simulate(plan)
    rank_use(plan)
    return {"steps": steps, "ranks": world, "packs": rows, "samples": len(lengths), "s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two processes, two strategies, few samples, once")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--processes", default="2,4", help="numbers of processes, comma-separated (default 2,4)")
    parser.add_argument("--strategies", help=f"comma-separated (default {','.join(BASELINES)} and every hbp)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each plan (default 1)")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file, beside its other process counts' rows")
    args = parser.parse_args()
    names = [*BASELINES, *(name for name in STRATEGIES if name.startswith("hbp"))]
    if args.strategies:
        names = args.strategies.split(",")
    elif args.quick:
        names = ["concat", "hbp"]
    processes = [2] if args.quick else [int(n) for n in args.processes.split(",")]
    samples, repeats = (40, 1) if args.quick else (160, args.repeats)
    rows = [row for n in processes for row in run_for_real(n, names, samples, repeats)]
    if args.out and args.out.is_file():
        rows = [r for r in json.loads(args.out.read_text())["rows"] if r["processes"] not in processes] + rows
    summary = {}
    for n in sorted({r["processes"] for r in rows}):
        mine = [r for r in rows if r["processes"] == n]
        shared = {f"shared_{key}": value for key, value in errors(mine, "shared").items()}
        summary[str(n)] = {
            **errors(mine),
            **shared,
            "noise": noise(mine),
            "profile_error": mine[0]["profile_error"],
            "oversubscribed": n > (os.cpu_count() or 1),
        }
    speed = simulator_speed(*((1_000, 256) if args.quick else (10_000, 1_024)))
    fair = [s for s in summary.values() if not s["oversubscribed"]] or list(summary.values())
    result = {
        "command": "python benchmarks/simulator.py" + (" --quick" if args.quick else ""),
        "date": datetime.date.today().isoformat(),
        "device": f"{os.cpu_count()} cores, {_processor()}",
        "step_time_error": max(s["step_time_error"] for s in fair),
        "ratio_error": max(s["ratio_error"] for s in fair),
        "by_processes": summary,
        "speed": speed,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'processes':>9} {'strategy':10} {'measured s':>10} {'predicted':>10} {'shared':>8} {'utilization':>11}")
    for r in rows:
        print(
            f"{r['processes']:9} {r['strategy']:10} {r['measured_s']:10.2f} {r['predicted_s']:10.2f} "
            f"{r['shared_s']:8.2f} {r['utilization']:11.1%}"
        )
    for n, s in summary.items():
        print(f"{n} processes: " + ", ".join(f"{k} {v:.1%}" for k, v in s.items() if isinstance(v, float)))
    print(f"{speed['steps']:,} steps x {speed['ranks']:,} ranks played in {speed['s']:.1f} s")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


if __name__ == "__main__":
    main()

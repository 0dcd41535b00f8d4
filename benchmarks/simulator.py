"""Is the simulator right? Plans run for real on CPU processes, beside what the profile alone predicts of them.

For each number of processes: micro-batches are profiled on the training engine as `hbp profile` does, plans of several
strategies are made with the fitted constants, and `hbp.train.loop.train` runs each on the embedded data set. Nothing of
the runs flows back into the prediction. A shared machine's speed drifts by more than what is to be measured, so
profile and runs alternate, round after round, within a few seconds of each other; every figure is the median of its
rounds. The optimizer's own seconds are profiled too. The first round warms up and is left out.

- `step_time_error`: median over the steps of |predicted / measured − 1|.
- `ratio_error`: largest |predicted ratio / measured ratio − 1| of two strategies' run times: what a choice between them
  rests on; `median_ratio_error` over all pairs.
- `noise`: median over the steps of (slowest − fastest round) / median, what no prediction can be better than.

All of these by the wall clock, and `busy_*` the same by processor time: a micro-step's is that of its busiest rank, of
the profile's and of the run's alike, the optimizer left out. On CPU a rank that waits uses none, so that is what the
clock would show if every rank had a core to itself. Where there are more processes than cores (`oversubscribed`) a rank
that waits hands its core to the others, which no GPU does: only `busy_*` tells anything there. It also keeps what other
programs run on the machine out.

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
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ranks import run_ranks

from hbp.cost.cluster import CLUSTERS, GIB
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.store import open_store
from hbp.plan import Plan, PlanInfo, read_plan, write_plan
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import say
from hbp.simulator import rank_use, simulate, step_seconds

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "examples" / "quickstart-model")
BASELINES = ("concat", "lb", "dcp")


@dataclass(frozen=True)
class Size:
    """What is trained."""

    short_samples: int
    long_samples: int
    longest_chars: int
    longest: int
    """Packing length, tokens."""
    step_tokens: int
    memory_bytes: float
    rounds: int
    shares: tuple[int, ...]
    """Of the longest length, that are profiled."""


FULL = Size(60, 6, 28_000, 6144, 12_288, 0.25 * GIB, 5, (16, 8, 4, 2))
QUICK = Size(24, 2, 6_000, 1536, 3072, 0.18 * GIB, 2, (8, 2))


def run_for_real(processes: int, strategies: list[str], size: Size) -> list[dict[str, Any]]:
    """Profile, plan and train with so many processes; one row a strategy."""
    from hbp.data.build import build_store, recipe_of
    from hbp.data.sources import Source
    from hbp.data.stdlib_sft import train_tokenizer, write_dataset
    from hbp.train.launch import CPU_ENVIRONMENT

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, tokenizer = folder / "data.jsonl", folder / "tokenizer"
        amounts = {"short_samples": size.short_samples, "long_samples": size.long_samples}
        write_dataset(data, seed=0, longest_chars=size.longest_chars, **amounts)
        train_tokenizer(data, tokenizer, vocab_size=4096)
        build_store(folder / "store", [Source(str(data))], recipe_of(str(tokenizer)))
        (folder / "size.json").write_text(json.dumps(dataclasses.asdict(size)))
        work = ["--worker", scratch, "--strategies", ",".join(strategies)]
        run_ranks(processes, __file__, *work, environment={**os.environ, **CPU_ENVIRONMENT})
        measured = json.loads((folder / "measured.json").read_text())
        base = _cost(folder, processes, size)
        wall, error = _fitted(base, measured["points"], measured["seconds"], measured["optimizer_s"])
        busy, busy_error = _fitted(base, measured["points"], measured["busy"], [0.0])
        rows = []
        for name in strategies:
            plan = read_plan(folder / name)
            row = {
                "processes": processes,
                "strategy": name,
                "groups": [dataclasses.asdict(group) for group in plan.info.groups],
                "tokens": plan.info.n_tokens,
                "utilization": simulate(_with_cost(plan, wall)).utilization,
                "profile_error": error,
                "busy_profile_error": busy_error,
                **_figures("", _with_cost(plan, wall), np.array(measured["steps"][name])),
                **_figures("busy_", _with_cost(plan, busy), np.array(measured["busy_steps"][name])),
            }
            rows.append(row)
            say(f"{processes} processes, {name}: {row['measured_s']:.1f} s, {row['predicted_s']:.1f} predicted")
    return rows


def worker(folder: Path, strategies: list[str]) -> None:
    """One rank: alternate between the profile's micro-batches and whole short runs of every plan."""
    import torch
    import torch.distributed as dist

    from hbp.config import TrainConfig
    from hbp.cost.fit import grid
    from hbp.parallel.mesh import make_mesh
    from hbp.train.batch import micro_batch_of
    from hbp.train.launch import process_group
    from hbp.train.loop import Learner, forward_backward, train
    from hbp.train.model import load_model, shard

    with process_group() as device:
        rank, world = dist.get_rank(), dist.get_world_size()
        size = Size(**json.loads((folder / "size.json").read_text()))
        store, cost = open_store(folder / "store"), _cost(folder, world, size)
        lengths = np.asarray(store.lengths)
        mesh = make_mesh(world, cost.degrees(), device.type)
        model = load_model(MODEL, vocab_size=store.vocab_size)
        shard(model, mesh.world, by_layer=cost.model.sharded_by_layer)
        rng = np.random.default_rng(0)
        wanted = grid(cost, lengths, min(size.longest, int(lengths.max())), rng, size.shares)
        batches = []
        for pack, degree, gc_layers in wanted:
            documents = [(rng.integers(0, store.vocab_size, n).astype(np.int32), np.ones(n, np.uint8)) for n in pack]
            batches.append(micro_batch_of(documents, 0, degree, rank % degree, gc_layers, mesh, device))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, foreach=True)

        def timed(run: Any) -> tuple[float, float]:
            """Seconds by the wall clock, and of the busiest rank by processor time."""
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            run()
            busy = time.process_time() - busy
            dist.barrier()
            seconds = torch.tensor([time.perf_counter() - start, busy], dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            return float(seconds[0]), float(seconds[1])

        def optimize() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        def profile() -> tuple[list[float], list[float], float]:
            seconds = []
            for batch in batches:
                seconds.append(timed(lambda batch=batch: forward_backward(model, batch)))
                model.zero_grad(set_to_none=True)
            forward_backward(model, batches[0])
            spent, _ = timed(optimize)
            optimizer.zero_grad(set_to_none=True)
            wall, busy = zip(*seconds, strict=True)
            return list(wall), list(busy), spent

        profile()
        first, _, optimizer_s = profile()
        if rank == 0:
            fitted, _ = _fitted(cost, wanted, [first], [optimizer_s])
            for name in strategies:
                options = {"strategy": name, "max_length": size.longest, "global_batch_tokens": size.step_tokens}
                write_plan(make_plan(lengths, fitted, **options), folder / name)
        dist.barrier()
        plans = {name: read_plan(folder / name) for name in strategies}
        measured: dict[str, Any] = {"points": wanted, "seconds": [], "busy": [], "optimizer_s": []}
        measured |= {"steps": {name: [] for name in plans}, "busy_steps": {name: [] for name in plans}}
        for turn in range(size.rounds + 1):
            for name, plan in plans.items():
                records = train(Learner.of(model, mesh, TrainConfig(), device), plan, store)
                if turn:
                    measured["steps"][name].append([record.seconds for record in records])
                    busy = [float(np.max(record.rank_busy_s, axis=0).sum()) for record in records]
                    measured["busy_steps"][name].append(busy)
            if turn:
                seconds, busy, spent = profile()
                measured["seconds"].append(seconds)
                measured["busy"].append(busy)
                measured["optimizer_s"].append(spent)
        if rank == 0:
            (folder / "measured.json").write_text(json.dumps(measured))


def _cost(folder: Path, world: int, size: Size) -> CostModel:
    spec = dataclasses.replace(load_model_spec(MODEL), vocab=open_store(folder / "store").vocab_size)
    return CostModel(spec, dataclasses.replace(CLUSTERS["cpu-local"], memory_bytes=size.memory_bytes), world)


def _fitted(
    cost: CostModel, wanted: list[Any], seconds: list[list[float]], optimizer_s: list[float]
) -> tuple[CostModel, float]:
    """The cost model of a profile and its held-out error; memory is left as modelled."""
    from hbp.cost.fit import Point, fit_cluster

    points = [
        Point(tuple(pack), degree, gc_layers, spent, cost.bytes(sum(pack), degree, gc_layers))
        for (pack, degree, gc_layers), spent in zip(wanted, np.median(seconds, axis=0).tolist(), strict=True)
    ]
    fit = fit_cluster(cost.cluster, cost.model, cost.world_size, points, "benchmark")
    cluster = dataclasses.replace(fit.cluster, step_overhead_s=statistics.median(optimizer_s))
    return dataclasses.replace(cost, cluster=cluster), fit.held_out_error


def _with_cost(plan: Plan, cost: CostModel) -> Plan:
    """The same plan, predicted by another profile."""
    work, seconds = cost.work(plan.lengths, plan.sample_offsets), np.empty(plan.n_packs, np.float32)
    for degree, gc_layers in set(zip(plan.sp_degree.tolist(), plan.gc_layers.tolist(), strict=True)):
        rows = np.flatnonzero((plan.sp_degree == degree) & (plan.gc_layers == gc_layers))
        seconds[rows] = cost.seconds(degree, gc_layers).of(work[rows])
    info = dataclasses.replace(plan.info, cluster=cost.cluster.to_json())
    return dataclasses.replace(plan, info=info, predicted_s=seconds)


def _figures(prefix: str, plan: Plan, measured: np.ndarray) -> dict[str, Any]:
    """A strategy's figures by one clock; `measured` are seconds, ``[rounds, steps]``."""
    predicted, seconds = step_seconds(plan), np.median(measured, axis=0)
    figures = {
        "noise": float(np.median(np.ptp(measured, axis=0) / seconds)),
        "measured_s": float(seconds.sum()),
        "predicted_s": float(predicted.sum()),
        "step_rounds_s": np.round(measured, 4).tolist(),
        "step_measured_s": np.round(seconds, 4).tolist(),
        "step_predicted_s": np.round(predicted, 4).tolist(),
    }
    return {prefix + name: figure for name, figure in figures.items()}


def errors(rows: list[dict[str, Any]], prefix: str = "") -> dict[str, float]:
    """Errors and noise of rows of one number of processes, by one clock."""
    steps = [
        abs(p / m - 1)
        for r in rows
        for p, m in zip(r[f"{prefix}step_predicted_s"], r[f"{prefix}step_measured_s"], strict=True)
    ]
    runs = [r[f"{prefix}predicted_s"] / r[f"{prefix}measured_s"] for r in rows]
    ratios = [abs(a / b - 1) for a, b in itertools.combinations(runs, 2)]
    figures = {
        "step_time_error": statistics.median(steps),
        "run_time_error": max(abs(run - 1) for run in runs),
        "ratio_error": max(ratios, default=0.0),
        "median_ratio_error": statistics.median(ratios) if ratios else 0.0,
        "noise": statistics.median(r[f"{prefix}noise"] for r in rows),
        "profile_error": rows[0][f"{prefix}profile_error"],
    }
    return {prefix + name: figure for name, figure in figures.items()}


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
    parser.add_argument("--quick", action="store_true", help="two processes, two strategies, few samples, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--processes", help="numbers of processes, comma-separated (default 2,4; of --quick 2)")
    parser.add_argument("--strategies", help=f"comma-separated (default {','.join(BASELINES)} and every hbp)")
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help=f"runs of each plan (default {FULL.rounds})")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file, beside its other process counts' rows")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = [*BASELINES, *(name for name, strategy in STRATEGIES.items() if strategy.ours)]
    if args.strategies:
        names = args.strategies.split(",")
    elif args.quick:
        names = ["concat", "hbp"]
    if args.worker:
        worker(args.worker, names)
        return
    processes = [int(n) for n in (args.processes or ("2" if args.quick else "2,4")).split(",")]
    size = QUICK if args.quick else dataclasses.replace(FULL, rounds=args.rounds)
    rows = [row for n in processes for row in run_for_real(n, names, size)]
    if args.out and args.out.is_file():
        rows = [r for r in json.loads(args.out.read_text())["rows"] if r["processes"] not in processes] + rows
    summary = {}
    for n in sorted({r["processes"] for r in rows}):
        mine = [r for r in rows if r["processes"] == n]
        summary[str(n)] = {**errors(mine), **errors(mine, "busy_"), "oversubscribed": n > (os.cpu_count() or 1)}
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
    print(f"{'processes':>9} {'strategy':10} {'measured s':>10} {'predicted':>10} {'busy s':>8} {'predicted':>10}")
    for r in rows:
        print(
            f"{r['processes']:9} {r['strategy']:10} {r['measured_s']:10.2f} {r['predicted_s']:10.2f} "
            f"{r['busy_measured_s']:8.2f} {r['busy_predicted_s']:10.2f}"
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

"""What strategies gain in measured compute on clusters that are not there: every rank of 8 and 32 on one device.

    python benchmarks/rehearse.py            # a quarter of an hour on two cores; nothing else should run beside it
    python benchmarks/rehearse.py --quick --json

Lengths like the paper's (95 % short, 5 % long), scaled by 1/64 to the quickstart's model, under one memory budget. The
cost model's constants are fitted on this processor first, from a dozen packs run as a rank alone. Then Table 6 of the
paper in measured compute: naive packing (`concat`), hierarchical packing alone, with balance batching, `hbp` and
`hbp-mixed`, each with its fastest setting that fits, at one global batch. All are rehearsed in turn
(:mod:`hbp.run.rehearse`): a run is measured compute, slowest rank by slowest rank, plus the predicted communication.
Speed-ups are over the faster of two rehearsals of naive packing, at equal samples and tokens; the other shows the noise
of a ratio. The worlds are rehearsed side by side, a core each. The paper has 1.16× for hierarchical
packing alone and 1.40× with balance batching.

Last, what a rehearsal says of two ranks is held against two real processes: the processor time and the peak bytes of
every pack of a plan.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from by_hand import plan_by_hand
from paper import hierarchical
from ranks import run_ranks

from hbp.cost.cluster import GIB, ClusterSpec, load_cluster
from hbp.cost.fit import Point, fit_cluster, grid
from hbp.cost.model_spec import ModelSpec, spec_from_config
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan, read_plan, write_plan
from hbp.planning.planner import make_plan
from hbp.run.rehearse import RandomTokens, Rehearsal, rehearse
from hbp.train.batch import make_micro_batch, micro_batch_of, rows_of_rank
from hbp.train.launch import process_group
from hbp.train.loop import forward_backward
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.measure.micro_batch import hold_gradients, peak_bytes_of
from hbp.train.model import load_sharded, local_parameter_bytes

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "quickstart-model"
CPU = torch.device("cpu")
SCALE, MEMORY_GIB, SEED = 64, 0.15, 3
NAIVE, AGAIN, OURS = "naive", "naive, again", ("hbp", "hbp-mixed")
BY_HAND = {"+ hierarchical": False, "+ balance": True}


def model_spec() -> ModelSpec:
    return spec_from_config(json.loads((MODEL / "config.json").read_text()))


def lengths_like_the_papers(samples: int) -> Any:
    return (generate("mix-128k", samples, SEED) // SCALE).clip(8)


def fitted_here(repeats: int, shares: tuple[int, ...]) -> tuple[ClusterSpec, float]:
    """The cluster as this processor computes, and the median error of its held-out packs.

    Packs of one rank alone, in processor time, so that links take no part: theirs stay the built-in ones.
    """
    torch.set_num_threads(1)
    base, spec, lengths = load_cluster("cpu-local"), model_spec(), lengths_like_the_papers(1000)
    packs = grid(CostModel(spec, base, 1), lengths, int(lengths.max()), np.random.default_rng(SEED), shares)
    found = [[math.inf, 0.0] for _ in packs]
    with fake_world(1):
        mesh = make_mesh(1, [1], "cpu", spec.heads)
        lm = drawn_model(str(MODEL), mesh.world, CPU, by_layer=spec.sharded_by_layer)
        lm.train()
        states = local_parameter_bytes(lm) + 3 * hold_gradients(lm)
        for number in range(1 + repeats):  # rounds, as a rehearsal's; the first to warm up
            for own, (documents, degree, gc_layers) in zip(found, packs, strict=True):
                batch = micro_batch_of([_random(n, spec.vocab) for n in documents], 0, degree, 0, gc_layers, mesh, CPU)
                if number == 0:
                    own[1] = peak_bytes_of(lambda batch=batch: forward_backward(lm, batch), CPU) + states
                else:
                    own[0] = min(own[0], _spent(lm, batch))
    points = [Point(*pack, *own) for pack, own in zip(packs, found, strict=True)]
    fit = fit_cluster(base, spec, 1, points, "one core")
    return replace(fit.cluster, memory_bytes=MEMORY_GIB * GIB), fit.held_out_error


def _random(tokens: int, vocab: int) -> tuple[Any, Any]:
    ids = np.random.default_rng(tokens).integers(0, vocab, tokens).astype(np.int32)
    return ids, np.ones(tokens, np.uint8)


def _spent(lm: Any, batch: Any) -> float:
    start = time.process_time()
    forward_backward(lm, batch)
    return time.process_time() - start


def plans_for(cluster: ClusterSpec, world: int, samples: int) -> list[tuple[str, Plan]]:
    """Table 6's rows, and ours."""
    lengths, cost = lengths_like_the_papers(samples), CostModel(model_spec(), cluster, world)
    longest = int(lengths.max())
    batch = longest * world * 2
    naive = make_plan(lengths, cost, strategy="concat", global_batch_tokens=batch, seed=SEED)
    plans = [(NAIVE, naive), (AGAIN, naive)]
    for name, balanced in BY_HAND.items():
        made = plan_by_hand(name, hierarchical(None, balanced), lengths, cost, None, batch, longest)
        plans.append((name, made))
    plans += [(name, make_plan(lengths, cost, strategy=name, global_batch_tokens=batch, seed=SEED)) for name in OURS]
    return plans


def rows_for(
    cluster: ClusterSpec, world: int, samples: int, micro_steps: int, ranks: int | None, repeats: int
) -> list[dict[str, Any]]:
    """One row a strategy."""
    named = plans_for(cluster, world, samples)
    found = rehearse(
        [plan for _, plan in named], str(MODEL), CPU, micro_steps=micro_steps, ranks=ranks, repeats=repeats, seed=SEED
    )
    naive = min(found[:2], key=lambda one: one.step_s)  # what disturbs a measurement only makes it longer
    steps = named[0][1].n_steps
    return [_row(world, name, plan, own, naive, steps) for (name, plan), own in zip(named, found, strict=True)]


def _row(world: int, name: str, plan: Plan, own: Rehearsal, naive: Rehearsal, naive_steps: int) -> dict[str, Any]:
    measured, predicted = own.step_s * plan.n_steps, own.predicted_step_s * plan.n_steps
    speedup = naive.step_s * naive_steps / measured
    predicted_speedup = naive.predicted_step_s * naive_steps / predicted
    interval = [bound * plan.n_steps if math.isfinite(bound) else None for bound in own.step_s_interval]
    return {
        "ranks": world,
        "strategy": name,
        "groups": [[g.capacity, g.sp_degree, g.gc_layers] for g in plan.groups_of_rows()[0]],
        "steps": plan.n_steps,
        "run_s": measured,
        "run_s_interval": interval,
        "predicted_run_s": predicted,
        "communication_s": own.communication_step_s * plan.n_steps,
        "speedup": speedup,
        "predicted_speedup": predicted_speedup,
        "ratio_error": predicted_speedup / speedup - 1,
        "idle": own.idle_share,
        "predicted_idle": own.predicted_idle_share,
        "peak_gib": own.peak_bytes / GIB,
        "noise": own.noise,
        "micro_steps": f"{own.micro_steps} of {own.of_micro_steps}",
        "abr": plan.info.metrics["abr"],
        "cr": plan.info.metrics["cr"],
    }


def real_rank(folder: Path, repeats: int) -> None:
    """As one of several real processes: seconds of its processor and peak bytes of each micro-step, into a file."""
    with process_group():
        rank = dist.get_rank()
        (folder / f"rank-{rank}.json").write_text(json.dumps(_of_real_rank(rank, folder, repeats)))


def _of_real_rank(rank: int, folder: Path, repeats: int) -> list[tuple[float, float, float]]:
    torch.set_num_threads(1)
    plan, spec = read_plan(folder), model_spec()
    mesh = make_mesh(plan.info.world_size, sorted(set(plan.sp_degree.tolist())), "cpu", spec.heads)
    lm = load_sharded(str(MODEL), mesh.world, CPU, by_layer=spec.sharded_by_layer)
    lm.train()
    samples = RandomTokens.of(plan, spec.vocab)
    states = local_parameter_bytes(lm) + 3 * hold_gradients(lm)
    batches = [make_micro_batch(plan, r, samples, mesh, rank, CPU) for step in rows_of_rank(plan, rank) for r in step]
    peaks = [peak_bytes_of(lambda batch=batch: forward_backward(lm, batch), CPU) + states for batch in batches]
    times = np.array([[_both_times(lm, batch) for batch in batches] for _ in range(repeats)])
    return [(*both, peak) for both, peak in zip(times.min(axis=0).tolist(), peaks, strict=True)]


def _both_times(lm: Any, batch: Any) -> tuple[float, float]:
    """Seconds of the processor: of the thread that computes, and with those that gloo sends and receives in."""
    start, own = time.process_time(), time.thread_time()
    forward_backward(lm, batch)
    return time.thread_time() - own, time.process_time() - start


def validation(cluster: ClusterSpec, samples: int, repeats: int) -> dict[str, Any]:
    """A rehearsal of two ranks against two real processes, pack by pack."""
    lengths, world = lengths_like_the_papers(samples), 2
    cost = CostModel(model_spec(), replace(cluster, memory_bytes=2 * cluster.memory_bytes), world)
    plan = make_plan(lengths, cost, strategy="hbp-mixed", seed=SEED)
    with tempfile.TemporaryDirectory() as folder:
        write_plan(plan, Path(folder))
        run_ranks(world, __file__, "--real-rank", folder, "--repeats", str(repeats))
        real = [json.loads((Path(folder) / f"rank-{rank}.json").read_text()) for rank in range(world)]
    twice = rehearse([plan, plan], str(MODEL), CPU, micro_steps=None, repeats=repeats)
    spent, whole, rehearsed, memory = [], [], [], []
    for rank, rows in enumerate(real):
        mine = [row for row in twice[0].rows if row.rank == rank]
        for (seconds, with_gloo, peak), row in zip(rows, mine, strict=True):
            spent.append(seconds)
            whole.append(with_gloo)
            rehearsed.append(row.measured_s)
            memory.append(row.peak_bytes / peak - 1)
    each = np.array(rehearsed) / np.array(spent) - 1
    return {
        "packs": len(spent),
        "processor_s": sum(spent),
        "processor_with_gloo_s": sum(whole),
        "rehearsed_s": sum(rehearsed),
        "compute_error": sum(rehearsed) / sum(spent) - 1,
        "compute_error_of_a_pack": float(np.median(np.abs(each))),
        "memory_error": float(np.abs(memory).max()),
        "rehearsed_again": twice[1].step_s / twice[0].step_s - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 ranks, few samples, one micro-step of each plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--micro-steps", type=int, default=4, help="of each plan on 32 ranks, half as many more on 8 (default 4)"
    )
    parser.add_argument("--out", type=Path, help="keep the object in a file, too")
    parser.add_argument("--real-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.real_rank:
        real_rank(args.real_rank, args.repeats)
        return
    started = time.monotonic()
    cluster, error = fitted_here(1, (8,)) if args.quick else fitted_here(4, (16, 8, 4, 2, 1))
    context = multiprocessing.get_context("spawn")
    if args.quick:
        rows = rows_for(cluster, 4, 120, 1, 2, 1)
    else:
        with context.Pool(2) as pool:
            worlds = [
                (cluster, 8, 1500, 3 * args.micro_steps // 2, None, 3),
                (cluster, 32, 6000, args.micro_steps, 16, 3),
            ]
            rows = [row for each in pool.starmap(rows_for, worlds, chunksize=1) for row in each]
    result = {
        "command": "python benchmarks/rehearse.py" + (" --quick" if args.quick else ""),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "constants": cluster.to_json(),
        "held_out_error": error,
        "rows": rows,
        "validation": validation(cluster, 30 if args.quick else 400, 1 if args.quick else 3),
    }
    result["seconds"] = time.monotonic() - started
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'ranks':>5} {'strategy':<15} {'run s':>9} {'speed':>6} {'predicted':>9} {'idle':>6} {'predicted':>9}")
    for row in rows:
        print(
            f"{row['ranks']:>5} {row['strategy']:<15} {row['run_s']:>9.1f} {row['speedup']:>5.2f}× "
            f"{row['predicted_speedup']:>8.2f}× {row['idle']:>6.1%} {row['predicted_idle']:>9.1%}"
        )
    print(json.dumps(result["validation"], indent=1))


if __name__ == "__main__":
    main()

"""What strategies gain in measured compute on clusters that are not there: every rank of 8 and 32 on one device.

    python benchmarks/rehearse.py            # minutes to an hour, by the processor; nothing else should run beside it
    python benchmarks/rehearse.py --quick --json

Lengths like the paper's (95 % short, 5 % long), scaled by 1/32 to the quickstart's model, under one memory budget.
Naive packing (`concat`), best fit (`bfd`), the paper's `hbp` and `hbp-mixed`, each with its fastest setting that fits,
at one global batch. All are rehearsed in turn (:mod:`hbp.run.rehearse`): a run is measured compute, slowest rank by
slowest rank, plus the predicted communication. Speed-ups are over naive packing, at equal samples and tokens. The
paper's Table 6 has 1.16× for hierarchical packing alone and 1.40× with balance batching.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hbp.cost.cluster import GIB, load_cluster
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.planning.planner import make_plan
from hbp.run.rehearse import rehearse

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "quickstart-model"
STRATEGIES = ("concat", "bfd", "hbp", "hbp-mixed")
SCALE, MEMORY_GIB, SEED = 32, 0.25, 3


def rows_for(world: int, samples: int, micro_steps: int, ranks: int | None, repeats: int) -> list[dict[str, Any]]:
    """One row a strategy."""
    lengths = (generate("mix-128k", samples, SEED) // SCALE).clip(8)
    spec = spec_from_config(json.loads((MODEL / "config.json").read_text()))
    cluster = replace(load_cluster("cpu-local"), memory_bytes=MEMORY_GIB * GIB)
    cost, batch = CostModel(spec, cluster, world), int(lengths.max()) * world * 2
    plans = [make_plan(lengths, cost, strategy=name, global_batch_tokens=batch, seed=SEED) for name in STRATEGIES]
    found = rehearse(
        plans, str(MODEL), torch.device("cpu"), micro_steps=micro_steps, ranks=ranks, repeats=repeats, seed=SEED
    )
    naive = found[0].step_s * plans[0].n_steps, found[0].predicted_step_s * plans[0].n_steps
    rows = []
    for name, plan, own in zip(STRATEGIES, plans, found, strict=True):
        measured, predicted = own.step_s * plan.n_steps, own.predicted_step_s * plan.n_steps
        rows.append(
            {
                "ranks": world,
                "strategy": name,
                "steps": plan.n_steps,
                "run_s": measured,
                "run_s_interval": [
                    bound * plan.n_steps if math.isfinite(bound) else None for bound in own.step_s_interval
                ],
                "predicted_run_s": predicted,
                "communication_s": own.communication_step_s * plan.n_steps,
                "speedup": naive[0] / measured,
                "predicted_speedup": naive[1] / predicted,
                "ratio_error": (naive[1] / predicted) / (naive[0] / measured) - 1,
                "idle": own.idle_share,
                "predicted_idle": own.predicted_idle_share,
                "peak_gib": own.peak_bytes / GIB,
                "noise": own.noise,
                "micro_steps": f"{own.micro_steps} of {own.of_micro_steps}",
                "abr": plan.info.metrics["abr"],
                "cr": plan.info.metrics["cr"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 ranks, few samples, one micro-step of each plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--micro-steps", type=int, default=6, help="of each plan (default 6)")
    parser.add_argument("--out", type=Path, help="keep the object in a file, too")
    args = parser.parse_args()
    if args.quick:
        rows = rows_for(4, 120, 1, 2, 1)
    else:
        rows = rows_for(8, 1500, args.micro_steps, None, 2) + rows_for(32, 6000, args.micro_steps, 8, 2)
    result = {
        "command": "python benchmarks/rehearse.py" + (" --quick" if args.quick else ""),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'ranks':>5} {'strategy':<10} {'run s':>9} {'speed':>6} {'predicted':>9} {'idle':>6} {'predicted':>9}")
    for row in rows:
        print(
            f"{row['ranks']:>5} {row['strategy']:<10} {row['run_s']:>9.1f} {row['speedup']:>5.2f}× "
            f"{row['predicted_speedup']:>8.2f}× {row['idle']:>6.1%} {row['predicted_idle']:>9.1%}"
        )


if __name__ == "__main__":
    main()

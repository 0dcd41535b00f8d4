"""Tokens a second of HBP against naive packing and against TRL, on two processes of this machine; cost of switching.

For three mixes of the embedded data set (functions and modules of this Python's library) the main job is run: live
profile, plan, training, then `concat` (naive packing) at every SP degree with the fewest recomputed layers that fit the
same memory budget, each trained whole; the fastest counts. TRL's SFTTrainer then trains the same samples from the same
weights with `packing=True` on as many processes, with and without gradient checkpointing; the faster counts, whether it
would fit the budget or not.

`switch_overhead` compares optimizer steps that alternate between SP degrees 1 and 2 with the same steps run in a row of
one degree: the sum of both degrees' median seconds, alternating over static, minus one.

    python benchmarks/train.py [--quick] [--json] [--mix NAME ...] [--out benchmarks/results/train.json]

`--quick` does the same on one mix and a model of two layers for a few steps: too few for its ratios to mean much. Where
TRL is not installed its figures are null. Results of single mixes (`--mix NAME`, `--mix switch`) are merged into FILE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from ranks import run_ranks

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "examples" / "quickstart-model")
RANKS = 2
MIXES = {
    "short-heavy": {"short_samples": 400, "long_samples": 2},
    "quickstart-like": {"short_samples": 300, "long_samples": 4},
    "long-heavy": {"short_samples": 80, "long_samples": 9},
}
QUICK = {"short-heavy": {"short_samples": 40, "long_samples": 3}}
LAYERS, QUICK_LAYERS = 8, 2
CONFIG: dict[str, Any] = {
    "data": {"source": "stdlib", "longest_chars": 26_000, "max_length": 8192, "eval_samples": 32},
    "model": {},
    "cluster": {"name": "cpu-local", "processes": RANKS, "memory_gib": 0.22, "profile": True},
    "plan": {"strategy": "hbp-mixed", "baseline": "concat", "global_batch_tokens": 16_384},
    "train": {"lr": 1.0e-3, "export": False, "resume": "never"},
}
SWITCH = "switch"


def environment() -> dict[str, str]:
    """Of every process that is measured, TRL's as ours: one thread, memory kept rather than given back."""
    from hbp.train.launch import CPU_ENVIRONMENT

    return {"HF_HUB_OFFLINE": "1", **os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}"}


def write_weights(folder: Path, n_layers: int) -> str:
    """A model folder with weights, so that both sides start from the same."""
    import torch

    from hbp.train.measure.live import load_stack

    load_stack(MODEL, n_layers, torch.device("cpu")).lm.save_pretrained(folder)
    return str(folder)


def measure_mix(name: str, mix: dict[str, int], *, quick: bool, scratch: Path) -> dict[str, Any]:
    """HBP, naive packing and TRL on one mix."""
    run, weights = scratch / name, write_weights(scratch / "model", QUICK_LAYERS if quick else LAYERS)
    config = {**CONFIG, "run_dir": str(run), "data": {**CONFIG["data"], **mix}, "model": {"path": weights}}
    if quick:
        config["data"] |= {"longest_chars": 4_000, "max_length": 1280, "eval_samples": 4}
        config["plan"] = {**CONFIG["plan"], "global_batch_tokens": 2560}
        config["cluster"] = {**CONFIG["cluster"], "profile": False, "memory_gib": 0.1}
    (scratch / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "hbp", "train", str(scratch / "config.yaml"), "--json"]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(done.stdout)
    ours, naive = summary["results"]
    trials: list[dict[str, Any]] = []
    tried = (True, False) if find_spec("trl") else ()
    for recompute in tried[:1] if quick else tried:
        trial = {
            "store": str(run / "store"),
            "samples": str(run / config["plan"]["strategy"] / "samples.npy"),
            "model": weights,
            "tokenizer": str(run / "data" / "tokenizer"),
            "max_length": config["data"]["max_length"],
            "accumulation": max(1, config["plan"]["global_batch_tokens"] // (RANKS * config["data"]["max_length"])),
            "gradient_checkpointing": recompute,
            "lr": config["train"]["lr"],
            "seed": 0,
            "out": str(scratch / "trl"),
            "result": str(scratch / "trl.json"),
        }
        (scratch / "trial.json").write_text(json.dumps(trial))
        script = str(ROOT / "benchmarks" / "trl_sft.py")
        run_ranks(RANKS, script, str(scratch / "trial.json"), environment=environment())
        trials.append(json.loads((scratch / "trl.json").read_text()))
    trl = max(trials, key=lambda trial: trial["tokens_per_s"]) if trials else {"failed": "trl is not installed"}
    return {
        "speedup_vs_naive": ours["tokens_per_s"] / naive["tokens_per_s"],
        "speedup_vs_trl": ours["tokens_per_s"] / trl["tokens_per_s"] if trials else None,
        "samples": mix,
        "memory_gib": config["cluster"]["memory_gib"],
        "hbp": ours,
        "naive": naive,
        "naive_trials": summary["baseline_trials"],
        "trl": trl,
        "trl_trials": trials,
    }


def measure_switching(*, quick: bool, scratch: Path) -> dict[str, Any]:
    """Seconds of steps that change the degree and of steps that do not."""
    result = scratch / "switch.json"
    options = ["--switch-rank", str(result), *(["--quick"] if quick else [])]
    run_ranks(RANKS, __file__, *options, environment=environment())
    return json.loads(result.read_text())


def switch_rank(out: Path, *, quick: bool) -> None:
    """One rank of :func:`measure_switching`."""
    import numpy as np
    import torch.distributed as dist

    from hbp.config import TrainConfig
    from hbp.parallel.mesh import make_mesh
    from hbp.train.batch import micro_batch_of
    from hbp.train.launch import device_name, process_group
    from hbp.train.loop import forward_backward, make_optimizer
    from hbp.train.measure.live import load_stack
    from hbp.train.model import shard

    n_layers, rounds, row, tokens = (QUICK_LAYERS, 6, 4, 128) if quick else (LAYERS, 12, 10, 1024)
    with process_group() as device:
        rank, rng = dist.get_rank(), np.random.default_rng(0)
        mesh = make_mesh(RANKS, [1, RANKS], device.type)
        model = load_stack(MODEL, n_layers, device)
        shard(model, mesh.world, by_layer=False)
        optimizer = make_optimizer(model, TrainConfig())

        def pack(degree: int) -> list[tuple[Any, Any]]:
            """As many tokens a rank at either degree, in eight documents."""
            length = tokens * degree // 8
            return [(rng.integers(0, 4096, length).astype(np.int32), np.ones(length, np.uint8)) for _ in range(8)]

        packs = {degree: pack(degree) for degree in (1, RANKS)}

        def step(degree: int) -> float:
            dist.barrier()
            began = time.perf_counter()
            batch = micro_batch_of(packs[degree], 0, degree, rank % degree, n_layers // 2, mesh, device)
            forward_backward(model, batch, 1e-4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            dist.barrier()
            return time.perf_counter() - began

        for degree in (1, RANKS) * 2:
            step(degree)
        static: dict[int, list[float]] = {1: [], RANKS: []}
        switched: dict[int, list[float]] = {1: [], RANKS: []}
        for _ in range(rounds):  # blocks in turn, so that a drift of the machine meets all alike
            for degree in (1, RANKS):
                step(degree)  # the block's own first step does switch
                static[degree] += [step(degree) for _ in range(row)]
            for _ in range(row):
                for degree in (1, RANKS):
                    switched[degree].append(step(degree))
        if rank == 0:
            medians = [[statistics.median(x[d]) for d in (1, RANKS)] for x in (static, switched)]
            out.write_text(
                json.dumps(
                    {
                        "switch_overhead": sum(medians[1]) / sum(medians[0]) - 1,
                        "static_s": medians[0],
                        "switching_s": medians[1],
                        "steps_of_each_kind": rounds * row,
                        "tokens_a_rank": tokens,
                        "device": device_name(device),
                    }
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small mix and model, planned without a profile")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--mix", action="append", choices=[*MIXES, SWITCH], help="only this part (may be repeated)")
    parser.add_argument("--out", type=Path, help="merge the results into this JSON file")
    parser.add_argument("--switch-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.switch_rank:
        switch_rank(args.switch_rank, quick=args.quick)
        return
    mixes = QUICK if args.quick else MIXES
    wanted = args.mix or [*mixes, SWITCH]
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    today = {"date": datetime.date.today().isoformat()}
    command = "python benchmarks/train.py" + (" --quick" if args.quick else "")
    result |= {"command": command, "processes": RANKS, **today}
    result.setdefault("mixes", {})
    with TemporaryDirectory() as scratch:
        for name in wanted:
            if name == SWITCH:
                result[SWITCH] = today | measure_switching(quick=args.quick, scratch=Path(scratch))
                result["switch_overhead"], result["device"] = (result[SWITCH][x] for x in ("switch_overhead", "device"))
            elif name in mixes:
                measured = measure_mix(name, mixes[name], quick=args.quick, scratch=Path(scratch))
                result["mixes"][name] = today | measured
    for key in ("speedup_vs_naive", "speedup_vs_trl"):
        result[key] = {name: mix[key] for name, mix in result["mixes"].items()}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'mix':16} {'HBP tok/s':>10} {'naive':>8} {'TRL':>8} {'vs naive':>9} {'vs TRL':>7}  TRL: documents apart")
    for name, mix in result["mixes"].items():
        ours, naive, trl = mix["hbp"], mix["naive"], mix["trl"]
        line = f"{name:16} {ours['tokens_per_s']:10,.0f} {naive['tokens_per_s']:8,.0f} "
        if "failed" in trl:
            print(f"{line}{'-':>8} {mix['speedup_vs_naive']:8.2f}× {'-':>7}  {trl['failed']}")
            continue
        print(
            f"{line}{trl['tokens_per_s']:8,.0f} {mix['speedup_vs_naive']:8.2f}× "
            f"{mix['speedup_vs_trl']:6.2f}×  {trl['documents_apart']} ({trl['attention']})"
        )
    if "switch_overhead" in result:
        print(f"switching degrees costs {result['switch_overhead']:.2%} of a step")


if __name__ == "__main__":
    main()

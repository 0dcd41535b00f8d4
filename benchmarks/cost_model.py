"""How well the cost model predicts seconds and bytes that it was not fitted to, on this machine's processes.

Two processes train the real engine on a Llama of eight layers. One profile measures the whole model, another stacks of
two and four of its layers. Then fresh packs are measured whole: other documents, other lengths, numbers of recomputed
layers in between. Both profiles predict them, as does the memory model with nothing fitted at all. A smaller Qwen3-MoE
(experts) and a smaller DeepSeek-V2 (experts and latent attention) follow, with one profile each of shorter packs.

    python benchmarks/cost_model.py [--quick] [--json] [--out FILE] [--pictures DIR]

`rows` of the JSON: model, profile, quantity, median_error, p90_error, n. Raw points of everything are in it too, the
smaller models' under `smaller`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from hbp.cost.cluster import CLUSTERS
from hbp.cost.fit import Point, predict_bytes, predict_point
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.cost.profile_file import profile_json
from hbp.parallel.mesh import make_mesh
from hbp.train.launch import CPU_ENVIRONMENT, device_name, process_group, under_torchrun
from hbp.train.measure.live import LiveProfile, live_profile, load_stack, packs_to_measure
from hbp.train.measure.micro_batch import measure_point
from hbp.train.model import CausalLMWithLoss, shard

PROCESSES = 2
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
MOE = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "vocab_size": 2048,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
SMALLER: dict[str, dict[str, Any]] = {
    "Qwen3-MoE": {"model_type": "qwen3_moe", **MOE, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8},
    "DeepSeek-V2": {
        "model_type": "deepseek_v2",
        **MOE,
        "num_key_value_heads": 8,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}
QUICK = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
QUICK_MOE = {**QUICK, "moe_intermediate_size": 64}
HEIGHTS = (2, 4)
SMALLER_LIMIT_S = 60.0
"""Of profiling each smaller model."""


def fresh_packs(longest: int, n_layers: int, count: int, seed: int) -> list[tuple[tuple[int, ...], int, int]]:
    """Packs unlike those of the grid: any length, any number of recomputed layers, both degrees."""
    rng = np.random.default_rng(seed)
    packs = []
    for i in range(count):
        degree = 1 + i % PROCESSES
        capacity = int(np.exp(rng.uniform(np.log(longest / 16), np.log(longest / 2)))) * degree
        lengths: list[int] = []
        while not lengths or sum(lengths) < capacity:
            lengths.append(int(min(np.exp(rng.normal(np.log(longest / 12), 1.2)) + 8, capacity)))
        packs.append((tuple(lengths), degree, int(rng.integers(0, n_layers + 1))))
    return packs


def measure(device: torch.device, quick: bool) -> dict[str, Any]:
    """Everything of this benchmark, on every rank alike."""
    changes, moe_changes = (QUICK, QUICK_MOE) if quick else ({}, {})
    longest, fresh, limit_s = (512, 8, 6.0) if quick else (4096, 24, SMALLER_LIMIT_S)
    result = measure_model("Llama", {**CONFIG, **changes}, longest, fresh, device, heights=HEIGHTS)
    smaller = {
        name: measure_model(name, {**config, **moe_changes}, longest // 2, fresh // 2, device, limit_s=limit_s)
        for name, config in SMALLER.items()
    }
    rows = result["rows"] + [r for part in smaller.values() for r in part.pop("rows")]
    return {"device": device_name(device), **result, "rows": rows, "smaller": smaller}


def measure_model(
    title: str,
    config: dict[str, Any],
    longest: int,
    fresh: int,
    device: torch.device,
    heights: Sequence[int] = (),
    limit_s: float = math.inf,
) -> dict[str, Any]:
    """Profiles of a model, whole and of stacks where heights are given, and what they predict of fresh packs."""
    spec = spec_from_config(config, title)
    cost = CostModel(spec, CLUSTERS["cpu-local"], PROCESSES)
    mesh = make_mesh(PROCESSES, cost.degrees(), device.type)
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(longest / 12), 1, 2000), 16, longest).astype(int)
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))

        def make_model(height: int | None) -> CausalLMWithLoss:
            model = load_stack(folder, height or spec.n_layers, device)
            shard(model, mesh.world, by_layer=spec.sharded_by_layer)
            return model

        def profile(heights: Sequence[int]) -> LiveProfile:
            packs = packs_to_measure(cost, lengths, longest, device, heights=heights)
            return live_profile(make_model, cost, mesh, device, packs, limit_s=limit_s)

        profiles = {"whole model": profile(())}
        if heights:
            profiles[f"stacks of {' and '.join(map(str, heights))} layers"] = profile(heights)
        model = make_model(None)
        packs = fresh_packs(longest, spec.n_layers, fresh, seed=1)
        measure_point(model, mesh, *max(packs, key=lambda p: sum(p[0])), device=device, repeats=0)
        points = [measure_point(model, mesh, *pack, device=device) for pack in packs]
    fitted = {name: CostModel(spec, measured.fit.cluster, PROCESSES) for name, measured in profiles.items()}
    rows = []
    for name, measured in profiles.items():
        own = [abs(p / q.seconds - 1) for p, q in zip(measured.fit.held_out_s, measured.points, strict=True)]
        seconds = [predict_point(fitted[name], p) for p in points]
        sizes = [predict_bytes(fitted[name], p) for p in points]
        rows += [
            row(title, name, "seconds, each of its own points left out", own),
            row(title, name, "seconds of fresh packs", relative_errors(points, seconds)),
            row(title, name, "peak bytes of fresh packs", relative_errors(points, sizes, "peak_bytes")),
        ]
    unfitted = [predict_bytes(cost, p) for p in points]
    rows.append(
        row(title, "nothing fitted", "peak bytes of fresh packs", relative_errors(points, unfitted, "peak_bytes"))
    )
    whole, *stacks = fitted.values()
    predicted = [
        {
            **dataclasses.asdict(p),
            "predicted_s": predict_point(whole, p),
            "predicted_from_stacks_s": predict_point(stacks[0], p) if stacks else None,
            "predicted_bytes": predict_bytes(whole, p),
            "unfitted_bytes": size,
        }
        for p, size in zip(points, unfitted, strict=True)
    ]
    files = {
        name: profile_json(m.fit, spec, PROCESSES, m.points, m.collectives, measured_in_s=m.seconds)
        for name, m in profiles.items()
    }
    return {"rows": rows, "fresh_points": predicted, "profiles": files}


def relative_errors(points: Sequence[Point], predicted: Sequence[float], quantity: str = "seconds") -> list[float]:
    """|predicted / measured − 1| of each point."""
    return [abs(guess / getattr(point, quantity) - 1) for point, guess in zip(points, predicted, strict=True)]


def row(model: str, profile: str, quantity: str, relative: Sequence[float]) -> dict[str, Any]:
    return {
        "model": model,
        "profile": profile,
        "quantity": quantity,
        "median_error": float(np.median(relative)),
        "p90_error": float(np.quantile(relative, 0.9)),
        "n": len(relative),
    }


def draw(result: dict[str, Any], folder: Path) -> None:
    """The pictures of docs/cost-model.md: this machine's scatters, and curves of the built-in H100."""
    from hbp.cost.model_spec import load_model_spec
    from hbp.report import profile_page
    from hbp.report.figures import standalone

    points = [
        Point(tuple(p["lengths"]), p["sp_degree"], p["gc_layers"], p["seconds"], p["peak_bytes"])
        for p in result["fresh_points"]
    ]
    cost = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 64)
    pictures = {
        "cost-seconds": profile_page.seconds_scatter(points, [p["predicted_s"] for p in result["fresh_points"]]),
        "cost-memory": profile_page.memory_scatter(points, [p["unfitted_bytes"] for p in result["fresh_points"]]),
        "cost-time-per-token": profile_page.time_per_token(cost, 2**17, degrees=[1, 2, 4, 8, 16]),
        "cost-memory-over-length": profile_page.memory_over_length(cost, 2**17, degrees=[1, 2, 4, 8, 16]),
    }
    for name, svg in pictures.items():
        (folder / f"{name}.svg").write_text(standalone(svg))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short packs")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    parser.add_argument("--pictures", type=Path, help="folder to draw the pictures of docs/cost-model.md into")
    args = parser.parse_args()
    if under_torchrun():
        with process_group() as device:
            result = measure(device, args.quick)
        if os.environ["RANK"] == "0":
            args.out.write_text(json.dumps(result))
        return
    with TemporaryDirectory() as folder:
        raw, began = Path(folder) / "raw.json", time.monotonic()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
        options = ["--out", str(raw), *(["--quick"] if args.quick else [])]
        environment = {**CPU_ENVIRONMENT, **os.environ}
        subprocess.run([sys.executable, *launcher, *options], check=True, env=environment, stdout=sys.stderr)
        result = {
            "command": "python benchmarks/cost_model.py" + (" --quick" if args.quick else ""),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "took_s": time.monotonic() - began,
            **json.loads(raw.read_text()),
        }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.pictures:
        draw(result, args.pictures)
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['device']}, {PROCESSES} processes, {result['took_s']:.0f} s")
    print(f"{'model':12} {'profile':26} {'quantity':42} {'median':>8} {'9 in 10':>8} {'n':>4}")
    for r in result["rows"]:
        error, tail = (f"{r[key]:8.1%}" for key in ("median_error", "p90_error"))
        print(f"{r['model']:12} {r['profile']:26} {r['quantity']:42} {error} {tail} {r['n']:4}")


if __name__ == "__main__":
    main()

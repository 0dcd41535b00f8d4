"""One GPU, under nine minutes: what layers with the real dimensions of large models cost, and whether we predict it.

For LLaMA-3.1-8B, Qwen2.5-32B and DeepSeek-V2 (its dense layer and an MLA + mixture-of-experts layer, with 32 of its 160
experts so that it fits: a token still goes to six), two stacks of a few layers each run the engine's forward and
backward on packs of 4K to 128K tokens in three document mixes, with no layer and with all layers recomputed. The cost
model is fitted to each model alone; the constants of the first then predict the others. Memory is compared with
``max_memory_allocated`` before anything is fitted. Matrix products over rows and document attention over lengths are
measured by themselves. ``cluster`` of the JSON is one fit to all models' points together, so that the file is a cluster
for ``hbp plan --cluster FILE``.

    python benchmarks/gpu_profile.py [--quick] [--json] [--out benchmarks/results/gpu-profile.json]

On a CPU, or with --quick, the same families run with tiny dimensions. A model that fails is reported and passed over.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from cost_model import relative_errors

from hbp.cost.cluster import CLUSTERS, ClusterSpec
from hbp.cost.fit import Point, pooled_cluster, predict_bytes, predict_point
from hbp.cost.known_models import KNOWN_MODELS
from hbp.cost.model_spec import ModelSpec, spec_from_config
from hbp.cost.predict import FLASH_BACKWARD, CostModel
from hbp.cost.profile_file import profile_json
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import document_attention, make_documents
from hbp.progress import say
from hbp.train.launch import device_name, process_group
from hbp.train.measure.links import seconds_of
from hbp.train.measure.live import Pack, live_profile, load_stack, that_fit
from hbp.train.model import CausalLMWithLoss, shard

STACKS = {"llama-3.1-8b": (2, 4), "qwen2.5-32b": (1, 2), "deepseek-v2-236b": (1, 2)}
EXPERTS = 32
CAPACITIES = [2**i for i in range(12, 18)]
ROWS = [2**i for i in range(6, 15)]
MODEL_LIMIT_S = 135.0
TINY: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {},
    "qwen2.5-32b": {},
    "deepseek-v2-236b": {
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "num_key_value_heads": 8,
    },
}


def configuration(name: str, tiny: bool) -> dict[str, Any]:
    """A transformers configuration of a built-in model, with fewer experts, or with tiny dimensions."""
    config = dict(KNOWN_MODELS[name])
    if tiny:
        small = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 2}
        return {**config, **small, "vocab_size": 512, **TINY[name]}
    if "n_routed_experts" in config:
        config["n_routed_experts"] = EXPERTS
    return config


def packs_of(n_layers: int, capacities: list[int], seed: int = 0) -> list[Pack]:
    """Packs of short documents, of one half-long and short ones, and of a single one, shortest first."""
    rng = np.random.default_rng(seed)
    packs: list[Pack] = []
    for capacity in capacities:
        short = np.minimum(rng.lognormal(np.log(500), 1, capacity).astype(int) + 16, capacity // 4)
        filled = short[np.cumsum(short) <= capacity].tolist()
        half = short[np.cumsum(short) <= capacity // 2].tolist()
        for lengths in (filled, [capacity // 2, *half], [capacity]):
            packs += [(tuple(lengths), 1, gc_layers) for gc_layers in (0, n_layers)]
    return packs


def measure_model(name: str, cluster: ClusterSpec, device: torch.device, tiny: bool) -> tuple[ModelSpec, Any]:
    """The live profile of two stacks of a model's layers."""
    config = configuration(name, tiny)
    spec = spec_from_config(config, name)
    mesh = make_mesh(1, [1], device.type)
    cost = CostModel(spec, cluster, 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))

        def make_model(height: int | None) -> CausalLMWithLoss:
            model = load_stack(folder, height or spec.n_layers, device)
            shard(model, mesh.world, by_layer=spec.sharded_by_layer, compute_dtype=dtype)
            return model

        packs: dict[int | None, list[Pack]] = {}
        low, high = STACKS[name]
        capacities = [64, 128, 256] if tiny else CAPACITIES
        for height, some in ((low, capacities[::2]), (high, capacities)):
            of_stack = dataclasses.replace(cost, model=spec.with_layers(height))
            packs[height] = that_fit(of_stack, packs_of(height, some), device)
        return spec, live_profile(make_model, cost, mesh, device, packs, limit_s=MODEL_LIMIT_S)


def model_result(spec: ModelSpec, measured: Any, cluster: ClusterSpec, others: ClusterSpec | None) -> dict[str, Any]:
    """Raw points, the fit, its held-out error, memory before any fit, and what another model's constants predict."""
    points = measured.points
    plain = CostModel(spec, cluster, 1)
    result = profile_json(measured.fit, spec, 1, points, measured_in_s=measured.seconds, skipped=measured.skipped)
    memory = relative_errors(points, [predict_bytes(plain, p) for p in points], "peak_bytes")
    result["memory_error_unfitted"] = summary(memory)
    result["memory_within_5_percent"] = float(np.mean(np.array(memory) <= 0.05))
    if others is not None:
        guesses = [predict_point(CostModel(spec, others, 1), p) for p in points]
        result["error_with_the_first_models_constants"] = summary(relative_errors(points, guesses))
    return result


def summary(errors: list[float]) -> dict[str, float]:
    return {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)), "max": max(errors)}


def timed(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median seconds."""
    return statistics.median(seconds_of(run, device, repeats))


def measure_products(spec: ModelSpec, device: torch.device, rows: list[int]) -> dict[str, Any]:
    """Achieved FLOP/s of an MLP's projection over its rows, and the two constants that explain it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = torch.randn(spec.hidden, spec.intermediate, device=device, dtype=dtype)
    seconds = []
    for count in rows:
        x = torch.randn(count, spec.hidden, device=device, dtype=dtype)
        seconds.append(timed(lambda x=x: x @ weight, device))  # type: ignore[misc]
    flops_per_row = 2.0 * spec.hidden * spec.intermediate
    count, s = np.array(rows, float), np.array(seconds)
    # seconds = (rows + half) × flops_per_row / rate, relative errors
    columns = np.stack([count, np.ones_like(count)], axis=1) * flops_per_row / s[:, None]
    (slope, constant), *_ = np.linalg.lstsq(columns, np.ones_like(s), rcond=None)
    return {
        "hidden": spec.hidden,
        "width": spec.intermediate,
        "rows": rows,
        "seconds": seconds,
        "flops_per_s": (count * flops_per_row / s).tolist(),
        "fitted_flops_per_s": float(1 / slope),
        "half_rate_tokens": max(0.0, float(constant / slope)),
    }


def measure_attention(spec: ModelSpec, device: torch.device, total: int) -> list[dict[str, Any]]:
    """Achieved FLOP/s of document attention, forward and backward, over the length of the documents."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    for length in (total // 64, total // 16, total // 4, total):
        documents = make_documents((length,) * (total // length), device)
        q, k, v = (
            torch.randn(total, heads, size, device=device, dtype=dtype, requires_grad=True)
            for heads, size in (
                (spec.heads, spec.qk_head_dim),
                (spec.kv_heads, spec.qk_head_dim),
                (spec.kv_heads, spec.v_head_dim),
            )
        )

        def forward(q: Any = q, k: Any = k, v: Any = v, documents: Any = documents) -> torch.Tensor:
            return document_attention(q, k, v, documents)

        def both(forward: Any = forward) -> None:
            forward().sum().backward()

        pairs = total / length * length * (length + 1) / 2
        flops = spec.attention_kernel_flops_per_pair() / spec.n_layers * pairs
        with torch.no_grad():
            alone = timed(forward, device, repeats=3)
        rows.append(
            {
                "tokens": total,
                "document": length,
                "forward_s": alone,
                "both_s": (seconds := timed(both, device, repeats=3)),
                "forward_flops_per_s": flops / alone,
                "both_flops_per_s": flops * (1 + FLASH_BACKWARD) / seconds,
            }
        )
    return rows


def attempt(what: str, run: Callable[[], Any], failed: dict[str, str]) -> Any:
    """A part of the benchmark; what it raised is kept and None returned, so that the other parts still run."""
    say(what)
    try:
        return run()
    except (RuntimeError, NotImplementedError, HbpError, ValueError, AssertionError) as error:
        failed[what] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        say(f"failed: {failed[what]}")
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measure(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Everything of this benchmark."""
    base, failed = CLUSTERS["h100-nvlink" if device.type == "cuda" else "cpu-local"], dict[str, str]()
    rows, total = ([16, 64, 256], 512) if tiny else (ROWS, 2**15)
    result: dict[str, Any] = {"products": {}, "attention": {}, "models": {}, "failed": failed}
    specs = {name: spec_from_config(configuration(name, tiny), name) for name in STACKS}
    for name, spec in specs.items():
        products = attempt(f"products of {name}", lambda s=spec: measure_products(s, device, rows), failed)  # type: ignore[misc]
        attention = attempt(f"attention of {name}", lambda s=spec: measure_attention(s, device, total), failed)  # type: ignore[misc]
        result["products"][name], result["attention"][name] = products, attention
    halves = [p["half_rate_tokens"] for p in result["products"].values() if p]
    cluster = dataclasses.replace(base, half_rate_tokens=float(np.median(halves)) if halves else base.half_rate_tokens)
    first: ClusterSpec | None = None
    measured_of: dict[str, tuple[ModelSpec, tuple[Point, ...]]] = {}
    for name in STACKS:
        made = attempt(name, lambda n=name: measure_model(n, cluster, device, tiny), failed)  # type: ignore[misc]
        if made is None:
            continue
        spec, measured = made
        result["models"][name] = model_result(spec, measured, cluster, first)
        first = first or measured.fit.cluster
        measured_of[name] = spec, measured.points
    if measured_of:
        pooled = pooled_cluster(cluster, list(measured_of.values()), 1, device_name(device))
        result["cluster"] = pooled.to_json()
        for name, (spec, points) in measured_of.items():
            guesses = [predict_point(CostModel(spec, pooled, 1), p) for p in points]
            result["models"][name]["error_with_the_pooled_constants"] = summary(relative_errors(points, guesses))
    return result


def rates(cluster: dict[str, Any]) -> str:
    return (
        f"{cluster['linear_flops_per_s'] / 1e12:.4g} TFLOP/s linear, "
        f"{cluster['attention_flops_per_s'] / 1e12:.4g} attention, "
        f"{cluster['layer_overhead_s'] * 1e6:.0f} us a layer and pass"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny dimensions (always on a CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    args = parser.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    with process_group() as device:
        tiny = args.quick or device.type != "cuda"
        result = {
            "command": "python benchmarks/gpu_profile.py" + (" --quick" if args.quick else ""),
            "date": datetime.date.today().isoformat(),
            "device": device_name(device),
            "torch": torch.__version__,
            "tiny": tiny,
            **measure(device, tiny),
        }
    result["took_s"] = time.monotonic() - began
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['device']}{', tiny dimensions' if tiny else ''}, {result['took_s']:.0f} s")
    for name, model in result["models"].items():
        memory = model["memory_error_unfitted"]
        print(
            f"{name:18} {len(model['points']):3} points, held-out error {model['median_error']:.1%} "
            f"(nine in ten below {model['p90_error']:.1%}); memory off by {memory['median']:.1%}, "
            f"at most {memory['max']:.1%}"
        )
        print(f"{'':18} {rates(model['cluster'])}")
    if "cluster" in result:
        print(f"{'all together':18} {rates(result['cluster'])}")
    for what, why in result["failed"].items():
        print(f"failed: {what}: {why}")


if __name__ == "__main__":
    main()

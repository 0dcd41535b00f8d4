"""One GPU for nine minutes: is attention right, what do layers cost, and the paper's tables as a rank of 32 GPUs.

Each part runs in a process of its own with a time limit, and writes a line for whatever it has found, so that a part
that crashes, hangs or runs out of memory costs nothing but itself; the result is on disk after every line.

- `attention`: the kernel of this device against SDPA, values and gradients, for grouped queries and for MLA's head
  sizes, and the seconds of one long document beside many short ones;
- `profile`: micro-batches of two stacks of LLaMA-3.1-8B's layers and the cost model's constants fitted to them;
- `tables`: LLaMA-3.1-8B in full (32 layers, bfloat16) as a rank of 32 GPUs, at the lengths, SP degrees and recomputed
  layers of the paper's Tables 4, 18 and 19: seconds and bytes of a micro-step, and how many layers we would recompute;
- `packing`: naive packing, `hbp` and `hbp-mixed` on lengths like Tulu3 + LongCite, for 32 GPUs: the packs of sampled
  micro-steps, measured in alternation;
- `qwen`, `deepseek` (the second call): profiles of Qwen2.5-32B's layers and of DeepSeek-V2's.

Of a rank of 32 all is measured but communication, which moves nothing here (:mod:`hbp.train.measure.fake_world`); what
the cost model predicts for that stands beside it.

    python benchmarks/gpu_hour.py [--call 1|2] [--quick] [--json] [--out benchmarks/results/gpu-hour-1.json]

On a CPU, or with --quick, everything runs with tiny dimensions: that shows that it runs, and measures nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu_profile import configuration, measure_model, timed

from hbp.cost.cluster import CLUSTERS, ClusterSpec
from hbp.cost.fit import predict_bytes, predict_point
from hbp.cost.model_spec import ModelSpec, spec_from_config
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import document_attention, make_documents
from hbp.plan import Plan
from hbp.planning.planner import make_plan
from hbp.progress import say
from hbp.train.launch import device_name
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.measure.micro_batch import measure_point
from hbp.train.model import CausalLMWithLoss

Note = Callable[[dict[str, Any]], None]
PARTS = {1: ("attention", "profile", "tables", "packing"), 2: ("qwen", "deepseek")}
SHARES = {"attention": 0.1, "profile": 0.25, "tables": 0.3, "packing": 0.35, "qwen": 0.5, "deepseek": 0.5}
"""Of the call's time; what a part leaves goes to those after it."""
LIMIT_S = 520.0
WORLD = 32
K = 1024
SETTINGS = (  # capacity, SP degree, recomputed layers, seconds an iteration in Table 4 and in Tables 18 and 19
    (8 * K, 2, 8, None, 2.69),
    (16 * K, 1, 28, None, 2.65),
    (32 * K, 2, 28, 4.45, 3.01),
    (32 * K, 4, 23, 4.35, 2.95),
    (32 * K, 8, 8, 4.12, 2.82),
    (32 * K, 16, 0, None, 3.60),
    (64 * K, 4, 28, 6.3, 3.01),
    (64 * K, 8, 24, 6.2, None),
    (128 * K, 8, 29, 10.2, 3.05),
    (128 * K, 16, 23, 10.5, None),
)
STRATEGIES = ("concat", "hbp", "hbp-mixed")
TINY_SHARE = 512


def attention(device: torch.device, tiny: bool, note: Note) -> None:
    """The device's kernel against SDPA, document by document, in the same type and in float32."""
    dtype, total = (torch.bfloat16 if device.type == "cuda" else torch.float32), 256 if tiny else 8192
    rng = np.random.default_rng(0)
    for name, heads, kv_heads, qk_size, v_size in (("gqa", 32, 8, 128, 128), ("mla", 16, 16, 192, 128)):
        cuts = np.sort(rng.choice(np.arange(1, total), 5, replace=False))
        lengths = tuple(np.diff([0, *cuts, total]).tolist())
        documents = make_documents(lengths, device)
        shapes = (heads, qk_size), (kv_heads, qk_size), (kv_heads, v_size)
        inputs = [torch.randn(total, *shape, device=device, dtype=dtype) for shape in shapes]
        weights = torch.randn(total, heads, v_size, device=device, dtype=dtype)

        def run(kernel: str, to: torch.dtype) -> list[torch.Tensor]:
            x = [t.detach().to(to).requires_grad_() for t in inputs]  # noqa: B023
            out = document_attention(*x, documents, kernel=kernel)  # noqa: B023
            return [out.detach(), *torch.autograd.grad((out * weights.to(to)).sum(), x)]  # noqa: B023

        exact, ours, plain = run("sdpa", torch.float32), run("auto", dtype), run("sdpa", dtype)
        for what, e, o, p in zip(("values", "dq", "dk", "dv"), exact, ours, plain, strict=True):
            off = [float((x.float() - e).norm() / e.norm()) for x in (o, p)]
            note({"check": name, "of": what, "error": off[0], "error_of_sdpa": off[1], "lengths": lengths})
        del exact, ours, plain
    long, short = (128, 8) if tiny else (65_536, 256)
    for n in (0, 110, 500):
        lengths = (long, *[short] * n)
        documents = make_documents(lengths, device)
        q, k, v = (torch.randn(sum(lengths), h, 128, device=device, dtype=dtype) for h in (8, 2, 2))
        for kernel in ("auto", "sdpa") if n == 0 else ("auto",):
            seconds = timed(lambda: document_attention(q, k, v, documents, kernel=kernel), device, repeats=3)  # noqa: B023
            note({"long": long, "short": short, "short_documents": n, "kernel": kernel, "forward_s": seconds})


def profile(device: torch.device, tiny: bool, note: Note, name: str = "llama-3.1-8b") -> None:
    """Stacks of a model's layers, measured and fitted."""
    base = CLUSTERS["cpu-local" if tiny else "h100-nvlink"]
    with fake_world(1):
        spec, measured = measure_model(name, base, device, tiny)
    plain = CostModel(spec, base, 1)
    for p in measured.points:
        note({"model": name, "point": dataclasses.asdict(p), "predicted_bytes": predict_bytes(plain, p)})
    note(
        {
            "model": name,
            "cluster": measured.fit.cluster.to_json(),
            "held_out_error": measured.fit.held_out_error,
            "skipped": measured.skipped,
        }
    )


def whole(tiny: bool) -> tuple[dict[str, Any], ModelSpec, ClusterSpec]:
    """LLaMA-3.1-8B with all of its layers, and the cluster."""
    config = configuration("llama-3.1-8b", tiny)
    if tiny:
        config = {**config, "num_hidden_layers": 4, "num_attention_heads": 16}
    return config, spec_from_config(config, "llama-3.1-8b"), CLUSTERS["cpu-local" if tiny else "h100-nvlink"]


def sharded(config: dict[str, Any], spec: ModelSpec, mesh: Any, device: torch.device) -> CausalLMWithLoss:
    """Rank 0's part of the model."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return drawn_model(folder, mesh, device, by_layer=spec.sharded_by_layer, compute_dtype=dtype)


def pack_like_the_papers(capacity: int, rng: np.random.Generator) -> list[int]:
    """Documents like Tulu3's, and beyond 32K a long one for half of the pack."""
    long = [capacity // 2] if capacity > 32 * K else []
    lengths: list[int] = []
    while sum(lengths) < capacity - sum(long):
        lengths.append(int(min(rng.lognormal(6, 1) + 16, capacity - sum(long) - sum(lengths))))
    return long + lengths


def tables(device: torch.device, tiny: bool, note: Note) -> None:
    """The settings of the paper's tables."""
    config, spec, cluster = whole(tiny)
    cost, rng = CostModel(spec, cluster, WORLD), np.random.default_rng(0)
    with fake_world(WORLD):
        mesh = make_mesh(WORLD, [1], device.type, spec.heads)
        model = sharded(config, spec, mesh.world, device)
        for capacity, degree, gc_layers, table_4, equal_tokens in SETTINGS:
            lengths = pack_like_the_papers(capacity, rng)
            if tiny:
                capacity, gc_layers = capacity // TINY_SHARE, gc_layers // 8
                lengths = [capacity // 2, capacity - capacity // 2]
            point = measure_point(model, mesh, lengths, degree, gc_layers, device=device, repeats=3)
            communication = dataclasses.replace(cost, cluster=dataclasses.replace(cluster, linear_flops_per_s=1e30))
            note(
                {
                    "capacity": capacity,
                    "sp_degree": degree,
                    "gc_layers": gc_layers,
                    "documents": len(lengths),
                    "measured_s": point.seconds,
                    "peak_bytes": point.peak_bytes,
                    "predicted_s": predict_point(cost, point),
                    "predicted_without_products_s": predict_point(communication, point),
                    "predicted_bytes": predict_bytes(cost, point),
                    "fewest_gc_layers": cost.fewest_gc_layers(capacity, degree),
                    "table_4_s": table_4,
                    "tables_18_19_s": equal_tokens,
                    "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
                }
            )


def packing(device: torch.device, tiny: bool, note: Note) -> None:
    """The slowest pack of sampled micro-steps, strategy after strategy, until time is up; every line counts."""
    config, spec, cluster = whole(tiny)
    cost = CostModel(spec, cluster, WORLD)
    lengths = generate("tulu3-longcite", 4_000 if tiny else 30_000, seed=0)
    if tiny:
        lengths = np.maximum(lengths // TINY_SHARE, 2)
    longest = 128 * K // (TINY_SHARE if tiny else 1)
    batch = WORLD * 2048 // (TINY_SHARE if tiny else 1) * 8
    plans = {s: make_plan(lengths, cost, strategy=s, max_length=longest, global_batch_tokens=batch) for s in STRATEGIES}
    for name, plan in plans.items():
        groups = [dataclasses.asdict(group) for group in plan.info.groups]
        note({"strategy": name, "predicted_s": plan.info.metrics["predicted_s"], "groups": groups})
    with fake_world(WORLD):
        mesh = make_mesh(WORLD, [1], device.type, spec.heads)
        model = sharded(config, spec, mesh.world, device)
        for sample in range(1 if tiny else 1000):
            for name, plan in plans.items():
                note(micro_step_of(model, mesh, plan, cost, name, sample, device))


def micro_step_of(
    model: CausalLMWithLoss, mesh: Any, plan: Plan, cost: CostModel, name: str, sample: int, device: torch.device
) -> dict[str, Any]:
    """The packs of one micro-step, drawn at random, that are predicted to be slowest, measured."""
    index = plan.micro_step_index()
    chosen = np.random.default_rng(sample).integers(int(index[-1]) + 1)
    rows = np.flatnonzero(index == chosen)
    slow = rows[np.argsort(-plan.predicted_s[rows])[:2]]
    seconds, predicted, peak = [], [], 0.0
    for row in slow:
        _, lengths = plan.samples(int(row))
        degree, gc_layers = int(plan.sp_degree[row]), int(plan.gc_layers[row])
        point = measure_point(model, mesh, lengths.tolist(), degree, gc_layers, device=device, repeats=2)
        seconds.append(point.seconds)
        predicted.append(predict_point(cost, point))
        peak = max(peak, point.peak_bytes)
    return {
        "strategy": name,
        "micro_step": int(chosen),
        "micro_steps": int(index[-1]) + 1,
        "tokens": int(plan.tokens()[rows].sum()),
        "measured_s": max(seconds),
        "predicted_s": max(predicted),
        "peak_bytes": peak,
    }


def ratios(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the packing part: tokens a second over naive packing's in sampled micro-steps, and their standard error."""
    rate: dict[str, float] = {}
    error: dict[str, float] = {}
    for name in STRATEGIES:
        own = [line for line in lines if line["strategy"] == name and "measured_s" in line]
        if not own:
            return {}
        tokens, seconds = (np.array([line[key] for line in own], float) for key in ("tokens", "measured_s"))
        rate[name] = float(tokens.sum() / seconds.sum())
        spread = (tokens - rate[name] * seconds).std() / np.sqrt(len(own)) / seconds.mean()
        error[name] = float(spread / rate[name])
    return {name: {"over_naive": rate[name] / rate["concat"], "relative_error": error[name]} for name in STRATEGIES}


RUN: dict[str, Callable[[torch.device, bool, Note], None]] = {
    "attention": attention,
    "profile": profile,
    "tables": tables,
    "packing": packing,
    "qwen": lambda device, tiny, note: profile(device, tiny, note, "qwen2.5-32b"),
    "deepseek": lambda device, tiny, note: profile(device, tiny, note, "deepseek-v2-236b"),
}


def run_part(name: str, lines: Path, quick: bool) -> None:
    """One part, in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tiny = quick or device.type != "cuda"
    with lines.open("a") as file:

        def note(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            say(f"{name}: {json.dumps(line)[:160]}")

        try:
            RUN[name](device, tiny, note)
        finally:
            gc.collect()


def run_call(parts: Sequence[str], quick: bool, limit_s: float, out: Path | None) -> dict[str, Any]:
    """All parts of a call, each in a process of its own; the result is written whenever one has ended."""
    began = time.monotonic()
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "command": f"python benchmarks/gpu_hour.py ({', '.join(parts)})" + (" --quick" if quick else ""),
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device("cuda", 0) if on_gpu else torch.device("cpu")),
        "torch": torch.__version__,
        "tiny": quick or not on_gpu,
        "parts": {},
    }
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with TemporaryDirectory() as folder:
        for number, name in enumerate(parts):
            left = limit_s - (time.monotonic() - began)
            share = SHARES[name] / sum(SHARES[later] for later in parts[number:])
            lines, ended = Path(folder) / f"{name}.jsonl", "done"
            command = [sys.executable, __file__, "--part", name, "--lines", str(lines)] + ["--quick"] * quick
            start = time.monotonic()
            try:
                code = subprocess.run(command, env=environment, stdout=sys.stderr, timeout=max(1.0, left * share))
                ended = "done" if code.returncode == 0 else f"exit code {code.returncode}"
            except subprocess.TimeoutExpired:
                ended = "time was up"
            found = whole_lines(lines)
            result["parts"][name] = {"ended": ended, "took_s": time.monotonic() - start, "lines": found}
            if name == "packing":
                result["parts"][name]["ratios"] = ratios(found)
            result["took_s"] = time.monotonic() - began
            if out:
                out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """What a part wrote; the last line may be cut off."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, default=1, choices=PARTS, help="which parts")
    parser.add_argument("--parts", nargs="+", choices=RUN, help="these parts instead")
    parser.add_argument("--quick", action="store_true", help="tiny dimensions (always on a CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file, after every part")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds of the whole call")
    parser.add_argument("--part", choices=RUN, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args.part, args.lines, args.quick)
        return
    result = run_call(args.parts or PARTS[args.call], args.quick, args.limit_s, args.out)
    if args.json:
        print(json.dumps(result))
        return
    for name, part in result["parts"].items():
        print(f"{name:10} {part['ended']:14} {part['took_s']:6.0f} s, {len(part['lines'])} lines")
    for name, row in result["parts"].get("packing", {}).get("ratios", {}).items():
        print(f"{name:10} {row['over_naive']:.3f} of naive's tokens a second (± {row['relative_error']:.1%})")


if __name__ == "__main__":
    main()

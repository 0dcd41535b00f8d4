"""One GPU: tokens a second and MFU of HBP's groups against naive packing that recomputes every layer, and TRL.

A Llama of 1.2 billion parameters (random weights, bfloat16 compute, float32 states) trains on random tokens whose
lengths follow the mixed set of `hbp.data.length_sets`, cut at 64K. HBP chooses its packing lengths and recomputed
layers from the memory of the GPU; the naive side packs greedily to the longest length and recomputes all layers. Both
run whole optimizer steps of the same trainer; the first step of each is not counted. TRL trains the same samples from
the same weights. Nothing here is about sequence parallelism: there is one GPU.

    python benchmarks/gpu_train.py [--quick] [--json] [--out benchmarks/results/gpu_train.json]

Without a GPU it trains a toy, with or without --quick: that shows that the script runs, and measures nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch is there

import torch

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.data.record import Encoded
from hbp.data.stdlib_sft import train_tokenizer, write_dataset
from hbp.data.store import TokenStore, write_store
from hbp.parallel.mesh import make_mesh
from hbp.plan import Group, Plan
from hbp.planning.planner import make_plan
from hbp.run_log import by_group
from hbp.train.launch import CPU_ENVIRONMENT, device_name, free_memory, process_group
from hbp.train.loop import Learner, StepFailed, train
from hbp.train.model import load_model, shard
from hbp.train.records import Efficiency, peak_flops_per_s, step_flops

ROOT = Path(__file__).parent.parent
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
TINY = LLAMA_1B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
}
SIDES = ("naive", "hbp", "trl")
SPARE_BYTES = 10 * 2**30
"""Of the GPU's memory: context, cuBLAS's workspaces, fragmentation. A pack too large would cost the whole result."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is trained."""

    model: dict[str, Any]
    tokens: int
    longest: int
    global_batch: int


SIZES = {
    "full": Size(LLAMA_1B, 3_000_000, 65_536, 131_072),
    "quick": Size(LLAMA_1B, 500_000, 32_768, 65_536),
    "tiny": Size(TINY, 12_000, 512, 2048),
}


def make_store(size: Size, folder: Path) -> TokenStore:
    """Random tokens, all with loss, of mixed lengths."""
    lengths = generate("mix-128k", max(2000, size.tokens // 500), seed=0)
    scaled = lengths if size.longest > 4096 else lengths // 32 + 8
    lengths = scaled[scaled <= size.longest]
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), size.tokens)) + 1]
    vocab, rng = size.model["vocab_size"], np.random.default_rng(0)

    def samples() -> Iterator[Encoded]:
        for n in lengths:
            yield Encoded(rng.integers(0, vocab, n).astype(np.int32), np.ones(n, np.uint8))

    return write_store(folder, samples(), fingerprint="random", tokenizer="none", vocab_size=vocab)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What :class:`hbp.config.TrainConfig` says by default, on a machine without pydantic."""

    lr: float = 1e-5
    warmup: float = 0.03
    final_lr: float = 0.1
    weight_decay: float = 0.01
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    loss: str = "ave-token"
    hang_minutes: float = 8.0


def measure(plan: Plan, store: TokenStore, model_folder: str, cost: CostModel, device: torch.device) -> dict[str, Any]:
    """Train by a plan; the first step warms up and is not counted."""
    mesh = make_mesh(1, [1], device.type)
    model = load_model(model_folder, seed=0)
    model.to(device)
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    shard(model, mesh.world, by_layer=cost.model.sharded_by_layer, compute_dtype=compute)
    efficiency = Efficiency(step_flops(plan, cost.model), peak_flops_per_s(device))
    learner = Learner.of(model, mesh, Settings(), device)
    records = train(learner, plan, store, efficiency=efficiency)[1:]
    del model, learner
    free_memory()
    seconds = sum(record.seconds for record in records)
    mfu = [record.mfu * record.seconds for record in records if record.mfu is not None]
    return {
        "groups": [dataclasses.asdict(group) for group in plan.info.groups],
        "steps": len(records),
        "tokens": sum(record.tokens for record in records),
        "seconds": seconds,
        "tokens_per_s": sum(record.tokens for record in records) / seconds,
        "mfu": sum(mfu) / seconds if mfu else None,
        "by_group": by_group(records),
        "predicted_s": plan.info.metrics["predicted_s"],
    }


def measure_trl(size: Size, store: TokenStore, scratch: Path, model_folder: str) -> dict[str, Any]:
    """TRL in a process of its own, with gradient checkpointing, which is its default; or why not."""
    if find_spec("trl") is None:
        return {"failed": "trl is not installed"}
    texts = scratch / "texts.jsonl"
    write_dataset(texts, seed=0, short_samples=50, long_samples=0)
    train_tokenizer(texts, scratch / "tokenizer", vocab_size=320)  # it wants one, and does not use it here
    np.save(scratch / "samples.npy", np.arange(len(store)))
    wanted = {
        "store": str(store.folder),
        "samples": str(scratch / "samples.npy"),
        "model": model_folder,
        "tokenizer": str(scratch / "tokenizer"),
        "max_length": size.longest,
        "accumulation": max(1, size.global_batch // size.longest),
        "gradient_checkpointing": True,
        "lr": 1e-5,
        "seed": 0,
        "out": str(scratch / "trl"),
        "result": str(scratch / "trl.json"),
    }
    (scratch / "trl-arguments.json").write_text(json.dumps(wanted))
    command = [sys.executable, str(ROOT / "benchmarks" / "trl_sft.py"), str(scratch / "trl-arguments.json")]
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": str(ROOT / "src")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, stdout=sys.stderr)
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}; its output is on standard error"}
    result: dict[str, Any] = json.loads((scratch / "trl.json").read_text())
    return result


def measured_or_why_not(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a side measured; if it failed, the reason, so that the other sides still count."""
    try:
        return run()
    except (RuntimeError, StepFailed) as error:  # out of memory among them
        return {"failed": f"{type(error).__name__}: {error.__cause__ or error}"[:400]}
    finally:
        free_memory()


def keep(out: Path | None, result: dict[str, Any]) -> None:
    """Written as it comes: what is measured so far."""
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")


def prepare(size: Size, scratch: Path) -> tuple[TokenStore, str]:
    """The samples, and a folder with the weights that all sides start from."""
    (scratch / "config").mkdir()
    (scratch / "config" / "config.json").write_text(json.dumps(size.model))
    weights = str(scratch / "model")
    load_model(str(scratch / "config"), seed=0).lm.save_pretrained(weights)
    return make_store(size, scratch / "store"), weights


def compare(
    size: Size, store: TokenStore, weights: str, scratch: Path, device: torch.device, out: Path | None
) -> dict[str, Any]:
    """All sides of the benchmark, one after the other, and what it says of them."""
    cluster = CLUSTERS["cpu-local"]
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory - SPARE_BYTES
        cluster = dataclasses.replace(CLUSTERS["h100-nvlink"], memory_bytes=memory, device=device_name(device))
    cost = CostModel(spec_from_config(size.model), cluster, 1)
    options: dict[str, Any] = {"max_length": size.longest, "global_batch_tokens": size.global_batch}
    full_gc = Group(size.longest, 1, cost.model.n_layers)
    plans = {  # the one that needs less memory first
        "naive": make_plan(store.lengths, cost, strategy="concat", static=full_gc, **options),
        "hbp": make_plan(store.lengths, cost, strategy="hbp-mixed", **options),
    }
    sides: dict[str, dict[str, Any]] = {}
    for side, plan in plans.items():
        sides[side] = measured_or_why_not(lambda p=plan: measure(p, store, weights, cost, device))  # type: ignore[misc]
        keep(out, sides)
    sides["trl"] = measure_trl(size, store, scratch, weights)
    rates = {side: sides[side].get("tokens_per_s") for side in SIDES}
    return {
        "parameters": cost.model.parameters(),
        "samples": len(store),
        "longest": int(store.lengths.max()),
        **sides,
        "speedup_vs_naive": rates["hbp"] / rates["naive"] if rates["hbp"] and rates["naive"] else None,
        "speedup_vs_trl": rates["hbp"] / rates["trl"] if rates["hbp"] and rates["trl"] else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a million tokens, packs up to 32K")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    size = SIZES["tiny" if not on_gpu else "quick" if args.quick else "full"]
    if not on_gpu:
        os.environ.update(CPU_ENVIRONMENT)
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update({key: os.environ.get(key, value) for key, value in meeting.items()})
    with TemporaryDirectory() as folder, process_group() as device:
        store, weights = prepare(size, Path(folder))
        compared = compare(size, store, weights, Path(folder), device, args.out)
        result = {
            "command": "python benchmarks/gpu_train.py" + (" --quick" if args.quick else ""),
            "date": datetime.date.today().isoformat(),
            "device": device_name(device),
            "torch": torch.__version__,
            "tiny": not on_gpu,
            **compared,
        }
    keep(args.out, result)
    if args.json:
        print(json.dumps(result))
        return
    for side in SIDES:
        rate, mfu = result[side].get("tokens_per_s"), result[side].get("mfu")
        print(f"{side:6} {rate or 0:10,.0f} tokens/s" + (f"  MFU {mfu:.1%}" if mfu else ""))


if __name__ == "__main__":
    main()

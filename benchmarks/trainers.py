"""TRL's SFTTrainer as it comes against SFTTrainer following our plan: same model, data, processes and memory.

The stock settings are those that users choose between: packing (best-fit decreasing), padding-free batches, batches
grouped by length, and transformers' `batch_rebalance`. Each takes as many tokens an optimizer step as the plan, as
large a micro-batch as the memory holds (two of the longest samples, every layer recomputed), and recomputes activations
only where it must. Each runs with its own attention (SDPA with masks) and with our document attention, so that the gain
of the plan stands alone: the plan against the best stock setting that has our attention. `plan: bfd` follows a plan of
best-fit packs at its best static setting through the same integration: over TRL's own packing with our attention, what
the way of the integration gains (a loss in chunks, no figures that need logits); under the plan, what the packs gain.

    python benchmarks/trainers.py [--quick] [--json] [--out benchmarks/results/trainers.json]

Wall seconds of a step are those of its slowest rank. Processor seconds of a step are those of its busiest rank, which
other programs on the machine do not lengthen, nor does waiting: what the wall seconds would be on a quiet machine with
ranks that wait only at the end of a step. Ratios are medians over the repeats.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ranks import run_ranks

ROOT = Path(__file__).parent.parent
RANKS, VOCAB = 2, 512
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"samples": 80, "long": 3, "longest": 2048, "layers": 2, "batch": 8192, "repeats": 1, "profile_s": 0},
    "full": {"samples": 140, "long": 7, "longest": 3072, "layers": 3, "batch": 12288, "repeats": 2, "profile_s": 40},
}


def write_data(path: Path, samples: int, long: int, longest: int) -> int:
    """Documents in which each token mostly follows from the last: lognormal lengths and a few long ones."""
    rng = np.random.default_rng(0)
    short = np.clip(rng.lognormal(np.log(160), 0.9, samples - long), 16, longest // 2)
    lengths = np.concatenate([short, rng.uniform(longest / 2, longest, long - 1), [longest]]).astype(np.int64)
    rng.shuffle(lengths)
    follows = rng.permutation(VOCAB - 2)
    tokens = []
    for n in lengths:
        drawn, document = rng.random(n), [int(rng.integers(VOCAB - 2))]
        for place in range(1, n):
            document.append(int(rng.integers(VOCAB - 2)) if drawn[place] < 0.2 else int(follows[document[-1]]))
        tokens += document
    np.savez(path, tokens=np.array(tokens, np.int32), offsets=np.concatenate([[0], np.cumsum(lengths)]))
    return len(tokens)


def write_model(folder: Path, layers: int) -> None:
    """A small Llama with fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        eos_token_id=VOCAB - 2,
        pad_token_id=VOCAB - 2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(size: dict[str, Any]) -> dict[str, Any]:
    """Everything, on two local processes."""
    from hbp.train.launch import CPU_ENVIRONMENT

    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = write_data(folder / "data.npz", size["samples"], size["long"], size["longest"])
        write_model(folder / "model", size["layers"])
        wanted = {
            "data": str(folder / "data.npz"),
            "model": str(folder / "model"),
            "profile": str(folder / "profile.json"),
            "out": str(folder / "out"),
            "result": str(folder / "result.json"),
            "batch_tokens": size["batch"],
            "budget_tokens": 2 * size["longest"],
            "repeats": size["repeats"],
            "profile_s": size["profile_s"],
            "lr": 3e-3,
            "vocab": VOCAB,
        }
        (folder / "wanted.json").write_text(json.dumps(wanted))
        environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": f"{ROOT / 'src'}", "HF_HUB_OFFLINE": "1"}
        load, start = os.getloadavg()[0], time.time()
        run_ranks(
            RANKS, str(ROOT / "benchmarks" / "trainers_rank.py"), str(folder / "wanted.json"), environment=environment
        )
        result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {**result, "tokens": tokens, "seconds": time.time() - start, "load": [load, os.getloadavg()[0]]}


def median(rows: list[dict[str, Any]], name: str, attention: str, of: str) -> float:
    return statistics.median(r[of] for r in rows if (r["setting"], r["attention"]) == (name, attention))


def loss_at(rows: list[dict[str, Any]], name: str, attention: str, share: float) -> float:
    """Mean of the losses around a share of the tokens."""
    losses = next(r["losses"] for r in rows if (r["setting"], r["attention"]) == (name, attention))
    last = max(1, round(share * len(losses)))
    return statistics.mean(losses[max(0, last - 3) : last])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The plan over the best stock setting, by wall and by processor seconds."""
    found: dict[str, Any] = {}
    stock = {(r["setting"], r["attention"]) for r in rows if not r["setting"].startswith("plan")}
    for of in ("tokens_per_s", "tokens_per_busy_s"):
        ours = median(rows, "plan: hbp-mixed", "ours", of)
        best = {}
        for attention in ("theirs", "ours"):
            speeds = {name: median(rows, name, attention, of) for name, kind in stock if kind == attention}
            best[attention] = max(speeds, key=lambda name: speeds[name]), max(speeds.values())
        found[of] = {
            "best_stock": best["theirs"][0],
            "over_best_stock": ours / best["theirs"][1],
            "best_stock_with_our_attention": best["ours"][0],
            "plan_alone": ours / best["ours"][1],
            "over_plan_bfd": ours / median(rows, "plan: bfd", "ours", of),
            "plan_bfd_over_packing_bfd": median(rows, "plan: bfd", "ours", of)
            / median(rows, "packing bfd", "ours", of),
        }
    names = sorted({(r["setting"], r["attention"]) for r in rows})
    found["loss_at"] = {
        f"{name} ({attention})": {f"{share:.0%}": loss_at(rows, name, attention, share) for share in (0.5, 1.0)}
        for name, attention in names
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small, one repeat")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="file for the raw output")
    args = parser.parse_args()
    measured = measure(SIZES["quick" if args.quick else "full"])
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {RANKS} processes, gloo",
        "command": " ".join(["python", "benchmarks/trainers.py", *sys.argv[1:]]),
        "quick": args.quick,
        "summary": summary(measured["rows"]),
        **measured,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    for row in measured["rows"]:
        print(
            f"{row['setting']:18} {row['attention']:7} {row['tokens_per_s']:8.0f} tokens/s "
            f"{row['tokens_per_busy_s']:8.0f} tokens/processor s  {row['steps']:4} steps  loss {row['losses'][-1]:.3f}"
        )
    for of, ratios in result["summary"].items():
        print(of, json.dumps(ratios))


if __name__ == "__main__":
    main()

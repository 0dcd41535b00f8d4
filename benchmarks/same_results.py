"""Does a refactoring change what comes out? Plans, short trainings and every command's ``--json``, as fingerprints.

    python benchmarks/same_results.py record before.json     # on the tree before the change
    python benchmarks/same_results.py compare before.json    # on the tree after it: names what differs, exit code 1

Recorded are, through the command line alone, so that code may move freely:

- *plans*: SHA-256 of ``plan.parquet`` and ``plan.json`` for every strategy, set of lengths and place (cluster, model,
  number of ranks, with and without a global batch);
- *trainings*: loss of every step and SHA-256 of the exported weights, on 1, 2 and 4 local processes, bit for bit;
- *commands*: the ``--json`` object of every command on fixed input, without what a clock measured.

``--quick`` takes fewer samples, strategies' sets and no training. Fingerprints hold for one machine and one set of
libraries: record and compare on the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hbp.__main__ import main as hbp
from hbp.data.length_sets import LENGTH_SETS, generate

STRATEGIES = ("concat", "ffd", "bfd", "isf", "sorted", "lb", "dcp", "hbp", "hbp-mixed")
PLACES: tuple[tuple[str, ...], ...] = (
    ("--model", "llama-3.1-8b", "--cluster", "h100-nvlink", "--gpus", "32"),
    ("--model", "llama-3.1-8b", "--cluster", "h100-ethernet", "--gpus", "16", "--global-batch-tokens", "4000000"),
    ("--model", "qwen3-30b-a3b", "--cluster", "a100-pcie", "--gpus", "64", "--max-length", "65536"),
    ("--model", "qwen2.5-32b", "--cluster", "h100-nvlink", "--gpus", "128", "--order", "balanced", "--seed", "7"),
)
SHORT_PLACE = ("--model", "llama-3.1-8b", "--cluster", "cpu-local", "--gpus", "4", "--memory-gib", "400")
SAMPLES, QUICK_SAMPLES = 6_000, 1_000
MEASURED = (
    "seconds",
    "skew",
    "tokens_per_s",
    "started_s",
    "waiting_s",
    "memory_bytes",
    "peak_bytes",
    "report",
    "plan",
    "mfu",
)
"""Keys whose values a clock, an allocator or a folder's name gives."""
TRAINING = """
run_dir: {run}
data: {{source: stdlib, short_samples: 240, long_samples: 4, longest_chars: 9000, vocab_size: 512, eval_samples: 8}}
model: {{path: {model}}}
cluster: {{profile: false, memory_gib: 2.0, processes: {processes}}}
plan: {{strategy: {strategy}, global_batch_tokens: 6000}}
train: {{lr: 0.001, save_minutes: null}}
"""
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 32768,
}  # fmt: skip


def run(*arguments: str) -> dict[str, Any]:
    """One command's ``--json`` object, or its error line."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = hbp([*arguments, "--json"])
    result: dict[str, Any] = json.loads(out.getvalue()) if code == 0 else {"error": said.getvalue().strip()}
    return result


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_measured(value: Any) -> Any:
    """The same with what a clock measured taken out."""
    if isinstance(value, dict):
        return {key: without_measured(item) for key, item in value.items() if key not in MEASURED}
    return [without_measured(item) for item in value] if isinstance(value, list) else value


def plans(folder: Path, samples: int, sets: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Fingerprints of plans."""
    for name in sets:
        np.save(folder / f"{name}.npy", generate(name, samples, seed=11))
        for number, place in enumerate((*PLACES, SHORT_PLACE)):
            for strategy in STRATEGIES:
                out = folder / "plan"
                arguments = ("--lengths", str(folder / f"{name}.npy"), *place, "--strategy", strategy)
                result = run("plan", *arguments, "--out", str(out))
                if "error" in result:
                    yield f"plan {name} {number} {strategy}", result["error"].replace(str(folder), "")
                else:
                    yield f"plan {name} {number} {strategy}", [sha256(out / x) for x in ("plan.parquet", "plan.json")]


def trainings(folder: Path) -> Iterator[tuple[str, Any]]:
    """Losses and weights of short trainings."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    for processes in (1, 2, 4):
        for strategy in ("hbp-mixed", "hbp", "concat"):
            run_dir, config = folder / f"run-{processes}-{strategy}", folder / "train.yaml"
            config.write_text(TRAINING.format(run=run_dir, model=model, processes=processes, strategy=strategy))
            subprocess.run(
                [sys.executable, "-m", "hbp", "train", str(config), "--json"],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip
            steps = (run_dir / strategy / "steps.jsonl").read_text().splitlines()
            losses = [json.loads(line)["loss"] for line in steps]
            yield f"train {processes} {strategy}", [losses, sha256(run_dir / strategy / "model" / "model.safetensors")]
            yield (
                f"summary {processes} {strategy}",
                without_measured(json.loads((run_dir / "summary.json").read_text())),
            )
            if processes == 2:
                yield f"report {strategy}", sorted(run("report", str(run_dir)))


def commands(folder: Path, samples: int) -> Iterator[tuple[str, Any]]:
    """What every command that needs no training prints."""
    lengths = folder / "commands.npy"
    np.save(lengths, generate("mix-128k", samples, seed=5))
    given, out = ("--lengths", str(lengths), *PLACES[0]), str(folder / "given")
    for strategy in ("hbp-mixed", "hbp"):
        yield (
            f"plan --explain {strategy}",
            without_measured(run("plan", *given, "--strategy", strategy, "--out", out, "--explain")),
        )
    yield "simulate", without_measured(run("simulate", out, "--price", "2.5"))
    yield (
        "simulate elsewhere",
        without_measured(run("simulate", out, "--gpus", "16,64", "--cluster", "h100-ethernet", "a100-pcie")),
    )
    run("simulate", out, "--timeline", str(folder / "timeline.parquet"))
    yield "simulate --timeline", sha256(folder / "timeline.parquet")
    sizes = ("--lengths", str(lengths), *PLACES[0][:4], "--gpus", "16..32")
    yield "compare", without_measured(run("compare", *sizes))
    page = folder / "page.html"
    yield "report of a plan", without_measured(run("report", out, "--out", str(page)))


def everything(quick: bool) -> dict[str, Any]:
    """All fingerprints by name."""
    samples = QUICK_SAMPLES if quick else SAMPLES
    sets = ("mix-128k", "tulu3-longcite") if quick else tuple(LENGTH_SETS)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for key, value in (
            *plans(folder, samples, sets),
            *commands(folder, samples),
            *(() if quick else trainings(folder)),
        ):
            found[key] = json.loads(json.dumps(value).replace(name, ""))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="two sets, fewer samples, no training")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    found = everything(args.quick)
    if args.what == "record":
        args.file.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({"recorded": len(found)}) if args.json else f"{len(found)} fingerprints → {args.file}")
        return 0
    before = without_measured(json.loads(args.file.read_text()))
    differ = sorted(key for key in before.keys() | found.keys() if before.get(key) != found.get(key))
    if args.json:
        print(json.dumps({"compared": len(before), "differ": differ}))
    else:
        print("\n".join([f"differs: {key}" for key in differ] + [f"{len(before)} compared, {len(differ)} differ"]))
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())

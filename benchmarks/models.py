"""Which model families train here as their documents alone do: `hbp check` of each, and the largest errors.

One row is what ``hbp check MODEL --json`` prints. Each is a tiny instance of the model's own configuration, on four
gloo processes of the CPU, held against plain transformers. `--quick` takes two families. `--time` runs the command
itself, family by family, and keeps how many seconds each took.

    python benchmarks/models.py [--quick] [--time] [--json] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbp.progress import say
from hbp.train.check.compare import check_models

MODELS = (
    "llama-3.1-8b",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen3-8b",
    "gemma-2-9b",
    "gemma-3-12b",
    "phi-3-mini",
    "phi-4",
    "olmo-2-7b",
    "smollm3-3b",
    "glm-4-9b",
    "granite-3.3-8b",
    "mixtral-8x7b",
    "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b",
    "gpt-oss-20b",
    "deepseek-v2-236b",
    "deepseek-v3-671b",
    "phi-4-mini",
)
BY_DEFAULTS = ("glm", "gemma3", "qwen3_next", "llama4_text")
"""Families of which no size is known by name: the configuration that transformers has by default"""
UNPROVEN = ("starcoder2", "cohere2", "olmo3")
"""Families that `hbp train` checks by itself, for example"""
QUICK = ("llama-3.1-8b", "gpt-oss-20b")


def check_each(names: Sequence[str]) -> list[dict[str, Any]]:
    """What `hbp check` prints of each model, by a command for each, with its `seconds`."""
    rows = []
    for name in names:
        began = time.monotonic()
        command = [sys.executable, "-m", "hbp", "check", name, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        if done.returncode not in (0, 1, 2) or not done.stdout.startswith("{"):
            sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
        rows.append({**json.loads(done.stdout), "seconds": round(seconds, 1)})
        say(f"{name}: {seconds:.0f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two families, under a minute")
    parser.add_argument("--time", action="store_true", help="a command for each family, and how long it took")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="file to keep the result in")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        names = list(QUICK if args.quick else MODELS)
        for family in () if args.quick else (*BY_DEFAULTS, *UNPROVEN):
            folder = Path(root) / family
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": family}))
            names.append(str(folder))
        rows = check_each(names) if args.time else check_models(names)
    for row in rows:
        if row["model"].startswith(root):
            row["model"] = "its defaults"
        say(f"{row['model_type']}: {'holds' if row['holds'] else row['refused'] or 'FAILS'}")
    result = {
        "command": "python benchmarks/models.py" + " --quick" * args.quick + " --time" * args.time,
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "proven": not [row for row in rows if not row["holds"] and not row["refused"]],
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

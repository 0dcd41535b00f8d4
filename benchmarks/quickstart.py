"""What the README says of `make quickstart`: the main job twice, then under other memory budgets; raw output kept.

Each run trains both sides in turn, HBP and then naive packing at every static setting that fits, and reports the ratio.
The first run's picture becomes `docs/timelines.svg`.

    python benchmarks/quickstart.py [--budgets GIB ...] [--only NAME] [--out benchmarks/results/quickstart]
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hbp.report.numbers import numbers_of, read_run

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (0.35, 0.5)


def run(out: Path, name: str, overrides: list[str], *, whole: bool) -> float:
    """One run; its summary under `name`, and with `whole` its steps, profile and picture too. Returns the ratio."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = ["-m", "hbp", "train", "examples/quickstart.yaml", *overrides]
        subprocess.run([sys.executable, *command, f"run_dir={folder}"], cwd=ROOT, check=True, stdout=sys.stderr)
        if any(s.get("disturbed", False) for s in numbers_of(read_run(folder))["strategies"]):
            sys.exit(f"{name}: another program used the machine meanwhile, nothing is kept; measure on a quiet machine")
        summary = json.loads((folder / "summary.json").read_text())
        kept = {"date": datetime.date.today().isoformat(), "command": " ".join(["python", *command]), **summary}
        (out / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        if whole:
            for result in summary["results"]:
                steps = folder / result["strategy"] / "steps.jsonl"
                shutil.copy(steps, out / f"{result['strategy']}-steps.jsonl")
            shutil.copy(folder / "profile.json", out / "profile.json")
            shutil.copy(folder / "timelines.svg", ROOT / "docs" / "timelines.svg")
    return float(summary["speedup"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="further memory budgets, GiB")
    parser.add_argument("--only", help="one of summary, second-run-summary, memory-GIB")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quickstart")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[str]] = {"summary": [], "second-run-summary": []}
    runs |= {f"memory-{gib:g}": [f"cluster.memory_gib={gib:g}"] for gib in args.budgets}
    for name, overrides in runs.items():
        if args.only in (None, name):
            ratio = run(args.out, name, overrides, whole=name == "summary")
            print(f"{name}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()

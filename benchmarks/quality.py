"""Does it learn as well? Small models trained from the plans of every strategy, order, curriculum and loss, graded on
held-out short and long samples.

Each run is one process of one thread and leaves one line in `benchmarks/results/quality/`; what is there is not run
again, so a run that was cut off goes on. Seconds are those that the plan is predicted to take on its cluster
(`quality_plans.py`), not this machine's.

    python benchmarks/quality.py [--processes 2] [--only NAME ...]    all runs, about 40 minutes on two cores
    python benchmarks/quality.py --page                               docs/quality.md and its pictures from what is kept
    python benchmarks/quality.py --quick --json                       a tiny form, under a minute
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from quality_stats import differences

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
FOLDER = ROOT / "runs" / "quality"
"""What can be made again: base models and texts."""
SEEDS = 3
STDLIB = ("unpacked", "naive packing", "hbp, as published", "ours", "order", "run-token")
"""Settings of the standard library's set, and questions all of whose settings are."""
MAIN = ("main", "order")
"""Questions whose settings' gradients are looked at."""
QUICK = ("unpacked", "naive packing", "ours", "run-token")
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One line of the results."""

    kind: str
    """``run``, ``gradients`` or ``prepare``."""
    set: str
    setting: str = ""
    seed: int = 0

    @property
    def file(self) -> Path:
        """Where its line is kept."""
        return RESULTS / f"{self.set}{'-gradients' if self.kind == 'gradients' else ''}.jsonl"


def jobs(seeds: int = SEEDS) -> list[Job]:
    """All of them, the most telling first."""
    from quality_plans import settings

    every = settings()
    found = [Job("prepare", name) for name in ("mix", "stdlib")]
    found += [Job("run", "mix", s.name, seed) for s in every if s.question in MAIN for seed in range(seeds)]
    found += [Job("gradients", "mix", s.name) for s in every if s.question in MAIN and not s.seconds_of]
    found += [Job("run", "mix", s.name, seed) for s in every if s.question not in MAIN for seed in range(seeds)]
    of_stdlib = [s for s in every if s.name in STDLIB or s.question in STDLIB]
    found += [Job("run", "stdlib", s.name, seed) for s in of_stdlib for seed in range(seeds)]
    return found


def do(job: Job, *, quick: bool = False, folder: Path = FOLDER) -> Row:
    """One job in this process."""
    import torch
    from quality_runs import FORMS, gradients, prepare, run, settings
    from quality_runs import QUICK as SMALL

    torch.set_num_threads(1)
    form = (SMALL if quick else FORMS)[job.set]
    if job.kind == "prepare":
        prepare(form, folder)
        return {}
    setting = next(s for s in settings() if s.name == job.setting)
    if job.kind == "gradients":
        return gradients(form, setting, job.seed, folder, every=1 if quick else 2)
    return run(form, setting, job.seed, folder)


def is_kept(job: Job) -> bool:
    """Whether its line is there, of the forms as they are."""
    from quality_runs import FORMS, kept_rows, prepared

    form = FORMS[job.set].digest
    if job.kind == "prepare":
        file = prepared(FORMS[job.set], FOLDER)
        return file is None or file.is_file()
    place = (job.setting, job.seed, form)
    return any((row["setting"], row["seed"], row["form"]) == place for row in kept_rows(job.file))


def run_all(todo: Sequence[Job], processes: int) -> int:
    """Run jobs, some at a time, each in a process of its own; returns how many failed."""
    waiting, running, failed = list(todo), list[tuple[Job, subprocess.Popen[bytes], IO[bytes], float]](), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    while waiting or running:
        while len(running) < processes:
            made = {job.set for job, *_ in running if job.kind == "prepare"}  # which others of the set wait for
            job = next((job for job in waiting if job.set not in made), None)
            if job is None:
                break
            waiting.remove(job)
            out = TemporaryFile()  # noqa: SIM115 - read and closed when its process ends
            command = [sys.executable, __file__, "--one", json.dumps(vars(job))]
            running.append((job, subprocess.Popen(command, stdout=out, env=environment), out, time.monotonic()))
        time.sleep(0.2)
        for entry in [entry for entry in running if entry[1].poll() is not None]:
            running.remove(entry)
            job, process, out, began = entry
            out.seek(0)
            line = out.read().decode().strip()
            out.close()
            if process.returncode:
                failed += 1
            elif job.kind != "prepare":
                job.file.parent.mkdir(parents=True, exist_ok=True)
                with job.file.open("a") as file:
                    file.write(line + "\n")
            left, took = len(waiting) + len(running), time.monotonic() - began
            state = "failed" if process.returncode else "done"
            print(f"{state}: {job.set} {job.kind} {job.setting} {job.seed}, {took:.0f} s; {left} left", file=sys.stderr)
    return failed


def quick_rows() -> tuple[list[Row], list[Row]]:
    """Rows and gradients of the tiny form, in this process."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [do(Job("run", "mix", name, seed), quick=True, folder=folder) for name in QUICK for seed in range(2)]
        return rows, [do(Job("gradients", "mix", name), quick=True, folder=folder) for name in QUICK[:3]]


def kept() -> tuple[list[Row], list[Row]]:
    """Rows and gradients of the whole form that are kept, of the forms and settings as they are."""
    from quality_plans import settings
    from quality_runs import FORMS, kept_rows

    names, found = [s.name for s in settings()], []
    for suffix in ("", "-gradients"):
        rows = [row for name in FORMS for row in kept_rows(RESULTS / f"{name}{suffix}.jsonl")]
        found.append([row for row in rows if row["form"] == FORMS[row["set"]].digest and row["setting"] in names])
    return found[0], found[1]


def summary(rows: Sequence[Row], gradients: Sequence[Row], command: str) -> Row:
    """The one object that `--json` prints: rows without their curves, differences to unpacked, and cosines."""
    from quality_plans import UNPACKED

    short = [{key: value for key, value in row.items() if key not in ("curve", "trace")} for row in rows]
    cosine = [{key: value for key, value in row.items() if key != "cosines"} for row in gradients]
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "rows": short,
        "differences": differences(rows, UNPACKED),
        "cosine": cosine,
    }


def print_table(result: Row) -> None:
    """For people."""
    print(f"{'set':8}{'setting':32}{'seed':>5}{'steps':>7}{'seconds':>9}{'short':>8}{'long':>8}{'loss':>8}{'loss':>8}")
    for row in result["rows"]:
        figures = "".join(f"{row[k]:8.3f}" for k in ("short_accuracy", "long_accuracy", "short_loss", "long_loss"))
        print(f"{row['set']:8}{row['setting']:32}{row['seed']:5}{row['steps']:7}{row['seconds']:9.1f}{figures}")
    for row in result["cosine"]:
        print(f"cosine of a step's gradient with the whole set's, {row['setting']}: {row['cosine']:.3f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny form, nothing kept")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--page", action="store_true", help="run nothing; write docs/quality.md and its pictures")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each setting")
    parser.add_argument("--only", nargs="*", help="settings to run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(do(Job(**json.loads(args.one)))))
        return 0
    failed, command = 0, "python benchmarks/quality.py" + (" --quick" if args.quick else "")
    if args.quick:
        rows, gradients = quick_rows()
    else:
        if not args.page:
            todo = [job for job in jobs(args.seeds) if not is_kept(job)]
            todo = [job for job in todo if not args.only or job.setting in args.only or job.kind == "prepare"]
            failed = run_all(todo, args.processes)
        rows, gradients = kept()
    if args.page:
        from quality_page import draw

        draw(rows, gradients, ROOT / "docs")
        return 0
    result = summary(rows, gradients, command)
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""``hbp rehearse``: sampled micro-steps of every rank of a plan, for any cluster, run and measured on one device."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands
from hbp.errors import HbpError
from hbp.progress import QUIET, say

if TYPE_CHECKING:
    from hbp.run.rehearse import Rehearsal
    from hbp.run.rehearse_memory import MemoryCheck

GIB = 2.0**30


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "rehearse",
        help="run sampled micro-steps of every rank of a plan on this one device",
        description="Run chosen micro-steps of plans as each of their ranks would, one rank after another on this "
        "device: measured seconds and bytes at the true world size, beside the predicted. Several plans are taken in "
        "turn, and the first is the reference.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN", help="plan folders, of one world size")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the plan's model; only its configuration is read"
    )
    parser.add_argument(
        "--micro-steps", default="8", metavar="N|all", help="of each plan that stand for the run (default 8)"
    )
    parser.add_argument(
        "--ranks", default="all", metavar="all|N", help="of each micro-step: all, or N with the slowest among them"
    )
    parser.add_argument(
        "--repeats", type=int, default=2, metavar="N", help="timed runs; the fastest counts (default 2)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--attention", default="auto", metavar="KERNEL", help="as model.attention of a run")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="as model.compile of a run")
    parser.add_argument(
        "--memory", action="store_true", help="run only the fullest pack of each group, once: does the plan fit?"
    )
    parser.add_argument("--offload-activations", action="store_true", help="as model.offload_activations of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of micro-steps")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="keep the numbers here (default: rehearsal.json in the plan's folder, which `hbp report` shows)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp rehearse`."""
    for name, value in QUIET.items():  # read when torch is loaded
        os.environ.setdefault(name, value)
    import torch

    from hbp.plan import read_plan
    from hbp.run.rehearse import rehearse
    from hbp.run.rehearse_memory import check_memory
    from hbp.train.launch import compiles

    micro_steps, ranks = _count("--micro-steps", args.micro_steps), _count("--ranks", args.ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    plans = [read_plan(folder) for folder in args.plans]
    engine = {
        "compute_dtype": getattr(torch, dtype),
        "attention": args.attention,
        "compiled": compiles(args.compile, device),
        "offload_activations": args.offload_activations,
    }
    if args.memory:
        checks = [check_memory(plan, args.model, device, **engine) for plan in plans]
        if not args.json:
            for folder, check in zip(args.plans, checks, strict=True):
                _print_memory(str(folder), check)
        return _kept(args, [check.to_json() for check in checks])
    rehearsals = rehearse(
        plans, args.model, device, micro_steps=micro_steps, ranks=ranks, repeats=args.repeats, seed=args.seed, **engine
    )
    if not args.json:
        _print([str(folder) for folder in args.plans], rehearsals)
    return _kept(args, [rehearsal.to_json() for rehearsal in rehearsals])


def _kept(args: argparse.Namespace, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The command's object, written where it is to be kept."""
    from hbp.report.rehearsal import FILE_NAME

    named = [{"plan": str(folder), **each} for folder, each in zip(args.plans, found, strict=True)]
    result = named[0] if len(named) == 1 else {"plans": named}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    elif not args.memory:
        for folder, each in zip(args.plans, named, strict=True):
            try:
                (folder / FILE_NAME).write_text(json.dumps(each, indent=1) + "\n")
            except OSError as error:
                say(f"not kept in {folder} ({error.strerror}); name a file with --out")
    return result


def _count(option: str, text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise HbpError(f"{option} {text}: give a number from 1 up, or all")
    return int(text)


def _print(names: list[str], rehearsals: list[Rehearsal]) -> None:
    from hbp.cli.tables import table

    first, rows = rehearsals[0], []
    for name, own in zip(names, rehearsals, strict=True):
        low, high = own.step_s_interval
        rows.append(
            (
                name,
                f"{own.step_s:.4g} s ({low:.4g} to {high:.4g})",
                f"{own.predicted_step_s:.4g} s",
                f"{own.communication_step_s:.4g} s",
                f"{first.step_s / own.step_s:.2f}×",
                f"{first.predicted_step_s / own.predicted_step_s:.2f}×",
                f"{own.idle_share:.1%} ({own.predicted_idle_share:.1%})",
                f"{own.peak_bytes / GIB:.3f}",
                f"{own.noise:.1%}",
            )
        )
    head = (
        "plan", "a step", "predicted", "of it communication", "speed", "predicted speed", "idle (predicted)",
        "peak GiB", "noise",
    )  # fmt: skip
    table("rehearsal", head, rows)
    print(
        f"{first.world_size} ranks on one device ({first.device}), {first.micro_steps} of {first.of_micro_steps} "
        f"micro-steps, {'every rank' if first.all_ranks else 'sampled ranks'}; a step is measured compute and "
        "predicted communication, with its 95 % interval"
    )


def _print_memory(name: str, check: MemoryCheck) -> None:
    from hbp.cli.tables import table

    rows = [
        (
            f"{group.capacity:,} tokens · SP {group.sp_degree} · GC {group.gc_layers}",
            f"{group.tokens:,}",
            _gib(group.peak_bytes),
            _gib(group.predicted_bytes),
            _gib(check.budget_bytes - group.peak_bytes),
        )
        for group in check.groups
    ]
    table(f"memory of {name}", ("group", "fullest pack", "peak GiB", "predicted GiB", "left GiB"), rows)
    left = check.budget_bytes - check.peak_bytes
    verdict = f"fits, with {_gib(left)} GiB ({left / check.budget_bytes:.0%}) to spare"
    if not check.fits:
        short = f"by {_gib(-left)} GiB" if math.isfinite(left) else "nor does this device hold its fullest pack"
        verdict = f"does not fit, {short}: plan with less, such as --memory-gib {0.9 * check.budget_bytes / GIB:.3g}"
    print(
        f"{check.world_size} ranks, seen on one device ({check.device}): each needs {_gib(check.peak_bytes)} of "
        f"{_gib(check.budget_bytes)} GiB, {_gib(check.state_bytes)} for parameters, gradients and optimizer; {verdict}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}" if math.isfinite(size) else "more than there is"

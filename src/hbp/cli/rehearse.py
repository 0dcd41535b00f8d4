"""``hbp rehearse``: sampled micro-steps of every rank of a plan, for any cluster, run and measured on one device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands
from hbp.errors import HbpError

if TYPE_CHECKING:
    from hbp.run.rehearse import Rehearsal

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
    parser.add_argument("--compile", action="store_true", help="compile layers, as model.compile of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the sample of micro-steps")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the numbers, which `hbp report` shows")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp rehearse`."""
    import json

    import torch

    from hbp.plan import read_plan
    from hbp.run.rehearse import rehearse

    micro_steps, ranks = _count("--micro-steps", args.micro_steps), _count("--ranks", args.ranks)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    rehearsals = rehearse(
        [read_plan(folder) for folder in args.plans],
        args.model,
        device,
        micro_steps=micro_steps,
        ranks=ranks,
        repeats=args.repeats,
        compute_dtype=getattr(torch, dtype),
        attention=args.attention,
        compiled=args.compile,
        seed=args.seed,
    )
    if not args.json:
        _print([str(folder) for folder in args.plans], rehearsals)
    named = [{"plan": str(p), **r.to_json()} for p, r in zip(args.plans, rehearsals, strict=True)]
    result = named[0] if len(named) == 1 else {"plans": named}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
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

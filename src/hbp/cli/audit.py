"""``hbp audit``: whether each sample of a run was trained on exactly once an epoch, from its plans and logs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hbp.cli.usage import Commands


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "audit",
        help="prove that every sample was trained on exactly once an epoch",
        description="Count, epoch by epoch, which samples the plans and step logs of a run say that it trained on. "
        "Exit code 0 if none is missing and none was trained on twice (in the last epoch of an unfinished run, "
        "if none was trained on twice or skipped), else 1. A step that was skipped, since its loss or gradients were "
        "not finite, has trained on nothing: its samples are missing.",
    )
    parser.set_defaults(run=run_audit)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run")


def run_audit(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp audit`; ``holds`` decides the exit code."""
    from hbp.run.audit import audit_run

    epochs = audit_run(args.run_dir)
    result = {"epochs": [dataclasses.asdict(epoch) for epoch in epochs], "holds": all(e.holds for e in epochs)}
    if not args.json:
        for epoch in epochs:
            print(_line(**dataclasses.asdict(epoch)))
    return result


def _line(
    epoch: int,
    trained: int,
    missing: int,
    twice: int,
    dropped: int,
    missing_ids: list[int],
    twice_ids: list[int],
    skipped: int,
    skipped_ids: list[int],
    unlogged: int,
    under_way: bool,
) -> str:
    """An epoch for people."""
    text = f"epoch {epoch + 1}: {trained:,} samples trained"
    text += f" ({unlogged:,} by a checkpoint's word, since lines of the log are lost)" if unlogged else ""
    text += f", {dropped:,} dropped by the plan" if dropped else ""
    rest = "still to come" if under_way else "MISSING"
    lost = "of them LOST TO SKIPPED STEPS, which were not finite"
    found = ((missing, rest, missing_ids), (skipped, lost, skipped_ids), (twice, "TRAINED MORE THAN ONCE", twice_ids))
    for count, what, ids in found:
        if count:
            more = ", …" if count > len(ids) else ""
            text += f", {count:,} {what} (samples {', '.join(map(str, ids))}{more})"
    return text if missing or twice else f"{text}, each exactly once"

"""``hbp report``: the page of a run or a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hbp.cli.usage import Commands


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("report", help="write the HTML page of a run or a plan")
    parser.set_defaults(run=run)
    parser.add_argument("target", type=Path, metavar="RUN|PLAN", help="folder of a run or of a plan")
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the folder)")
    parser.add_argument(
        "--rehearsal",
        type=Path,
        metavar="FILE",
        help="of the plan, kept by hbp rehearse (default: rehearsal.json there)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp report`."""
    from hbp.report.page import write_report

    report = write_report(args.target, args.out, args.rehearsal)
    if not args.json:
        print(report.html)
    return {"report": str(report.html), "numbers": report.numbers}

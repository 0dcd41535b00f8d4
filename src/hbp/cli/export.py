"""``hbp export``: a plan's packs as data that other trainers read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hbp.cli.usage import Commands, check_out


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("export", help="write a plan's packs as data for other trainers")
    parser.set_defaults(run=run)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan folder, of one setting: hbp plan --sp N --gc K")
    parser.add_argument(
        "--to", required=True, metavar="NAME", help="datasets (TRL), llama-factory, automodel (NeMo), bridge (Megatron)"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="STORE", help="token store that the plan is of")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp export`."""
    from hbp.data.samples import cut_to
    from hbp.data.store import open_store
    from hbp.integrations.export import export_plan
    from hbp.plan import read_plan

    check_out(args.out, "layout.json")
    plan, store = read_plan(args.plan), open_store(args.data)
    if (too_long := plan.info.settings.get("too_long")) is not None:
        store = cut_to(store, int(plan.info.settings["cut_to"]), str(too_long))
    layout = export_plan(plan, store, args.to, args.out)
    if not args.json:
        print(f"{layout.rows:,} rows of up to {layout.longest_row:,} tokens → {args.out}; set {layout.to} to")
        for name, value in layout.settings.items():
            print(f"  {name}: {value}")
    return {"export": str(args.out), **vars(layout)}

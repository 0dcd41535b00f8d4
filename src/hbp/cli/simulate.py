"""``hbp simulate``: what plans are predicted to take, side by side; on their own devices or on others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands, parse_counts, parse_span
from hbp.errors import HbpError
from hbp.progress import Progress, say

if TYPE_CHECKING:
    from hbp.cost.cluster import ClusterSpec
    from hbp.plan import Plan

    Named = Sequence[tuple[str, Plan]]


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "simulate", help="predicted time, its parts, memory and cost of plans, here or elsewhere"
    )
    parser.set_defaults(run=run)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN", help="plan folders; the first is the reference")
    parser.add_argument("--price", type=float, metavar="PER_HOUR", help="of one GPU for an hour, to give the cost")
    parser.add_argument(
        "--timeline", type=Path, metavar="FILE.parquet", help="write what each rank of the first plan does when"
    )
    parser.add_argument("--steps", metavar="A..B", help="of the timeline (default: all)")
    parser.add_argument("--ranks", metavar="A..B", help="of the timeline (default: all)")
    parser.add_argument("--gpus", metavar="N,N|N..N", help='"what if": plan anew for these numbers of GPUs')
    parser.add_argument(
        "--cluster", nargs="+", action="extend", default=[], metavar="NAME|FILE", help='"what if": on these clusters'
    )
    parser.add_argument(
        "--global-batch-tokens", type=int, metavar="TOKENS", help='"what if": of a step (default: as the plan)'
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp simulate`."""
    from hbp.plan import read_plan

    _check(args)
    plans = [(str(folder), read_plan(folder)) for folder in args.plans]
    if _elsewhere(args):
        return _what_if(args, plans)
    if args.timeline is not None:
        _write_timeline(args, plans[0][1])
    rows = here(plans, args.price)
    if not args.json:
        from hbp.cli.tables import metrics_table, parts_table

        metrics_table([(name, plan.info.metrics, row) for (name, plan), row in zip(plans, rows, strict=True)])
        parts_table([(row["plan"], row) for row in rows])
    return {"plans": rows}


def _elsewhere(args: argparse.Namespace) -> bool:
    return args.gpus is not None or bool(args.cluster) or args.global_batch_tokens is not None


def _check(args: argparse.Namespace) -> None:
    for name in ("price", "global_batch_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise HbpError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    if args.timeline is not None and _elsewhere(args):
        raise HbpError("--timeline plays the plan as it is; leave out --gpus, --cluster and --global-batch-tokens")
    if args.timeline is None and (args.steps or args.ranks):
        raise HbpError("--steps and --ranks are of --timeline; give it too")


def _write_timeline(args: argparse.Namespace, plan: Plan) -> None:
    from hbp.simulator import write_timeline

    steps = parse_span("--steps", args.steps, plan.n_steps)
    ranks = parse_span("--ranks", args.ranks, plan.info.world_size)
    written = write_timeline(plan, args.timeline, steps, ranks)
    say(f"timeline: {args.timeline}, {written:,} rows")


def here(plans: Named, price: float | None) -> list[dict[str, Any]]:
    """What each plan takes on its own devices; ``speedup`` is over the first, None where that predicts no time."""
    from hbp.simulator import detailed_json

    rows = [{"plan": name, **detailed_json(plan, price)} for name, plan in plans]
    first = rows[0]["tokens_per_s"]
    return [row | {"speedup": row["tokens_per_s"] / first if first else None} for row in rows]


def _what_if(args: argparse.Namespace, plans: Named) -> dict[str, Any]:
    from hbp.cost.cluster import load_cluster

    counts = parse_counts(args.gpus) if args.gpus is not None else [plans[0][1].info.world_size]
    clusters: list[ClusterSpec | None] = [load_cluster(name) for name in args.cluster]
    places = [(cluster, gpus) for cluster in clusters or [None] for gpus in counts]
    rows = elsewhere(plans, places, args.global_batch_tokens, args.price)
    if all("error" in row for row in rows):
        raise HbpError(rows[0]["error"])
    if not args.json:
        from hbp.cli.tables import what_if_table

        what_if_table(rows)
    return {"rows": rows}


def elsewhere(
    plans: Named,
    places: Sequence[tuple[ClusterSpec | None, int]],
    global_batch_tokens: int | None,
    price: float | None,
) -> list[dict[str, Any]]:
    """What each plan's samples take, planned anew, at each place; ``speedup`` is over the first plan at that place.

    Args:
        plans: each with its name.
        places: cluster (None: the plan's own) and number of ranks.
        global_batch_tokens: None: the plan's own.
        price: of a device for an hour.
    """
    from hbp.planning.elsewhere import plan_elsewhere
    from hbp.simulator import detailed_json

    rows: list[dict[str, Any]] = []
    with Progress("what if", len(places) * len(plans)) as progress:
        for cluster, gpus in places:
            first = None
            for folder, plan in plans:
                name = cluster.name if cluster else plan.info.cluster.get("name", "")
                row: dict[str, Any] = {"plan": folder, "cluster": name, "gpus": gpus}
                try:
                    made = plan_elsewhere(plan, gpus, cluster, global_batch_tokens)
                except HbpError as error:
                    rows.append(row | {"error": str(error)})
                else:
                    played = detailed_json(made, price)
                    del played["ranks"]
                    first = first or played["tokens_per_s"]
                    speedup = played["tokens_per_s"] / first
                    rows.append(row | {"metrics": dict(made.info.metrics), **played, "speedup": speedup})
                progress.advance(f"{row['cluster']}, {gpus} GPUs")
    return rows

"""The command line: plan, profile, train, simulate, report, compare.

Tables for people go to standard output, or with ``--json`` one JSON object does; progress and logs go to standard
error. Exit codes: 0 done, 2 wrong input (one line says what and how to mend it), 1 a fault of ours, 143 a signal ended
the run and its state is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.errors import HbpError, RankFailed, Stopped, report_to_parent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hbp.cost.cluster import ClusterSpec
    from hbp.cost.predict import CostModel
    from hbp.plan import Plan

TRAIN_MODULES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")
PROFILE_LIMIT_S = 170.0
INSTALL_TRAIN = "install with `pip install 'hierarchical-balance-packing[train]'`"
STOPPED = 128 + 15
"""Exit code of a run that a signal ended, as the shell has it for a process that SIGTERM ended."""
STRATEGY_NAMES = ("concat", "ffd", "bfd", "isf", "sorted", "lb", "dcp", "hbp", "hbp-mixed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        result = args.run(args)
    except HbpError as error:
        if not report_to_parent(error):
            print(f"hbp: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_MODULES:
            raise
        print(f"hbp: error: this needs {error.name}; {INSTALL_TRAIN}", file=sys.stderr)
        return 2
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        print(f"hbp: error: {error.filename}: {error.strerror}; give a folder that can be written", file=sys.stderr)
        return 2
    except RankFailed as error:
        if not report_to_parent(error):
            print(f"hbp: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        if report_to_parent(stop):
            return 0
        if os.environ.get("RANK", "0") == "0":
            print(f"hbp: {stop}", file=sys.stderr)
        return 0 if "RANK" in os.environ else STOPPED  # torchrun would call another code of a rank a failure
    except KeyboardInterrupt:
        print("hbp: interrupted", file=sys.stderr)
        return 130
    if result is not None and args.json:
        print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbp", description="Hierarchical Balance Packing for long-context training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    plan = commands.add_parser("plan", parents=[common], help="turn lengths into a plan folder")
    _add_planning(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks to plan for")
    plan.add_argument("--strategy", default="hbp-mixed", help=f"one of {', '.join(STRATEGY_NAMES)} (default hbp-mixed)")
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the plan to")
    plan.add_argument("--explain", action="store_true", help="say why each group is there and runs as it does")
    plan.set_defaults(run=_plan)

    compare = commands.add_parser("compare", parents=[common], help="plan with every strategy, one table")
    _add_planning(compare)
    compare.add_argument(
        "--gpus", required=True, metavar="N|N,N|N..N", help="ranks to plan for, one number or several (8..256 doubles)"
    )
    compare.add_argument(
        "--strategies", default=",".join(STRATEGY_NAMES), help="comma-separated (default: all of them)"
    )
    compare.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw efficiency and speed-up over GPUs")
    compare.set_defaults(run=_compare)

    simulate = commands.add_parser(
        "simulate", parents=[common], help="predicted time, its parts, memory and cost of plans, here or elsewhere"
    )
    simulate.add_argument(
        "plans", type=Path, nargs="+", metavar="PLAN", help="plan folders; the first is the reference"
    )
    simulate.add_argument("--price", type=float, metavar="PER_HOUR", help="of one GPU for an hour, to give the cost")
    simulate.add_argument("--gpus", metavar="N,N|N..N", help='"what if": plan anew for these numbers of GPUs')
    simulate.add_argument(
        "--cluster", nargs="+", action="extend", default=[], metavar="NAME|FILE", help='"what if": on these clusters'
    )
    simulate.add_argument(
        "--global-batch-tokens", type=int, metavar="TOKENS", help='"what if": of a step (default: as the plan)'
    )
    simulate.set_defaults(run=_simulate)

    report = commands.add_parser("report", parents=[common], help="write the HTML page of a run or a plan")
    report.add_argument("target", type=Path, metavar="RUN|PLAN", help="folder of a run or of a plan")
    report.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the folder)")
    report.set_defaults(run=_report)

    formatter = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        "train",
        parents=[common],
        help="run the whole job that a YAML file describes",
        formatter_class=formatter,
        description="Prepare, profile, plan and train what a YAML file describes. Alone it starts local processes;\n"
        "under torchrun it is one rank: torchrun --nproc-per-node 8 -m hbp train config.yaml",
    )
    train.add_argument("config", type=Path, metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single options")
    train.set_defaults(run=_train)

    profile = commands.add_parser(
        "profile",
        parents=[common],
        help="measure the cost model on this machine's devices",
        formatter_class=formatter,
        description="Measure the cost model's constants on this machine, on the engine that trains, and write a\n"
        "profile file that `--cluster` and `cluster.name` take.",
    )
    profile.add_argument("config", type=Path, metavar="CONFIG.yaml", help="as for train: its model, data and cluster")
    profile.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single options")
    profile.add_argument("--out", type=Path, help="file to write (default: profile.json in run_dir)")
    profile.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="measure stacks of N and 2N layers and scale to all (default: the whole model, or for a large one N = 2)",
    )
    profile.set_defaults(run=_profile)

    if {"train", "profile"} & set(sys.argv[1:2]):  # the options' list needs pydantic and yaml, plan does not
        from hbp.config import describe

        train.epilog = profile.epilog = "options of CONFIG.yaml:\n\n" + describe()
    return parser


def _add_planning(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", metavar="DIR|FILE", help="a token store, or samples to tokenize (needs --tokenizer)")
    source.add_argument(
        "--lengths", type=Path, metavar="FILE", help=".npy or .parquet with one length a sample, tokens"
    )
    parser.add_argument("--tokenizer", metavar="NAME|DIR", help="for --data (default: --model)")
    parser.add_argument(
        "--model", required=True, metavar="NAME|DIR", help="built-in name, or a transformers config folder"
    )
    parser.add_argument("--cluster", default="h100-nvlink", metavar="NAME|FILE", help="built-in name or profile file")
    parser.add_argument(
        "--memory-gib", type=float, metavar="GIB", help="memory budget of a device (default: the cluster's)"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longest packing length (default: the longest sample, or longer where that is faster)",
    )
    parser.add_argument("--global-batch-tokens", type=int, metavar="TOKENS", help="tokens of an optimizer step")
    parser.add_argument("--short-steps", type=int, metavar="N", help="curriculum: first steps with short groups only")
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="hbp-mixed: plan the shuffled samples in N pieces; more stay closer to a random order, fewer are faster "
        "(default: as many as cost at most 1 %% of the speed)",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another epoch")


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.plan import write_plan
    from hbp.planning.planner import make_plan
    from hbp.simulate import simulate

    lengths, cost = _lengths(args), _cost(args, args.gpus)
    plan = make_plan(lengths, cost, strategy=args.strategy, **_options(args))
    write_plan(plan, args.out)
    result = {
        "plan": str(args.out),
        "strategy": plan.info.strategy,
        "samples": len(plan.sample_ids),
        "dropped": len(plan.info.dropped),
        "groups": [dataclasses.asdict(group) for group in plan.info.groups],
        "metrics": dict(plan.info.metrics),
        "simulation": simulate(plan).to_json(),
        "details": dict(plan.info.details),
    }
    reasons = []
    if args.explain:
        from hbp.planning.explain import explain

        reasons = explain(plan, cost, lengths)
        result["explain"] = [dataclasses.asdict(reason) for reason in reasons]
    if not args.json:
        from hbp.tables import metrics_table, table

        groups = [(f"{g.capacity:,}", str(g.sp_degree), str(g.gc_layers)) for g in plan.info.groups]
        table("groups", ("packing length", "SP degree", "GC layers"), groups)
        metrics_table([(plan.info.strategy, plan.info.metrics, simulate(plan).to_json())])
        for why in reasons:
            print(f"- {why}")
        details = {name.replace("_", " "): f"{value:.4f}" for name, value in plan.info.details.items()}
        print(", ".join(f"{name} {value}" for name, value in details.items()))
        print(f"{len(plan.sample_ids):,} samples in {plan.n_packs:,} packs, {plan.n_steps:,} steps → {args.out}")
    if plan.info.dropped:
        sample, reason = plan.info.dropped[0]
        count = f"{len(plan.info.dropped):,} samples (listed in plan.json)"
        print(f"hbp: dropped {count}, the first: sample {sample}, {reason}", file=sys.stderr)
    return result


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.planning.planner import make_plan
    from hbp.progress import Progress
    from hbp.simulate import simulate
    from hbp.what_if import parse_counts

    names = [name.strip() for name in args.strategies.split(",") if name.strip()]
    if not names:
        raise HbpError(f"--strategies names none; give some of {','.join(STRATEGY_NAMES)}")
    sizes, rows = parse_counts(args.gpus), []
    lengths, options = _lengths(args), _options(args)
    with Progress("compare", len(names) * len(sizes)) as progress:
        for gpus in sizes:
            cost, first = _cost(args, gpus), None
            for name in names:
                plan = make_plan(lengths, cost, strategy=name, **options)
                metrics = plan.info.metrics
                first = first or metrics["predicted_s"]
                speedup = first / metrics["predicted_s"]
                rows.append({"strategy": name, "gpus": gpus, **metrics, **simulate(plan).to_json(), "speedup": speedup})
                progress.advance(f"{name}, {gpus} GPUs")
    if not args.json:
        from hbp.tables import compare_table

        compare_table(rows)
    if args.plot is not None:
        from hbp.report.comparison import strategies_over_gpus
        from hbp.report.figures import standalone

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(standalone(strategies_over_gpus(rows)))
        print(f"hbp: plot: {args.plot}", file=sys.stderr)
    return {"rows": rows}


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.plan import read_plan
    from hbp.simulate import detailed_json

    for name in ("price", "global_batch_tokens"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise HbpError(f"--{name.replace('_', '-')} {value:g}: give more than 0")
    plans = [read_plan(folder) for folder in args.plans]
    if args.gpus is not None or args.cluster:
        return _what_if(args, plans)
    rows = [
        (str(folder), plan.info.metrics, detailed_json(plan, args.price))
        for folder, plan in zip(args.plans, plans, strict=True)
    ]
    if not args.json:
        from hbp.tables import metrics_table, parts_table

        metrics_table(rows)
        parts_table([(name, row) for name, _, row in rows])
    first = rows[0][2]["tokens_per_s"]
    return {"plans": [{"plan": name, **row, "speedup": row["tokens_per_s"] / first} for name, _, row in rows]}


def _what_if(args: argparse.Namespace, plans: Sequence[Plan]) -> dict[str, Any]:
    from hbp.cost.cluster import load_cluster
    from hbp.progress import Progress
    from hbp.simulate import detailed_json
    from hbp.what_if import parse_counts, plan_elsewhere

    counts = parse_counts(args.gpus) if args.gpus is not None else [plans[0].info.world_size]
    clusters: list[ClusterSpec | None] = [load_cluster(name) for name in args.cluster]
    clusters = clusters or [None]
    places = [(cluster, gpus) for cluster in clusters for gpus in counts]
    rows: list[dict[str, Any]] = []
    with Progress("what if", len(places) * len(plans)) as progress:
        for cluster, gpus in places:
            first = None
            for folder, plan in zip(args.plans, plans, strict=True):
                name = cluster.name if cluster else plan.info.cluster.get("name", "")
                row: dict[str, Any] = {"plan": str(folder), "cluster": name, "gpus": gpus}
                try:
                    made = plan_elsewhere(plan, gpus, cluster, args.global_batch_tokens)
                except HbpError as error:
                    rows.append(row | {"error": str(error)})
                else:
                    played = detailed_json(made, args.price)
                    del played["ranks"]
                    first = first or played["tokens_per_s"]
                    speedup = played["tokens_per_s"] / first
                    rows.append(row | {"metrics": dict(made.info.metrics), **played, "speedup": speedup})
                progress.advance(f"{row['cluster']}, {gpus} GPUs")
    if all("error" in row for row in rows):
        raise HbpError(rows[0]["error"])
    if not args.json:
        from hbp.tables import what_if_table

        what_if_table(rows)
    return {"rows": rows}


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.report.page import write_report

    report = write_report(args.target, args.out)
    if not args.json:
        print(report.html)
    return {"report": str(report.html), "numbers": report.numbers}


def _train(args: argparse.Namespace) -> dict[str, Any] | None:
    from hbp.config import load_config
    from hbp.train import launch

    config = load_config(args.config, args.overrides)
    run = Path(config.run_dir)
    if not launch.under_torchrun():
        _check_before_launch(config)
        launch.launch_local(["train", str(args.config), *args.overrides], config.cluster.processes)
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    else:
        from hbp.job import run_job

        with launch.process_group() as device:
            summary = run_job(config, device)
            if not launch.reports_here():
                return None
    from hbp.report.page import write_report

    page = write_report(run).html
    if not args.json:
        from hbp.tables import run_table

        run_table(summary)
        print(f"report: {page}")
    return {**summary, "report": str(page)}


def _check_before_launch(config: Any) -> None:
    """Find what can be wrong with the input before any process is started."""
    import numpy as np
    import torch

    from hbp.job import check_strategies
    from hbp.live_plan import check_plan
    from hbp.plan import read_plan
    from hbp.prepare import prepare, split_samples
    from hbp.resume import may_resume

    gpus = torch.cuda.device_count()
    if 0 < gpus < config.cluster.processes:
        raise HbpError(f"cluster.processes is {config.cluster.processes} but this machine has {gpus} GPUs; lower it")
    check_strategies(config)
    store = prepare(config)
    train_ids, _ = split_samples(store.lengths, config)
    if config.plan.path is not None and not may_resume(config):
        check_plan(read_plan(Path(config.plan.path)), np.asarray(store.lengths[train_ids]), config.cluster.processes)


def _profile(args: argparse.Namespace) -> dict[str, Any] | None:
    from hbp.config import load_config
    from hbp.train import launch

    config = load_config(args.config, args.overrides)
    out = args.out or Path(config.run_dir) / "profile.json"
    if args.layers is not None and args.layers < 1:
        raise HbpError(f"--layers {args.layers}: give at least 1")
    if not launch.under_torchrun():
        _check_before_launch(config)
        layers = [] if args.layers is None else ["--layers", str(args.layers)]
        arguments = ["profile", str(args.config), *args.overrides, "--out", str(out), *layers]
        launch.launch_local(arguments, config.cluster.processes)
    else:
        from hbp.cluster_profile import profile_cluster
        from hbp.prepare import make_engine

        with launch.process_group() as device:
            heights = None if args.layers is None else (args.layers, 2 * args.layers)
            profile_cluster(make_engine(config, device), out, heights, PROFILE_LIMIT_S)
            if not launch.reports_here():
                return None
    from hbp.report.cost_page import write_cost_page

    profile: dict[str, Any] = json.loads(out.read_text())
    page = write_cost_page(out)
    if not args.json:
        from hbp.tables import profile_table

        profile_table(profile)
        print(f"profile: {out}\npictures: {page}")
    return {"profile": str(out), "page": str(page), **profile}


def _lengths(args: argparse.Namespace) -> npt.NDArray[np.int32]:
    import numpy as np

    from hbp.data.store import open_store, read_lengths

    if args.lengths is not None:
        return read_lengths(args.lengths)
    if (Path(args.data) / "store.json").is_file():
        return np.asarray(open_store(Path(args.data)).lengths)
    from hbp.data.sources import source_fingerprint
    from hbp.data.tokenize import prepare_store

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hbp"
    folder = cache / source_fingerprint(args.data, tokenizer := args.tokenizer or args.model)[:16]
    return np.asarray(prepare_store(args.data, tokenizer, folder).lengths)


def _cost(args: argparse.Namespace, gpus: int) -> CostModel:
    from hbp.cost.cluster import GIB, load_cluster
    from hbp.cost.model_spec import load_model_spec
    from hbp.cost.predict import CostModel

    if gpus < 1:
        raise HbpError(f"--gpus {gpus}: give at least 1")
    cluster = load_cluster(args.cluster)
    if args.memory_gib is not None:
        if not 0 < args.memory_gib < 1e6:
            raise HbpError(f"--memory-gib {args.memory_gib:g}: give a device's memory in GiB, such as 80")
        cluster = dataclasses.replace(cluster, memory_bytes=args.memory_gib * GIB)
    return CostModel(load_model_spec(args.model), cluster, gpus)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("max_length", "global_batch_tokens", "windows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise HbpError(f"--{name.replace('_', '-')} {value}: give at least 1")
    for name in ("seed", "short_steps"):
        value = getattr(args, name)
        if value is not None and value < 0:
            raise HbpError(f"--{name.replace('_', '-')} {value}: give at least 0")
    return {
        "seed": args.seed,
        "max_length": args.max_length,
        "global_batch_tokens": args.global_batch_tokens,
        "short_steps": args.short_steps,
        "windows": args.windows,
    }

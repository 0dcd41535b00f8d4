"""The command line: plan, profile, train, simulate, report, compare.

Tables for people go to standard output, or with ``--json`` one JSON object does; progress and logs go to standard
error. Exit codes: 0 done, 2 wrong input (one line says what and how to mend it), 1 a fault of ours, 143 a signal ended
the run and its state is saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.parser import STRATEGY_NAMES, parser_for
from hbp.errors import HbpError, RankFailed, Stopped, report_to_parent

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hbp.cost.cluster import ClusterSpec
    from hbp.cost.predict import CostModel
    from hbp.plan import Plan

TRAIN_MODULES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")
INSTALL_TRAIN = "install with `pip install 'hierarchical-balance-packing[train]'`"
STOPPED = 128 + 15
"""Exit code of a run that a signal ended, as the shell has it for a process that SIGTERM ended."""
SLOW_ABOVE = {"lb": 100_000}
"""Samples above which `compare` leaves a strategy out unless it is asked for by name: it would take minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        args = parser_for(arguments).parse_args(arguments)
        result = COMMANDS[args.command](args)
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


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.plan import write_plan
    from hbp.planning.planner import make_plan
    from hbp.simulator import simulate

    options, cost = _options(args), _cost(args, args.gpus)
    lengths = _lengths(args)
    plan = make_plan(lengths, cost, strategy=args.strategy, **options)
    write_plan(plan, args.out)
    simulation = simulate(plan).to_json()
    result = {
        "plan": str(args.out),
        "strategy": plan.info.strategy,
        "samples": len(plan.sample_ids),
        "dropped": len(plan.info.dropped),
        "groups": [dataclasses.asdict(group) for group in plan.info.groups],
        "metrics": dict(plan.info.metrics),
        "simulation": simulation,
        "details": dict(plan.info.details),
    }
    reasons = []
    if args.explain:
        from hbp.planning.explain import explain

        reasons = explain(plan, cost, lengths)
        result["explain"] = [dataclasses.asdict(reason) for reason in reasons]
    if not args.json:
        from hbp.cli.tables import metrics_table, table

        groups = [(f"{g.capacity:,}", str(g.sp_degree), str(g.gc_layers)) for g in plan.info.groups]
        table("groups", ("packing length", "SP degree", "GC layers"), groups)
        metrics_table([(plan.info.strategy, plan.info.metrics, simulation)])
        for why in reasons:
            print(f"- {why}")
        details = {name.replace("_", " "): f"{value:.4f}" for name, value in plan.info.details.items()}
        print(", ".join(f"{name} {value}" for name, value in details.items()))
        print(f"{len(plan.sample_ids):,} samples in {plan.n_packs:,} packs, {plan.n_steps:,} steps → {args.out}")
    if plan.info.metrics["ave_tokens"] > 1.5 * (args.global_batch_tokens or math.inf):
        print(
            f"hbp: a step holds {plan.info.metrics['ave_tokens']:,.0f} tokens, more than --global-batch-tokens "
            f"{args.global_batch_tokens:,}: one micro-step of {args.gpus} GPUs is larger; give more, or fewer --gpus",
            file=sys.stderr,
        )
    if plan.info.dropped:
        sample, reason = plan.info.dropped[0]
        count = f"{len(plan.info.dropped):,} samples (listed in plan.json)"
        print(f"hbp: dropped {count}, the first: sample {sample}, {reason}", file=sys.stderr)
    return result


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.planning.planner import make_plan
    from hbp.planning.what_if import parse_counts
    from hbp.progress import Progress
    from hbp.simulator import simulate

    sizes, asked, options, rows = parse_counts(args.gpus), _asked_for(args.strategies), _options(args), []
    costs = [_cost(args, gpus) for gpus in sizes]
    lengths = _lengths(args)
    names = asked or _quick_enough(len(lengths))
    with Progress("compare", len(names) * len(sizes)) as progress:
        for gpus, cost in zip(sizes, costs, strict=True):
            first = None  # seconds of the first strategy
            for name in names:
                row: dict[str, Any] = {"strategy": name, "gpus": gpus}
                try:
                    plan = make_plan(lengths, cost, strategy=name, **options)
                except HbpError as error:
                    rows.append(row | {"error": str(error)})
                else:
                    metrics = plan.info.metrics
                    first = metrics["predicted_s"] if name == names[0] else first
                    speedup = first / metrics["predicted_s"] if first else None
                    rows.append(row | {**metrics, **simulate(plan).to_json(), "speedup": speedup})
                progress.advance(f"{name}, {gpus} GPUs")
    planned = [row for row in rows if "error" not in row]
    if not planned:
        raise HbpError(rows[0]["error"])
    if not args.json:
        from hbp.cli.tables import compare_table

        compare_table(rows)
    if args.plot is not None:
        from hbp.report.comparison import strategies_over_gpus
        from hbp.report.figures import standalone

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(standalone(strategies_over_gpus(planned)))
        print(f"hbp: plot: {args.plot}", file=sys.stderr)
    return {"rows": rows}


def _asked_for(strategies: str | None) -> list[str]:
    """The names in ``--strategies``; none where all are meant."""
    if strategies is None:
        return []
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    if not names or not set(names) <= set(STRATEGY_NAMES):
        raise HbpError(f"--strategies {strategies}: give some of {','.join(STRATEGY_NAMES)}")
    return names


def _quick_enough(samples: int) -> list[str]:
    """All strategies that do not take minutes for so many samples."""
    slow = [name for name, limit in SLOW_ABOVE.items() if samples > limit]
    if slow:
        print(f"hbp: {', '.join(slow)} left out, slow on {samples:,} samples; --strategies takes it", file=sys.stderr)
    return [name for name in STRATEGY_NAMES if name not in slow]


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    from hbp.plan import read_plan
    from hbp.simulator import detailed_json, write_timeline

    for name in ("price", "global_batch_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise HbpError(f"--{name.replace('_', '-')} {value:g}: give a number above 0")
    elsewhere = args.gpus is not None or args.cluster or args.global_batch_tokens is not None
    if args.timeline is not None and elsewhere:
        raise HbpError("--timeline plays the plan as it is; leave out --gpus, --cluster and --global-batch-tokens")
    if args.timeline is None and (args.steps or args.ranks):
        raise HbpError("--steps and --ranks are of --timeline; give it too")
    plans = [read_plan(folder) for folder in args.plans]
    if elsewhere:
        return _what_if(args, plans)
    if args.timeline is not None:
        steps = _span("--steps", args.steps, plans[0].n_steps)
        ranks = _span("--ranks", args.ranks, plans[0].info.world_size)
        written = write_timeline(plans[0], args.timeline, steps, ranks)
        print(f"hbp: timeline: {args.timeline}, {written:,} rows", file=sys.stderr)
    rows = [
        (str(folder), plan.info.metrics, detailed_json(plan, args.price))
        for folder, plan in zip(args.plans, plans, strict=True)
    ]
    if not args.json:
        from hbp.cli.tables import metrics_table, parts_table

        metrics_table(rows)
        parts_table([(name, row) for name, _, row in rows])
    first = rows[0][2]["tokens_per_s"]
    return {"plans": [{"plan": name, **row, "speedup": row["tokens_per_s"] / first} for name, _, row in rows]}


def _span(option: str, text: str | None, end: int) -> range:
    """What ``A..B`` names of 0 to end − 1, both ends included."""
    if text is None:
        return range(end)
    first, dots, last = text.partition("..")
    last = last if dots else first
    span = range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)
    if not span or span.stop > end:
        raise HbpError(f"{option} {text}: give A..B within 0..{end - 1}")
    return span


def _what_if(args: argparse.Namespace, plans: Sequence[Plan]) -> dict[str, Any]:
    from hbp.cost.cluster import load_cluster
    from hbp.planning.what_if import parse_counts, plan_elsewhere
    from hbp.progress import Progress
    from hbp.simulator import detailed_json

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
        from hbp.cli.tables import what_if_table

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
        _check_before_launch(config, logs=True)
        launch.launch_local(["train", str(args.config), *args.overrides], config.cluster.processes)
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    else:
        from hbp.run.job import run_job

        with launch.process_group() as device:
            summary = run_job(config, device)
            if not launch.reports_here():
                return None
    from hbp.report.page import write_report

    page = write_report(run).html
    if not args.json:
        from hbp.cli.tables import run_table

        run_table(summary)
        print(f"report: {page}")
    return {**summary, "report": str(page)}


def _check_before_launch(config: Any, *, logs: bool) -> None:
    """Find what can be wrong with the input before any process is started."""
    import numpy as np
    import torch

    from hbp.plan import read_plan
    from hbp.run.engine import prepare, split_samples
    from hbp.run.fit_memory import check_plan
    from hbp.run.job import check_strategies
    from hbp.run.preflight import check_ready
    from hbp.run.resume import may_resume

    gpus = torch.cuda.device_count()
    if 0 < gpus < config.cluster.processes:
        raise HbpError(f"cluster.processes is {config.cluster.processes} but this machine has {gpus} GPUs; lower it")
    check_strategies(config)
    check_ready(config, logs=logs)
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
        _check_before_launch(config, logs=False)
        layers = [] if args.layers is None else ["--layers", str(args.layers)]
        arguments = ["profile", str(args.config), *args.overrides, "--out", str(out), *layers]
        launch.launch_local(arguments, config.cluster.processes)
    else:
        from hbp.run.engine import make_engine
        from hbp.run.profile import profile_cluster
        from hbp.train.watch import watch_others

        with launch.process_group() as device, watch_others():
            heights = None if args.layers is None else (args.layers, 2 * args.layers)
            profile_cluster(make_engine(config, device), out, heights)
            if not launch.reports_here():
                return None
    from hbp.report.profile_page import write_cost_page

    profile: dict[str, Any] = json.loads(out.read_text())
    page = write_cost_page(out)
    if not args.json:
        from hbp.cli.tables import profile_table

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
    from hbp.cost.known_models import KNOWN_MODELS
    from hbp.data.sources import source_fingerprint
    from hbp.data.tokenize import prepare_store

    if args.tokenizer is None and args.model in KNOWN_MODELS:
        raise HbpError(f"--data needs --tokenizer DIR: the built-in {args.model} is dimensions only")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hbp"
    folder = cache / source_fingerprint(args.data, tokenizer := args.tokenizer or args.model)[:16]
    return np.asarray(prepare_store(args.data, tokenizer, folder).lengths)


def _cost(args: argparse.Namespace, gpus: int) -> CostModel:
    from hbp.cost.predict import CostModel

    if gpus < 1:
        raise HbpError(f"--gpus {gpus}: give at least 1")
    if args.memory_gib is not None and not 0 < args.memory_gib < 1e6:
        raise HbpError(f"--memory-gib {args.memory_gib:g}: give a device's memory in GiB, such as 80")
    return CostModel.of(args.model, args.cluster, gpus, memory_gib=args.memory_gib)


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


COMMANDS = {
    "plan": _plan,
    "compare": _compare,
    "simulate": _simulate,
    "report": _report,
    "train": _train,
    "profile": _profile,
}

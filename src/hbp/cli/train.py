"""``hbp train`` and ``hbp profile``: what CONFIG.yaml describes, run on local processes or as one rank of torchrun."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands, Parser, check_numbers

if TYPE_CHECKING:
    from hbp.config import Config


def add_parser(commands: Commands) -> None:
    """Declare both commands."""
    train = commands.add_parser(
        "train",
        help="run the whole job that a YAML file describes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepare, profile, plan and train what a YAML file describes. Alone it starts local processes;\n"
        "under torchrun it is one rank: torchrun --nproc-per-node 8 -m hbp train config.yaml",
    )
    train.set_defaults(run=run_train)
    _add_job(train)
    torchrun = commands.add_parser(
        "torchrun",
        help="torchrun, with our exit codes and signals",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="PyTorch's torchrun with all its options. It ends with what its ranks end with (0 finished, 85\n"
        "saved and to be continued, 2 wrong input, 1 a fault), where torchrun knows only 0 and 1, and it hands\n"
        "SIGUSR1 on:  hbp torchrun --nproc-per-node 8 -m hbp train config.yaml",
        usage="hbp torchrun [options of torchrun] -m hbp train CONFIG.yaml [section.key=value ...]",
    )
    torchrun.set_defaults(run=lambda args: torchrun.error("give torchrun's arguments"))
    profile = commands.add_parser(
        "profile",
        help="measure the cost model on this machine's devices",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure the cost model's constants on this machine, on the engine that trains, and write a\n"
        "profile file that `--cluster` and `cluster.name` take. Model, data and cluster are those of CONFIG.yaml.",
    )
    profile.set_defaults(run=run_profile)
    _add_job(profile)
    profile.add_argument("--out", type=Path, help="file to write (default: profile.json in run_dir)")
    profile.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="measure stacks of N and 2N layers and scale to all (default: the whole model, or for a large one N = 2)",
    )


def _add_job(parser: Parser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single options")
    parser.late_epilog = _options


def _options() -> str:
    from hbp.config import describe

    return "options of CONFIG.yaml:\n\n" + describe()


def run_train(args: argparse.Namespace) -> dict[str, Any] | None:
    """`hbp train`; None on the ranks that the first one speaks for."""
    from hbp.config import load_config
    from hbp.run.start.slurm import understand_srun
    from hbp.train import launch

    config = load_config(args.config, args.overrides)
    run = Path(config.run_dir)
    understand_srun(os.environ)
    if not launch.under_torchrun():
        from hbp.run.job import check_before_launch, check_ready, check_strategies
        from hbp.run.start.lock import owning

        check_strategies(config)  # what needs no run_dir is refused before there is one
        check_ready(config)
        with owning(run, launcher=True):
            with launch.stopped_by_signals():  # tokenizing may take hours
                check_before_launch(config)
            launch.launch_local(["train", str(args.config), *args.overrides], config.cluster.processes)
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    else:
        from hbp.run.job import run_job

        with launch.process_group(config.train.hang_minutes) as device:
            summary = run_job(config, device)
            if not launch.reports_here():
                return None
    from hbp.report.page import write_report

    report = write_report(run)
    if not args.json:
        from hbp.cli.tables import run_table

        run_table(summary, disturbed=any(s.get("disturbed", False) for s in report.numbers["strategies"]))
        print(f"report: {report.html}")
    return {**summary, "report": str(report.html)}


def run_torchrun(arguments: list[str]) -> None:
    """`hbp torchrun`, with torchrun's arguments."""
    from hbp.train import launch

    launch.launch_torchrun(arguments)


def run_profile(args: argparse.Namespace) -> dict[str, Any] | None:
    """`hbp profile`; None on the ranks that the first one speaks for."""
    from hbp.config import load_config
    from hbp.train import launch

    config = load_config(args.config, args.overrides)
    out = args.out or Path(config.run_dir) / "profile.json"
    check_numbers(args, {"layers": 1})
    if not launch.under_torchrun():
        from hbp.run.job import check_before_launch

        check_before_launch(config, logs=False)
        layers = [] if args.layers is None else ["--layers", str(args.layers)]
        arguments = ["profile", str(args.config), *args.overrides, "--out", str(out), *layers]
        launch.launch_local(arguments, config.cluster.processes)
    elif not _profile_here(config, out, args.layers):
        return None
    from hbp.report.profile_page import write_cost_page

    profile: dict[str, Any] = json.loads(out.read_text())
    page = write_cost_page(out)
    if not args.json:
        from hbp.cli.tables import profile_table

        profile_table(profile)
        print(f"profile: {out}\npictures: {page}")
    return {"profile": str(out), "page": str(page), **profile}


def _profile_here(config: Config, out: Path, layers: int | None) -> bool:
    """As one rank of several; whether this one speaks."""
    from hbp.run.engine import make_engine, profile_cluster
    from hbp.train import launch
    from hbp.train.watch import watch_others

    with launch.process_group(config.train.hang_minutes) as device, watch_others():
        heights = None if layers is None else (layers, 2 * layers)
        profile_cluster(make_engine(config, device), out, heights)
        return launch.reports_here()

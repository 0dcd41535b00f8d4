"""Every command's options, as `--help` prints them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hbp.errors import HbpError

STRATEGY_NAMES = ("concat", "ffd", "bfd", "isf", "sorted", "lb", "dcp", "hbp", "hbp-mixed")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other wrong input is told."""

    def error(self, message: str) -> NoReturn:
        raise HbpError(f"{message}; see `{self.prog} --help`")


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of these arguments; ``command`` names the command."""
    parser = _Parser(prog="hbp", description="Hierarchical Balance Packing for long-context training")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")

    plan = commands.add_parser("plan", parents=[common], help="turn lengths into a plan folder")
    _add_planning(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks to plan for")
    plan.add_argument("--strategy", default="hbp-mixed", help=f"one of {', '.join(STRATEGY_NAMES)} (default hbp-mixed)")
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the plan to")
    plan.add_argument("--explain", action="store_true", help="say why each group is there and runs as it does")

    compare = commands.add_parser("compare", parents=[common], help="plan with every strategy, one table")
    _add_planning(compare)
    compare.add_argument(
        "--gpus", required=True, metavar="N|N,N|N..N", help="ranks to plan for, one number or several (8..256 doubles)"
    )
    compare.add_argument(
        "--strategies",
        metavar="NAME,NAME",
        help="in this order; speed-ups are over the first (default: all that take seconds)",
    )
    compare.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw efficiency and speed-up over GPUs")

    simulate = commands.add_parser(
        "simulate", parents=[common], help="predicted time, its parts, memory and cost of plans, here or elsewhere"
    )
    simulate.add_argument(
        "plans", type=Path, nargs="+", metavar="PLAN", help="plan folders; the first is the reference"
    )
    simulate.add_argument("--price", type=float, metavar="PER_HOUR", help="of one GPU for an hour, to give the cost")
    simulate.add_argument(
        "--timeline", type=Path, metavar="FILE.parquet", help="write what each rank of the first plan does when"
    )
    simulate.add_argument("--steps", metavar="A..B", help="of the timeline (default: all)")
    simulate.add_argument("--ranks", metavar="A..B", help="of the timeline (default: all)")
    simulate.add_argument("--gpus", metavar="N,N|N..N", help='"what if": plan anew for these numbers of GPUs')
    simulate.add_argument(
        "--cluster", nargs="+", action="extend", default=[], metavar="NAME|FILE", help='"what if": on these clusters'
    )
    simulate.add_argument(
        "--global-batch-tokens", type=int, metavar="TOKENS", help='"what if": of a step (default: as the plan)'
    )

    report = commands.add_parser("report", parents=[common], help="write the HTML page of a run or a plan")
    report.add_argument("target", type=Path, metavar="RUN|PLAN", help="folder of a run or of a plan")
    report.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: report.html in the folder)")

    formatter = argparse.RawDescriptionHelpFormatter
    job = _Parser(add_help=False)
    job.add_argument("config", type=Path, metavar="CONFIG.yaml")
    job.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single options")
    train = commands.add_parser(
        "train",
        parents=[common, job],
        help="run the whole job that a YAML file describes",
        formatter_class=formatter,
        description="Prepare, profile, plan and train what a YAML file describes. Alone it starts local processes;\n"
        "under torchrun it is one rank: torchrun --nproc-per-node 8 -m hbp train config.yaml",
    )

    profile = commands.add_parser(
        "profile",
        parents=[common, job],
        help="measure the cost model on this machine's devices",
        formatter_class=formatter,
        description="Measure the cost model's constants on this machine, on the engine that trains, and write a\n"
        "profile file that `--cluster` and `cluster.name` take. Model, data and cluster are those of CONFIG.yaml.",
    )
    profile.add_argument("--out", type=Path, help="file to write (default: profile.json in run_dir)")
    profile.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="measure stacks of N and 2N layers and scale to all (default: the whole model, or for a large one N = 2)",
    )

    if {"train", "profile"} & set(arguments[:1]):  # the options' list needs pydantic and yaml, plan does not
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

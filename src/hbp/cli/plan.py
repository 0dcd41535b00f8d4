"""``hbp plan`` and ``hbp compare``: lengths, a model and devices in; a plan folder, or a row a strategy, out."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbp.cli.usage import Commands, Parser, check_numbers, check_out, parse_counts
from hbp.errors import HbpError, did_you_mean
from hbp.plan_info import DEFAULT_ORDER, ORDERS
from hbp.progress import Progress, say

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hbp.cost.model_spec import ModelSpec
    from hbp.cost.predict import CostModel
    from hbp.data.store import TokenStore
    from hbp.plan import Plan

    Lengths = npt.NDArray[np.int32]
    Pairs = npt.NDArray[np.bool_] | None

ONE_KIND = 0.25
"""Drift of a plan's steps above which it is worth a word: random packs have some .17 (docs/planning.md)."""
LEAST = {"max_length": 1, "global_batch_tokens": 1, "seed": 0, "short_steps": 0}
"""The options that shape a plan, with their least values."""
SHOWN_GROUPS = 32


def add_parser(commands: Commands) -> None:
    """Declare both commands."""
    plan = commands.add_parser(
        "plan", help="turn lengths into a plan folder", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan.set_defaults(run=run_plan)
    _add_planning(plan)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks to plan for")
    plan.add_argument("--strategy", default="hbp-mixed", metavar="NAME", help="one of those below (default hbp-mixed)")
    plan.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the plan to")
    plan.add_argument("--sp", type=int, metavar="N", help="one SP degree for every pack, for trainers that need one")
    plan.add_argument("--gc", type=int, metavar="K", help="one number of recomputed layers for every pack")
    plan.add_argument(
        "--equal-micro-steps", action="store_true", help="as many micro-steps in every optimizer step (hbp export)"
    )
    plan.add_argument("--explain", action="store_true", help="say why each group is there and runs as it does")
    compare = commands.add_parser(
        "compare", help="plan with every strategy, one table", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compare.set_defaults(run=run_compare)
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


def _add_planning(parser: Parser) -> None:
    parser.late_epilog = _strategies
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
    parser.add_argument(
        "--too-long",
        choices=("drop", "truncate", "split"),
        default="drop",
        help="of --data, samples over --max-length: left out by name, their start alone, or every piece a sample, as "
        "data.too_long of `hbp train` has it (default drop)",
    )
    parser.add_argument("--global-batch-tokens", type=int, metavar="TOKENS", help="tokens of an optimizer step")
    parser.add_argument("--short-steps", type=int, metavar="N", help="curriculum: first steps with short groups only")
    parser.add_argument(
        "--order",
        choices=ORDERS,
        help="hbp-mixed, what an optimizer step holds. fastest: packs of one kind; balanced: the data's mix, as near "
        f"as 5 %% of the speed buys; random: what a shuffle puts there, at any price (default {DEFAULT_ORDER})",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed is another epoch")


def run_plan(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp plan`."""
    from hbp.plan import JSON_NAME, write_plan
    from hbp.planning.pairs import plan_with_pairs
    from hbp.simulator import simulate

    check_numbers(args, LEAST)
    check_out(args.out, JSON_NAME)
    _check_strategy(args.strategy)
    cost, (lengths, pair) = _cost(args, args.gpus), _samples(args)
    if args.sp is None and args.gc is None and not args.equal_micro_steps:
        plan = plan_with_pairs(lengths, pair, cost, strategy=args.strategy, **_shape(args))
    else:
        from hbp.planning.one_setting import one_setting_plan

        if pair is not None and pair.any():
            raise HbpError("--sp, --gc and --equal-micro-steps do not know preference pairs; leave them out")
        one = {"sp_degree": args.sp, "gc_layers": args.gc, "equal_micro_steps": args.equal_micro_steps}
        plan = one_setting_plan(lengths, cost, strategy=args.strategy, **one, **_shape(args))
    if args.too_long != "drop":  # whoever follows the plan has to cut alike
        cut = {"too_long": args.too_long, "cut_to": args.max_length}
        plan = dataclasses.replace(plan, info=dataclasses.replace(plan.info, settings={**plan.info.settings, **cut}))
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
    if args.explain:
        from hbp.planning.explain import explain

        result["explain"] = explain(plan, cost, lengths)
    if not args.json:
        _show_plan(plan, result, args.model)
    for line in _worth_knowing(plan):
        say(line)
    return result


def _show_plan(plan: Plan, result: Mapping[str, Any], model: str) -> None:
    from hbp.cli.tables import metrics_table, table

    groups = [(f"{g.capacity:,}", str(g.sp_degree), str(g.gc_layers)) for g in plan.info.groups]
    name = "groups" if len(groups) <= SHOWN_GROUPS else f"first {SHOWN_GROUPS} of {len(groups)} groups"
    table(name, ("packing length", "SP degree", "GC layers"), groups[:SHOWN_GROUPS])
    metrics_table([(plan.info.strategy, plan.info.metrics, result["simulation"])])
    details = plan.info.details
    if "price" in details:
        price = f"{details['price']:+.1%} predicted seconds over fastest"
        print(f"order {plan.info.settings['order']}: {price}, drift {details['drift']:.3f}")
    for why in result.get("explain", ()):
        print(f"- {why}")
    shown = {name: f"{value:,.0f}" if name.endswith("_tokens") else f"{value:.4f}" for name, value in details.items()}
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items()))
    print(f"{len(plan.sample_ids):,} samples in {plan.n_packs:,} packs, {plan.n_steps:,} steps → {result['plan']}")
    known = model if Path(model).exists() else "DIR"
    print(f"does it fit? on one device: hbp rehearse {result['plan']} --model {known} --memory")


def _worth_knowing(plan: Plan) -> Iterator[str]:
    """What may not be as the user meant it."""
    from hbp.plan import batch_not_kept
    from hbp.planning.planner import STRATEGIES

    batch = batch_not_kept(plan)
    if batch is not None:
        yield f"{batch}; give more --global-batch-tokens, or fewer --gpus"
    could_do_better = STRATEGIES[plan.info.strategy].orders and "order" not in plan.info.settings
    if could_do_better and plan.info.details.get("drift", 0.0) > ONE_KIND:
        yield (
            f"steps hold samples of one kind (drift {plan.info.details['drift']:.2f}); for a plan to train by, see "
            "--order balanced (docs/quality.md)"
        )
    if plan.info.dropped:
        sample, reason = plan.info.dropped[0]
        count = f"{len(plan.info.dropped):,} samples (listed in plan.json)"
        yield f"dropped {count}, the first: sample {sample}, {reason}"


def run_compare(args: argparse.Namespace) -> dict[str, Any]:
    """`hbp compare`."""
    check_numbers(args, LEAST)
    sizes, asked = parse_counts(args.gpus), _asked_for(args.strategies)
    first = _cost(args, sizes[0])
    costs = [dataclasses.replace(first, world_size=gpus) for gpus in sizes]
    lengths, pair = _samples(args)
    rows = compare_rows(lengths, costs, asked or _quick_enough(len(lengths)), _shape(args), pair)
    planned = [row for row in rows if "error" not in row]
    if not planned:
        raise HbpError(rows[0]["error"])
    if not args.json:
        from hbp.cli.tables import compare_table

        compare_table(rows)
    if args.plot is not None:
        from hbp.report.figures import standalone, strategies_over_gpus

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(standalone(strategies_over_gpus(planned)))
        say(f"plot: {args.plot}")
    return {"rows": rows}


def compare_rows(
    lengths: Lengths,
    costs: Sequence[CostModel],
    strategies: Sequence[str],
    shape: Mapping[str, Any],
    pair: Pairs = None,
) -> list[dict[str, Any]]:
    """A row for each strategy at each number of ranks: its metrics and simulation, or ``error``.

    Args:
        lengths: of the samples.
        costs: one for each number of ranks.
        strategies: in the table's order; ``speedup`` is over the first, None where that cannot be planned.
        shape: further options of the plans.
        pair: whether a sample begins a preference pair.
    """
    from hbp.planning.pairs import plan_with_pairs
    from hbp.simulator import simulate

    rows: list[dict[str, Any]] = []
    with Progress("compare", len(strategies) * len(costs)) as progress:
        for cost in costs:
            first = None  # seconds of the first strategy
            for name in strategies:
                row: dict[str, Any] = {"strategy": name, "gpus": cost.world_size}
                try:
                    plan = plan_with_pairs(lengths, pair, cost, strategy=name, **shape)
                except HbpError as error:
                    rows.append(row | {"error": str(error)})
                else:
                    metrics = plan.info.metrics
                    first = metrics["predicted_s"] if name == strategies[0] else first
                    speedup = first / metrics["predicted_s"] if first else None
                    rows.append(row | {**metrics, **simulate(plan).to_json(), "speedup": speedup})
                progress.advance(f"{name}, {cost.world_size} GPUs")
    return rows


def _strategies() -> str:
    """A line of help for each strategy."""
    from hbp.planning.planner import STRATEGIES

    return "strategies:\n\n" + "\n".join(f"  {s.name:<12}{s.summary}" for s in STRATEGIES.values())


def _check_strategy(name: str) -> None:
    from hbp.planning.planner import STRATEGIES

    if name not in STRATEGIES:
        raise HbpError(f"no strategy {name!r}{did_you_mean(name, STRATEGIES)}: give one of {', '.join(STRATEGIES)}")


def _asked_for(strategies: str | None) -> list[str]:
    """The names in ``--strategies``; none where all are meant."""
    from hbp.planning.planner import STRATEGIES

    if strategies is None:
        return []
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    unknown = [name for name in names if name not in STRATEGIES]
    if not names or unknown:
        hint = did_you_mean(unknown[0], STRATEGIES) if unknown else ""
        raise HbpError(f"--strategies {strategies}{hint}: give some of {','.join(STRATEGIES)}")
    return names


def _quick_enough(samples: int) -> list[str]:
    """All strategies that do not take minutes for so many samples."""
    from hbp.planning.planner import STRATEGIES

    slow = [name for name, strategy in STRATEGIES.items() if samples > (strategy.slow_above or math.inf)]
    if slow:
        say(f"{', '.join(slow)} left out, slow on {samples:,} samples; --strategies takes it")
    return [name for name in STRATEGIES if name not in slow]


def _samples(args: argparse.Namespace) -> tuple[Lengths, Pairs]:
    """Lengths of the samples, and for those of a store whether each begins a preference pair."""
    from hbp.data.store import CHOSEN, read_lengths

    if args.too_long != "drop" and (args.lengths is not None or args.max_length is None):
        raise HbpError(f"--too-long {args.too_long} cuts the samples of --data to --max-length; give both")
    if args.lengths is not None:
        return read_lengths(args.lengths), None
    store = _store(args)
    if args.too_long != "drop":
        from hbp.data.samples import cut_to

        store = cut_to(store, args.max_length, args.too_long)
    return store.lengths, store.part == CHOSEN


def _store(args: argparse.Namespace) -> TokenStore:
    from hbp.data.store import open_store

    if (Path(args.data) / "store.json").is_file():
        return open_store(Path(args.data))
    from hbp.config import DataConfig
    from hbp.cost.known_models import KNOWN_MODELS
    from hbp.run.data import cached_store

    if args.tokenizer is None and args.model in KNOWN_MODELS:
        raise HbpError(f"--data needs --tokenizer DIR: the built-in {args.model} is dimensions only")
    return cached_store(DataConfig(source=args.data), args.tokenizer or args.model)


def _cost(args: argparse.Namespace, gpus: int) -> CostModel:
    from hbp.cost.cluster import load_cluster
    from hbp.cost.predict import CostModel

    if gpus < 1:
        raise HbpError(f"--gpus {gpus}: give at least 1")
    load_cluster(args.cluster)  # a name of which there is none is said before a model is looked for on a hub
    if args.memory_gib is not None and not 0 < args.memory_gib < 1e6:
        raise HbpError(f"--memory-gib {args.memory_gib:g}: give a device's memory in GiB, such as 80")
    return CostModel.of(_model(args.model), args.cluster, gpus, memory_gib=args.memory_gib)


def _model(name_or_folder: str) -> str | ModelSpec:
    """The model; of a family that the cost model does not know as `hbp train` takes it, which needs transformers."""
    from hbp.cost.dimensions import known_family
    from hbp.cost.known_models import load_config

    config, name = load_config(name_or_folder)
    family = config.get("model_type")
    if known_family(config) or not isinstance(family, str):
        return name_or_folder
    from hbp.train.check.describe import describe_model

    spec = describe_model(name_or_folder, name=name)
    say(
        f"{family} models are unproven and planned as a plain decoder of {spec.parameters():,} parameters; "
        f"`hbp check {name_or_folder}` says whether they train here"
    )
    return spec


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in (*LEAST, "order")}

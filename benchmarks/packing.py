"""The planner against its peers: speed of fitting, padding, imbalance, efficiency, size, streaming, order.

Every figure comes with what it is compared with, run in this process on the same lengths, one thread, in turn.
Sections:

- `fitting`: packers alone at one packing length; real peers where they are installed (`pip install trl binpacking`,
  `pip install --no-deps axolotl llamafactory ms-swift verl xtuner`), each on its own clock alone. Balance
  over 32 ranks, packs in random order, in the packer's own and in order of attention cost.
- `plans`: whole plans of every strategy on the published length sets, 32 to 1,024 ranks, fast and slow networks, at the
  packing length that is the set's own; and short samples without that limit.
- `size`: the whole plan of ten million samples, written, against reading and sorting (and argsorting) their lengths;
  peak memory of a hundred million, in a process of its own.
- `streaming`: padding, imbalance and efficiency by size of the buffer.
- `order`: what staying near a random order costs, by number of windows; drift and price of every `plan.order`, by
  global batch.
- `startup`: the whole command on a thousand lengths, a fresh process with a warm cache of compiled functions.

Every kept row has its date. With `--sets` or `--most-samples` whole plans are made of some cases only and the other
rows of the section stay as they are; the tables mark rows of an earlier date. `--keep-times` leaves `samples_per_s` as
it was measured before (`timed`), where something else runs on the machine.

    python benchmarks/packing.py [--quick] [--json] [--section NAME] [--out benchmarks/results/packing.json]
        [--sets tulu3-longcite,mix-128k] [--most-samples 100000] [--keep-times]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from packing_peers import Packer, peers

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import LENGTH_SETS, generate
from hbp.plan import Plan, imbalance, write_plan
from hbp.plan_info import ORDERS
from hbp.planning.kernels import best_fit_decreasing, counting_sort
from hbp.planning.mixed.even_fit import even_fit
from hbp.planning.mixed.stream import StreamPlanner
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import Progress

Lengths = npt.NDArray[np.int32]
Row = dict[str, Any]
MODEL, RANKS = "llama-3.1-8b", 32
OURS = tuple(name for name, strategy in STRATEGIES.items() if strategy.ours)
QUICK = tuple(name for name, strategy in STRATEGIES.items() if strategy.slow_above is None)
ENOUGH_S = 5.0
"""Seconds after which a packer is not timed again."""
SLOW = ("trl", "binpacking", "ms-swift", "verl", "xtuner")
"""Peers that would take minutes for a million samples."""
FITTING_SETS = ("short-32k", "short-128k", "mix-32k", "mix-128k")
PLAN_SETS = (*FITTING_SETS, "tulu3-longcite", "openhermes-longcite", "mix-1m")
NO_LIMIT = "short, no limit"
"""The short samples where every strategy may pack as long as it likes."""
USUAL = ("concat", "bfd", "hbp", "hbp-mixed")
CASES = (
    (20_000, 32, "h100-nvlink", tuple(STRATEGIES)),
    (100_000, 32, "h100-nvlink", QUICK),
    (1_000_000, 32, "h100-nvlink", QUICK),
    *((1_000_000, gpus, "h100-nvlink", (*USUAL, "dcp")) for gpus in (256, 1024)),
    *((1_000_000, gpus, "h100-ethernet", USUAL) for gpus in (32, 256)),
    (1_000_000, 1024, "h100-ethernet", (*USUAL, "dcp")),
    (1_000_000, 256, "a100-pcie", USUAL),
    (1_000_000, 1024, "a100-pcie", (*USUAL, "dcp")),
)
"""Samples, ranks, cluster and strategies of whole plans; lb takes minutes for more samples."""
EVERY_ROW = ("samples_per_s", "padding", "abr", "efficiency")
"""What every row has, null where its section does not measure it."""


def cost_model(gpus: int, cluster: str = "h100-nvlink") -> CostModel:
    return CostModel(load_model_spec(MODEL), CLUSTERS[cluster], gpus)


def seconds_of(run: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median of the repeats, and the last result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def even(lengths: Lengths, capacity: int) -> npt.NDArray[np.integer]:
    """Even fit at one length: bin of each sample; what finds no room goes to bins of its own by best fit."""
    counts = np.bincount(lengths).astype(np.int64)
    packs = -(-int(lengths.sum(dtype=np.int64)) // capacity)
    left = counts.copy()
    pack_of, taken, _ = even_fit(left, np.full(packs, capacity), RANKS)
    order = counting_sort(np.arange(len(lengths)), lengths, int(lengths.max()))
    bin_of = np.full(len(lengths), -1)
    by_length = np.argsort(taken, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    taken_sorted = taken[by_length]
    rank = np.arange(len(taken)) - np.searchsorted(taken_sorted, taken_sorted)
    bin_of[order[starts[taken_sorted] + rank]] = pack_of[by_length]
    rest = np.flatnonzero(bin_of < 0)
    bin_of[rest] = packs + best_fit_decreasing(lengths[rest], capacity, np.random.default_rng(0))
    return bin_of


def balance(bin_of: npt.NDArray[np.integer], lengths: Lengths, *, sort: bool | None) -> float:
    """ABR over 32 ranks of packs dealt in random order, in order of attention cost, or (None) as they are numbered."""
    cost = np.bincount(bin_of, weights=lengths.astype(np.float64) ** 2)
    if sort is not None:
        cost = -np.sort(-cost) if sort else np.random.default_rng(0).permutation(cost)
    whole = len(cost) // RANKS * RANKS
    if not whole:
        return float("nan")
    return imbalance(cost[:whole], np.ones(whole), np.arange(whole) // RANKS, RANKS)


def fitting(quick: bool) -> Iterator[Row]:
    packers: dict[str, Packer] = {
        "hbp best fit": lambda lengths, c: seconds_of(
            lambda: best_fit_decreasing(lengths, c, np.random.default_rng(0)), 1
        ),
        "hbp even fit": lambda lengths, c: seconds_of(lambda: even(lengths, c), 1),
        **peers(),
    }
    warm = generate("short-32k", 3000, 1)
    for packer in packers.values():
        packer(warm, 32768)
    for name in FITTING_SETS[:2] if quick else FITTING_SETS:
        for samples in (5_000,) if quick else (100_000, 1_000_000):
            lengths, capacity = generate(name, samples, 1234), LENGTH_SETS[name][3]
            times: dict[str, list[float]] = {packer: [] for packer in packers}
            bins: dict[str, npt.NDArray[np.integer]] = {}
            for _ in range(1 if quick else 3):  # in turn, so that noise hits all alike
                for packer, pack in packers.items():
                    if (samples > 100_000 and packer.startswith(SLOW)) or sum(times[packer]) > ENOUGH_S:
                        continue
                    seconds, bins[packer] = pack(lengths, capacity)
                    times[packer].append(seconds)
            best, level = (statistics.median(times[f"hbp {kind} fit"]) for kind in ("best", "even"))
            for packer, found in bins.items():  # slow ones not at a million
                packs, used = int(found.max()) + 1, np.bincount(found, weights=lengths)
                seconds = statistics.median(times[packer])
                yield {
                    "section": "fitting",
                    "strategy": packer,
                    "set": name,
                    "samples": samples,
                    "samples_per_s": samples / seconds,
                    "times_best_fit": seconds / best,
                    "times_even_fit": seconds / level,
                    "padding": float(1 - used.sum() / (packs * capacity)),
                    "over_capacity": int((used > capacity).sum()),
                    "abr": balance(found, lengths, sort=True),
                    "abr_own_order": balance(found, lengths, sort=None),
                    "abr_random_order": balance(found, lengths, sort=False),
                }


def plan_row(plan: Plan, section: str, name: str, gpus: int, cluster: str, seconds: float | None = None) -> Row:
    m, longest_alone = plan.info.metrics, max((g.capacity for g in plan.info.groups if g.sp_degree == 1), default=0)
    most = np.maximum.reduceat(plan.lengths, plan.sample_offsets[:-1])  # of a pack
    needless = plan.tokens()[(plan.sp_degree > 1) & (most <= longest_alone)].sum()
    row = {
        "section": section,
        "strategy": plan.info.strategy,
        "set": name,
        "samples": plan.info.n_samples,
        "gpus": gpus,
        "cluster": cluster,
        "padding": m["pr"],
        "abr": m["abr"],
        "cr": m["cr"],
        "cr_least": float(plan.lengths[plan.lengths > longest_alone].sum(dtype=np.int64) / plan.info.n_tokens),
        "cr_needless": float(needless / plan.info.n_tokens),
        "efficiency": m["efficiency"],
        "predicted_s": m["predicted_s"],
        "groups": [str(group) for group in plan.info.groups],
        **plan.info.details,
    }
    return row if seconds is None else {**row, "samples_per_s": plan.info.n_samples / seconds}


def plans(quick: bool, sets: Sequence[str] = (*PLAN_SETS, NO_LIMIT), most: float = math.inf) -> Iterator[Row]:
    """Of all sets and cases, or of some sets and of cases of so many samples at most."""
    make_plan(generate("mix-128k", 2000, 0), cost_model(32))  # compile
    for name in ("short-32k", "mix-128k") if quick else sets:
        source, limit = ("short-32k", None) if name == NO_LIMIT else (name, LENGTH_SETS[name][3])
        for samples, gpus, cluster, strategies in [(2_000, *CASES[0][1:])] if quick else CASES:
            if samples > most:
                continue
            lengths, cost = generate(source, samples, 0), cost_model(gpus, cluster)
            for strategy in strategies:
                make = partial(make_plan, lengths, cost, strategy=strategy, max_length=limit)
                seconds, plan = seconds_of(make, 3 if strategy in OURS and samples <= 100_000 and not quick else 1)
                yield plan_row(plan, "plans", name, gpus, cluster, seconds)


def size(quick: bool) -> Iterator[Row]:
    make_plan(generate("mix-128k", 2000, 0), cost_model(32))  # compile
    for name in ("short-128k",) if quick else ("short-128k", "mix-128k"):
        samples = 200_000 if quick else 10_000_000
        lengths, cost = generate(name, samples, 0), cost_model(RANKS)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "lengths.parquet"
            pq.write_table(pa.table({"length": lengths}), file)

            def read() -> Lengths:
                return pq.read_table(file)["length"].to_numpy()  # noqa: B023

            sort, _ = seconds_of(lambda: np.sort(read()), 3)
            argsort, _ = seconds_of(lambda: np.argsort(read(), kind="stable"), 3)
            whole, plan = seconds_of(lambda: make_plan(read(), cost), 1 if quick else 3)  # noqa: B023
            write, _ = seconds_of(lambda: write_plan(plan, Path(scratch) / "plan"), 1 if quick else 3)  # noqa: B023
        yield {
            **plan_row(plan, "size", name, RANKS, "h100-nvlink", whole + write),
            "plan_s": whole,
            "write_s": write,
            "times_read_and_sort": (whole + write) / sort,
            "times_read_and_argsort": (whole + write) / argsort,
        }
    samples = 200_000 if quick else 100_000_000
    done = subprocess.run(
        [sys.executable, __file__, "--huge", str(samples)], capture_output=True, text=True, check=True
    )
    yield json.loads(done.stdout)


def huge(samples: int) -> Row:
    """One plan of so many samples, written, in this process; its peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "lengths.npy"
        # Made a part at a time, so that the peak is the planner's and not the generator's.
        array = np.lib.format.open_memmap(file, "w+", np.int32, (samples,))
        part = 1_000_000
        for begin in range(0, samples, part):
            array[begin : begin + part] = generate("mix-128k", min(part, samples - begin), begin)
        array.flush()
        del array
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        plan = make_plan(np.load(file, mmap_mode="r"), cost_model(RANKS))
        write_plan(plan, Path(scratch) / "plan")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = plan_row(plan, "size", "mix-128k", RANKS, "h100-nvlink", seconds)
    return {**row, "peak_gib": peak / 2**20, "before_gib": before / 2**20}


def streaming(quick: bool) -> Iterator[Row]:
    samples = 20_000 if quick else 500_000
    for name in ("tulu3-longcite",) if quick else ("short-128k", "mix-128k", "tulu3-longcite"):
        lengths, cost = generate(name, samples, 0), cost_model(RANKS)
        for buffer in (5_000,) if quick else (5_000, 20_000, 80_000, 320_000):
            planner = StreamPlanner(cost, buffer, max_length=int(lengths.max()))
            start = time.perf_counter()
            pieces = [piece for at in range(0, samples, 4096) for piece in planner.add(lengths[at : at + 4096])]
            last = planner.finish()
            pieces += [last] if last else []
            seconds = time.perf_counter() - start
            time_s = sum(piece.info.metrics["predicted_s"] for piece in pieces)
            weights = [len(piece.micro_step_seconds()) for piece in pieces]
            capacity = sum(int(piece.capacity.sum(dtype=np.int64)) for piece in pieces)
            best = sum(piece.info.metrics["predicted_s"] * piece.info.metrics["efficiency"] for piece in pieces)
            yield {
                "section": "streaming",
                "strategy": "hbp-mixed",
                "set": name,
                "samples": samples,
                "buffer": buffer,
                "samples_per_s": samples / seconds,
                "padding": 1 - int(lengths.sum(dtype=np.int64)) / capacity,
                "abr": float(np.average([piece.info.metrics["abr"] for piece in pieces], weights=weights)),
                "efficiency": best / time_s,
            }


def order(quick: bool) -> Iterator[Row]:
    samples = 20_000 if quick else 1_000_000
    for name in ("mix-128k",) if quick else ("mix-128k", "tulu3-longcite"):
        lengths, cost = generate(name, samples, 0), cost_model(RANKS)
        for windows in (None, 1) if quick else (None, 1, 4, 16, 64):
            plan = make_plan(lengths, cost, order="fastest", windows=windows)
            batch = plan.info.n_tokens // plan.n_steps  # as it came out
            # Steps of so many random packs have a drift too: what is left is not the planner's.
            random = make_plan(
                lengths, cost, strategy="isf", max_length=LENGTH_SETS[name][3], global_batch_tokens=batch
            )
            yield {
                **plan_row(plan, "order", name, RANKS, "h100-nvlink"),
                "windows": plan.info.settings["windows"],
                "default": windows is None,
                "drift_random": random.info.details["drift"],
                "batch_random": random.info.n_tokens // random.n_steps,
            }
        lengths = generate(name, min(samples, 100_000), 0)
        for batch in (2**21,) if quick else (2**19, 2**21, 2**23):
            asked: dict[str, Any] = {"global_batch_tokens": batch, "short_steps": 0}
            for strategy in ("concat", "isf"):
                plan = make_plan(lengths, cost, strategy=strategy, **asked)
                yield {**plan_row(plan, "order", name, RANKS, "h100-nvlink"), "global_batch_tokens": batch}
            for kind in ORDERS:
                plan = make_plan(lengths, cost, order=kind, **asked)
                row = plan_row(plan, "order", name, RANKS, "h100-nvlink")
                row["n_groups"] = len(row.pop("groups"))  # of packs made step by step, a hundred
                yield {**row, "global_batch_tokens": batch, "order": kind, "steps": plan.n_steps}


def startup(quick: bool) -> Iterator[Row]:
    """Seconds of `hbp plan` on a thousand lengths, a fresh process each, after one that fills numba's cache."""
    samples, name = 1000, "tulu3-longcite"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "lengths.npy"
        np.save(file, generate(name, samples, 0))
        command = [sys.executable, "-m", "hbp", "plan", "--lengths", str(file), "--model", MODEL]
        command += ["--gpus", str(RANKS), "--out", str(Path(scratch) / "plan")]

        def plan() -> None:
            subprocess.run(command, capture_output=True, check=True)

        plan()
        times = [seconds_of(plan, 1)[0] for _ in range(2 if quick else 5)]
    row = {"section": "startup", "strategy": "hbp-mixed", "set": name, "samples": samples, "gpus": RANKS}
    median = statistics.median(times)
    yield {**row, "samples_per_s": samples / median, "seconds": median, "least_s": min(times), "most_s": max(times)}


IDENTITY = (
    "section",
    "strategy",
    "set",
    "samples",
    "gpus",
    "cluster",
    "buffer",
    "windows",
    "global_batch_tokens",
    "order",
)
"""What makes two rows the same measurement, where a row has it."""


def merge(old: Row, rows: list[Row], chosen: Sequence[str], *, whole: bool, keep_times: bool) -> list[Row]:
    """Rows of a kept file and new ones, each with its date.

    Args:
        old: what the file holds.
        rows: just measured.
        chosen: the sections that were.
        whole: whether they replace their sections, rather than the same measurements alone.
        keep_times: leave `samples_per_s` as it was, and say in `timed` of when it is.
    """

    def identity(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in IDENTITY)

    before = {identity(row): {"date": old["date"], **row} for row in old["rows"]}
    for row in rows:
        known = before.get(identity(row)) if keep_times else None
        if known is not None:
            row |= {"samples_per_s": known["samples_per_s"], "timed": known.get("timed", known["date"])}
    new = {identity(row): row for row in rows}
    if whole:
        return [row for row in before.values() if row["section"] not in chosen] + rows
    return [new.pop(at, row) for at, row in before.items()] + list(new.values())


SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "fitting": fitting,
    "plans": plans,
    "size": size,
    "streaming": streaming,
    "order": order,
    "startup": startup,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sets, under a minute")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    parser.add_argument("--section", choices=SECTIONS, help="one section alone")
    parser.add_argument("--out", type=Path, help="file for the raw rows; the rows of other sections in it stay")
    parser.add_argument("--sets", help="whole plans of these sets alone, comma-separated")
    parser.add_argument("--most-samples", type=int, help="whole plans of at most so many samples")
    parser.add_argument("--keep-times", action="store_true", help="leave samples/s in the file as they are")
    parser.add_argument("--huge", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.huge:
        print(json.dumps(huge(args.huge)))
        return
    some: Row = {"sets": args.sets.split(",")} if args.sets else {}
    some |= {"most": args.most_samples} if args.most_samples else {}
    if some and args.section != "plans":
        parser.error("--sets and --most-samples are of --section plans")
    chosen, today = [args.section] if args.section else list(SECTIONS), datetime.date.today().isoformat()
    rows: list[Row] = []
    section_s: dict[str, float] = {}
    with Progress("packing", len(chosen)) as progress:
        for section in chosen:
            start = time.perf_counter()
            for row in plans(args.quick, **some) if some else SECTIONS[section](args.quick):
                rows.append({**dict.fromkeys(EVERY_ROW), **row, "date": today})
                progress.advance(f"{section}: {row['set']} {row['strategy']}", 0)
            section_s[section] = time.perf_counter() - start
            progress.advance(section)
    result: dict[str, Any] = {
        "date": today,
        "device": "one CPU core",
        "model": MODEL,
        "command": "python benchmarks/packing.py" + (" --quick" if args.quick else ""),
        "section_s": section_s,
        "rows": rows,
    }
    if args.out:
        if args.out.exists():
            old = json.loads(args.out.read_text())
            result["rows"] = merge(old, rows, chosen, whole=not some, keep_times=args.keep_times)
            kept = some or args.keep_times
            result["section_s"] = {**old.get("section_s", {}), **({} if kept else section_s)}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        for row in rows:
            print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k != "groups"})


if __name__ == "__main__":
    main()

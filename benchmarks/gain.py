"""How much will I gain? Predicted speed-ups over contexts, GPUs, networks, long samples, and against every peer.

What the paper could not show, on the built-in H100 clusters: `peers` (every strategy and a FlexSP-style solver, four
sets), `gpus` (8 to 1,024 GPUs, three networks), `contexts` (128K to 1M tokens), `map` (share of long samples × speed of
the network) and `claims` (workloads of which others publish a speed-up, as far as they describe them). The reference is
`bfd`, the tightest single-length packing, under the fastest static setting that fits: a well-tuned user of today's
packers, not naive packing. Every strategy may pack longer than the longest sample. Every plan is made for the same
samples.

Rows that are in the file already are kept, each with its date, so that a run can be continued or widened by a strategy:
--fresh plans all anew. Sections are planned in the order in which they are asked for. --draw makes the pictures and the
numbers of docs/how-much-will-i-gain.md from the file and plans nothing.

    python benchmarks/gain.py [--quick] [--json] [--sections peers,map] [--strategies hbp] [--fresh] [--processes 2]
    python benchmarks/gain.py --draw
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from by_hand import plan_by_hand
from flexsp import flexsp
from paper_deepseek import without_fsdp

from hbp.cost.cluster import CLUSTERS, GB, ClusterSpec
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.planning.settings import longest_capacity, longest_settings
from hbp.progress import Progress
from hbp.simulator import DAY

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gain.json"
MODEL, REFERENCE, K = "llama-3.1-8b", "bfd", 1024
OURS = [name for name, strategy in STRATEGIES.items() if strategy.ours]
H100 = CLUSTERS["h100-nvlink"]
NETWORKS = {
    "NVLink throughout": dataclasses.replace(H100, name="nvlink-throughout", devices_per_node=1 << 20),
    "400 Gb/s a GPU": H100,
    "100 Gb/s a node": CLUSTERS["h100-ethernet"],
}
IN_PLACE = "400 Gb/s a GPU, experts in place"
"""Expert parallelism instead of FSDP's traffic; the experts' own all-to-all, alike on all sides, is left out."""
GBPS = (12.5, 25, 50, 100, 400)
"""Of the map: Gb/s a GPU between nodes of eight, nine tenths of it achieved; then NVLink throughout."""
STATIC = "isf-sp"
"""ISF at one degree that is not chosen, but given."""
SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3)
UNIFORM = "log-uniform, 1K to 16K"
SLOW = ["flexsp", "sorted", "lb"]
"""Planned for up to 64 GPUs: two of them take minutes for more, and one gains nothing."""


@dataclass(frozen=True)
class Case:
    """One place of a section."""

    section: str
    data: str
    samples: int
    gpus: int
    network: str
    context: int = 128 * K
    share: float | None = None
    model: str = MODEL

    def lengths(self) -> np.ndarray:
        """Samples no longer than the context."""
        if self.data == UNIFORM:
            rng = np.random.default_rng(0)
            lengths = np.exp(rng.uniform(np.log(K), np.log(16 * K), self.samples)).astype(np.int32)
        elif self.share is None:
            lengths = generate(self.data, self.samples, seed=0)
        else:
            rng = np.random.default_rng(0)
            lengths = generate("short-128k", self.samples, seed=0)
            long = rng.random(self.samples) < self.share
            lengths[long] = rng.integers(8 * K, 128 * K + 1, int(long.sum()))
        return lengths[lengths <= self.context]

    def cluster(self) -> ClusterSpec:
        """H100s on the network."""
        if self.network == IN_PLACE:
            return without_fsdp(H100)
        if self.network in NETWORKS:
            return NETWORKS[self.network]
        return dataclasses.replace(H100, node_bytes_per_s=8 * float(self.network.split()[0]) / 8 * 0.9 * GB)


def cases(quick: bool) -> Iterator[tuple[Case, list[str]]]:
    """Every place, and the strategies that are planned there."""
    usual = [REFERENCE, "isf", "dcp", *OURS]
    every = [name for name in STRATEGIES if name != "ffd"] + ["flexsp"]
    fast = "400 Gb/s a GPU"
    few = 5_000 if quick else 20_000
    for data in ("tulu3-longcite",) if quick else ("short-32k", "tulu3-longcite", "mix-128k", "mix-1m"):
        yield Case("peers", data, few, 32, fast, 1024 * K if data == "mix-1m" else 128 * K), every
    if quick:
        return
    for gpus, network in itertools.product((8, 16, 32, 64, 128, 256, 512, 1024), NETWORKS):
        more = SLOW if gpus <= 64 else []
        yield Case("gpus", "tulu3-longcite", max(20_000, 1000 * gpus), gpus, network), usual + more
    yield Case("few", "tulu3-longcite", 25_600, 256, "100 Gb/s a node"), usual
    for context, network in itertools.product((128, 256, 512, 1024), NETWORKS):
        yield Case("contexts", "mix-1m", 20_000, 64, network, context * K), usual + SLOW
    names = [f"{gbps:g} Gb/s a GPU" if gbps < 400 else fast for gbps in GBPS] + ["NVLink throughout"]
    for share, network in itertools.product(SHARES, names):
        yield Case("map", "short + long", 20_000, 32, network, share=share), [REFERENCE, *OURS]
    for network in (fast, IN_PLACE):
        place = Case("claims", UNIFORM, 20_000, 64, network, 16 * K, model="qwen3-30b-a3b")
        yield place, [*usual, "isf-sp4", "isf-sp8"]
    for model, gpus in (("llama-3.1-8b", 64), ("llama-3.1-70b", 256)):
        yield Case("claims", "mix-1m", 20_000, gpus, fast, 256 * K, model=model), [*usual, "isf-sp16", "isf-sp32"]


def measure(case: Case, strategy: str) -> dict[str, Any]:
    """One row."""
    lengths = case.lengths()
    cost = CostModel(load_model_spec(case.model), case.cluster(), case.gpus)
    row: dict[str, Any] = {**dataclasses.asdict(case), "strategy": strategy, "date": datetime.date.today().isoformat()}
    start = time.perf_counter()
    try:
        if strategy == "flexsp":
            longest = longest_capacity(lengths, None)
            static = longest_settings(cost, lengths, longest)[0].group
            batch = case.gpus // static.sp_degree * longest
            plan = plan_by_hand(strategy, flexsp, lengths, cost, None, batch, longest)
        elif strategy.startswith(STATIC):
            degree = int(strategy.removeprefix(STATIC))
            gc_layers = cost.fewest_gc_layers(case.context, degree)
            if gc_layers is None:
                raise HbpError(f"{case.context} tokens do not fit at SP {degree}")
            plan = make_plan(lengths, cost, strategy="isf", static=Group(case.context, degree, gc_layers))
        else:
            plan = make_plan(lengths, cost, strategy=strategy)
    except HbpError as error:
        return row | {"error": str(error)}
    metrics = plan.info.metrics
    return row | {
        "tokens": plan.info.n_tokens,
        "tokens_per_s": plan.info.n_tokens / metrics["predicted_s"],
        "gpu_days_per_billion": metrics["predicted_s"] * case.gpus / DAY / plan.info.n_tokens * 1e9,
        "planning_s": time.perf_counter() - start,
        **{name: metrics[name] for name in ("pr", "abr", "cr", "efficiency")},
        "groups": " · ".join(f"{g.capacity / K:.4g}K SP{g.sp_degree} GC{g.gc_layers}" for g in plan.info.groups),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    place = tuple(row[name] for name in ("section", "data", "gpus", "network", "context", "share"))
    return (*place, row.get("model", MODEL), row["strategy"])


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Speed-up of every row over the reference in its place, on the same samples.

    A row of an earlier date than the reference keeps the speed-up that it had over the reference of its own date.
    """
    reference = {key(r)[:-1]: r for r in rows if r["strategy"] == REFERENCE and "error" not in r}
    for row in rows:
        slower = reference.get(key(row)[:-1])
        if "error" not in row and slower and ("speedup" not in row or row.get("date") == slower.get("date")):
            row["speedup"] = row["tokens_per_s"] / slower["tokens_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the peers on one set, 5,000 samples; nothing is kept")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--sections", default="peers,gpus,few,contexts,map,claims", help="comma-separated (default all)"
    )
    parser.add_argument("--strategies", help="only these, comma-separated")
    parser.add_argument("--fresh", action="store_true", help="plan anew what is in the file")
    parser.add_argument("--processes", type=int, default=1, help="plan so many at a time (default 1)")
    parser.add_argument("--draw", action="store_true", help="only make the pictures and the page's numbers")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"default {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    if args.draw:
        from gain_page import draw

        draw(json.loads(args.out.read_text()), ROOT / "docs")
        return
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    if args.out.is_file() and not args.quick:
        old = json.loads(args.out.read_text())
        kept = {key(row): {"date": old["date"], **row} for row in old["rows"]}
    chosen = args.strategies.split(",") if args.strategies else None
    sections = args.sections.split(",")
    wanted = [
        (case, strategy)
        for case, strategies in cases(args.quick)
        for strategy in strategies
        if case.section in sections and (chosen is None or strategy in chosen)
    ]
    wanted.sort(key=lambda pair: sections.index(pair[0].section))
    result: dict[str, Any] = {}
    with ProcessPoolExecutor(args.processes) as pool, Progress("gain", len(wanted)) as progress:
        found: list[Future[dict[str, Any]] | None] = []
        for case, strategy in wanted:
            name = key(dataclasses.asdict(case) | {"strategy": strategy})
            found.append(pool.submit(measure, case, strategy) if args.fresh or name not in kept else None)
        for (case, strategy), task in zip(wanted, found, strict=True):
            if task is not None:
                row = task.result()
                kept[key(row)] = row
            rows = list(kept.values())
            add_speedups(rows)
            result = {
                "command": "python benchmarks/gain.py" + (" --quick" if args.quick else ""),
                "date": datetime.date.today().isoformat(),
                "model": MODEL,
                "reference": REFERENCE,
                "rows": rows,
            }
            if not args.quick:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
            progress.advance(f"{case.section}: {case.data}, {case.gpus} GPUs, {strategy}")
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{'section':9} {'data':15} {'context':>7} {'GPUs':>5} {'network':18} {'share':>6} "
        f"{'strategy':10} {'speed-up':>8}"
    )
    for r in result.get("rows", []):
        share = "" if r["share"] is None else f"{r['share']:.1%}"
        speedup = f"{r['speedup']:.2f}" if "speedup" in r else "-"
        print(
            f"{r['section']:9} {r['data']:15} {r['context'] // K:6}K {r['gpus']:5} {r['network']:18} {share:>6} "
            f"{r['strategy']:10} {speedup:>8}"
        )


if __name__ == "__main__":
    main()

"""The paper's tables again: each published figure beside ours, with the relative difference.

Lengths come from the generators of `hbp.data.length_sets`, which mirror the published mixes; times from the cost model
on the testbed that `testbed.py` fits to the paper's iteration times (Tables 4, 18, 19: `ours`). Those iterations and
all speed-ups also come on the built-in, uncorrected `h100-nvlink` (`built_in`). An optimizer step holds 512K tokens, on
256 GPUs the world filled once.

What is not published is set once for all rows: the tokens of a run, one number a data set, so that ours and the
published GPU-days agree in the geometric mean over all dense models' rows of that set. So the absolute GPU-days of a
set say one number less than there are rows; speed-ups, ABR, CR, PR and DBR do not depend on it at all.

The naive plan is ISF to the longest length at the smallest degree from 8 up that fits (by our memory model), the fewest
recomputed layers. Which settings the authors gave models beyond 8B is not published; `over SP8, all recomputed` is HBP
over ISF at SP 8 with every layer recomputed, whether or not we think that it fits. `same_step` is `ours` if the seconds
of a step, fitted to 8B, were the same for larger models rather than grew with the parameters that a GPU holds.

Tables 2, 6 and 17 are of balance, which depends on how many packs there are to sort: they draw a million samples, about
as many as the paper has. `deepseek` holds what the 2.4× of Table 5's last model may hang on (`paper_deepseek.py`).

Left out: rows without packing (Tables 3 and 13), whose batch size is not published. Table 18 gives whole runs only
beside each other, as its iterations and its GPU-days are not in the same ratios: ours are over SP 8's, too. Table 14's
seconds are of the model; FlexSP's own 3.43 s of solving come on top of them.

With `--tables` what is not asked for stays in the file as it is, each row with its date and number of samples.

    python benchmarks/paper.py [--quick] [--json] [--tables 2,5,6] [--out benchmarks/results/paper.json]
"""

from __future__ import annotations

import argparse
import bisect
import datetime
import heapq
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from by_hand import ByHand, Lengths, Made, plan_by_hand
from flexsp import flexsp
from paper_deepseek import GPUS as DEEPSEEK_GPUS
from paper_deepseek import deepseek_rows, deepseek_table_5
from testbed import K, iteration_rows, testbed

from hbp.cost.cluster import CLUSTERS, ClusterSpec
from hbp.cost.model_spec import ModelSpec, load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import LENGTH_SETS, generate
from hbp.errors import HbpError
from hbp.plan import Group
from hbp.planning.kernels import first_fit
from hbp.planning.packs import Int, packs_of, predicted_seconds
from hbp.planning.paper.packing import balance_batches, hierarchical_packs
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import Progress
from hbp.simulator import DAY

LONGEST, STEP_TOKENS = 128 * K, 512 * K
SETS = {"Tulu3 + LongCite": "tulu3-longcite", "OpenHermes + LongCite": "openhermes-longcite"}
SETS |= {"Tulu3 + LongWriter": "tulu3-longwriter"}
SHORT_SETS = {"Tulu3": "tulu3-longcite", "OpenHermes": "openhermes-longcite"}
"""Sets of which a mix has the short part alone."""
DENSE = [  # table, row, model, data, naive, HBP
    ("5", "LLaMA-3.1-8B", "llama-3.1-8b", "Tulu3 + LongCite", 5.22, 3.73),
    ("5", "Qwen2.5-32B", "qwen2.5-32b", "Tulu3 + LongCite", 21.33, 16.00),
    ("5", "LLaMA-3.1-70B", "llama-3.1-70b", "Tulu3 + LongCite", 44.40, 31.10),
    ("5", "Qwen2.5-72B", "qwen2.5-72b", "Tulu3 + LongCite", 47.10, 33.70),
    ("22", "LLaMA-3.1-8B, OpenHermes", "llama-3.1-8b", "OpenHermes + LongCite", 2.95, 2.04),
    ("23", "LLaMA-3.1-8B, LongWriter", "llama-3.1-8b", "Tulu3 + LongWriter", 4.4, 3.5),
]
PAPER_GROUPS = ((16 * K, 1), (LONGEST, 8))
MANUAL_GROUPS = ((32 * K, 2), (LONGEST, 8))
HIERARCHICAL_ONLY: dict[tuple[str, str], dict[str, float | None]] = {
    ("5", "LLaMA-3.1-70B"): {"gpu_days": 33.3},
    ("22", "LLaMA-3.1-8B, OpenHermes"): {"gpu_days": 2.33, "abr": 0.269},
}
EIGHT_B = "llama-3.1-8b"
TABLE_17 = {  # ABR, and whether the groups are the paper's or those of Algorithm 1
    "Tulu3": (0.001, "-own"),
    "OpenHermes": (0.001, "-own"),
    "Tulu3 + LongCite": (0.002, ""),
    "OpenHermes + LongCite": (0.004, ""),
    "Tulu3 + LongWriter": (0.003, ""),
}
TABLE_14 = (("FlexSP", "12", "FlexSP", 3.02), ("HBP", "5", "LLaMA-3.1-8B, HBP", 2.75))
"""Seconds of an iteration, and which GPU-days they follow from; as those of Table 20."""
DEEPSEEK_SAMPLES = 60_000
"""At most, in `deepseek`: some twenty steps."""
BALANCE_SAMPLES = 10
"""Times as many samples in the tables of balance."""
TABLE_18 = {2: 3.73, 4: 3.37, 8: 3.04, 16: 3.93}
"""GPU-days of packs of 32K by SP degree."""
TABLE_20 = (("LLaMA-3.1-8B", 168.0), ("LLaMA-3.1-70B", 1400.0))
"""Minutes of training under HBP."""
ITERATIONS = 3000
"""Of a run, and some more (Appendix G.1)."""
STATED = "SP8, all recomputed"


@dataclass(frozen=True)
class Run:
    """What of a plan stands in a table."""

    metrics: dict[str, float]
    days_per_token: float
    groups: str


class Bench:
    """Plans by name, each made once, on samples of a size."""

    def __init__(self, samples: int, cluster: Callable[[ModelSpec, int], ClusterSpec]) -> None:
        self.samples, self.cluster = samples, cluster
        self.run = cache(self._run)

    def cost(self, model: str, gpus: int) -> CostModel:
        """A model on the cluster."""
        spec = load_model_spec(model)
        return CostModel(spec, self.cluster(spec, gpus), gpus)

    def static(self, model: str, gpus: int, length: int, lowest: int) -> Group:
        """The smallest degree from `lowest` up that fits, with the fewest recomputed layers."""
        cost = self.cost(model, gpus)
        for degree in cost.degrees():
            gc_layers = cost.fewest_gc_layers(length, degree)
            if degree >= lowest and gc_layers is not None:
                return Group(length, degree, gc_layers)
        raise HbpError(f"{model} does not fit {gpus} GPUs at {length} tokens")

    def _run(
        self,
        strategy: str,
        data: str,
        model: str,
        gpus: int = 32,
        length: int = LONGEST,
        lowest: int | None = 8,
        all_recomputed: bool = False,
    ) -> Run:
        """Plan and measure.

        `lowest` None takes the fastest static setting instead of the paper's; `all_recomputed` that degree itself with
        every layer recomputed.
        """
        lengths = draw(data, self.samples)
        lengths, cost = lengths[lengths <= length], self.cost(model, gpus)
        chosen = strategy in STRATEGIES and STRATEGIES[strategy].ours
        static = None if lowest is None or chosen else self.static(model, gpus, length, lowest)
        if all_recomputed and lowest is not None:
            static = Group(length, lowest, cost.model.n_layers)
        tokens = STEP_TOKENS if gpus == 32 else None
        if strategy in BY_HAND:
            plan = plan_by_hand(strategy, BY_HAND[strategy], lengths, cost, static, STEP_TOKENS, length)
        else:
            plan = make_plan(
                lengths, cost, strategy=strategy, static=static, max_length=length, global_batch_tokens=tokens
            )
        metrics = dict(plan.info.metrics)
        groups = ", ".join(f"{g.capacity / K:.4g}K SP{g.sp_degree} GC{g.gc_layers}" for g in plan.info.groups)
        return Run(metrics, metrics["predicted_s"] * gpus / DAY / plan.info.n_tokens, groups)


def draw(data: str, samples: int) -> Lengths:
    """Lengths of a mix, or of the short part of one alone."""
    if data in SETS:
        return generate(SETS[data], samples, seed=0)
    short, *_ = LENGTH_SETS[SHORT_SETS[data]]
    return short(np.random.default_rng(0), samples).astype(np.int32)


def hierarchical(shape: Sequence[tuple[int, int]] | None, balanced: bool) -> ByHand:
    """Hierarchical packing into groups of (length, degree), or those of `hbp`, with or without balance batching."""

    def make(lengths: Lengths, cost: CostModel, static: Group, batch: int, rng: np.random.Generator) -> Made:
        if shape is None:
            plan = make_plan(lengths, cost, strategy="hbp", max_length=static.capacity, global_batch_tokens=batch)
            groups = plan.info.groups
        else:
            layers = [cost.fewest_gc_layers(length, degree) for length, degree in shape]
            if None in layers:
                raise HbpError(f"the groups {shape} do not fit this memory")
            groups = tuple(Group(*pair, k) for pair, k in zip(shape, layers, strict=True))
        packs = hierarchical_packs(lengths, np.arange(len(lengths)), groups, rng)
        if not balanced:
            packs = packs.take(rng.permutation(len(packs)))
        spent, world = predicted_seconds(cost, lengths, groups), cost.world_size
        return balance_batches(packs, spent, groups, lengths, world, batch, rng, by_cost=balanced), groups

    return make


def packer(fit: Callable[[Int, int], Int], falling: bool = False) -> ByHand:
    """One packing length, samples in random or falling order, packs in random order."""

    def make(lengths: Lengths, cost: CostModel, static: Group, batch: int, rng: np.random.Generator) -> Made:
        ids = rng.permutation(len(lengths))
        if falling:
            ids = ids[np.argsort(-lengths[ids], kind="stable")]
        packs = packs_of(fit(lengths[ids], static.capacity), ids)
        packs, groups = packs.take(rng.permutation(len(packs))), (static,)
        spent, world = predicted_seconds(cost, lengths, groups), cost.world_size
        return balance_batches(packs, spent, groups, lengths, world, batch, rng, by_cost=False), groups

    return make


def best_fit(lengths: Int, capacity: int) -> Int:
    """Best fit in the order given: the fullest pack with room."""
    rooms: list[tuple[int, int]] = []
    pack_of, count = np.empty(len(lengths), np.int64), 0
    for i, length in enumerate(lengths.tolist()):
        at = bisect.bisect_left(rooms, (length, -1))
        room, pack = rooms.pop(at) if at < len(rooms) else (capacity, count)
        count += pack == count
        pack_of[i] = pack
        bisect.insort(rooms, (room - length, pack))
    return pack_of


def shortest_pack_first(lengths: Int, capacity: int) -> Int:
    """SPFHP (Krell et al., https://arxiv.org/abs/2107.02027): samples of falling length, each to the emptiest pack."""
    heap: list[tuple[int, int]] = []
    pack_of, count = np.empty(len(lengths), np.int64), 0
    for i, length in enumerate(lengths.tolist()):
        if heap and heap[0][0] + length <= capacity:
            used, pack = heap[0]
            heapq.heapreplace(heap, (used + length, pack))
        else:
            used, pack = 0, count
            count += 1
            heapq.heappush(heap, (length, pack))
        pack_of[i] = pack
    return pack_of


BY_HAND: dict[str, ByHand] = {
    "hierarchical": hierarchical(PAPER_GROUPS, False),
    "balanced": hierarchical(PAPER_GROUPS, True),
    "manual": hierarchical(MANUAL_GROUPS, True),
    "hierarchical-own": hierarchical(None, False),
    "balanced-own": hierarchical(None, True),
    "ffs": packer(first_fit),
    "bfs": packer(best_fit),
    "spfhp": packer(shortest_pack_first, falling=True),
    "flexsp": flexsp,
}


def tables(bench: Bench, wanted: set[str], quick: bool) -> list[dict[str, Any]]:
    """All rows, on one cluster; GPU-days per token, not yet scaled to a run."""
    rows: list[dict[str, Any]] = []
    dense = DENSE[:1] if quick else DENSE

    def add(table: str, row: str, run: Run, data: str, published: dict[str, float | None], note: str = "") -> None:
        for metric, figure in published.items():
            ours = run.days_per_token if metric == "gpu_days" else run.metrics[metric]
            rows.append({"table": table, "row": row, "metric": metric, "published": figure, "ours": ours})
            rows[-1] |= {"data": data, "groups": run.groups} | ({"note": note} if note else {})

    whole = Bench(BALANCE_SAMPLES * bench.samples, bench.cluster)
    mix = "Tulu3 + LongCite"
    beyond = [name for name, strategy in STRATEGIES.items() if strategy.finds_groups]
    if "2" in wanted:
        for length, lowest, abr, cr in ((4, 1, 0.343, 0.0), (32, 4, 0.456, 1.0), (128, 8, 0.506, 1.0)):
            run = whole.run("isf", mix, EIGHT_B, length=length * K, lowest=lowest)
            add("2", f"{length}K SP{lowest}", run, mix, {"abr": abr, "cr": cr, "pr": 0.0, "dbr": 0.003})
    if wanted & {"5", "22", "23"}:
        for table, name, model, data, naive, ours in dense:
            add(table, f"{name}, naive", bench.run("isf", data, model), data, {"gpu_days": naive})
            add(table, f"{name}, HBP", bench.run("hbp", data, model), data, {"gpu_days": ours})
            if (table, name) in HIERARCHICAL_ONLY:
                run = bench.run("hierarchical-own", data, model)
                add(table, f"{name}, hierarchical only", run, data, HIERARCHICAL_ONLY[table, name])
            for other in beyond:
                add(table, f"{name}, {other}", bench.run(other, data, model), data, {"gpu_days": None})
            fastest = bench.run("isf", data, model, lowest=None)
            add(table, f"{name}, fastest static setting", fastest, data, {"gpu_days": None})
            stated = bench.run("isf", data, model, all_recomputed=True)
            add(table, f"{name}, {STATED}", stated, data, {"gpu_days": None})
    if "6" in wanted:
        naive = {"abr": 0.506, "cr": 1.0, "gpu_days": 5.22}
        add("6", "naive", whole.run("isf", mix, EIGHT_B), mix, naive)
        for suffix, origin in (("", "the paper's groups"), ("-own", "our groups")):
            run = whole.run(f"hierarchical{suffix}", mix, EIGHT_B)
            add("6", f"+ hierarchical, {origin}", run, mix, {"abr": 0.288, "cr": 0.173, "gpu_days": 4.51})
            run = whole.run(f"balanced{suffix}", mix, EIGHT_B)
            add("6", f"+ balance, {origin}", run, mix, {"abr": 0.002, "cr": 0.173, "gpu_days": 3.73})
    if "11" in wanted:
        add("11", "[16K, 128K], SP [1, 8]", bench.run("balanced", mix, EIGHT_B), mix, {"gpu_days": 3.73})
        add("11", "[32K, 128K], SP [2, 8]", bench.run("manual", mix, EIGHT_B), mix, {"gpu_days": 4.25})
        add("11", "our Algorithm 1", bench.run("hbp", mix, EIGHT_B), mix, {"gpu_days": None})
    if "12" in wanted:
        published = {"pr": 0.04, "dbr": 0.064, "cr": 0.171, "abr": 0.36, "gpu_days": 4.35}
        run = bench.run("flexsp", mix, EIGHT_B, lowest=None)
        add("12", "FlexSP", run, mix, published, "without its time of solving")
        add("12", "HBP", bench.run("hbp", mix, EIGHT_B), mix, {"gpu_days": 3.73})
    if "13" in wanted:
        for name, strategy, abr, days in (
            ("random", "concat", 0.53, 5.57),
            ("ISF", "isf", 0.506, 5.22),
            ("FFS", "ffs", 0.508, 5.24),
            ("FFD", "ffd", 0.515, 5.48),
            ("BFS", "bfs", 0.508, 5.24),
            ("SPFHP", "spfhp", 0.512, 5.40),
        ):
            add("13", name, bench.run(strategy, mix, EIGHT_B), mix, {"abr": abr, "gpu_days": days})
    if "17" in wanted:
        for data, (abr, shape) in TABLE_17.items():
            length = 32 * K if data in SHORT_SETS else LONGEST
            add("17", data, whole.run(f"balanced{shape}", data, EIGHT_B, length=length), data, {"abr": abr})
    if "18" in wanted:
        runs = {d: bench.run("isf", "Tulu3", EIGHT_B, length=32 * K, lowest=d) for d in TABLE_18}
        for degree, run in runs.items():
            relative = replace(run, metrics={"over_sp8": run.days_per_token / runs[8].days_per_token})
            add("18", f"32K SP{degree}", relative, "Tulu3", {"over_sp8": TABLE_18[degree] / TABLE_18[8]})
    return rows


def scale(rows: list[dict[str, Any]], tokens: dict[str, float]) -> list[dict[str, Any]]:
    """GPU-days of whole runs, then the speed-ups of each table's last rows over its first."""
    for row in rows:
        if row["metric"] == "gpu_days":
            row["ours"] *= tokens[row["data"]]
    days = {(r["table"], r["row"]): r for r in rows if r["metric"] == "gpu_days"}
    speedups = []
    for (table, name), row in days.items():
        model, _, kind = name.rpartition(", ")
        first = days.get((table, f"{model}, naive")) if model else None
        if first is not None and kind != "naive":
            published = first["published"] / row["published"] if row["published"] else None
            ours = first["ours"] / row["ours"]
            speedups.append({**row, "metric": "speedup", "published": published, "ours": ours})
        stated = days.get((table, f"{model}, {STATED}")) if model and kind == "HBP" else None
        if stated is not None:
            over = {"row": f"{model}, HBP over {STATED}", "metric": "speedup", "ours": stated["ours"] / row["ours"]}
            speedups.append({**speedups[-1], **over})
    return rows + speedups


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """Which figure a row is."""
    return row["table"], row["row"], row["metric"]


def common_tokens(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The one token count of each data set, from all its dense models' rows of Tables 5, 22 and 23."""
    logs: dict[str, list[float]] = {data: [] for data in SETS}
    for row in rows:
        known = row["metric"] == "gpu_days" and row["published"] and row["table"] in ("5", "22", "23")
        if known and "note" not in row:
            logs[row["data"]].append(math.log(row["published"] / row["ours"]))
    return {data: math.exp(float(np.mean(values))) for data, values in logs.items() if values}


def derived(rows: list[dict[str, Any]], tokens: float) -> list[dict[str, Any]]:
    """Tables 14 and 20, which say once more in other units what GPU-days of other tables say."""
    days = {(r["table"], r["row"]): r["ours"] for r in rows if r["metric"] == "gpu_days"}
    found: list[dict[str, Any]] = []

    def add(table: str, row: str, metric: str, published: float, ours: float) -> None:
        found.append({"table": table, "row": row, "metric": metric, "published": published, "ours": ours})

    for name, table, row, seconds in TABLE_14:
        if (table, row) in days:
            add("14", name, "iteration_s", seconds, days[table, row] * DAY / 32 / (tokens / STEP_TOKENS))
    for name, minutes in TABLE_20:
        if ("5", f"{name}, HBP") in days:
            add("20", f"{name}, HBP", "minutes", minutes, days["5", f"{name}, HBP"] * 24 * 60 / 32)
    add("20", "all models (published: 3000+)", "iterations", ITERATIONS, tokens / STEP_TOKENS)
    return found


def with_kept(old: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows, and the kept ones of a file that they do not replace, each with its date and number of samples."""
    new = {key(row) for row in rows}
    kept = [{"date": old["date"], "samples": old["samples"], **row} for row in old["rows"] if key(row) not in new]
    for row in kept:
        if row["table"] == "17":
            row["published"], _ = TABLE_17[row["row"]]
            row.pop("note", None)
    return [*(row for row in kept if row["table"] not in ("14", "20")), *rows]


CLUSTER_OF: dict[str, Callable[[ModelSpec, int], ClusterSpec]] = {
    "testbed": testbed,
    "h100-nvlink": lambda spec, gpus: CLUSTERS["h100-nvlink"],
    "same step": lambda spec, gpus: testbed(spec, gpus, step_grows=False),
}


def measured(
    wanted: set[str], samples: int, quick: bool, processes: int
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Rows of each cluster, and those of DeepSeek; all tables on the testbed, on the others those of speed-ups."""
    together = ({"5", "22", "23"}, *({table} for table in ("2", "6", "11", "12", "13", "17", "18")))
    asked = [part & wanted for part in together if part & wanted]
    jobs = [(name, part) for name in CLUSTER_OF for part in asked if name == "testbed" or "5" in part]
    testbed(load_model_spec(EIGHT_B))  # fitted once, before the processes part
    with ProcessPoolExecutor(processes) as pool, Progress("paper", len(jobs) + 2) as progress:
        alone = list(CLUSTER_OF)[:2] if "deepseek" in wanted else []
        apart = [pool.submit(deepseek_task, name, min(samples, DEEPSEEK_SAMPLES)) for name in alone]
        tasks = [pool.submit(tables_task, name, part, samples, quick) for name, part in jobs]
        for task in as_completed([*apart, *tasks]):
            task.result()
            progress.advance("a table")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in CLUSTER_OF}
    for (name, _), task in zip(jobs, tasks, strict=True):
        rows[name] += task.result()
    return rows, [row for task in apart for row in task.result()]


def tables_task(name: str, wanted: set[str], samples: int, quick: bool) -> list[dict[str, Any]]:
    """Some tables on a cluster."""
    return tables(Bench(samples, CLUSTER_OF[name]), wanted, quick)


def deepseek_task(name: str, samples: int) -> list[dict[str, Any]]:
    """DeepSeek-V2 on a cluster."""
    return deepseek_rows(samples, {name: lambda spec: CLUSTER_OF[name](spec, DEEPSEEK_GPUS)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples, LLaMA-3.1-8B alone in Table 5")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--tables", default="2,4,5,6,11,12,13,17,18,19,22,23,deepseek", help="comma-separated (default all)"
    )
    parser.add_argument("--samples", type=int, help="of each set (default 100,000; tenfold in Tables 2, 6, 17)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    args = parser.parse_args()
    old = json.loads(args.out.read_text()) if args.out and args.out.exists() and not args.quick else None
    wanted = set(args.tables.split(",")) | ({"5"} if old is None else set())  # sets the tokens
    samples = args.samples or (20_000 if args.quick else 100_000)
    rows, deepseek = measured(wanted, samples, args.quick, args.processes)
    tokens = common_tokens(rows["testbed"]) or (old or {})["tokens_of_a_run"]
    rows = {name: scale(of, tokens) for name, of in rows.items()}
    same, built_in = ({key(row): row for row in rows[name]} for name in ("same step", "h100-nvlink"))
    for row in rows["testbed"]:
        other = built_in.get(key(row))
        row |= {"built_in": other["ours"], "built_in_groups": other["groups"]} if other else {}
        if row["metric"] == "speedup":
            row["same_step"] = same[key(row)]["ours"]
    found = rows["testbed"] + (iteration_rows() if wanted & {"4", "18", "19"} else [])
    found += deepseek_table_5(deepseek, tokens["Tulu3 + LongCite"]) if deepseek else []
    today = {"date": datetime.date.today().isoformat(), "samples": samples}
    found = with_kept(old, [{**row, **today} for row in found]) if old else [{**row, **today} for row in found]
    found += [{**row, **today} for row in derived(found, tokens["Tulu3 + LongCite"])]
    found.sort(key=lambda row: int(row["table"].split("/")[0]))
    for row in found:
        row.setdefault("built_in", None)
        if row["published"] and row["ours"] is not None:
            row["relative"] = row["ours"] / row["published"] - 1
    result = {
        "command": "python benchmarks/paper.py" + (" --quick" if args.quick else ""),
        **today,
        "tokens_of_a_run": tokens,
        "testbed": testbed(load_model_spec(EIGHT_B)).to_json(),
        "rows": found,
        "deepseek": deepseek or (old or {}).get("deepseek", []),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'table':6} {'row':50} {'metric':12} {'published':>9} {'ours':>8} {'relative':>8} {'built-in':>8}")
    for r in found:
        figures = [f"{r[k]:.3f}" if r[k] is not None else "-" for k in ("published", "ours", "built_in")]
        relative = f"{r['relative']:+.1%}" if "relative" in r else ""
        print(
            f"{r['table']:6} {r['row']:50} {r['metric']:12} "
            f"{figures[0]:>9} {figures[1]:>8} {relative:>8} {figures[2]:>8}"
        )
    print({data: f"{count:,.0f} tokens" for data, count in tokens.items()})


if __name__ == "__main__":
    main()

"""Packers of other projects, called as their users call them: their own seconds, and the bin of each sample.

Only what is installed is used (`pip install --no-deps`, or a folder on PYTHONPATH), the rest is named on standard
error. Where a module drags in a whole trainer, its packing functions alone are compiled from the installed file. What
our side needs, such as token tables for TRL or numbering its packs, is not on a peer's clock.
"""

from __future__ import annotations

import ast
import bisect
import heapq
import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int32]
Bins = npt.NDArray[np.int64]
Packer = Callable[[Lengths, int], tuple[float, Bins]]
AXOLOTL_GROUP, AXOLOTL_BIN = 100_000, 200  # its defaults
ROWS = 1000  # of a batch, the default of `datasets.map`, LLaMA-Factory and ms-swift
RANKS, STEP_FULL = 32, 0.95


def peers() -> dict[str, Packer]:
    """Those that are installed."""
    ways: dict[str, tuple[str, Callable[[], Packer]]] = {
        "axolotl first fit": ("axolotl", _axolotl),
        "trl bfd, 1000 rows": ("trl", lambda: lambda lengths, capacity: _trl(lengths, capacity, ROWS)),
        "trl bfd, one batch": ("trl", lambda: lambda lengths, capacity: _trl(lengths, capacity, len(lengths))),
        "binpacking, 1000 rows": ("binpacking", lambda: _binpacking),
        "llama-factory knapsack, 1000 rows": ("llamafactory", _llama_factory),
        "ms-swift binpack": ("swift", _ms_swift),
        "verl karmarkar-karp": ("verl", _verl),
        "xtuner soft pack": ("xtuner", _xtuner),
    }
    found: dict[str, Packer] = {}
    for name, (package, make) in ways.items():
        needs = (package, "binpacking") if package == "swift" else (package,)
        missing = [need for need in needs if importlib.util.find_spec(need) is None]
        if missing:
            print(f"packing: no row {name!r}: {', '.join(missing)} is not installed", file=sys.stderr)
        else:
            found[name] = make()
    return found


def _functions(package: str, file: str, names: tuple[str, ...], scope: dict[str, Any]) -> dict[str, Any]:
    """Functions and classes of an installed file, without what it imports."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / file
    tree = ast.parse(path.read_text())
    # Annotations may name what is not imported.
    future = ast.parse("from __future__ import annotations").body
    tree.body = [*future, *(node for node in tree.body if getattr(node, "name", "") in names)]
    exec(compile(tree, str(path), "exec"), scope)
    return scope


def _axolotl() -> Packer:
    import numba

    scope = _functions("axolotl", "utils/samplers/multipack.py", ("pack_group",), {"numba": numba, "np": np})
    pack_group = scope["pack_group"]

    def pack(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
        start = time.perf_counter()
        bins: list[list[int]] = []
        for at in range(0, len(lengths), AXOLOTL_GROUP):
            part = lengths[at : at + AXOLOTL_GROUP]
            bins += pack_group(part, at, capacity, AXOLOTL_GROUP, AXOLOTL_BIN, False)
        return time.perf_counter() - start, _numbered(bins, len(lengths))

    return pack


def _trl(lengths: Lengths, capacity: int, rows: int) -> tuple[float, Bins]:
    """It packs Arrow tables of token ids, so it is handed tables whose tokens are the sample's number."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    bin_of = np.empty(len(lengths), np.int64)
    bins, seconds = 0, 0.0
    for at in range(0, len(lengths), rows):
        part = lengths[at : at + rows]
        offsets = np.concatenate([[0], np.cumsum(part)])
        ids = pa.array(np.repeat(np.arange(at, at + len(part)), part))
        table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)})
        start = time.perf_counter()
        packed = _pack_bfd(table, capacity)
        seconds += time.perf_counter() - start
        column = packed.column("input_ids").combine_chunks()
        starts, values = column.offsets.to_numpy(), column.values.to_numpy()
        bin_of[values] = bins + np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        bins += len(starts) - 1
    return seconds, bin_of


def _binpacking(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
    import binpacking

    bins: list[list[int]] = []
    seconds = 0.0
    for at in range(0, len(lengths), ROWS):
        part = lengths[at : at + ROWS].tolist()
        pairs = list(zip(range(at, at + len(part)), part, strict=True))
        start = time.perf_counter()
        packed = binpacking.to_constant_volume(pairs, capacity, weight_pos=1)
        seconds += time.perf_counter() - start
        bins += [[i for i, _ in b] for b in packed]
    return seconds, _numbered(bins, len(lengths))


def _llama_factory() -> Packer:
    names = ("search_for_fit", "greedy_knapsack")
    file = "data/processor/processor_utils.py"
    knapsack = _functions("llamafactory", file, names, {"bisect": bisect})["greedy_knapsack"]

    def pack(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
        bins: list[list[int]] = []
        seconds = 0.0
        for at in range(0, len(lengths), ROWS):
            part = lengths[at : at + ROWS].tolist()
            of_length: dict[int, list[int]] = {}
            for i, length in enumerate(part, at):
                of_length.setdefault(length, []).append(i)
            start = time.perf_counter()
            packed = knapsack(part, capacity)
            seconds += time.perf_counter() - start
            bins += [[of_length[length].pop() for length in b] for b in packed]
        return seconds, _numbered(bins, len(lengths))

    return pack


def _ms_swift() -> Packer:
    """A thousand rows at a time, the last pack of each carried over to the next."""
    group = _functions("swift", "dataset/packing.py", ("calculate_matched_group",), {})["calculate_matched_group"]

    def pack(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
        pairs, bins = list(enumerate(lengths.tolist())), []
        left: list[tuple[int, int]] = []
        start = time.perf_counter()
        for at in range(0, len(pairs), ROWS):
            packed, left = group(left + pairs[at : at + ROWS], capacity, is_finished=at + ROWS >= len(pairs))
            bins += packed
        seconds = time.perf_counter() - start
        return seconds, _numbered([[i for i, _ in b] for b in bins], len(lengths))

    return pack


def _verl() -> Packer:
    """Steps of 95 % of the ranks' capacity, each dealt to the ranks by its own workload. It knows no capacity."""
    names = ("karmarkar_karp", "get_seqlen_balanced_partitions", "calculate_workload")
    scope = _functions("verl", "utils/seqlen_balancing.py", names, {"heapq": heapq})

    def pack(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
        ends = np.cumsum(lengths, dtype=np.int64)
        step = (ends - 1) // int(STEP_FULL * RANKS * capacity)
        parts = np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(step)) + 1)
        if len(parts) > 1 and len(parts[-1]) < RANKS:
            parts[-2:] = [np.concatenate(parts[-2:])]
        bins: list[list[int]] = []
        start = time.perf_counter()
        for part in parts:
            work = scope["calculate_workload"](lengths[part].astype(np.int64)).tolist()
            dealt = scope["get_seqlen_balanced_partitions"](work, min(RANKS, len(part)), False)
            bins += [part[members].tolist() for members in dealt]
        return time.perf_counter() - start, _numbered(bins, len(lengths))

    return pack


def _xtuner() -> Packer:
    storage = SimpleNamespace(from_list=lambda rows: rows)  # of the packs, no part of packing
    torch = SimpleNamespace(utils=SimpleNamespace(data=SimpleNamespace(Dataset=object)))
    scope = {"random": random, "np": np, "torch": torch, "Dataset": storage, "concatenate_datasets": lambda x: x[0]}
    soft = _functions("xtuner", "_lite/datasets/pack.py", ("SoftPackDataset",), scope)["SoftPackDataset"]

    class Samples:
        def __init__(self, lengths: Lengths) -> None:
            self.num_tokens = lengths.tolist()

        def __len__(self) -> int:
            return len(self.num_tokens)

    def pack(lengths: Lengths, capacity: int) -> tuple[float, Bins]:
        samples = Samples(lengths)
        random.seed(0)
        start = time.perf_counter()
        packed = soft([samples], target=capacity)
        seconds = time.perf_counter() - start
        return seconds, _numbered([row["indices"] for row in packed.pack_infos], len(lengths))

    return pack


def _numbered(bins: list[list[int]], n: int) -> Bins:
    bin_of = np.full(n, -1, np.int64)
    for number, members in enumerate(bins):
        bin_of[members] = number
    return bin_of

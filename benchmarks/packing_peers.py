"""Packers of other projects, called as their users call them: bin of each sample from lengths and a capacity.

Only what is installed is used. axolotl's module drags in its whole trainer, so its packing function alone is compiled
from the installed file (`pip install --no-deps axolotl`); TRL packs Arrow tables of token ids, so it is handed tables
whose tokens are the sample's number.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bins = npt.NDArray[np.int64]
Packer = Callable[[npt.NDArray[np.int32], int], Bins]
AXOLOTL_GROUP, AXOLOTL_BIN = 100_000, 200  # its defaults
ROWS = 1000  # of a batch, the default of `datasets.map`


def peers() -> dict[str, Packer]:
    """Those that are installed."""
    found: dict[str, Packer] = {}
    if importlib.util.find_spec("axolotl") is not None:
        found["axolotl first fit"] = _axolotl()
    if importlib.util.find_spec("trl") is not None:
        found["trl bfd, 1000 rows"] = lambda lengths, capacity: _trl(lengths, capacity, ROWS)
        found["trl bfd, one batch"] = lambda lengths, capacity: _trl(lengths, capacity, len(lengths))
    if importlib.util.find_spec("binpacking") is not None:
        found["binpacking, 1000 rows"] = _binpacking
    return found


def _axolotl() -> Packer:
    import numba

    spec = importlib.util.find_spec("axolotl")
    assert spec is not None and spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "utils" / "samplers" / "multipack.py"
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "pack_group"]
    scope: dict[str, Any] = {"numba": numba, "np": np}
    exec(compile(tree, str(file), "exec"), scope)
    pack_group = scope["pack_group"]

    def pack(lengths: npt.NDArray[np.int32], capacity: int) -> Bins:
        bins: list[list[int]] = []
        for at in range(0, len(lengths), AXOLOTL_GROUP):
            part = lengths[at : at + AXOLOTL_GROUP]
            bins += pack_group(part, at, capacity, AXOLOTL_GROUP, AXOLOTL_BIN, False)
        return _numbered(bins, len(lengths))

    return pack


def _trl(lengths: npt.NDArray[np.int32], capacity: int, rows: int) -> Bins:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    bin_of = np.empty(len(lengths), np.int64)
    bins = 0
    for at in range(0, len(lengths), rows):
        part = lengths[at : at + rows]
        offsets = np.concatenate([[0], np.cumsum(part)])
        ids = pa.array(np.repeat(np.arange(at, at + len(part)), part))
        table = pa.table({"input_ids": pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)})
        packed = _pack_bfd(table, capacity).column("input_ids").combine_chunks()
        starts, values = packed.offsets.to_numpy(), packed.values.to_numpy()
        pack_of_token = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        bin_of[values] = bins + pack_of_token
        bins += len(starts) - 1
    return bin_of


def _binpacking(lengths: npt.NDArray[np.int32], capacity: int) -> Bins:
    import binpacking

    bins: list[list[int]] = []
    for at in range(0, len(lengths), ROWS):
        part = lengths[at : at + ROWS].tolist()
        pairs = list(zip(range(at, at + len(part)), part, strict=True))
        bins += [[i for i, _ in b] for b in binpacking.to_constant_volume(pairs, capacity, weight_pos=1)]
    return _numbered(bins, len(lengths))


def _numbered(bins: list[list[int]], n: int) -> Bins:
    bin_of = np.empty(n, np.int64)
    for number, members in enumerate(bins):
        bin_of[members] = number
    return bin_of

"""The tensors of a checkpoint, and which of them each tensor of a model is made of.

Both file formats are mapped into memory and read in slices: safetensors, and PyTorch's own `.bin` (but for those older
than 2020, which are read whole). Which files count, and in which order they are looked for, is as in transformers.

Names follow transformers' own rules for the family: prefixes, renamings, and conversions that merge several stored
tensors into one of the model's (experts, saved one by one) or split one into several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbp.errors import HbpError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FILES = (WEIGHTS, INDEX, BIN, BIN_INDEX)
"""Where weights may be, first that is there."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: not a floating-point type that models are trained in."""
    whole: Callable[[], Tensor]
    part: Callable[[int, int, int], Tensor]
    """Of a dimension the entries ``[begin, end)``."""


@dataclass
class Source:
    """What a checkpoint has for a tensor of the model: one tensor, or several and how they become it."""

    names: dict[str, list[str]] = field(default_factory=dict)
    """Stored tensors, by the pattern of the conversion that their names match; alone under their own name."""
    converter: Any = None
    """transformers' ``WeightConverter``; None: the tensor is taken as it is."""

    def stacks(self, ndim: int) -> bool:
        """Whether tensors are stacked along a new first dimension, and such stacks laid one below the other."""
        kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in self.converter.operations]
        return ndim == 3 and kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])

    def in_order(self, count: int) -> list[list[str]]:
        """Names of all `count` stacked tensors of each pattern, whether they are there or not."""
        parts = []
        for pattern in self.converter.source_patterns:
            any_name = next(iter(self.names.get(pattern) or next(iter(self.names.values()))))
            number = re.search(r"\.(\d+)\.(?!.*\.\d+\.)", any_name)
            assert number
            before, after = any_name[: number.start(1)], any_name[number.end(1) :]
            if pattern not in self.names:  # none of them is there: the name that one would have
                after = after.replace(_last(next(iter(self.names))), _last(pattern))
            parts.append([f"{before}{i}{after}" for i in range(count)])
        return parts

    def convert(self, lm: Any, name: str, stored: Mapping[str, Stored]) -> Tensor:
        """The model's tensor, by transformers' own operations."""
        converter = deepcopy(self.converter)
        for pattern, names in self.names.items():
            for one in names:
                converter.add_tensor(name, one, pattern, stored[one].whole())
        made = converter.convert(name, model=lm, config=lm.config)
        value: Any = made[name]
        tensor: Tensor = value[0] if isinstance(value, list) else value
        return tensor


def _last(pattern: str) -> str:
    return pattern.rsplit("*.", 1)[-1]


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, none if it has none."""
    for name in FILES:
        path = folder / name
        if path.is_file() and name.endswith(".json"):
            try:
                named = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                raise HbpError(f"{path} is damaged; fetch or save the checkpoint again") from None
            return [folder / file for file in named]
        if path.is_file():
            return [path]
    return []


def checkpoint_folder(name_or_folder: str) -> Path | None:
    """The folder of a checkpoint, downloaded first if it is a hub name; None for a configuration alone.

    Raises:
        HbpError: it has weights under names that nothing loads.
    """
    path = Path(name_or_folder)
    if not path.exists():
        path = _download(name_or_folder) or path
    if not path.is_dir():
        return None
    if weight_files(path):
        return path
    strange = sorted(file.name for file in (*path.glob("*.safetensors"), *path.glob("*.bin")))
    if strange:
        raise HbpError(f"{path} has {strange[0]} but none of {', '.join(FILES)}; give a folder that transformers loads")
    return None


def _download(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            path = Path(snapshot_download(name, allow_patterns=[weights, "*.json"]))
            if weight_files(path):
                return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        pass  # whoever loads the model says what is wrong
    return None


def open_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, by name.

    Raises:
        HbpError: a file cannot be read.
    """
    stored: dict[str, Stored] = {}
    for path in weight_files(folder):
        try:
            stored.update(_of_safetensors(path) if path.suffix == ".safetensors" else _of_bin(path))
        except Exception as error:  # of many kinds, all of them a damaged file
            reason = " ".join(str(error).split())[:200]
            raise HbpError(f"the checkpoint {folder} cannot be read: {reason}; fetch or save it again") from None
    return stored


def _of_safetensors(path: Path) -> dict[str, Stored]:
    from safetensors import safe_open

    file = safe_open(path, "pt")

    def stored(name: str) -> Stored:
        found = file.get_slice(name)
        return Stored(
            tuple(found.get_shape()),
            DTYPES.get(found.get_dtype()),
            lambda: file.get_tensor(name),
            lambda dim, begin, end: found[(*[slice(None)] * dim, slice(begin, end))],
        )

    return {name: stored(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _of_bin(path: Path) -> dict[str, Stored]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # of the format before 2020

    def stored(x: Tensor) -> Stored:
        dtype = x.dtype if x.dtype in DTYPES.values() else None
        return Stored(tuple(x.shape), dtype, lambda: x, lambda dim, begin, end: x.narrow(dim, begin, end - begin))

    return {name: stored(x) for name, x in tensors.items()}


def stored_dtype(folder: Path) -> torch.dtype:
    """What most of a checkpoint's weights are in, as transformers finds out: of the first that is floating point."""
    return next((x.dtype for x in open_tensors(folder).values() if x.dtype is not None), torch.float32)


def find_sources(
    lm: Any, stored: Mapping[str, Stored], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Source], list[str]]:
    """Of what each tensor of a model is made.

    Args:
        lm: transformers model.
        stored: of the checkpoint.
        wanted: parameters and persistent buffers of the model, by their names in transformers.

    Returns:
        The source of each that has one, and the stored names that no tensor of the model is made of (but for those
        that the family says may be left over).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(lm)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, Source] = {}
    unused = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, lm.base_model_prefix, dict(wanted))
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            unused.append(name)
        elif pattern is None:
            sources.setdefault(target, Source({name: [name]}))
        else:
            converter = of_pattern[pattern]
            for other in converter.target_patterns:
                made = target.replace(converter.target_patterns[0], other, 1)
                source = sources.setdefault(made, Source(converter=converter))
                source.names.setdefault(pattern, []).append(name)
    return sources, [name for name in unused if not _may_be_left(lm, name)]


def _may_be_left(lm: Any, name: str) -> bool:
    patterns = {*(lm._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return any(re.search(pattern, name) for pattern in patterns)

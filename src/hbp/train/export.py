"""Write the trained model as a Hugging Face folder that ``from_pretrained`` loads; of a model with adapters, those.

Parameters are gathered one after another and written in files of bounded size, so that rank 0 never holds more of the
model than one file. The others wait for it on a group of their own, whose limit is a day: the device's collectives give
up after minutes, and a slow disk may take longer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hbp.train.launch import PREPARE_TIMEOUT, rank_zero_first
from hbp.train.lora import frozen_names, has_adapters, save_adapters
from hbp.train.model import CausalLMWithLoss, kept_in_float32, read_config
from hbp.train.weights.stored import INDEX, WEIGHTS, checkpoint_folder, stored_dtype

SHARD_BYTES = 5 * 10**9


def source_dtype(name_or_folder: str) -> torch.dtype:
    """What transformers would load a model's weights in: as its configuration says, else as the first of them is."""
    dtype = read_config(name_or_folder).dtype
    if dtype is None:
        folder = checkpoint_folder(name_or_folder)
        return torch.float32 if folder is None else stored_dtype(folder)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def export_model(
    model: CausalLMWithLoss,
    folder: Path,
    tokenizer_folder: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Gather the parameters on rank 0, file by file, and save them there, with the tokenizer. A collective.

    The folder appears whole or not at all: it is written beside its place and renamed.

    Args:
        model: sharded over the world.
        folder: to write.
        tokenizer_folder: whose tokenizer is saved too.
        dtype: of the written parameters; adapters stay as they are trained.
        shard_bytes: of a file, at most, unless a single parameter is larger.

    Raises:
        RankFailed: on the other ranks, if rank 0 could not write.
    """
    lm, partial = model.lm, folder.with_name(folder.name + ".partial")
    left_out = frozen_names(lm) if has_adapters(model) else set()
    state = {name: x for name, x in _untied(lm.state_dict(keep_vars=True)).items() if name not in left_out}
    group = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    with rank_zero_first(group) as first:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    if has_adapters(model):
        adapters = {name: _whole(x, None) for name, x in state.items()}
        with rank_zero_first(group) as first:
            if first:
                save_adapters(model, adapters, partial)
    else:
        _write_files(lm, state, partial, dtype, shard_bytes, group)
    with rank_zero_first(group) as first:
        if first:
            if tokenizer_folder:
                from transformers import AutoTokenizer

                AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    dist.destroy_process_group(group)


def _write_files(
    lm: Any, state: dict[str, Tensor], folder: Path, dtype: torch.dtype, shard_bytes: int, group: dist.ProcessGroup
) -> None:
    shards = _shards(state, dtype, shard_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        values = {name: _whole(state[name], _written_in(lm, name, dtype)) for name in names}
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with rank_zero_first(group) as first:
            if first:
                where |= dict.fromkeys(_write_file(lm, values, folder, file), file)
        del values
    with rank_zero_first(group) as first:
        if first:
            if len(shards) > 1:
                total = sum(_bytes(x, dtype) for x in state.values())
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
                (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
            config = json.loads((folder / "config.json").read_text())
            config["dtype"] = str(dtype).removeprefix("torch.")  # what was trained in is float32
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _written_in(lm: Any, name: str, dtype: torch.dtype) -> torch.dtype | None:
    """The type that a tensor is written in: None, its own, for what transformers keeps in float32 in any case."""
    return None if any(part in name for part in kept_in_float32(lm)) else dtype


def _write_file(lm: Any, values: dict[str, Tensor], folder: Path, file: str) -> list[str]:
    """Write some parameters as transformers would, experts one by one; returns the names that it gave them."""
    import transformers
    from safetensors import safe_open

    transformers.utils.logging.disable_progress_bar()
    alone = folder / "shard"
    # Some published models' generation configurations are ones that transformers reads but refuses to write.
    generation, lm.generation_config = lm.generation_config, transformers.GenerationConfig()
    try:
        lm.save_pretrained(alone, state_dict=values, max_shard_size=1 << 60)
    finally:
        lm.generation_config = generation
    if generation is not None:
        generation.to_json_file(alone / "generation_config.json")
    (alone / WEIGHTS).rename(folder / file)
    for other in alone.iterdir():  # the configuration, every time anew
        other.replace(folder / other.name)
    alone.rmdir()
    with safe_open(folder / file, "pt") as written:
        return list(written.keys())


def _shards(state: dict[str, Tensor], dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Names of the parameters of each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, x in state.items():
        if shards[-1] and size + _bytes(x, dtype) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(x, dtype)
    return shards


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter once, by the first of its names."""
    seen: dict[int, str] = {}
    return {name: x for name, x in state.items() if seen.setdefault(id(x), name) == name}


def _bytes(x: Tensor, dtype: torch.dtype) -> int:
    return x.numel() * (dtype.itemsize if x.is_floating_point() else x.element_size())


def _whole(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The full value in host memory on rank 0, nothing on the others. A collective."""
    x = x.detach()
    if dtype is not None and x.is_floating_point():
        x = x.to(dtype)  # before it is gathered: half the bytes
    if isinstance(x, DTensor):
        x = x.full_tensor()
    return x.cpu().contiguous() if dist.get_rank() == 0 else x.new_empty(0)

"""Give a sharded model its first values, of a checkpoint of safetensors or afresh: no rank ever holds the whole.

The model has been built on the meta device and sharded by FSDP2, so every parameter knows which part this rank owns.
Of a checkpoint it is sliced out of the memory-mapped files and converted to the parameter's type, one tensor after
another; the rest is never read. Afresh, every rank draws each module's own parameters whole, by the model family's own
rules and from a seed of the module's name, and keeps its part: the same values for any number of ranks.

Four things are not in a checkpoint as the model has them: experts, saved one by one and trained as one tensor (a rank
reads its own experts, or with fewer experts than ranks its rows of each); tied weights, saved once; buffers that follow
from the configuration (rotary frequencies), computed anew; and low-rank adapters that were added to the model,
whose first values are drawn, the same for any number of ranks.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hbp.errors import HbpError

INDEX = "model.safetensors.index.json"
EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Of a tensor of all experts: what a checkpoint has for each, laid one below the other."""

ADAPTER = re.compile(r"\.lora_([AB])\.")
"""Names of peft's adapters"""

Part = Callable[[int, int, int], Tensor]
"""Of a dimension of a parameter, the entries ``[begin, end)``, as the checkpoint has them"""


def safetensors_folder(name_or_folder: str) -> Path | None:
    """The folder of a checkpoint in safetensors, downloaded first if it is a hub name; None for anything else."""
    path = Path(name_or_folder)
    if not path.exists():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(snapshot_download(name_or_folder, allow_patterns=["model*.safetensors", "*.json"]))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None  # whoever loads the model says what is wrong
    return path if path.is_dir() and any(path.glob("*.safetensors")) else None


def load_shards(lm: Any, folder: Path, device: torch.device, seed: int = 0) -> None:
    """Give a sharded model without storage its memory and the values of a checkpoint.

    Args:
        lm: transformers model on the meta device, its parameters sharded along their rows.
        folder: of the checkpoint.
        device: of this rank.
        seed: of the first values of adapters.

    Raises:
        HbpError: a tensor of the model is missing or has another shape; names it.
    """
    read = _Checkpoint(folder)
    names: dict[nn.Parameter, list[str]] = {}  # tied weights have several
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    state = {}
    for parameter, aliases in names.items():
        name, shape, adapter = aliases[0], parameter.shape, ADAPTER.search(aliases[0])
        part = _adapter(adapter[1], name, shape, seed) if adapter else read.parameter(aliases, shape)
        loaded = nn.Parameter(_shard(parameter, part, device), parameter.requires_grad)
        state.update(dict.fromkeys(aliases, loaded))
    _assign(lm, state, device)


def draw_shards(lm: Any, device: torch.device, seed: int) -> None:
    """Give a sharded model without storage its memory and fresh values, as transformers draws them for its family.

    Args:
        lm: transformers model on the meta device, its parameters sharded.
        device: of this rank.
        seed: of the values.
    """
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    state = {}
    for path, module in lm.named_modules():
        own = {name: p for name, p in module._parameters.items() if p is not None}
        new = {name: p for name, p in own.items() if p not in drawn}  # not tied to an earlier module's
        whole = {name: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype)) for name, p in new.items()}
        if whole:
            module._parameters.update(whole)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(path, seed))
                lm._init_weights(module)
            module._parameters.update(own)
        for name, p in new.items():
            assert not whole[name].isnan().any(), f"{path}.{name} is not initialised by {type(lm).__name__}"
            drawn[p] = nn.Parameter(_shard(p, _cut(whole[name].detach()), device), p.requires_grad)
        state.update({f"{path}.{name}": drawn[p] for name, p in own.items()})
    _assign(lm, state, device)


def _assign(lm: Any, state: dict[str, nn.Parameter], device: torch.device) -> None:
    """Parameters as given, buffers computed."""
    lm.load_state_dict(state, assign=True)
    for module in lm.modules():
        compute_buffers(module, lm.config, device)


def _seed(name: str, seed: int) -> int:
    """Of what is drawn for a name: 32 bits, more the CPU's generator does not look at."""
    return zlib.crc32(f"{seed} {name}".encode())


def _cut(values: Tensor) -> Part:
    return lambda dim, begin, end: values.narrow(dim, begin, end - begin)


def _adapter(which: str, name: str, shape: torch.Size, seed: int) -> Part:
    """First values of a low-rank adapter, as peft's: B zero, A uniform; small, so drawn whole and then cut."""
    values = torch.zeros(shape)
    if which == "A":
        generator = torch.Generator().manual_seed(_seed(name, seed))
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return _cut(values)


def _shard(parameter: nn.Parameter, part: Part, device: torch.device) -> Tensor:
    """A parameter's slice on this rank, wrapped as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part(0, 0, parameter.size(0)).to(device, parameter.dtype, copy=True)
    mesh, (placement,) = parameter.device_mesh, parameter.placements
    assert isinstance(placement, Shard)
    size, rank = parameter.size(placement.dim), mesh.get_local_rank()
    share = -(-size // mesh.size())
    values = part(placement.dim, min(rank * share, size), min((rank + 1) * share, size))
    local = values.to(device, parameter.dtype, copy=True).contiguous()  # not a view of the mapped file
    assert local.shape == parameter.to_local().shape
    return DTensor.from_local(
        local, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


class _Checkpoint:
    """The tensors of a folder, by name, read in slices."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        index, single = folder / INDEX, folder / "model.safetensors"
        self.folder = folder
        if index.is_file():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = [single.name] if single.is_file() else sorted(path.name for path in folder.glob("*.safetensors"))
        try:
            opened = [safe_open(folder / name, "pt") for name in files]
        except (OSError, SafetensorError) as error:
            raise HbpError(f"the checkpoint {folder} cannot be read: {error}; fetch or save it again") from None
        self.file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a dict)

    def parameter(self, aliases: list[str], shape: torch.Size) -> Part:
        """How to read a parameter of this shape, known by any of these names.

        Raises:
            HbpError: it is not there, or not of this shape.
        """
        for name in (alias.replace(".base_layer.", ".") for alias in aliases):  # peft's, of a layer with adapters
            if name in self.file_of:
                self._check(name, shape)
                tensor = self._slice(name)
                return lambda dim, begin, end: tensor[(*[slice(None)] * dim, slice(begin, end))]
            experts, _, fused = name.rpartition(".")
            if fused in EXPERT_PARTS and f"{experts}.0.{EXPERT_PARTS[fused][0]}.weight" in self.file_of:
                return self._experts(experts, EXPERT_PARTS[fused], shape)
        raise HbpError(f"the checkpoint {self.folder} has no tensor {aliases[0]}; is it of another model?")

    def _experts(self, experts: str, parts: tuple[str, ...], shape: torch.Size) -> Part:
        for expert in range(shape[0]):
            for part in parts:
                self._check(f"{experts}.{expert}.{part}.weight", torch.Size((shape[1] // len(parts), *shape[2:])))

        def read(dim: int, begin: int, end: int) -> Tensor:
            which, within = (range(begin, end), slice(None)) if dim == 0 else (range(shape[0]), slice(begin, end))
            every = [
                torch.cat([self._slice(f"{experts}.{expert}.{part}.weight")[:] for part in parts])[within]
                for expert in which
            ]
            return torch.stack(every) if every else torch.empty(0, *shape[1:])

        return read

    def _check(self, name: str, shape: torch.Size) -> None:
        if name not in self.file_of:
            raise HbpError(f"the checkpoint {self.folder} has no tensor {name}; is it of another model?")
        found = self._slice(name).get_shape()
        if list(shape) != list(found):
            raise HbpError(
                f"the checkpoint {self.folder} has {name} of shape {list(found)} where the model's is {list(shape)}; "
                "is its config.json of another model?"
            )

    def _slice(self, name: str) -> Any:
        return self.file_of[name].get_slice(name)


def compute_buffers(module: nn.Module, config: Any, device: torch.device) -> None:
    """Buffers of a module that has no others and nothing else: of its class made anew on the CPU."""
    own = dict(module.named_buffers(recurse=False))
    if not own:
        return
    with torch.device("cpu"):
        fresh = type(module)(config)  # rotary embeddings take the configuration alone
    for name, buffer in fresh.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))

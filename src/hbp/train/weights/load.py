"""Give a sharded model its first values, of a checkpoint or afresh: no rank ever holds the whole.

The model has been built on the meta device and sharded by FSDP2, so every parameter knows which part this rank owns.
Of a checkpoint it is sliced out of the memory-mapped files (:mod:`hbp.train.weights.stored`) and converted to the
parameter's type, one tensor after another; the rest is never read. Afresh, every rank draws each module's own
parameters whole, by the model family's own rules and from a seed of the module's name, and keeps its part: the same
values for any number of ranks.

What `from_pretrained` would do with the checkpoint is done here: tensors are renamed and merged by the family's own
rules; tied weights are stored once, under either name, and weights that the configuration ties but the checkpoint has
apart stay apart; tensors that the model has no place for are named. A tensor that is missing is refused, where
`from_pretrained` would draw it at random.

Two things are in no checkpoint: buffers that follow from the configuration (rotary frequencies), computed anew by the
family's own rules; and low-rank adapters that were added to the model, whose first values are drawn as `peft` draws
them, the same for any number of ranks.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor, Shard

from hbp.errors import HbpError
from hbp.progress import say
from hbp.train.weights.nf4 import pack, packed_layers
from hbp.train.weights.stored import Source, Stored, find_sources, open_tensors

ADAPTER = re.compile(r"\.lora_(embedding_)?([AB])\.")
"""Names of peft's adapters"""
MAGNITUDE = ".lora_magnitude_vector."
"""What DoRA adds to them"""
WRAPPED = re.compile(r"(\.base_layer|\.original_module|\.modules_to_save\.\w+)+\.")
"""What peft adds to the names of what it wraps"""
EQUAL_ROWS = 4096
"""Of two tensors that may be the same, compared at a time"""
NAMED = 3
"""Tensors that a message names"""

Part = Callable[[int, int, int], Tensor]
"""Of a dimension of a parameter, the entries ``[begin, end)``, as the checkpoint has them"""


def settle_ties(lm: Any, folder: Path) -> None:
    """Untie, in place, what the configuration ties but the checkpoint holds twice with different values.

    Args:
        lm: transformers model on the meta device, before it is sharded.
        folder: of its checkpoint.
    """
    ties = dict(getattr(lm, "all_tied_weights_keys", None) or {})
    if not ties:
        return
    stored = open_tensors(folder)
    sources, _ = find_sources(lm, stored, lm.state_dict())
    for target, source in ties.items():
        if target not in sources or source not in sources:
            continue
        a, b = (_part_of(lm, name, sources[name], stored, folder) for name in (target, source))
        if _same(a, b, lm.get_parameter(source).size(0)):
            continue
        path, _, name = target.rpartition(".")
        kept = lm.get_parameter(source)
        setattr(lm.get_submodule(path), name, nn.Parameter(torch.empty_like(kept), kept.requires_grad))
        lm.all_tied_weights_keys.pop(target)
        lm.config.tie_word_embeddings = False
        say(f"the checkpoint has {target} apart from {source}, which its config.json would tie: both are kept")


def _same(a: Part, b: Part, rows: int) -> bool:
    pieces = ((begin, min(begin + EQUAL_ROWS, rows)) for begin in range(0, rows, EQUAL_ROWS))
    return all(torch.equal(a(0, *piece), b(0, *piece)) for piece in pieces)


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
    stored, persistent = open_tensors(folder), lm.state_dict(keep_vars=True)
    wanted = {plain_name(name): x for name, x in persistent.items() if not _of_adapter(name)}
    packed = {f"{path}.weight": layer.dense_shape for path, layer in packed_layers(lm).items()}
    wanted |= {plain_name(name): torch.empty(shape, device="meta") for name, shape in packed.items()}
    sources, unused = find_sources(lm, stored, wanted)
    _name_unused(folder, unused)

    ties = dict(getattr(lm, "all_tied_weights_keys", None) or {})
    ties |= {source: target for target, source in ties.items()}

    def read(aliases: list[str]) -> Part:
        plain = [plain_name(name) for name in aliases]
        # What `peft` copies or wraps of a tied pair is no longer the same parameter, but begins with the same values.
        for name in [*plain, *(ties[name] for name in plain if name in ties)]:
            if name in sources:
                return _part_of(lm, name, sources[name], stored, folder, wanted[name].shape)
        raise HbpError(f"the checkpoint {folder} has no tensor {plain_name(aliases[0])}; is it of another model?")

    names: dict[nn.Parameter, list[str]] = {}  # tied weights have several
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    state = {}
    for parameter, aliases in names.items():
        name = aliases[0]
        if MAGNITUDE in name:
            weight = plain_name(f"{name.split(MAGNITUDE)[0]}.weight")
            part = _cut(read([weight])(0, 0, wanted[weight].size(0)).to(parameter.dtype).norm(dim=1))
        elif ADAPTER.search(name):
            part = _adapter(name, parameter.shape, seed)
        elif name in packed:
            part = _packed(read(aliases))
        else:
            part = read(aliases)
        loaded = nn.Parameter(_shard(parameter, part, device), parameter.requires_grad)
        state.update(dict.fromkeys(aliases, loaded))
    buffers = {}
    for name in persistent.keys() - state.keys():
        part = read([name])
        rows = persistent[name].size(0) if persistent[name].ndim else 1
        buffers[name] = part(0, 0, rows).to(device, persistent[name].dtype, copy=True)
    _assign(lm, state, buffers, device)


def _packed(dense: Part) -> Part:
    """Rows of a matrix as the four bits that stand for them."""
    return lambda dim, begin, end: pack(dense(dim, begin, end))


def _name_unused(folder: Path, unused: list[str]) -> None:
    if unused:
        more = f" and {len(unused) - NAMED} more" if len(unused) > NAMED else ""
        say(f"the checkpoint {folder} has tensors that the model does not use: {', '.join(unused[:NAMED])}{more}")


def plain_name(name: str) -> str:
    """The name that a parameter has without `peft`'s wrappers around its module."""
    return WRAPPED.sub(".", name)


def _of_adapter(name: str) -> bool:
    return MAGNITUDE in name or ADAPTER.search(name) is not None


def draw_shards(lm: Any, device: torch.device, seed: int) -> None:
    """Give a sharded model without storage its memory and fresh values, as transformers draws them for its family.

    Args:
        lm: transformers model on the meta device, its parameters sharded.
        device: of this rank.
        seed: of the values.
    """
    drawn: dict[nn.Parameter, nn.Parameter] = {}
    state, buffers = {}, {}
    for path, module in lm.named_modules():
        prefix = f"{path}." if path else ""
        own = {name: p for name, p in module._parameters.items() if p is not None}
        new = {name: p for name, p in own.items() if p not in drawn}  # not tied to an earlier module's
        whole = {name: nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype)) for name, p in new.items()}
        held = {name: b for name, b in module._buffers.items() if b is not None}
        kept = held.keys() - module._non_persistent_buffers_set
        if whole or kept:
            module._parameters.update(whole)
            module._buffers.update({name: torch.zeros(b.shape, dtype=b.dtype) for name, b in held.items()})
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(path, seed))
                lm._init_weights(module)
            buffers.update({f"{prefix}{name}": module._buffers[name].to(device) for name in kept})
            module._parameters.update(own)
            module._buffers.update(held)
        for name, p in new.items():
            assert not whole[name].isnan().any(), f"{path}.{name} is not initialised by {type(lm).__name__}"
            drawn[p] = nn.Parameter(_shard(p, _cut(whole[name].detach()), device), p.requires_grad)
        state.update({f"{prefix}{name}": drawn[p] for name, p in own.items()})
    _assign(lm, state, buffers, device)


def _assign(lm: Any, state: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor], device: torch.device) -> None:
    """Parameters and persistent buffers as given, other buffers computed."""
    lm.load_state_dict({**state, **buffers}, assign=True)
    for module in lm.modules():
        compute_buffers(lm, module, device)


def compute_buffers(lm: Any, module: nn.Module, device: torch.device) -> None:
    """Give a module the buffers that no checkpoint has, by its family's own rules, which draw parameters too."""
    names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
    if not names:
        return
    parameters, buffers = dict(module._parameters), dict(module._buffers)
    try:
        for name, parameter in parameters.items():  # not these: on the meta device nothing is drawn
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="meta"))
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], torch.nan, device="cpu")  # type: ignore[arg-type]
        lm._init_weights(module)
        made = {name: module._buffers[name] for name in names}
    finally:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
    for name, buffer in made.items():
        assert buffer is not None
        computed = isinstance(buffer, FakeTensor) or not buffer.isnan().any()  # a tensor without values shows nothing
        assert computed, f"{name} is not computed by {type(lm).__name__}"
        module._buffers[name] = buffer.to(device)


def _seed(name: str, seed: int) -> int:
    """Of what is drawn for a name: 32 bits, more the CPU's generator does not look at."""
    return zlib.crc32(f"{seed} {name}".encode())


def _cut(values: Tensor) -> Part:
    return lambda dim, begin, end: values.narrow(dim, begin, end - begin)


def _adapter(name: str, shape: torch.Size, seed: int) -> Part:
    """First values of a low-rank adapter, as peft's; small, so drawn whole and then cut.

    On a layer, A is uniform and B zero; on an embedding A is zero and B normal.
    """
    found = ADAPTER.search(name)
    assert found
    of_embedding, which = found.groups()
    values, generator = torch.zeros(shape), torch.Generator().manual_seed(_seed(name, seed))
    if of_embedding and which == "B":
        values.normal_(generator=generator)
    elif not of_embedding and which == "A":
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


def _part_of(
    lm: Any,
    name: str,
    source: Source,
    stored: Mapping[str, Stored],
    folder: Path,
    shape: torch.Size | None = None,
) -> Part:
    """How to read a parameter of this shape (none: of any).

    Raises:
        HbpError: it is not there in whole, or not of this shape.
    """

    def check(tensor: str, wanted: tuple[int, ...]) -> None:
        if tensor not in stored:
            raise HbpError(f"the checkpoint {folder} has no tensor {tensor}; is it of another model?")
        if wanted != stored[tensor].shape:
            raise HbpError(
                f"the checkpoint {folder} has {tensor} of shape {list(stored[tensor].shape)} where the model's is "
                f"{list(wanted)}; is its config.json of another model?"
            )

    if source.converter is None:
        ((tensor,),) = source.names.values()
        if shape is not None:
            check(tensor, tuple(shape))
        found = stored[tensor]
        return found.part if found.shape else lambda dim, begin, end: found.whole()
    if shape is not None and source.stacks(len(shape)):
        return _stacked(source, stored, shape, check)
    whole = source.convert(lm, name, stored)
    if shape is not None and whole.shape != shape:
        raise HbpError(
            f"the checkpoint {folder} gives {name} the shape {list(whole.shape)} where the model's is {list(shape)}; "
            "is its config.json of another model?"
        )
    return _cut(whole)


def _stacked(
    source: Source,
    stored: Mapping[str, Stored],
    shape: torch.Size,
    check: Callable[[str, tuple[int, ...]], None],
) -> Part:
    """Experts that are stored one by one, each perhaps in parts that lie one below the other: read one by one too."""
    parts = source.in_order(shape[0])
    for of_expert in zip(*parts, strict=True):
        for tensor in of_expert:
            check(tensor, (shape[1] // len(parts), *shape[2:]))

    def read(dim: int, begin: int, end: int) -> Tensor:
        which, within = (range(begin, end), slice(None)) if dim == 0 else (range(shape[0]), slice(begin, end))
        every = [torch.cat([stored[part[expert]].whole() for part in parts])[within] for expert in which]
        return torch.stack(every) if every else torch.empty(0, *shape[1:])

    return read

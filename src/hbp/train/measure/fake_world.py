"""One process plays a rank of a world whose other ranks do not exist.

The process group has the world's size and moves nothing: whatever a rank would receive from the others is a copy of its
own part, so values stay finite and of normal size, but mean nothing. Everything else is real: FSDP's shards have the
size of the true world, a pack is cut at its true degree, layers are computed and recomputed. So one device can measure
the compute and the memory of any rank of any cluster.

The groups of one rank serve to play all: which tokens and documents a rank has follows from the number that is given to
:func:`~hbp.train.batch.make_micro_batch`, not from the group, and the shards of rank 0 are never smaller than
another's.

torch's own "fake" backend is used where it is there and does so. Where it is missing, or leaves what it should fill (as
torch 2.11's does after reduce-scatter and all-to-all), a backend of ours, registered with torch, does the same.

Cost: a gather is one copy a rank on the device itself, ``world size × shard`` bytes written, where a network would have
written as many; it is not a measure of communication.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.futures import Future

from hbp.errors import HbpError
from hbp.parallel.gather_kv import ALL_GATHER, REDUCE_SCATTER
from hbp.train.model import CausalLMWithLoss, meta_model, shard
from hbp.train.weights.load import compute_buffers

OWN_BACKEND = "hbp_fake"
DEVICES = ["cpu", "cuda"]
DEVIATION = 0.02
"""Of drawn matrices, as transformers initialises most families."""


@contextmanager
def fake_world(world_size: int, rank: int = 0, backend: str | None = None) -> Iterator[None]:
    """Inside, this process is a rank of a world of its own making; process groups end with it.

    Args:
        world_size: ranks of the world.
        rank: that this process is.
        backend: of torch; None: its own fake one if that can be used, else ours.

    Raises:
        HbpError: the process belongs to a world already, or there is no such rank.
    """
    if dist.is_initialized():
        raise HbpError("this process is a rank of a real job; leave its process group before playing another")
    if not 0 <= rank < world_size:
        raise HbpError(f"there is no rank {rank} in a world of {world_size}; give 0 to {world_size - 1}")
    _join(backend or fake_backend(), world_size, rank)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def fake_backend() -> str:
    """The backend to use: torch's, or ours. Tried once, in a world of four."""
    try:
        import torch.testing._internal.distributed.fake_pg  # noqa: F401

        _join("fake", 4, 2)
        try:
            if _copies_own_part():
                return "fake"
        finally:
            dist.destroy_process_group()
    except (ImportError, AttributeError, RuntimeError, ValueError, NotImplementedError):
        pass
    return OWN_BACKEND


def drawn_model(
    name_or_folder: str,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    by_layer: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    compiled: bool = False,
) -> CausalLMWithLoss:
    """A sharded model with values of a normal size, drawn shard by shard on the device; no checkpoint is read.

    What a rank computes and holds does not depend on the values, and gathering copies of one shard would make nothing
    of a checkpoint's. Experts are chosen about alike.

    Args:
        name_or_folder: as for :func:`~hbp.train.model.load_model`, and so `attention`.
        mesh: of the world, and so `by_layer`, `compute_dtype` and `compiled` as for :func:`~hbp.train.model.shard`.
        device: of this rank.

    Raises:
        HbpError: as they do.
    """
    model = meta_model(name_or_folder, attention=attention)
    shard(model, mesh, by_layer=by_layer, compute_dtype=compute_dtype, compiled=compiled)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.ndim > 1:
                local.normal_(0.0, DEVIATION)
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
    for module in model.lm.modules():
        compute_buffers(model.lm, module, device)
    return model


def _join(backend: str, world_size: int, rank: int) -> None:
    if backend == OWN_BACKEND:
        _register_own()
    named = ",".join(f"{device}:{backend}" for device in DEVICES)
    dist.init_process_group(named, rank=rank, world_size=world_size, store=HashStore())


def _copies_own_part() -> bool:
    """Whether the collectives of training fill what they should, in a world that is joined."""
    ranks, mine = dist.get_world_size(), torch.arange(1.0, 4.0)
    whole, sent = mine.repeat(ranks), torch.arange(2.0 * ranks)
    group = dist.new_group(range(ranks), backend=dist.get_backend_config(), use_local_synchronization=True)
    gathered, exchanged = (torch.full_like(x, torch.nan) for x in (whole, sent))
    reduced, summed = torch.full_like(mine, torch.nan), mine.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that torch has moved on from
        ALL_GATHER(gathered, mine, group=group)
        REDUCE_SCATTER(reduced, whole, group=group)
        dist.all_to_all_single(exchanged, sent, group=group)
        dist.all_reduce(summed, group=group)
        dist.barrier(group)
    got = (gathered, reduced, summed, exchanged)
    return all(bool((x == y).all()) for x, y in zip(got, (whole, mine, mine, sent), strict=True))


class _Collectives:
    """What torch calls for each collective, under the names of today and under those before torch 2.13."""

    world_rank: int
    world_size: int

    def size(self) -> int:
        return self.world_size

    def rank(self) -> int:
        return self.world_rank

    def getBackendName(self) -> str:
        return OWN_BACKEND

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[cast(Any, self)])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        return _done([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        with torch.no_grad():
            for every, mine in zip(outputs, inputs, strict=True):
                for part in every:
                    part.copy_(mine)
        return _done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        return self.allgather(outputs, inputs) if outputs else _done([])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        with torch.no_grad():
            for mine, every in zip(outputs, inputs, strict=False):  # of the root alone; others keep what they have
                mine.copy_(every[self.world_rank])
        return _done(outputs)

    def all_gather_single(self, output: Tensor, mine: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(output.view(self.world_size, *mine.shape))], [mine])

    def reduce_scatter_single(self, mine: Tensor, whole: Tensor, opts: Any = None) -> Any:
        with torch.no_grad():
            mine.copy_(whole.view(self.world_size, *mine.shape)[self.world_rank])
        return _done([mine])

    def all_to_all_single(
        self, output: Tensor, sent: Tensor, outputs: Sequence[int], inputs: Sequence[int], opts: Any = None
    ) -> Any:
        if list(outputs) != list(inputs):
            raise NotImplementedError("messages of unlike sizes")
        with torch.no_grad():
            output.copy_(sent)
        return _done([output])

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


class _OwnGroup(_Collectives, dist.ProcessGroup):  # type: ignore[misc]  # torch's own are static, and renamed in 2.13
    def __init__(self, rank: int, size: int) -> None:
        dist.ProcessGroup.__init__(self, rank, size)  # type: ignore[call-arg]
        self.world_rank, self.world_size = rank, size


def _done(value: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(value)
    return _create_work_from_future(future)


def _create(store: object, rank: int, size: int, timeout: object) -> Any:
    return _OwnGroup(rank, size)


@functools.cache
def _register_own() -> None:
    dist.Backend.register_backend(OWN_BACKEND, _create, devices=DEVICES)

"""Process groups for each sequence-parallel (SP) degree, all on one world mesh.

FSDP2 shards the model once, over the whole world, and never hears of the degree. What changes from pack to pack is
only which process groups the attention communicates in. So a change of degree costs nothing but picking other groups
(paper, Section 4.3): those of the degrees that a plan uses are made once, before its first step, and no others.

A rank makes only the groups that it belongs to, so the work does not grow with the world. The ranks of an SP group are
adjacent and aligned to the degree, so that on a cluster with `gpus_per_node` devices every degree up to it stays inside
a node.

Up to the number of attention heads a degree is Ulysses alone. Beyond, the largest divisor of the degree that also
divides the heads is Ulysses among neighbours, and keys and values are gathered across the rest
(:mod:`hbp.parallel.gather_kv`): with 4 heads and degree 8, ranks 0–3 and 4–7 exchange heads, and 0 and 4, 1 and 5, …
gather.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbp.errors import HbpError


@dataclass(frozen=True)
class SequenceGroups:
    """How the ranks of one SP degree divide the attention, and this rank's groups for it."""

    ulysses: int = 1
    """Ranks, adjacent, that exchange tokens for heads."""
    gather: int = 1
    """Ranks, `ulysses` apart, that gather keys and values."""
    ulysses_group: ProcessGroup | None = None
    gather_group: ProcessGroup | None = None

    @property
    def degree(self) -> int:
        """The SP degree."""
        return self.ulysses * self.gather


@dataclass(frozen=True)
class ParallelMesh:
    """The world mesh that FSDP2 shards over, and the SP groups of this rank that have been made."""

    world: DeviceMesh
    heads: int | None = None
    """Attention heads of the model, beyond which keys and values are gathered; None to refuse such degrees later."""
    made: dict[int, SequenceGroups] = field(default_factory=lambda: {1: SequenceGroups()})

    def prepare(self, degrees: Iterable[int]) -> None:
        """Make the groups of these degrees that are not there yet. A collective: all ranks call it alike.

        Raises:
            HbpError: a degree does not divide the world.
        """
        for degree in sorted(set(degrees) - set(self.made)):
            self.made[degree] = self._make(degree)

    def groups(self, degree: int) -> SequenceGroups:
        """The groups of this rank at a degree.

        Raises:
            HbpError: nobody prepared it.
        """
        if degree not in self.made:
            raise HbpError(f"no process groups for SP degree {degree}; call prepare([{degree}]) on all ranks first")
        return self.made[degree]

    def _make(self, degree: int) -> SequenceGroups:
        world_size, rank = self.world.size(), self.world.get_rank()
        if world_size % degree:
            raise HbpError(
                f"SP degree {degree} does not divide the world of {world_size} ranks; "
                f"make the plan again with `hbp plan --gpus {world_size}`"
            )
        ulysses = degree if self.heads is None else math.gcd(degree, self.heads)
        start = rank // degree * degree
        row, column = divmod(rank - start, ulysses)
        neighbours = [start + row * ulysses + i for i in range(ulysses)]
        across = [start + column + i * ulysses for i in range(degree // ulysses)]
        return SequenceGroups(ulysses, degree // ulysses, self._group(neighbours), self._group(across))

    def _group(self, ranks: list[int]) -> ProcessGroup | None:
        if len(ranks) == 1:
            return None
        of_device = dict(part.split(":") for part in dist.get_backend_config().split(","))
        group = dist.new_group(ranks, backend=of_device[self.world.device_type], use_local_synchronization=True)
        assert isinstance(group, ProcessGroup)
        return group


def make_mesh(world_size: int, degrees: Iterable[int], device_type: str, heads: int | None = None) -> ParallelMesh:
    """Make the world mesh and the groups of some degrees. A collective: all ranks call it alike.

    Args:
        world_size: ranks.
        degrees: SP degrees to prepare now; others can be later, by :meth:`ParallelMesh.prepare`.
        device_type: ``cpu`` or ``cuda``.
        heads: attention heads of the model, so that higher degrees gather keys and values.

    Raises:
        HbpError: a degree does not divide the world.
    """
    mesh = ParallelMesh(init_device_mesh(device_type, (world_size,), mesh_dim_names=("world",)), heads)
    mesh.prepare(degrees)
    return mesh

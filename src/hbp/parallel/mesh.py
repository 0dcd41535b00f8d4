"""One process group per sequence-parallel (SP) degree, all on one world mesh.

FSDP2 shards the model once, over the whole world, and never hears of the degree. What changes from pack to pack is
only which process group the attention's all-to-all runs in. So a change of degree costs nothing but picking another
group (paper, Section 4.3): every group is made once, before training, because making one is itself a collective.

The ranks of a group are adjacent and aligned to the degree, so that on a cluster with `gpus_per_node` devices every
degree up to it stays inside a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hbp.errors import HbpError


@dataclass(frozen=True)
class ParallelMesh:
    """The world mesh that FSDP2 shards over, and the SP process groups of this rank by degree."""

    world: DeviceMesh
    sp_groups: Mapping[int, ProcessGroup]

    def sp_group(self, degree: int) -> ProcessGroup | None:
        """The group of this rank at a degree; None for degree 1, which needs no communication."""
        return self.sp_groups[degree] if degree > 1 else None


def make_mesh(world_size: int, degrees: Iterable[int], device_type: str) -> ParallelMesh:
    """Make the world mesh and the groups of every degree above 1. A collective: all ranks call it alike.

    Raises:
        HbpError: a degree does not divide the world.
    """
    world = init_device_mesh(device_type, (world_size,), mesh_dim_names=("world",))
    groups: dict[int, ProcessGroup] = {}
    for degree in sorted(set(degrees) - {1}):
        if world_size % degree:
            raise HbpError(
                f"SP degree {degree} does not divide the world of {world_size} ranks; "
                f"make the plan again with `hbp plan --gpus {world_size}`"
            )
        mesh = init_device_mesh(device_type, (world_size // degree, degree), mesh_dim_names=("dp", "sp"))
        groups[degree] = mesh.get_group("sp")
    return ParallelMesh(world, groups)

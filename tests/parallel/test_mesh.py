from __future__ import annotations

import torch.distributed as dist
from workers import run_ranks

from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh

WORLD = 4


def ranks_of(mesh: ParallelMesh, degree: int) -> list[list[int] | None]:
    groups = mesh.groups(degree)
    assert groups.degree == degree
    return [group and dist.get_process_group_ranks(group) for group in (groups.ulysses_group, groups.gather_group)]


def look(rank: int, world: int) -> dict[str, object]:
    mesh = make_mesh(world, [4, 1, 2, 2], "cpu")
    found: dict[str, object] = {"ulysses": {d: ranks_of(mesh, d) for d in mesh.made}}
    found["world"] = mesh.world.mesh.tolist()
    found["gather"] = {heads: ranks_of(make_mesh(world, [4], "cpu", heads), 4) for heads in (2, 3, 4, 6)}
    mesh = make_mesh(world, [], "cpu")
    for call in (lambda: mesh.groups(2), lambda: mesh.prepare([2, 3])):
        try:
            call()
        except HbpError as error:
            found.setdefault("errors", []).append(str(error))
    before = mesh.groups(2)
    mesh.prepare([1, 2, 4])
    found["once"] = before is mesh.groups(2)
    found["all work"] = []
    for degree in (2, 4):
        number = [None] * degree
        dist.all_gather_object(number, rank, mesh.groups(degree).ulysses_group)
        found["all work"].append(number)
    return found


def test_groups_are_adjacent_and_aligned():
    for rank, found in enumerate(run_ranks(look, WORLD)):
        pair, everyone, across = [rank // 2 * 2, rank // 2 * 2 + 1], [0, 1, 2, 3], [rank % 2, rank % 2 + 2]
        assert found["errors"] == [
            "no process groups for SP degree 2; call prepare([2]) on all ranks first",
            "SP degree 3 does not divide the world of 4 ranks; make the plan again with `hbp plan --gpus 4`",
        ]
        assert found["world"] == everyone
        assert found["ulysses"] == {1: [None, None], 2: [pair, None], 4: [everyone, None]}
        assert found["gather"] == {
            2: [pair, across],  # the heads take two ranks, the rest gathers
            3: [None, everyone],
            4: [everyone, None],
            6: [pair, across],
        }
        assert found["once"]
        assert found["all work"] == [pair, everyone]

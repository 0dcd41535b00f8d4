from __future__ import annotations

import torch.distributed as dist
from workers import run_ranks

from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh

WORLD = 4


def look(rank: int, world: int) -> dict[str, object]:
    mesh = make_mesh(world, [4, 1, 2, 2], "cpu")
    found: dict[str, object] = {d: dist.get_process_group_ranks(g) for d, g in mesh.sp_groups.items()}
    found["world"] = mesh.world.mesh.tolist()
    found["alone"] = mesh.sp_group(1)
    try:
        make_mesh(world, [2, 3], "cpu")
    except HbpError as error:
        found["error"] = str(error)
    return found


def test_groups_are_adjacent_and_aligned():
    for rank, found in enumerate(run_ranks(look, WORLD)):
        start = rank // 2 * 2
        assert found.pop("error") == (
            "SP degree 3 does not divide the world of 4 ranks; make the plan again with `hbp plan --gpus 4`"
        )
        assert found == {2: [start, start + 1], 4: [0, 1, 2, 3], "world": [0, 1, 2, 3], "alone": None}

"""Measure what the links carry: the three collectives of training, on groups of adjacent ranks, at a few sizes.

Every group of a size runs at once, as in training, so ranks share what they share then. They are measured alone, with
nothing to hide behind: hiding is the cost model's own constant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from hbp.cost.fit import Collective
from hbp.parallel.gather_kv import ALL_GATHER, REDUCE_SCATTER
from hbp.train.measure.micro_batch import highest

SIZES = {"cpu": (2**16, 2**20, 2**23), "cuda": (2**16, 2**20, 2**24, 2**27, 2**29)}
"""Bytes that a rank receives, about. Small ones tell the latency; the rate shows only from a layer's size on (436 MB at
8B), so those of a GPU end there."""
REPEATS = 5


def measure_collectives(degrees: Iterable[int], device: torch.device) -> list[Collective]:
    """All-to-all at each SP degree above 1, all-gather and reduce-scatter over the world. A collective call.

    Args:
        degrees: that divide the world; 1 is passed over, so a single rank measures nothing.
        device: of this rank.

    Returns:
        The same on every rank: the slowest rank's median seconds.
    """
    world, measured = dist.get_world_size(), []
    for ranks in sorted(set(degrees) | {world}):
        if ranks == 1:
            continue
        group = init_device_mesh(device.type, (world // ranks, ranks), mesh_dim_names=("dp", "sp")).get_group("sp")
        for size in SIZES[device.type]:
            elements = size // 4 // (ranks - 1)
            whole = torch.ones(ranks * elements, device=device)
            part, target = torch.ones(elements, device=device), torch.empty_like(whole)
            runs: dict[str, Callable[[], object]] = {}
            if ranks in degrees:
                runs["all_to_all"] = _bound(dist.all_to_all_single, target, whole, group)
            if ranks == world:
                runs["all_gather"] = _bound(ALL_GATHER, target, part, group)
                runs["reduce_scatter"] = _bound(REDUCE_SCATTER, part, whole, group)
            received = float(elements * 4 * (ranks - 1))
            measured += [Collective(kind, ranks, received, _seconds(run, device)) for kind, run in runs.items()]
    return measured


def _bound(collective: Callable[..., object], output: Tensor, given: Tensor, group: object) -> Callable[[], object]:
    return lambda: collective(output, given, group=group)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return highest(float(np.median(seconds_of(run, device, REPEATS, dist.barrier))), device)


def seconds_of(
    run: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Wall seconds of something on a device, after once to warm up.

    Args:
        run: what is timed, until the device has done it.
        device: where it runs.
        repeats: how often it is timed.
        before: done before each time, and not counted.
    """
    run()
    seconds = []
    for _ in range(repeats):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds

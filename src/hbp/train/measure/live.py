"""The live profile: measure micro-batches and collectives on this engine and fit the cost model to them.

A small model is measured whole. Of a large one, two stacks of a few layers are, with its real dimensions, so
that a profile takes minutes on hardware that could not hold the model on so few devices. Embedding, head and loss
are there in full; only decoder layers are left out. Two stacks of different height tell the layers' cost from that of
the ends, and a fit to both predicts any height (:mod:`hbp.cost.fit`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hbp.cost.cluster import ClusterSpec
from hbp.cost.fit import Collective, Fit, Point, fit_cluster, grid, predict_bytes, predict_point
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh
from hbp.progress import Progress, say
from hbp.train.launch import device_name, free_memory
from hbp.train.measure.links import measure_collectives
from hbp.train.measure.micro_batch import highest, measure_point
from hbp.train.model import CausalLMWithLoss, load_model, read_config

FEW_SHARES = (16, 4)
"""Of the shorter stack, which only has to tell the layers from the ends."""
ROOM = 0.85
"""Share of a device's memory that a pack may be predicted to need."""

Pack = tuple[tuple[int, ...], int, int]
"""Document lengths, SP degree, recomputed layers."""


@dataclass(frozen=True)
class LiveProfile:
    """What was measured, and the fit to it."""

    fit: Fit
    points: tuple[Point, ...]
    collectives: tuple[Collective, ...]
    seconds: float
    """That measuring took."""
    skipped: int
    """Packs that the time limit left out, or for which a device had not the memory."""


def packs_to_measure(
    cost: CostModel,
    lengths: npt.NDArray[np.integer],
    longest: int,
    device: torch.device,
    *,
    heights: Sequence[int] = (),
    seed: int = 0,
) -> dict[int | None, list[Pack]]:
    """The grid of each stack of layers, by its height; under None that of the whole model if no stacks are wanted.

    Args:
        cost: of the whole model.
        lengths: of the data, tokens; packs are filled with such documents.
        longest: packing length, tokens.
        device: that has to have the memory.
        heights: layers of the stacks.
        seed: of the choice of documents.
    """
    packs: dict[int | None, list[Pack]] = {}
    for height in heights or (None,):
        of_stack = cost if height is None else replace(cost, model=cost.model.with_layers(height))
        few = height is not None and height < max(heights)
        shares = {"shares": FEW_SHARES} if few else {}
        every = grid(of_stack, lengths, longest, np.random.default_rng(seed), **shares)
        packs[height] = that_fit(of_stack, every, device)
    return packs


def that_fit(cost: CostModel, packs: Sequence[Pack], device: torch.device) -> list[Pack]:
    """Those packs for which the device is predicted to have the memory; on CPU all, and the first always."""
    if device.type != "cuda":
        return list(packs)
    room = ROOM * torch.cuda.get_device_properties(device).total_memory
    return [p for i, p in enumerate(packs) if not i or predict_bytes(cost, Point(*p, 0.0, 0.0)) <= room]


def live_profile(
    make_model: Callable[[int | None], CausalLMWithLoss],
    cost: CostModel,
    mesh: ParallelMesh,
    device: torch.device,
    packs: Mapping[int | None, Sequence[Pack]],
    *,
    limit_s: float = math.inf,
) -> LiveProfile:
    """Measure and fit. A collective: all ranks call it alike and get the same.

    Args:
        make_model: the sharded model, whole (None) or a stack of its first layers.
        cost: its model is the whole one; its cluster keeps what cannot be measured.
        mesh: with groups for every degree of the packs.
        device: of this rank.
        packs: to measure, by the height of the stack that runs them.
        limit_s: packs that would end later are left out, but for the first of each stack, which has its share of it.
    """
    began, points, skipped = time.monotonic(), list[Point](), 0
    cost = replace(cost, cluster=in_its_nodes(cost.cluster, cost.world_size))
    collectives = measure_collectives({p[1] for every in packs.values() for p in every}, device)
    total = sum(map(len, packs.values()))
    with Progress("profile", total) as progress:
        for height, every in packs.items():
            model = make_model(height)
            end = limit_s * (len(points) + skipped + len(every)) / total
            # The largest first, once and unrecorded: later points then find a warm allocator, as training does.
            measure_point(model, mesh, *every[-1], device=device, repeats=0)
            pace = 0.0  # seconds that measuring the last pack took over those predicted for one run of it
            for index, (lengths, degree, gc_layers) in enumerate(every):
                predicted = predict_point(cost, Point(lengths, degree, gc_layers, 0.0, 0.0, height))
                start = time.monotonic()
                if index and highest(start - began + pace * predicted, device) > end:
                    skipped += 1
                    continue
                point = measure_point(model, mesh, lengths, degree, gc_layers, device=device)
                if math.isinf(point.peak_bytes):
                    skipped += 1
                    continue
                pace = (time.monotonic() - start) / predicted
                points.append(replace(point, n_layers=height))
                stack = f"{height} layers " if height else ""
                progress.advance(f"{stack}{sum(lengths)} tokens SP{degree} GC{gc_layers}: {point.seconds:.2f} s")
            del model
            free_memory()
    fit = fit_cluster(cost.cluster, cost.model, cost.world_size, points, device_name(device), collectives)
    say(f"cost model fitted to {len(points)} micro-batches; held-out median error {fit.held_out_error:.1%}")
    if skipped:
        say(f"{skipped} micro-batches were left out: they would have ended after {limit_s:.0f} s, or did not fit")
    return LiveProfile(fit, tuple(points), tuple(collectives), time.monotonic() - began, skipped)


def in_its_nodes(cluster: ClusterSpec, world_size: int) -> ClusterSpec:
    """A cluster with as many devices a node as this job's launcher has ranks here, if that is fewer than all."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return replace(cluster, devices_per_node=here) if here < world_size else cluster


WHOLE_MODEL_PARAMETERS = 300e6
"""Up to so many a model is measured whole."""
STACK_LAYERS = 2


def stack_heights(parameters: int, n_layers: int) -> tuple[int, ...]:
    """Layers of the stacks to measure, shortest first; none where the whole model is measured."""
    if parameters <= WHOLE_MODEL_PARAMETERS or n_layers <= 2 * STACK_LAYERS:
        return ()
    return STACK_LAYERS, 2 * STACK_LAYERS


def load_stack(
    name_or_folder: str,
    n_layers: int,
    device: torch.device,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    attention: str = "auto",
) -> CausalLMWithLoss:
    """The first `n_layers` of a model, freshly initialised on a device; its weights are not read.

    Args:
        name_or_folder: as for :func:`~hbp.train.model.load_model`.
        n_layers: at most the model's.
        device: where the parameters are made.
        vocab_size: replaces the configuration's.
        seed: of the initialisation.
        attention: kernel.

    Raises:
        HbpError: no configuration that transformers can load, or one with fewer layers.
    """
    config = read_config(name_or_folder).to_dict()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cut_config(config, n_layers)))
        with torch.device(device):
            return load_model(folder, vocab_size=vocab_size, seed=seed, attention=attention).to(device)


def cut_config(config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """A transformers configuration with only its first layers.

    Raises:
        HbpError: it has fewer, or none are asked for.
    """
    every = config["num_hidden_layers"]
    if not 1 <= n_layers <= every:
        raise HbpError(f"the model has {every} layers, so a stack of {n_layers} cannot be cut from it")
    cut = {**config, "num_hidden_layers": n_layers}
    if cut.get("layer_types"):
        cut["layer_types"] = list(cut["layer_types"])[:n_layers]
    return cut

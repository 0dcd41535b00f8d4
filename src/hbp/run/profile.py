"""Measure this machine with the model and data of a run: what `hbp profile` does, and `hbp train` before it plans."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hbp.cost.cluster import ClusterSpec
from hbp.cost.profile_file import profile_json
from hbp.train.lora import add_adapters
from hbp.train.measure.layer_stack import load_stack, stack_heights
from hbp.train.measure.live import live_profile, packs_to_measure
from hbp.train.model import CausalLMWithLoss, shard

if TYPE_CHECKING:
    from hbp.run.engine import Engine

PROFILE_LIMIT_S = 170.0


def profile_cluster(
    engine: Engine, out: Path, heights: Sequence[int] | None = None, limit_s: float = PROFILE_LIMIT_S
) -> ClusterSpec:
    """The cluster as measured on this engine with packs of its data; rank 0 writes the profile file. A collective.

    Args:
        engine: whose cluster keeps what cannot be measured.
        out: the file.
        heights: layers of the stacks to measure; none given: the whole model where it is small, else two stacks.
        limit_s: micro-batches that would end later are left out.
    """
    lengths, cost = engine.samples.lengths, engine.cost
    if heights is None:
        heights = stack_heights(cost.model.parameters(), cost.model.n_layers)

    def make_model(height: int | None) -> CausalLMWithLoss:
        return engine.fresh_model() if height is None else sharded_stack(engine, height)

    longest = min(engine.config.data.max_length or int(lengths.max()), int(lengths.max()))
    packs = packs_to_measure(cost, lengths, longest, engine.device, heights=heights, seed=engine.config.seed)
    measured = live_profile(make_model, cost, engine.mesh, engine.device, packs, limit_s=limit_s)
    if dist.get_rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        data = profile_json(
            measured.fit,
            cost.model,
            cost.world_size,
            measured.points,
            measured.collectives,
            date=datetime.date.today().isoformat(),
            torch=torch.__version__,
            measured_in_s=measured.seconds,
            skipped=measured.skipped,
        )
        out.write_text(json.dumps(data, indent=1) + "\n")
    return measured.fit.cluster


def sharded_stack(engine: Engine, height: int) -> CausalLMWithLoss:
    """The first layers of the run's model, freshly initialised, with adapters where the run trains some."""
    config, spec = engine.config.model, engine.cost.model
    model = load_stack(
        config.path,
        height,
        engine.device,
        vocab_size=spec.vocab,
        seed=engine.config.seed,
        attention=config.attention,
    )
    if engine.config.lora.rank:
        add_adapters(model, engine.config.lora, config.path, engine.config.seed)
        model.to(engine.device)
    dtype = getattr(torch, config.compute_dtype)
    by_layer = spec.sharded_by_layer
    shard(model, engine.mesh.world, by_layer=by_layer, compute_dtype=dtype, compiled=config.compile)
    model.offload_activations = config.offload_activations
    return model

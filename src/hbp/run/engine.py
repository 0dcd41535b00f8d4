"""What a run stands on before anything is planned: its samples, the engine of this rank, the live profile.

Every rank calls these alike; rank 0 makes what is shared on disk while the others wait.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from hbp.config import Config
from hbp.cost.cluster import GIB, ClusterSpec, load_cluster
from hbp.cost.predict import CostModel
from hbp.cost.profile_file import profile_json
from hbp.data.samples import Samples
from hbp.data.store import open_store
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.progress import say
from hbp.run.data import check_model, choose, prepare
from hbp.train.check.describe import describe_model
from hbp.train.launch import compiles, rank_zero_first
from hbp.train.lora import adapter_parameters, add_adapters
from hbp.train.measure.live import live_profile, load_stack, packs_to_measure, stack_heights
from hbp.train.model import CausalLMWithLoss, is_configuration_alone, load_sharded, shard
from hbp.train.weights.nf4 import pack_base

GPUS = ("NVIDIA", "Instinct")
"""What the names of GPUs hold, and those of CPUs do not."""
PROFILE_LIMIT_S = 170.0
"""Micro-batches that would end later are left out of a profile."""


@dataclass(frozen=True)
class Engine:
    """What every strategy of a run shares on this rank."""

    config: Config
    device: torch.device
    mesh: ParallelMesh
    samples: Samples
    held_out: Samples
    cost: CostModel
    lowered: bool = False
    """A step of the run ran out of memory, so plans count on less than is configured."""

    def fresh_model(self) -> CausalLMWithLoss:
        """The model at its starting point, sharded; the same bits every time."""
        gc.collect()  # modules of an earlier one and their hooks hold each other
        config, lora = self.config.model, self.config.lora
        adapt = partial(add_adapters, config=lora, base=config.path, seed=self.config.seed) if lora.rank else None
        model = load_sharded(
            config.path,
            self.mesh.world,
            self.device,
            vocab_size=self.samples.store.vocab_size,
            seed=self.config.seed,
            by_layer=self.cost.model.sharded_by_layer,
            compute_dtype=getattr(torch, config.compute_dtype),
            attention=config.attention,
            compiled=compiles(config.compile, self.device),
            quantize=config.quantize,
            adapt=adapt,
        )
        if config.hub_kernels:
            model.lm.set_use_kernels(True)
        model.offload_activations = config.offload_activations
        return model

    def stack(self, height: int) -> CausalLMWithLoss:
        """The first layers of the model, freshly initialised, with adapters where the run trains some."""
        config, lora, spec = self.config.model, self.config.lora, self.cost.model
        model = load_stack(
            config.path,
            height,
            self.device,
            vocab_size=spec.vocab,
            seed=self.config.seed,
            attention=config.attention,
        )
        if lora.rank:
            add_adapters(model, lora, config.path, self.config.seed)
            if config.quantize == "nf4":
                pack_base(model.lm)
            model.to(self.device)
        dtype = getattr(torch, config.compute_dtype)
        compiled = compiles(config.compile, self.device)
        shard(model, self.mesh.world, by_layer=spec.sharded_by_layer, compute_dtype=dtype, compiled=compiled)
        if config.hub_kernels:
            model.lm.set_use_kernels(True)
        model.offload_activations = config.offload_activations
        return model


def make_engine(config: Config, device: torch.device) -> Engine:
    """Prepare data (rank 0), split it, describe model and cluster, make the process groups. A collective."""
    run, world_size = Path(config.run_dir), dist.get_world_size()
    if device.type == "cuda" and config.model.compute_dtype == "float32":
        raise HbpError("attention on CUDA needs half precision; set model.compute_dtype to bfloat16")
    with rank_zero_first() as first:
        if first:
            check_model(config, made := prepare(config), choose(config, made))
    store = open_store(run / "store")
    samples, held_out = choose(config, store)
    cluster = load_cluster(config.cluster.name)
    if device.type == "cpu" and any(name in cluster.device for name in GPUS):
        say(
            f"cluster.name={config.cluster.name} describes {cluster.device}, but there is no GPU here: this trains on "
            "the CPU; give cluster.name=cpu-local, or see why torch finds no GPU"
        )
    if config.cluster.memory_gib is not None:
        cluster = dataclasses.replace(cluster, memory_bytes=config.cluster.memory_gib * GIB)
    if is_configuration_alone(config.model.path) and config.lora.rank:
        raise HbpError(f"{config.model.path} holds no weights for adapters to add to; give model.path one that does")
    if is_configuration_alone(config.model.path):
        say(f"{config.model.path} holds no weights: the model starts from a fresh initialisation")
    spec = describe_model(config.model.path, store.vocab_size)
    if config.lora.rank:
        adapters, packed = adapter_parameters(config.lora, config.model.path, config.model.quantize)
        spec = dataclasses.replace(spec, adapter_parameters=adapters, packed_parameters=packed)
    cluster = dataclasses.replace(cluster, offload_activations=config.model.offload_activations)
    cost = CostModel(spec, cluster, world_size)
    mesh = make_mesh(world_size, [], device.type, spec.heads)  # groups are made for the degrees that are run
    return Engine(config, device, mesh, samples, held_out, cost)


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
        return engine.fresh_model() if height is None else engine.stack(height)

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

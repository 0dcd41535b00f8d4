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

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hbp.config import Config, DataConfig
from hbp.cost.cluster import GIB, ClusterSpec, load_cluster
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.cost.profile_file import profile_json
from hbp.data.stdlib_sft import train_tokenizer, write_dataset
from hbp.data.store import TokenStore, open_store
from hbp.data.tokenize import prepare_store
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.progress import say
from hbp.train.launch import rank_zero_first
from hbp.train.lora import adapter_parameters, add_adapters
from hbp.train.measure.live import live_profile, load_stack, packs_to_measure, stack_heights
from hbp.train.model import CausalLMWithLoss, is_configuration_alone, load_sharded, read_config, shard

PROFILE_LIMIT_S = 170.0
"""Micro-batches that would end later are left out of a profile."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a token store, numbered from 0: what a plan's sample ids mean."""

    store: TokenStore
    ids: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each."""
        return self.store.lengths[self.ids]

    @property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        """Targets of each."""
        return self.store.loss_tokens[self.ids]

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and loss mask."""
        return self.store.sample(int(self.ids[index]))


@dataclass(frozen=True)
class Engine:
    """What every strategy of a run shares on this rank."""

    config: Config
    device: torch.device
    mesh: ParallelMesh
    samples: Samples
    held_out: Samples
    cost: CostModel

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
            compiled=config.compile,
            adapt=adapt,
        )
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
            model.to(self.device)
        dtype = getattr(torch, config.compute_dtype)
        by_layer = spec.sharded_by_layer
        shard(model, self.mesh.world, by_layer=by_layer, compute_dtype=dtype, compiled=config.compile)
        model.offload_activations = config.offload_activations
        return model


def prepare(config: Config) -> TokenStore:
    """Make the token store (and for the embedded data set its files and tokenizer), or open it if it is up to date."""
    source, tokenizer = config.data.source, config.data.tokenizer or config.model.path
    if source == "stdlib":
        source, tokenizer = _prepare_stdlib(config.data, Path(config.run_dir) / "data", config.seed)
    return prepare_store(
        source,
        tokenizer,
        Path(config.run_dir) / "store",
        split=config.data.split,
        subset=config.data.subset,
        processes=config.data.processes,
    )


def _prepare_stdlib(data: DataConfig, folder: Path, seed: int) -> tuple[str, str]:
    jsonl, tokenizer, made = folder / "stdlib.jsonl", folder / "tokenizer", folder / "made.json"
    wanted = json.dumps({**data.model_dump(), "seed": seed}, sort_keys=True)
    if not (made.is_file() and made.read_text() == wanted):
        say("making the embedded data set and its tokenizer from this Python's standard library")
        folder.mkdir(parents=True, exist_ok=True)
        write_dataset(
            jsonl,
            seed=seed,
            short_samples=data.short_samples,
            long_samples=data.long_samples,
            longest_chars=data.longest_chars,
        )
        train_tokenizer(jsonl, tokenizer, vocab_size=data.vocab_size)
        made.write_text(wanted)
    return str(jsonl), data.tokenizer or str(tokenizer)


def make_engine(config: Config, device: torch.device) -> Engine:
    """Prepare data (rank 0), split it, describe model and cluster, make the process groups. A collective."""
    run, world_size = Path(config.run_dir), dist.get_world_size()
    if device.type == "cuda" and config.model.compute_dtype == "float32":
        raise HbpError("attention on CUDA needs half precision; set model.compute_dtype to bfloat16")
    with rank_zero_first() as first:
        if first:
            prepare(config)
    store = open_store(run / "store")
    train_ids, eval_ids = split_samples(store.lengths, config)
    samples, held_out = Samples(store, train_ids), Samples(store, eval_ids)
    cluster = load_cluster(config.cluster.name)
    if config.cluster.memory_gib is not None:
        cluster = dataclasses.replace(cluster, memory_bytes=config.cluster.memory_gib * GIB)
    if is_configuration_alone(config.model.path) and config.lora.rank:
        raise HbpError(f"{config.model.path} holds no weights for adapters to add to; give model.path one that does")
    if is_configuration_alone(config.model.path):
        say(f"{config.model.path} holds no weights: the model starts from a fresh initialisation")
    spec = spec_from_config(read_config(config.model.path, store.vocab_size).to_dict())
    if config.lora.rank:
        spec = dataclasses.replace(spec, adapter_parameters=adapter_parameters(config.lora, config.model.path))
    cost = CostModel(spec, cluster, world_size)
    mesh = make_mesh(world_size, [], device.type, spec.heads)  # groups are made for the degrees that are run
    return Engine(config, device, mesh, samples, held_out, cost)


def split_samples(
    lengths: npt.NDArray[np.int32], config: Config
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids of the samples to train on and of those held out, drawn among those short enough to be trained on."""
    n = len(lengths)
    held = config.data.eval_samples
    if held >= n:
        raise HbpError(f"data.eval_samples={held} leaves none of the {n} samples to train on; lower it")
    order = np.random.default_rng(config.seed).permutation(n)
    fits = lengths[order] <= (config.data.max_length or lengths.max())
    if held >= fits.sum():
        raise HbpError(
            f"data.eval_samples={held} leaves none to train on of the {fits.sum()} samples of up to "
            f"{config.data.max_length} tokens; lower it or raise data.max_length"
        )
    eval_ids = order[fits][:held]
    return np.setdiff1d(np.arange(n), eval_ids), np.sort(eval_ids)


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

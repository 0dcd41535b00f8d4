"""Load a transformers model, wrap it with the loss, shard it with FSDP2, choose which layers recompute.

The root module that FSDP2 sees is :class:`CausalLMWithLoss`: the vocabulary projection is used inside its forward, in
chunks, so the full logits never exist. One world mesh shards everything; nothing here depends on the SP degree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hbp.errors import HbpError
from hbp.parallel.ulysses import PackLayout, register_attention
from hbp.train.loss import summed_cross_entropy


class CausalLMWithLoss(nn.Module):
    """A transformers causal language model that returns the summed cross entropy of a pack's slice."""

    lm: Any
    """The transformers model."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, layout: PackLayout) -> Tensor:
        """Args: ids and positions ``[1, T]``, shifted labels ``[T]``. Returns the sum, float32 scalar."""
        decoder = self.lm.get_decoder()
        out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, hbp_layout=layout)
        weight = self.lm.get_output_embeddings().weight
        return summed_cross_entropy(out.last_hidden_state[0], weight, labels)

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers, first to last."""
        layers: Sequence[Any] = self.lm.get_decoder().layers
        return layers


def is_configuration_alone(name_or_folder: str) -> bool:
    """Whether this is a configuration file, or a folder without weights."""
    path = Path(name_or_folder)
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else []
    return path.suffix == ".json" or (path.is_dir() and not weights)


def load_model(
    name_or_folder: str, *, vocab_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> CausalLMWithLoss:
    """A pretrained model, or a freshly initialised one where a folder or file holds only a configuration.

    Args:
        name_or_folder: a folder with weights, a folder or ``.json`` file with a configuration alone, or a hub name.
        vocab_size: replaces the configuration's when the model is initialised afresh.
        seed: of the fresh initialisation; the same on every rank.
        dtype: of the parameters.

    Raises:
        HbpError: nothing there that transformers can load, or a tokenizer larger than the model's vocabulary.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = register_attention()
    fresh = is_configuration_alone(name_or_folder)
    try:
        config = AutoConfig.from_pretrained(name_or_folder)
        if fresh:
            config.vocab_size = vocab_size or config.vocab_size
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        else:
            lm = AutoModelForCausalLM.from_pretrained(name_or_folder, attn_implementation=attention, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()[:200]
        raise HbpError(f"cannot load a model from {name_or_folder!r}: {reason}") from None
    if vocab_size and lm.config.vocab_size < vocab_size:
        raise HbpError(
            f"the tokenizer has {vocab_size} tokens but {name_or_folder!r} embeds {lm.config.vocab_size}; "
            "use the model's own tokenizer"
        )
    # Non-reentrant: a layer's keyword arguments (the pack's layout) are kept for the recomputation.
    name = "activation_checkpointing_enable"  # since transformers 5.2x; before that:
    enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    lm.train()
    return CausalLMWithLoss(lm)


def shard(
    model: CausalLMWithLoss, mesh: DeviceMesh, *, by_layer: bool = True, compute_dtype: torch.dtype = torch.float32
) -> None:
    """Shard over the world mesh, in place. Gradients are reduced in float32.

    Args:
        model: on this rank's device.
        mesh: of the world.
        by_layer: gather each layer apart. Without, the model is gathered in one piece, once a micro-step, which is
            faster where layers are so small that latency is all that their collectives cost.
        compute_dtype: of the gathered parameters.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model, FSDPModule)


def set_gc_layers(model: CausalLMWithLoss, count: int) -> None:
    """Recompute the activations of the first ``count`` layers, keep those of the others."""
    if not 0 <= count <= len(model.layers):
        raise HbpError(f"the plan recomputes {count} layers but the model has {len(model.layers)}; make it again")
    for index, layer in enumerate(model.layers):
        layer.gradient_checkpointing = index < count


def local_parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameter shards that this rank holds."""
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(shard.numel() * shard.element_size() for shard in shards)

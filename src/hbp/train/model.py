"""Load a transformers model, wrap it with the loss, shard it with FSDP2, choose which layers recompute.

The root module that FSDP2 sees is :class:`CausalLMWithLoss`: the vocabulary projection is used inside its forward, in
chunks, so the full logits never exist. One world mesh shards everything; nothing here depends on the SP degree.

The model is sharded before a checkpoint is read or fresh values are drawn, so that no rank ever holds the whole
(:mod:`hbp.train.weights`).

Any family that transformers knows may come. The proven ones (:mod:`hbp.train.check.families`) are held against plain
transformers in the tests; another has to pass the same comparison before it is trained (:mod:`hbp.train.check`).

Activations may be offloaded (:func:`offloaded_activations`): what autograd keeps for backward waits in host memory.
Offloading the inputs of recomputed layers leaves almost nothing on the device between forward and backward, at the cost
of two copies over the bus. Copies go through pinned memory and queue behind the computation that needs them, so neither
waits for the host. Parameters stay where they are (FSDP gathers and frees them itself), and so do small tensors, whose
copies would cost more than they free. The hooks are torch's saved-tensor hooks, as in its own `save_on_cpu`, which
knows neither exception.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from hbp.errors import HbpError, not_loaded
from hbp.parallel.ulysses import PackLayout, Sealed, register_attention
from hbp.parallel.varlen import check_features
from hbp.train.check.families import check_trainable, decoder_of
from hbp.train.loss import RouterLoss, summed_cross_entropy
from hbp.train.weights.load import draw_shards, load_shards, settle_ties
from hbp.train.weights.nf4 import pack_base, packed_layers
from hbp.train.weights.stored import checkpoint_folder

SMALL_BYTES = 1 << 20
"""A tensor of fewer stays on the device."""


@dataclass
class Kept:
    """A saved tensor: on its device, or in host memory."""

    device: torch.device
    tensor: Tensor
    copied: torch.cuda.Event | None = None
    """When the copy to the host is done."""


def offloaded_activations(small_bytes: int = SMALL_BYTES) -> saved_tensors_hooks:
    """A context in which tensors saved for backward move to host memory; they come back when backward asks.

    Args:
        small_bytes: tensors of fewer stay.
    """

    def pack(tensor: Tensor) -> Kept:
        if is_parameter(tensor) or tensor.numel() * tensor.element_size() < small_bytes:
            return Kept(tensor.device, tensor)
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return Kept(tensor.device, host)
        stream = side_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # what computes it
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not another's before that
        return Kept(tensor.device, host, stream.record_event())

    def unpack(kept: Kept) -> Tensor:
        if kept.copied is None:
            return kept.tensor.to(kept.device)
        current = torch.cuda.current_stream(kept.device)
        current.wait_event(kept.copied)
        return kept.tensor.to(kept.device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the copies, one a device for the whole run: each new one would keep memory of its own."""
    return torch.cuda.Stream(device)


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or a view of one."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)


FLOAT32_WEIGHTS = {"deepseek_v2": ("gate.weight",), "deepseek_v3": ("gate.weight",)}
"""What a family computes with in float32 in any case, where transformers (5.17) does not say so itself."""


def kept_in_float32(lm: Any) -> tuple[str, ...]:
    """Parts of the names of what a transformers model holds in float32, whatever it computes in."""
    own: Iterable[str] = getattr(lm, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(dict.fromkeys([*own, *FLOAT32_WEIGHTS.get(lm.config.model_type, ())]))


class CausalLMWithLoss(nn.Module):
    """A transformers causal language model that returns the summed, weighted cross entropy of a pack's slice."""

    lm: Any
    """The transformers model."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.router_loss = RouterLoss(lm)
        self.finish_logits = finish_logits(lm.config)
        self.offload_activations = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        layout: PackLayout,
        weights: Tensor | None = None,
        token_share: float = 0.0,
    ) -> Tensor:
        """This rank's part of the loss.

        Args:
            input_ids: ``[1, T]``.
            position_ids: ``[1, T]``.
            labels: shifted ``[T]``.
            layout: of the pack.
            weights: what each token counts ``[T]`` float32; none: 1.
            token_share: one over the tokens that router losses are averaged over; 0 leaves them out.

        Returns:
            Weighted sum of the cross entropies, plus router losses; float32 scalar.
        """
        decoder, offload = decoder_of(self.lm), self.offload_activations and torch.is_grad_enabled()
        routed = bool(self.router_loss.coefficient and token_share)
        with (
            offloaded_activations() if offload else nullcontext(),
            self.router_loss.listening() if routed else nullcontext(),
        ):
            out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, hbp_layout=Sealed(layout))
        head = self.lm.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None  # not with adapters on it
        projection = head.weight if plain else head
        loss = summed_cross_entropy(out.last_hidden_state[0], projection, labels, weights, finish=self.finish_logits)
        return loss + token_share * self.router_loss.of_pack(layout) if routed else loss

    @property
    def layers(self) -> Sequence[Any]:
        """The decoder layers, first to last."""
        layers: Sequence[Any] = decoder_of(self.lm).layers
        return layers


def attention_features(lm: Any) -> list[str]:
    """What a transformers model's attention needs of a kernel besides scale and window."""
    softcap = ["softcap"] if getattr(lm.config, "attn_logit_softcapping", None) else []
    return softcap + (["sinks"] if any(hasattr(module, "sinks") for module in lm.modules()) else [])


def finish_logits(config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a family does to its logits after the projection, from its configuration; None for nothing."""
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    if factor == 1.0 and not cap:
        return None

    def finish(logits: Tensor) -> Tensor:
        scaled = logits * factor
        return torch.tanh(scaled / cap) * cap if cap else scaled

    return finish


def is_configuration_alone(name_or_folder: str) -> bool:
    """Whether this is a configuration file, or a folder without weights."""
    path = Path(name_or_folder)
    weights = [*path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else []
    return path.suffix == ".json" or (path.is_dir() and not weights)


def read_config(name_or_folder: str, vocab_size: int | None = None) -> Any:
    """The transformers configuration of a model that can be trained here.

    Args:
        name_or_folder: as for :func:`load_model`.
        vocab_size: of the tokenizer; replaces the configuration's where there are no weights.

    Raises:
        HbpError: nothing there, a model that cannot be trained, or a tokenizer larger than the model's vocabulary.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _not_loaded(name_or_folder, error) from None
    check_trainable(config)
    if vocab_size and is_configuration_alone(name_or_folder):
        config.vocab_size = vocab_size
    if vocab_size and config.vocab_size < vocab_size:
        raise HbpError(
            f"the tokenizer's ids go up to {vocab_size - 1} but {name_or_folder!r} embeds {config.vocab_size} (ids up "
            f"to {config.vocab_size - 1}); use the model's own tokenizer"
        )
    return config


def _not_loaded(name_or_folder: str, error: Exception) -> HbpError:
    return HbpError(f"cannot load a model from {name_or_folder!r}: {not_loaded(name_or_folder, error)}")


def load_model(
    name_or_folder: str,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
) -> CausalLMWithLoss:
    """A pretrained model, or a freshly initialised one where a folder or file holds only a configuration.

    Args:
        name_or_folder: a folder with weights, a folder or ``.json`` file with a configuration alone, or a hub name.
        vocab_size: replaces the configuration's when the model is initialised afresh.
        seed: of the fresh initialisation; the same on every rank.
        dtype: of the parameters.
        attention: kernel, see :mod:`hbp.parallel.varlen`.

    Raises:
        HbpError: nothing there that transformers can load, a family or setting that cannot be trained, or a tokenizer
            larger than the model's vocabulary.
    """
    from transformers import AutoModelForCausalLM

    config, kernel = read_config(name_or_folder, vocab_size), register_attention(attention)
    try:
        if is_configuration_alone(name_or_folder):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lm = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=dtype)
        else:
            lm = AutoModelForCausalLM.from_pretrained(name_or_folder, attn_implementation=kernel, dtype=dtype)
    except (OSError, ValueError) as error:
        raise _not_loaded(name_or_folder, error) from None
    return _ready(lm, attention)


def load_sharded(
    name_or_folder: str,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    by_layer: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    compiled: bool = False,
    quantize: str = "none",
    adapt: Callable[[CausalLMWithLoss], None] | None = None,
) -> CausalLMWithLoss:
    """A model in float32, sharded over the world, its values read or drawn shard by shard.

    The model is built without storage, sharded, given memory, and each rank reads its own slices of a checkpoint, or
    draws each module's parameters and keeps its own slices, so that none holds the whole.

    Args:
        name_or_folder: as for :func:`load_model`, and so `vocab_size`, `seed` and `attention`.
        mesh: of the world, and so `by_layer`, `compute_dtype` and `compiled` as for :func:`shard`.
        device: of this rank.
        quantize: ``nf4`` packs the frozen layers in four bits (:mod:`hbp.train.weights.nf4`).
        adapt: called with the model before it is sharded or has storage, to add low-rank adapters.

    Raises:
        HbpError: as they do, or a checkpoint whose tensors do not fit the model.
    """
    folder, fresh = checkpoint_folder(name_or_folder), is_configuration_alone(name_or_folder)
    model = meta_model(name_or_folder, vocab_size=vocab_size, attention=attention)
    if folder is not None:
        settle_ties(model.lm, folder)
    elif not fresh:
        raise HbpError(f"cannot load a model from {name_or_folder!r}: it has a configuration but no weights")
    if adapt:
        adapt(model)
    if quantize == "nf4":
        pack_base(model.lm)
    shard(model, mesh, by_layer=by_layer, compute_dtype=compute_dtype, compiled=compiled)
    if folder is not None:
        load_shards(model.lm, folder, device, seed)
        _take_generation_config(model.lm, folder)
    else:
        draw_shards(model.lm, device, seed)
    return model


def _take_generation_config(lm: Any, folder: Path) -> None:
    """For the exported model."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(folder)


def meta_model(name_or_folder: str, *, vocab_size: int | None = None, attention: str = "auto") -> CausalLMWithLoss:
    """The model in float32 without storage, on the meta device.

    Args:
        name_or_folder: as for :func:`load_model`, and so `vocab_size` and `attention`.

    Raises:
        HbpError: as :func:`load_model`.
    """
    from transformers import AutoModelForCausalLM

    config, kernel = read_config(name_or_folder, vocab_size), register_attention(attention)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    return _ready(lm, attention)


def _ready(lm: Any, attention: str) -> CausalLMWithLoss:
    check_features(attention, attention_features(lm))
    # Non-reentrant: a layer's keyword arguments (the pack's layout) are kept for the recomputation.
    name = "activation_checkpointing_enable"  # since transformers 5.2x; before that:
    enable = getattr(lm, name, None) or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    lm.train()
    return CausalLMWithLoss(lm)


def shard(
    model: CausalLMWithLoss,
    mesh: DeviceMesh,
    *,
    by_layer: bool = True,
    compute_dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> None:
    """Shard over the world mesh, in place. Gradients are reduced in float32.

    Args:
        model: on this rank's device, or on the meta device.
        mesh: of the world.
        by_layer: gather each layer apart. Without, the model is gathered in one piece, once a micro-step, which is
            faster where layers are so small that latency is all that their collectives cost.
        compute_dtype: of the gathered parameters. Those that transformers keeps in float32 in any case (DeepSeek-V2's
            routers) are gathered apart, in float32.
        compiled: see :func:`compile_layers`.
    """
    # Inputs are of the compute dtype from the embedding on. To see that, FSDP2 would build the pack's layout anew for
    # each layer, and with it what is made once a pack.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if compute_dtype != torch.float32:
        for module in _float32_modules(model.lm):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    place = functools.partial(_placement, world_size=mesh.size())
    if compiled:
        compile_layers(model)
    for layer in model.layers:  # packed weights are bytes, which have no other type to be gathered in
        packed: list[nn.Module] = [*packed_layers(layer).values()]
        if packed:
            fully_shard(packed, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for layer in model.layers if by_layer else ():
        fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    assert isinstance(model, FSDPModule)


def _placement(parameter: nn.Parameter, world_size: int) -> Shard:
    """Along rows; but where there are fewer experts than ranks, along each expert's rows, if they divide evenly."""
    few_experts = parameter.ndim == 3 and parameter.size(0) < world_size
    return Shard(1 if few_experts and parameter.size(1) % world_size == 0 else 0)


COMPILED_VERSIONS = 64


def compile_layers(model: CausalLMWithLoss, **options: Any) -> None:
    """Compile each layer around its attention, once for any number of tokens (torch.compile, with its `options`).

    All layers share one function, of which there is a version for each kind of layer, with and without gradients,
    recomputed or kept, and for a single token (an idle rank). Beyond a number of versions, 8 by default, dynamo goes on
    uncompiled with no more than a warning; so it is set higher, for this process.
    """
    import torch._dynamo

    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, COMPILED_VERSIONS)
    for layer in model.layers:
        layer.compile(dynamic=True, **options)


def _float32_modules(lm: Any) -> list[nn.Module]:
    names = [name.removesuffix(".weight") for name in kept_in_float32(lm)]
    return [m for path, m in lm.named_modules() if any(path.endswith(f".{name}") for name in names)]


def set_gc_layers(model: nn.Module, count: int) -> None:
    """Recompute the activations of the first ``count`` decoder layers in backward, keep those of the others.

    Costs nothing: it sets a flag of each layer, which must have been enabled once
    (``model.gradient_checkpointing_enable({"use_reentrant": False})``).

    Args:
        model: a transformers causal language model, or ours around it.
        count: layers, from the first.

    Raises:
        HbpError: the model has fewer layers.
    """
    layers = decoder_layers(model)
    if not 0 <= count <= len(layers):
        raise HbpError(f"the plan recomputes {count} layers but the model has {len(layers)}; make it again")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count


def decoder_layers(model: Any) -> Sequence[Any]:
    """The decoder layers of a transformers causal language model, first to last, peft's wrapper seen through."""
    if isinstance(model, CausalLMWithLoss):
        return model.layers
    layers: Sequence[Any] = decoder_of(model).layers
    return layers


def local_parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameter shards that this rank holds."""
    shards = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(shard.numel() * shard.element_size() for shard in shards)

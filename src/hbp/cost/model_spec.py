"""What a model is made of, from its transformers configuration: parameters, FLOPs, activations, messages.

Families: those of :data:`hbp.cost.dimensions.FAMILIES`, among them multi-head latent attention (MLA) and mixtures of
experts (MoE). The counts follow the modules of transformers 5; the tests hold
them against those modules, torch's FLOP counter and its saved tensors. Parameters: exact. FLOPs: forward, two
a multiply-add, matrix products only (no norms, biases, softmax).

Activation bytes: what autograd keeps of one layer that is not recomputed, with flash attention and eager
norms, rotary embedding and gated MLP, per token; ``b`` bytes an element, ``h`` hidden size:

- norm of width ``w``: ``4w`` its input in float32, ``bw`` the normalised copy, 4 the reciprocal root;
- projections: ``bh`` a layer norm, whose output q/k/v (or gate/up) share; the last takes attention's output;
- rotary embedding: nothing of its own (cosines and sines are shared by all layers);
- attention: queries, keys, values and output at ``b``, log-sum-exp at 4 a head; with MLA values and output
  of the keys' head size, the only one that flash attention knows, and the output once more, cut back to size;
- gated MLP of width ``i``: ``4bi`` for gate, its activation, up, and their product;
- each of a token's ``k`` experts (of ``e``): the MLP's ``4bi`` and ``2bh`` (gathered input, unweighted
  output); router: ``4e`` probabilities, ``32k`` indices, ``bk`` weights, DeepSeek's float32 input copy;
- MLA: norms of the compressed queries and keys/values;
- above SP degree 1: repeated keys/values, attention's output once more after the exchange, and with MLA the
  values as they were sent;
- a degree beyond the heads: keys/values of as many times the tokens as ranks gather them, and the own ones,
  in one message with the queries.

What it trades: no fused kernels (Liger, Apex) in the activation count, and MLA as trained (not absorbed).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.cost.dimensions import Experts, LatentAttention, read_dimensions
from hbp.cost.known_models import load_config
from hbp.errors import HbpError

FLOAT32 = 4
"""Bytes."""
SMALL_LAYER_PARAMETERS = 1_000_000
"""Gathering fewer takes latency rather than bandwidth, on any link."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by part, over all layers; attention and MLP with biases, MoE with its routers."""

    embedding: int
    lm_head: int  # 0 where it is tied to the embedding
    attention: int
    dense_mlp: int
    moe_mlp: int
    norms: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.lm_head + self.attention + self.dense_mlp + self.moe_mlp + self.norms


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions of a decoder-only transformer; sizes in elements."""

    name: str
    model_type: str
    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    """Equal to ``heads`` under MLA, whose keys and values are expanded before attention."""
    qk_head_dim: int
    v_head_dim: int
    intermediate: int  # of a dense MLP
    vocab: int
    tied_embeddings: bool
    qkv_bias: bool = False
    """Under MLA: on the two compressing projections."""
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    """It is over all heads at once."""
    layer_norms: int = 2
    float32_norms: bool = False
    """Norms are scaled before they are cast back, so that autograd keeps a float32 copy."""
    fused_qkv: bool = False
    """One projection makes queries, keys and values."""
    sinks: bool = False
    """Each head has an attention sink."""
    mlp_matrices: int = 3
    """Of a dense MLP; 2: without a gate."""
    other_parameters: int = 0
    """Of a layer, of which nothing is known (a family that is not known here)."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens, None for full attention; empty if all layers attend in full."""
    latent: LatentAttention | None = None
    experts: Experts | None = None
    adapter_parameters: int = 0
    """Of low-rank adapters, which alone are trained then, in all layers together; 0: the model itself is trained."""
    packed_parameters: int = 0
    """Of those that are not trained, how many are held in four bits."""

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``plan.json``."""
        data = dataclasses.asdict(self)
        if not self.packed_parameters:
            del data["packed_parameters"]  # files from before it was there look the same
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_json`, also after a trip through a JSON file.

        Raises:
            HbpError: keys are missing or unknown.
        """
        try:
            values = {**data, "windows": tuple(data["windows"])}
            if values["latent"] is not None:
                values["latent"] = LatentAttention(**values["latent"])
            if values["experts"] is not None:
                dense = tuple(values["experts"]["dense_layers"])
                values["experts"] = Experts(**{**values["experts"], "dense_layers": dense})
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise HbpError(f"the model description is damaged ({error}); make the plan or profile again") from None

    def window(self, layer: int) -> int | None:
        """Tokens that a query of this layer sees, itself included; None for all before it."""
        return self.windows[layer] if self.windows else None

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @cached_property
    def n_moe_layers(self) -> int:
        """Layers with experts."""
        return sum(self.is_moe(layer) for layer in range(self.n_layers))

    def with_layers(self, count: int) -> ModelSpec:
        """The same model cut to its first ``count`` layers: what a profile of a layer stack measures.

        Raises:
            HbpError: the model has fewer layers, or none are asked for.
        """
        if not 1 <= count <= self.n_layers:
            raise HbpError(f"{self.name} has {self.n_layers} layers, so a stack of {count} cannot be cut from it")
        experts = self.experts
        if experts is not None:
            experts = dataclasses.replace(experts, dense_layers=tuple(i for i in experts.dense_layers if i < count))
        return dataclasses.replace(
            self,
            n_layers=count,
            windows=self.windows[:count],
            experts=experts,
            adapter_parameters=self.adapter_parameters * count // self.n_layers,
            packed_parameters=self.packed_parameters * count // self.n_layers,
        )

    # Parameters

    @cached_property
    def _attention_weights(self) -> int:
        """Entries of one layer's projection matrices."""
        h, q, out = self.hidden, self.heads * self.qk_head_dim, self.heads * self.v_head_dim
        if self.latent is None:
            return h * (q + self.kv_heads * (self.qk_head_dim + self.v_head_dim) + out)
        m = self.latent
        queries = h * q if m.q_lora_rank is None else (h + q) * m.q_lora_rank
        expand = m.kv_lora_rank * self.heads * (m.qk_nope_head_dim + self.v_head_dim)
        return queries + h * (m.kv_lora_rank + m.qk_rope_head_dim) + expand + h * out

    @cached_property
    def _attention_extras(self) -> tuple[int, int]:
        """Biases (and sinks) and norm weights inside one layer's attention."""
        if self.latent is not None:
            norms = (self.latent.q_lora_rank or 0) + self.latent.kv_lora_rank
            columns = norms + self.latent.qk_rope_head_dim
        else:
            wide = (self.heads + self.kv_heads) if self.wide_qk_norm else 2
            norms = self.qk_norm * wide * self.qk_head_dim
            columns = (self.heads + self.kv_heads) * self.qk_head_dim + self.kv_heads * self.v_head_dim
        biases = self.qkv_bias * columns + self.out_bias * self.hidden + self.sinks * self.heads
        return biases, norms

    @property
    def attention_parameters(self) -> int:
        """Of one layer: projections, their biases and the norms inside attention."""
        return self._attention_weights + sum(self._attention_extras)

    def _gated_mlp(self, width: int, count: int) -> int:
        """Of ``count`` gated MLPs that are one matrix side by side."""
        wide = width * count
        return self.mlp_matrices * self.hidden * wide + (self.mlp_bias * (2 * wide + self.hidden) if count else 0)

    def mlp_parameters(self, layer: int) -> int:
        """MLP of one layer: dense, or router, routed experts and shared experts."""
        e = self.experts
        if e is None or not self.is_moe(layer):
            return self._gated_mlp(self.intermediate, 1)
        routed = self.hidden * e.n_experts * (1 + 3 * e.intermediate)
        if e.biases:
            routed += e.n_experts * (1 + 2 * e.intermediate + self.hidden)
        return routed + self._gated_mlp(e.shared_width, e.n_shared > 0) + e.shared_gate * self.hidden

    def layer_parameters(self, layer: int) -> int:
        """All of one layer, its norms included."""
        norms = self.layer_norms * self.hidden
        return self.attention_parameters + self.mlp_parameters(layer) + norms + self.other_parameters

    @cached_property
    def parameter_count(self) -> ParameterCount:
        """All of the model, by part."""
        biases, norms = self._attention_extras
        mlp = [(self.is_moe(layer), self.mlp_parameters(layer)) for layer in range(self.n_layers)]
        return ParameterCount(
            embedding=self.vocab * self.hidden,
            lm_head=0 if self.tied_embeddings else self.vocab * self.hidden,
            attention=self.n_layers * (self._attention_weights + biases),
            dense_mlp=sum(count for moe, count in mlp if not moe),
            moe_mlp=sum(count for moe, count in mlp if moe),
            norms=self.n_layers * (norms + self.layer_norms * self.hidden + self.other_parameters) + self.hidden,
        )

    def parameters(self) -> int:
        """All of the model."""
        return self.parameter_count.total

    def layers_parameters(self) -> int:
        """All of the layers: all of the model but embedding, head and last norm."""
        count = self.parameter_count
        return count.total - count.embedding - count.lm_head - self.hidden

    @cached_property
    def sharded_by_layer(self) -> bool:
        """Whether each layer is gathered apart, or, its layers being small, the model in one piece."""
        return max(map(self.layer_parameters, range(self.n_layers))) >= SMALL_LAYER_PARAMETERS

    def matrix_parameters(self) -> int:
        """Entries of the matrices of all layers, every expert's included: what a pass reads, however few its tokens."""
        count = self.parameter_count
        biases = self._attention_extras[0]
        return count.attention - self.n_layers * biases + count.dense_mlp + count.moe_mlp

    # FLOPs, forward

    def linear_flops_per_token(self) -> float:
        """FLOPs of all layers' projections, MLPs, routers and experts (only those that a token goes to)."""
        dense = self.mlp_matrices * self.hidden * self.intermediate * (self.n_layers - self.n_moe_layers)
        total = self.n_layers * self._attention_weights + dense
        if self.experts is not None:
            e = self.experts
            active = 3 * (e.intermediate * e.experts_per_token + e.shared_width) + e.n_experts + e.shared_gate
            total += self.n_moe_layers * self.hidden * active
        return 2.0 * total

    def recomputed_flops_per_token(self) -> float:
        """Of :meth:`linear_flops_per_token`, what a recomputed layer does once more, for all layers recomputed.

        Recomputation stops at the last tensor that backward needs, so a layer's last product, the MLP's way down (with
        experts: the shared experts'; routed outputs are weighted, so their backward does need them), is not repeated.
        """
        skipped = self.intermediate * (self.n_layers - self.n_moe_layers)
        if self.experts is not None:
            skipped += self.experts.shared_width * self.n_moe_layers * (not self.experts.shared_gate)
        return self.linear_flops_per_token() - 2.0 * self.hidden * skipped

    def head_flops_per_token(self) -> float:
        """FLOPs of the vocabulary projection."""
        return 2.0 * self.hidden * self.vocab

    def attention_flops_per_pair(self) -> float:
        """FLOPs that one query-key pair (score and weighted value) needs, summed over all layers: for MFU.

        Times :meth:`attention_pairs`, which is the mean over the layers, this is a document's attention,
        whatever windows the layers have.
        """
        return 2.0 * self.n_layers * self.heads * (self.qk_head_dim + self.v_head_dim)

    def attention_kernel_flops_per_pair(self) -> float:
        """FLOPs that flash attention spends on :meth:`attention_flops_per_pair`: for time.

        Both products over :attr:`kernel_head_dim`. Backward has five such products: 2.5 times as many.
        """
        return 4.0 * self.n_layers * self.heads * self.kernel_head_dim

    def attention_pairs(self, lengths: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float64]:
        """Query-key pairs that the causal mask keeps, per document, mean over the layers.

        With ``m = min(l, w)`` a layer of window ``w`` keeps ``m (m + 1) / 2 + (l - m) w`` of a document of
        ``l`` tokens: the first ``m`` queries see all before them, the others ``w`` each.
        """
        tokens = np.asarray(lengths, np.float64)
        total = np.zeros_like(tokens)
        for window, layers in Counter(self.windows or (None,) * self.n_layers).items():
            inside = tokens if window is None else np.minimum(tokens, window)
            pairs = inside * (inside + 1) / 2
            if window is not None:
                pairs += (tokens - inside) * window
            total += pairs * (layers / self.n_layers)
        return total

    # Activation bytes

    def layer_activation_bytes(self, layer: int, dtype_bytes: int, degree: int = 1) -> float:
        """Bytes per local token that autograd keeps of a layer not recomputed, at an SP degree."""
        b, h = dtype_bytes, self.hidden
        total = self.layer_norms * self._norm_bytes(h, b) + 2 * h * b  # norms, and what goes into the projections
        total += self._attention_elements(degree) * b + self.heads * FLOAT32  # log-sum-exp
        if self.fused_qkv and degree == 1:  # values are a view of the fused projection, all of which is kept
            total += (self.heads + self.kv_heads) * self.qk_head_dim * b
        if self.qk_norm:
            heads = self.heads + self.kv_heads
            total += self._norm_bytes(heads * self.qk_head_dim, b) + (1 if self.wide_qk_norm else heads - 1) * FLOAT32
        if self.latent is not None:
            total += self._latent_bytes(self.latent, b, degree)
        return total + self._mlp_bytes(layer, b)

    @property
    def kernel_head_dim(self) -> int:
        """Head size that flash attention runs with: the other of keys' and values' is padded to it."""
        return max(self.qk_head_dim, self.v_head_dim)

    def _attention_elements(self, degree: int) -> float:
        """Queries, keys, values and output of a local token, in all copies of them that are kept."""
        heads, kv, gather = self.heads, self.kv_heads_at(degree), self.gather_degree(degree)
        qk, v, size = self.qk_head_dim, self.v_head_dim, self.kernel_head_dim
        copies, reach = gather, 1.0
        if gather > 1:
            copies += self.ulysses_degree(degree) > 1  # the own ones: queries are a view of their message
            reach = gather + 0.5  # keys of the early and of the late chunk of one document, in local tokens
        total = float(heads * (qk + size) + copies * kv * (qk + v))
        if size > v:
            total += kv * (reach * size - v * (degree == 1))  # padded; as they were exchanged, they are kept too
        if size > v or degree > 1:
            total += heads * v  # the output, copied for its projection
        return total

    def _norm_bytes(self, width: int, dtype_bytes: int) -> float:
        """Kept by an RMSNorm besides its output: input in float32, normalised copy, reciprocal root."""
        return width * (FLOAT32 + (FLOAT32 if self.float32_norms else dtype_bytes)) + FLOAT32

    def _latent_bytes(self, m: LatentAttention, b: int, degree: int) -> float:
        total = self._norm_bytes(m.kv_lora_rank, b) + m.kv_lora_rank * b
        if m.q_lora_rank is not None:
            total += self._norm_bytes(m.q_lora_rank, b) + m.q_lora_rank * b
        if b == FLOAT32:  # no upcast, so the norm keeps the tensor of which its input is a view
            total += m.qk_rope_head_dim * b
        if degree == 1 and self.v_head_dim == self.kernel_head_dim:  # not padded, values are a view of their projection
            total += self.heads * m.qk_nope_head_dim * b
        return total

    def _mlp_bytes(self, layer: int, b: int) -> float:
        e = self.experts
        if e is None or not self.is_moe(layer):
            return (self.mlp_matrices + 1) * self.intermediate * b
        routed = e.experts_per_token * ((7 if e.biases else 4) * e.intermediate + 2 * self.hidden) * b
        router = e.n_experts * FLOAT32 + e.experts_per_token * (32 + b)
        if e.float32_router and b < FLOAT32:
            router += self.hidden * FLOAT32
        return routed + router + (4 * e.shared_width + e.shared_gate * (self.hidden + 1)) * b

    def activation_bytes_per_token_per_layer(self, dtype_bytes: int, degree: int = 1) -> float:
        """:meth:`layer_activation_bytes`, mean over the layers."""
        moe = [self.is_moe(layer) for layer in range(self.n_layers)]
        kinds = ((moe.index(kind), moe.count(kind)) for kind in set(moe))
        total = sum(count * self.layer_activation_bytes(layer, dtype_bytes, degree) for layer, count in kinds)
        return total / self.n_layers

    @cached_property
    def widest_mlp(self) -> int:
        """Elements of a token between an MLP's projections, in the layer where they are most."""
        e = self.experts
        routed = e.intermediate * e.experts_per_token + e.shared_width if e is not None and self.n_moe_layers else 0
        return max(routed, self.intermediate if self.n_moe_layers < self.n_layers else 0)

    def combining_bytes(self, dtype_bytes: int) -> float:
        """Bytes per token of the gradients where the outputs of a token's experts are weighted and summed.

        Three of the size of all these outputs: theirs in two orders, and that of the weights before it is summed; in
        float32 where the router's weights are. What the shared experts kept is free by then.
        """
        e = self.experts
        if e is None:
            return 0.0
        size = FLOAT32 if e.float32_router else dtype_bytes
        shared = 4 * e.intermediate * e.n_shared * dtype_bytes
        return float(3 * e.experts_per_token * self.hidden * size - shared)

    def checkpoint_bytes_per_token(self, dtype_bytes: int) -> float:
        """Bytes per token kept by one layer that is recomputed: its input."""
        return self.hidden * dtype_bytes

    # Communication

    def ulysses_degree(self, degree: int) -> int:
        """The part of an SP degree that Ulysses takes: the largest divisor of it that divides the query heads."""
        return math.gcd(degree, self.heads)

    def gather_degree(self, degree: int) -> int:
        """The rest of an SP degree, 1 up to the heads: ranks that gather each other's keys and values."""
        return degree // self.ulysses_degree(degree)

    def kv_heads_at(self, degree: int) -> int:
        """Key/value heads after repeating them for an SP degree: the fewest that its Ulysses part divides.

        For powers of two this is ``max(kv_heads, degree)``.
        """
        return math.lcm(self.kv_heads, self.ulysses_degree(degree))

    def alltoall_bytes_per_token(self, degree: int, dtype_bytes: int) -> float:
        """Bytes per layer, forward pass and local token that a rank hands to Ulysses' all-to-alls.

        Queries, keys and values on the way in, the output on the way back, all heads; keys and values
        repeated (:meth:`kv_heads_at`). ``(u - 1) / u`` of it leaves the rank at Ulysses degree ``u``: not
        multiplied in. Backward sends the same the other way.
        """
        heads = self.heads + self.kv_heads_at(degree)
        return float(heads * (self.qk_head_dim + self.v_head_dim) * dtype_bytes)

    def gather_bytes_per_token(self, degree: int, dtype_bytes: int) -> float:
        """Bytes per layer, forward pass and local token that a rank receives of other ranks' keys and values.

        After Ulysses' exchange a rank holds its share of the key/value heads for one of ``g`` slices of the
        pack, and gathers the other ``g - 1``. Backward reduce-scatters as many bytes. Zero up to the heads.
        """
        others = self.gather_degree(degree) - 1
        return float(others * self.kv_heads_at(degree) * (self.qk_head_dim + self.v_head_dim) * dtype_bytes)


def load_model_spec(name_or_path: str) -> ModelSpec:
    """A built-in model by name, or the ``config.json`` of a folder (or the file itself), or of a hub name.

    Raises:
        HbpError: no such name or file, not a transformers configuration, or of an unknown family.
    """
    config, name = load_config(name_or_path)
    return spec_from_config(config, name)


def spec_from_config(config: Mapping[str, Any], name: str = "") -> ModelSpec:
    """From the contents of a transformers ``config.json``, or ``config.to_dict()``.

    Args:
        config: the configuration; keys that transformers has a default for may be absent.
        name: of the model in plans and reports; the family's if empty.

    Raises:
        HbpError: an unknown family, or a key that is missing or makes no sense.
    """
    dimensions = read_dimensions(config)
    return ModelSpec(name=name or dimensions["model_type"], **dimensions)

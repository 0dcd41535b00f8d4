"""Peak bytes of one micro-batch on one rank, by the moments at which it can peak.

Always there: parameters, gradients and AdamW's two moments in float32, sharded over all ranks, and what the embedding,
the head and the last norm take while they are gathered. On top of that, per token of the rank:

- *loss*: everything that the layers keep (an ordinary layer what autograd saves, a recomputed one its input), the last
  norm, and for a chunk of tokens the logits, their log-softmax and gradients, in float32;
- *backward*: what the layers keep, at least one whole layer (recomputation runs one at a time, after the ordinary
  layers' backward has freed theirs), two gradients inside one layer's MLP, two gathered layers and one layer's
  gradients before and during their reduction;
- *end*: nothing per token, but the gradients of embedding and head before and during their reduction.

A model that is gathered in one piece holds all of its parameters throughout and all gradients at the end; and until the
loss is taken, once more, in the message that they came in.

Where low-rank adapters are trained in place of the model, only they have gradients and moments. What the layers keep is
counted as without adapters: an adapter's input is that of the projection that it adapts, and frozen projections without
one, which keep nothing, are taken to be few.

Where activations are offloaded, what waits for backward is in host memory, but for tensors so small that they stay: at
most :data:`STAYS_BYTES` each, a layer's all together no more than what it keeps. Backward has one whole layer on the
device. The copies' time is not modelled (a live profile measures it), nor is host memory.

Each moment is affine in the tokens, but for the chunk's end and the small tensors', so the longest pack within a budget
is a closed form.
Held against the allocator's own record in ``benchmarks/cost_model.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from hbp.cost.cluster import ClusterSpec
from hbp.cost.model_spec import ModelSpec

STATE_BYTES_PER_PARAMETER = 16  # float32 parameter, gradient, and AdamW's two moments
FROZEN_BYTES_PER_PARAMETER = 4
REDUCE_BYTES = 4
LOSS_CHUNK_TOKENS = 1024
LOSS_COPIES = 3  # log-softmax, its gradient, the logits' gradient
FLOAT32 = 4
STAYS_BYTES = 1 << 20
"""Tensors of fewer bytes are not offloaded."""
SAVED_TENSORS = 24
"""That a layer keeps, at most: norms, projections, rotary embedding, attention, MLP."""


@dataclass(frozen=True)
class Moment:
    """Bytes on a rank at one moment of a micro-batch, affine in its tokens."""

    constant: float
    per_token: float = 0.0
    per_chunk_token: float = 0.0
    """For each of the first :data:`LOSS_CHUNK_TOKENS`."""
    per_small_token: float = 0.0
    """Of activations that stay on the device while they are small, …"""
    most_small: float = 0.0
    """… which is no more than this in all."""

    def bytes(self, tokens: float) -> float:
        """With this many tokens on the rank."""
        small = min(tokens * self.per_small_token, self.most_small)
        return self.constant + tokens * self.per_token + min(tokens, LOSS_CHUNK_TOKENS) * self.per_chunk_token + small

    def most_tokens(self, budget: float) -> float:
        """Tokens on the rank that just fit a budget; 0 if none do, infinite if any number does."""
        if self.per_small_token:
            all_small = replace(self, per_token=self.per_token + self.per_small_token, per_small_token=0.0)
            tokens = all_small.most_tokens(budget)
            if tokens * self.per_small_token <= self.most_small:
                return tokens
            return replace(self, constant=self.constant + self.most_small, per_small_token=0.0).most_tokens(budget)
        room = budget - self.constant
        if room < 0:
            return 0.0
        if not self.per_token:
            return float("inf")
        within_chunk = room / (self.per_token + self.per_chunk_token)
        if within_chunk <= LOSS_CHUNK_TOKENS:
            return within_chunk
        return (room - LOSS_CHUNK_TOKENS * self.per_chunk_token) / self.per_token


def moments(
    model: ModelSpec, cluster: ClusterSpec, world_size: int, sp_degree: int, gc_layers: int
) -> tuple[Moment, Moment, Moment]:
    """Loss, backward and end of a micro-batch at an SP degree and a number of recomputed layers."""
    m, b = model, cluster.dtype_bytes
    states, loss, backward, end = _constants(m, cluster, world_size)
    saved = _saved_per_layer(m, b, sp_degree)
    kept, whole = gc_layers * m.checkpoint_bytes_per_token(b), m.n_layers - gc_layers
    hidden = m.hidden * b
    last_norm = m.hidden * (FLOAT32 + b) + hidden
    if cluster.offload_activations:
        waiting = cluster.activation_scale * (whole * saved + kept)
        small = float((whole * SAVED_TENSORS + gc_layers) * STAYS_BYTES)
        layer = cluster.activation_scale * saved + 2 * m.widest_mlp * b + 2 * hidden
        return (
            Moment(states + loss, last_norm + hidden, m.vocab * float(FLOAT32) * LOSS_COPIES, waiting, small),
            Moment(states + backward, layer, 0.0, waiting, small),
            Moment(states + end),
        )
    return (
        Moment(
            states + loss,
            cluster.activation_scale * (whole * saved + kept) + last_norm + hidden,
            m.vocab * float(FLOAT32) * LOSS_COPIES,
        ),
        Moment(
            states + backward,
            cluster.activation_scale * (max(whole, 1) * saved + kept) + 2 * m.widest_mlp * b + 2 * hidden,
        ),
        Moment(states + end),
    )


@lru_cache
def _saved_per_layer(model: ModelSpec, dtype_bytes: int, sp_degree: int) -> float:
    return model.activation_bytes_per_token_per_layer(dtype_bytes, sp_degree)


@lru_cache
def _constants(m: ModelSpec, cluster: ClusterSpec, world_size: int) -> tuple[float, float, float, float]:
    """Bytes that no token causes: always, and more at the loss, in backward, at the end."""
    b, total = cluster.dtype_bytes, m.parameters()
    largest = max(map(m.layer_parameters, range(m.n_layers)))
    root = total - m.layers_parameters() if m.sharded_by_layer else total
    if m.adapter_parameters:
        sharded = total * FROZEN_BYTES_PER_PARAMETER + m.adapter_parameters * STATE_BYTES_PER_PARAMETER
        head, trained = 0, m.adapter_parameters // m.n_layers
        trained_root = 0 if m.sharded_by_layer else m.adapter_parameters
    else:
        sharded = total * STATE_BYTES_PER_PARAMETER
        head, trained, trained_root = m.vocab * m.hidden, largest, root
    states = sharded / world_size + cluster.fixed_bytes + root * b
    backward = (head + trained) * b
    if m.sharded_by_layer:
        backward += largest * 2 * b + trained * REDUCE_BYTES
    gathered_twice = 0 if m.sharded_by_layer or world_size == 1 else root * b
    return states, head * b + gathered_twice, backward, trained_root * (b + REDUCE_BYTES)

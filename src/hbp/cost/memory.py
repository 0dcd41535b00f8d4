"""Peak bytes of one micro-batch on one rank, by the moments at which it can peak.

Always there: parameters, gradients and AdamW's two moments in float32, sharded over all ranks, and what the embedding,
the head and the last norm take while they are gathered. On top of that, per token of the rank:

- *loss*: everything that the layers keep (an ordinary layer what autograd saves, a recomputed one its input), the
  message that the last layer came in, the last norm, the float32 sum of the head's gradient, and for a chunk of tokens
  the logits in float32 and their gradients; at its *end*, instead of those, the head's gradient in the compute dtype;
- *backward*: what the layers keep, at least one whole layer (recomputation runs one at a time, after the ordinary
  layers' backward has freed theirs), two gathered layers, the message that reduces the gradients of the layer before,
  and either two gradients inside one layer's MLP and that of its last matrix, or, the MLP's activations being freed,
  all gradients of the layer. With experts all of them, or those of the experts' outputs, before they are weighted
  (:meth:`~hbp.cost.model_spec.ModelSpec.combining_bytes`);
- *end*: nothing per token, but the gradients of embedding and head before and during their reduction.

A model that is gathered in one piece holds all of its parameters throughout and all gradients at the end; the message
that it came in is there until the loss is taken.

Where low-rank adapters are trained in place of the model, only they have gradients and moments. What the layers keep is
counted as without adapters: an adapter's input is that of the projection that it adapts, and frozen projections without
one, which keep nothing, are taken to be few. A base in four bits is counted as dense where a layer is gathered: what is
gathered is less, and the matrix that is unpacked for a product makes up for it.

Where activations are offloaded, what waits for backward is in host memory, but for tensors so small that they stay: at
most :data:`STAYS_BYTES` each, a layer's all together no more than what it keeps. Backward has one whole layer on the
device. The copies' time is not modelled (a live profile measures it), nor is host memory.

Each moment is affine in the tokens, but for the chunk's end and the small tensors', so the longest pack within a budget
is a closed form. AdamW is fused, so its step takes nothing. Held against the allocator's own record in
``benchmarks/cost_model.py``, and against a simulated one for large models in ``benchmarks/memory_sim.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from hbp.cost.cluster import ClusterSpec
from hbp.cost.model_spec import ModelSpec

STATE_BYTES_PER_PARAMETER = 16  # float32 parameter, gradient, and AdamW's two moments
FROZEN_BYTES_PER_PARAMETER = 4
PACKED_BYTES_PER_PARAMETER = 0.5625  # four bits, and a float32 for each 64
REDUCE_BYTES = 4
LOSS_CHUNK_TOKENS = 2048
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
) -> tuple[Moment, ...]:
    """Loss, its end, backward and end of a micro-batch at an SP degree and a number of recomputed layers.

    Backward goes from the last layer to the first, which recomputed ones are. While the first ordinary layer to be done
    is at work all others wait; from the next on one less, but the gradients of the one before are being reduced.
    """
    m, b = model, cluster.dtype_bytes
    held = _constants(m, cluster, world_size)
    saved = _saved_per_layer(m, b, sp_degree)
    kept, whole = gc_layers * m.checkpoint_bytes_per_token(b), m.n_layers - gc_layers
    hidden = m.hidden * b
    last_norm = m.hidden * (FLOAT32 + b) + hidden
    waiting = cluster.activation_scale * (whole * saved + kept)
    small = float((whole * SAVED_TENSORS + gc_layers) * STAYS_BYTES)
    # Of what waits, (per token on the device, per token and at most in all where only small tensors stay there).
    here, stay = (0.0, (waiting, small)) if cluster.offload_activations else (waiting, (0.0, 0.0))
    every = [
        Moment(held.states + held.loss, here + last_norm + hidden, m.vocab * float(FLOAT32 + b), *stay),
        Moment(held.states + held.loss_end, here + last_norm + hidden, 0.0, *stay),
        Moment(held.states + held.end),
    ]
    inputs = m.checkpoint_bytes_per_token(b)
    for layers, inputs_kept, reducing in (
        (max(whole, 1), kept, 0.0),
        (max(whole - 1, 1), kept - inputs * (not whole), held.reduced * (m.n_layers > 1)),
    ):
        on_device = saved if cluster.offload_activations else layers * saved + inputs_kept
        alive = cluster.activation_scale * on_device + hidden
        constant = held.states + held.backward + reducing
        every.append(Moment(constant + held.first_gradient, alive + 2 * m.widest_mlp * b, 0.0, *stay))
        # As many moments for every model: fits stack them.
        done = 0.0 if m.n_moe_layers else cluster.activation_scale * (m.mlp_matrices + 1) * m.intermediate * b
        every.append(Moment(constant + held.gradients, alive - done + hidden, 0.0, *stay))
        combining = m.combining_bytes(b) + hidden if m.n_moe_layers else 0.0
        every.append(Moment(constant, alive + combining, 0.0, *stay))
    return tuple(every)


@lru_cache
def _saved_per_layer(model: ModelSpec, dtype_bytes: int, sp_degree: int) -> float:
    return model.activation_bytes_per_token_per_layer(dtype_bytes, sp_degree)


@dataclass(frozen=True)
class _Held:
    """Bytes that no token causes."""

    states: float
    """Always: states, and what is gathered throughout."""
    loss: float
    loss_end: float
    backward: float
    """While any layer is at work,"""
    first_gradient: float
    """once it has that of its last matrix, the MLP's way down (of a layer with experts, any),"""
    gradients: float
    """or all of its gradients,"""
    reduced: float
    """and those of the layer before it, in the message that reduces them."""
    end: float


@lru_cache
def _constants(m: ModelSpec, cluster: ClusterSpec, world_size: int) -> _Held:
    b, total = cluster.dtype_bytes, m.parameters()
    largest = max(map(m.layer_parameters, range(m.n_layers)))
    root = total - m.layers_parameters() if m.sharded_by_layer else total
    if m.adapter_parameters:
        sharded = (
            (total - m.packed_parameters) * FROZEN_BYTES_PER_PARAMETER
            + m.packed_parameters * PACKED_BYTES_PER_PARAMETER
            + m.adapter_parameters * STATE_BYTES_PER_PARAMETER
        )
        head, trained = 0, m.adapter_parameters // m.n_layers
        trained_root = 0 if m.sharded_by_layer else m.adapter_parameters
    else:
        sharded = float(total * STATE_BYTES_PER_PARAMETER)
        head, trained, trained_root = m.vocab * m.hidden, largest, root
    last = m.layer_parameters(m.n_layers - 1) if m.sharded_by_layer else root
    message = last * b * (world_size > 1)
    return _Held(
        states=sharded / world_size + cluster.fixed_bytes + root * b,
        loss=head * FLOAT32 + message,
        loss_end=head * (FLOAT32 + b * (b != FLOAT32)) + message,
        backward=head * b + largest * 2 * b * m.sharded_by_layer,
        first_gradient=(trained if m.adapter_parameters or m.n_moe_layers else m.hidden * m.intermediate) * b,
        gradients=trained * b,
        reduced=trained * REDUCE_BYTES * m.sharded_by_layer,
        end=trained_root * (b + REDUCE_BYTES),
    )

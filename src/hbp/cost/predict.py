"""Seconds and bytes of one micro-batch, from its documents, its SP degree and its recomputed layers.

Everything that the planner decides, it decides with these two numbers. The model is a roofline with few constants
(:mod:`hbp.cost.cluster`), affine in three sums over the documents of a pack: how many there are, their tokens, and the
query-key pairs that causal attention keeps. So costs of samples add up, and costs of millions of packs are three array
sums.

Per rank, for a pack of ``S`` tokens at degree ``d`` with ``k`` of ``n`` layers recomputed:

- linear: ``S/d`` tokens × FLOPs × (1 forward + 2 backward + k/n recomputed); the vocabulary projection counts 4 passes,
  since the chunked loss recomputes it;
- attention: pairs/d × FLOPs × (1 + 2.5 + k/n), flash attention's backward being 2.5 forwards;
- all-to-all, twice a layer and pass: the bytes of queries, keys, values and outputs;
- FSDP: parameters gathered for forward and for backward (once where the model is one piece,
  :attr:`~hbp.cost.model_spec.ModelSpec.sharded_by_layer`), gradients reduced in float32; the part that does not hide
  behind compute is added.

Bytes: sharded parameters, gradients and AdamW states in float32, gathered layers, activations (what an ordinary layer
saves and a recomputed layer keeps, at least one whole layer), and a chunk of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hbp.cost.cluster import ClusterSpec
from hbp.cost.model_spec import ModelSpec

Float = npt.NDArray[np.float64]

ATTENTION_BACKWARD = 2.5
STATE_BYTES_PER_PARAMETER = 16  # float32 parameter, gradient, and AdamW's two moments
REDUCE_BYTES = 4
LOSS_CHUNK_TOKENS = 1024
LOSS_COPIES = 2  # logits and their gradient


@dataclass(frozen=True)
class Work:
    """What packs contain, as sums over their documents; arrays of one shape."""

    documents: Float
    tokens: Float
    pairs: Float
    """Query-key pairs that causal (or windowed) attention keeps, mean over layers."""

    def __getitem__(self, index: npt.NDArray[np.integer] | slice) -> Work:
        return Work(self.documents[index], self.tokens[index], self.pairs[index])


@dataclass(frozen=True)
class Seconds:
    """An affine cost: seconds of one pack on each rank of its group."""

    fixed: float
    per_document: float
    per_token: float
    per_pair: float
    fsdp: float
    """FSDP traffic of the micro-step, before hiding it behind compute."""
    overlap: float

    def of(self, work: Work) -> Float:
        """Seconds of each pack when it runs alone in its micro-step."""
        busy = self.compute(work)
        return busy + np.maximum(0.0, self.fsdp - self.overlap * busy)

    def compute(self, work: Work) -> Float:
        """Seconds without FSDP traffic."""
        return self.fixed + self.marginal(work)

    def marginal(self, work: Work) -> Float:
        """The part that the documents themselves cause: what a perfect packing could not avoid."""
        return self.per_document * work.documents + self.per_token * work.tokens + self.per_pair * work.pairs


@dataclass(frozen=True)
class CostModel:
    """Predicts one model on one cluster at one world size."""

    model: ModelSpec
    cluster: ClusterSpec
    world_size: int

    def work(self, lengths: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer] | None = None) -> Work:
        """Sums over each segment ``lengths[offsets[i]:offsets[i + 1]]``; over each document alone if None."""
        tokens = lengths.astype(np.float64)
        pairs = self.model.attention_pairs(lengths)
        documents = np.ones(len(lengths))
        if offsets is None:
            return Work(documents, tokens, pairs)

        def fold(x: Float) -> Float:
            total: Float = np.concatenate([[0.0], np.cumsum(x)])
            return np.asarray(total[offsets[1:]] - total[offsets[:-1]])

        return Work(np.diff(offsets).astype(np.float64), fold(tokens), fold(pairs))

    def seconds(self, sp_degree: int, gc_layers: int) -> Seconds:
        """The cost of packs at a degree and a number of recomputed layers."""
        m, c, d = self.model, self.cluster, sp_degree
        again = gc_layers / m.n_layers
        linear = m.linear_flops_per_token() * (3 + again) + m.head_flops_per_token() * 4
        pair = m.attention_flops_per_pair() * (1 + ATTENTION_BACKWARD + again)
        sent, messages = 0.0, 0.0
        if d > 1:
            sent = m.n_layers * m.alltoall_bytes_per_token(d, c.dtype_bytes) * (d - 1) / d / c.link(d) * (2 + again)
            messages = m.n_layers * 2 * (2 + again) * c.collective_latency_s
        passes = m.n_layers * (3 + again)
        return Seconds(
            fixed=passes * c.layer_overhead_s + messages,
            per_document=passes * c.document_overhead_s,
            per_token=(linear / c.linear_flops_per_s + sent) / d,
            per_pair=pair / c.attention_flops_per_s / d,
            fsdp=self._fsdp_seconds(),
            overlap=c.fsdp_overlap,
        )

    def _fsdp_seconds(self) -> float:
        if self.world_size == 1:
            return 0.0
        c = self.cluster
        received = self.model.parameters() * (self.world_size - 1) / self.world_size
        # Layers are gathered for forward and again for backward; a model in one piece stays gathered in between.
        gathers, pieces = (2, self.model.n_layers + 1) if self.model.sharded_by_layer else (1, 1)
        traffic = received * (gathers * c.dtype_bytes + REDUCE_BYTES) / c.ring(self.world_size)
        return traffic + (gathers + 1) * pieces * c.collective_latency_s

    def static_bytes(self) -> float:
        """Memory that does not depend on the pack: sharded states and gathered parameters."""
        m, c = self.model, self.cluster
        total = m.parameters()
        layers = [m.layer_parameters(i) for i in range(m.n_layers)]
        root = total - sum(layers)
        if m.sharded_by_layer:
            gathered = (2 * max(layers) + root) * c.dtype_bytes + max(max(layers), root) * REDUCE_BYTES
        else:
            gathered = total * (c.dtype_bytes + REDUCE_BYTES)
        return total * STATE_BYTES_PER_PARAMETER / self.world_size + gathered + c.fixed_bytes

    def bytes_per_token(self, sp_degree: int, gc_layers: int) -> float:
        """Activation bytes per token of a rank, those of the loss apart."""
        m, c = self.model, self.cluster
        saved = m.activation_bytes_per_token_per_layer(c.dtype_bytes, sp_degree)
        kept = m.checkpoint_bytes_per_token(c.dtype_bytes)
        ends = 4 * m.hidden * c.dtype_bytes  # embedding, last hidden state, and their gradients
        # Recomputation runs one layer at a time, after the backward of the ordinary layers has freed theirs.
        whole_layers = max(m.n_layers - gc_layers, 1)
        return c.activation_scale * (whole_layers * saved + gc_layers * kept) + ends

    def loss_bytes_per_token(self) -> float:
        """Bytes per token of a chunk of the loss, which holds at most :data:`LOSS_CHUNK_TOKENS`."""
        return self.model.vocab * 4.0 * LOSS_COPIES

    def bytes(self, tokens: int, sp_degree: int, gc_layers: int) -> float:
        """Peak bytes on a rank that runs a pack of `tokens` tokens."""
        mine = tokens / sp_degree
        loss = min(mine, LOSS_CHUNK_TOKENS) * self.loss_bytes_per_token()
        return self.static_bytes() + mine * self.bytes_per_token(sp_degree, gc_layers) + loss

    def longest_packs(self, sp_degree: int) -> Float:
        """Most tokens of a pack within the memory budget with 0, 1, … n layers recomputed, float64 ``[n + 1]``."""
        room = max(0.0, self.cluster.memory_bytes - self.static_bytes())
        per_token = np.array([self.bytes_per_token(sp_degree, k) for k in range(self.model.n_layers + 1)])
        loss = self.loss_bytes_per_token()
        within_chunk = room / (per_token + loss)
        beyond = (room - LOSS_CHUNK_TOKENS * loss) / per_token
        mine = np.where(within_chunk <= LOSS_CHUNK_TOKENS, within_chunk, beyond)
        return np.maximum.accumulate(mine * sp_degree)

    def fewest_gc_layers(self, tokens: int, sp_degree: int) -> int | None:
        """The fewest recomputed layers with which a pack fits the memory budget; None if even all do not help."""
        fewest = int(np.searchsorted(self.longest_packs(sp_degree), tokens))
        return fewest if fewest <= self.model.n_layers else None

    def degrees(self) -> list[int]:
        """Powers of two that divide both the world and the model's attention heads."""
        most = min(self.world_size, self.model.max_ulysses_degree)
        powers = (2**i for i in range(most.bit_length()))
        return [d for d in powers if self.world_size % d == 0 and self.model.max_ulysses_degree % d == 0]

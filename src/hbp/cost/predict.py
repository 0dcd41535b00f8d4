"""Seconds and bytes of one micro-batch, from its documents, its SP degree and its recomputed layers.

Everything that the planner decides, it decides with these two numbers. The model is a roofline with few constants
(:mod:`hbp.cost.cluster`), affine in three sums over the documents of a pack: how many there are, their tokens, and the
query-key pairs that causal attention keeps. So costs of samples add up, and costs of millions of packs are three array
sums.

Per rank, for a pack of ``S`` tokens at degree ``d`` with ``k`` of ``n`` layers recomputed:

- linear: ``S/d`` tokens × FLOPs × (1 forward + 2 backward + k/n recomputed, all but each layer's last product); the
  vocabulary projection counts 3 passes in any case. Small products do not reach the rate of
  large ones: a product of ``r`` rows runs at ``r / (r + h)`` of it (``h`` is
  :attr:`~hbp.cost.cluster.ClusterSpec.half_rate_tokens`), which is the time of ``h`` more rows, whatever ``r``: a fixed
  part. With experts each has its own ``h``, so few tokens an expert are slow;
- recomputed layers, k/n above, take :attr:`~hbp.cost.cluster.ClusterSpec.recompute_scale` times as long;
- attention: pairs/d × FLOPs × (1 + backward + k/n), flash attention's backward being 2.5 forwards, over heads of the
  size that it pads keys and values to;
- all-to-all, twice a layer and pass: the bytes of queries, keys, values and outputs; beyond the heads, gathered keys
  and values (the pack is cut so that every rank has an equal share of the pairs);
- FSDP: layers gathered for forward and for backward (once where the model is one piece,
  :attr:`~hbp.cost.model_spec.ModelSpec.sharded_by_layer`, as embedding and head are), gradients reduced in float32; the
  part that does not hide behind compute is added. Experts are sharded like everything else, so tokens never travel to
  them: there is no expert all-to-all, and every expert's parameters are gathered.

Bytes: :mod:`hbp.cost.memory`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.cost.cluster import GIB, ClusterSpec, cluster_from_json, load_cluster
from hbp.cost.memory import REDUCE_BYTES, moments
from hbp.cost.model_spec import ModelSpec, load_model_spec
from hbp.errors import HbpError

Float = npt.NDArray[np.float64]

HEAD_PASSES = 3
"""Of the vocabulary projection: forward, and one for each of its two gradients; nothing of it is recomputed."""
FLASH_BACKWARD = 2.5
"""Forwards that flash attention's backward takes: five products, the scores' once more among them, over two."""


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

    @classmethod
    def of(
        cls,
        model: str | Path | ModelSpec,
        cluster: str | Path = "h100-nvlink",
        gpus: int = 8,
        *,
        memory_gib: float | None = None,
    ) -> CostModel:
        """The cost model of a model on a cluster, as ``hbp plan --model --cluster --gpus --memory-gib`` has it.

        Args:
            model: a built-in name (``llama-3.1-8b``), a folder or file with a transformers configuration, or what
                ``hbp.describe_model`` gives of a family that is not known here.
            cluster: a built-in name (``h100-nvlink``), or a profile file that `hbp profile` wrote.
            gpus: ranks.
            memory_gib: memory budget of a device, GiB; None: the cluster's own.

        Raises:
            HbpError: an unknown model or cluster, fewer than one GPU, or no such amount of memory.
        """
        if gpus < 1:
            raise HbpError(f"{gpus} GPUs can run nothing; give at least 1")
        spec = load_cluster(str(cluster))
        if memory_gib is not None:
            if not 0 < memory_gib < 1e6:
                raise HbpError(f"{memory_gib:g} GiB is no device's memory; give it in GiB, such as 80")
            spec = replace(spec, memory_bytes=memory_gib * GIB)
        return cls(model if isinstance(model, ModelSpec) else load_model_spec(str(model)), spec, gpus)

    @classmethod
    def from_json(cls, model: Mapping[str, Any], cluster: Mapping[str, Any], world_size: int) -> CostModel | None:
        """Of the ``model`` and ``cluster`` of a ``plan.json``; None where a program that is not ours describes them in
        its own way, by keys that are not all of ours and no others, or not at all.

        Raises:
            HbpError: they are described in our way, by a value that cannot be.
        """
        required = {field.name for field in fields(ClusterSpec) if field.default is MISSING}
        names = {field.name for field in fields(ModelSpec)}
        ours = names - {"packed_parameters"} <= model.keys() <= names  # which is left out where there are none
        if not ours or not required <= cluster.keys() <= {field.name for field in fields(ClusterSpec)}:
            return None
        try:
            return cls(ModelSpec.from_json(model), cluster_from_json(cluster), world_size)
        except (TypeError, ValueError) as error:
            raise HbpError(f"the plan's cluster is damaged ({error}); make the plan again with `hbp plan`") from None

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
        key = sp_degree, gc_layers
        if key not in self._seconds:
            self._seconds[key] = self._find_seconds(*key)
        return self._seconds[key]

    @cached_property
    def _seconds(self) -> dict[tuple[int, int], Seconds]:
        """What :meth:`seconds` has found so far."""
        return {}

    def _find_seconds(self, sp_degree: int, gc_layers: int) -> Seconds:
        m, c, d = self.model, self.cluster, sp_degree
        recomputed = gc_layers / m.n_layers
        again = recomputed * c.recompute_scale
        linear = 3 * m.linear_flops_per_token() + again * m.recomputed_flops_per_token()
        linear += m.head_flops_per_token() * HEAD_PASSES
        pair = m.attention_kernel_flops_per_pair() * (1 + again + FLASH_BACKWARD)
        few = c.half_rate_tokens * 2.0 * m.matrix_parameters() * (3 + again)
        sent, waiting = self._sp_seconds(d)
        passes = m.n_layers * (3 + again)
        return Seconds(
            fixed=passes * c.layer_overhead_s + few / c.linear_flops_per_s + waiting * m.n_layers * (2 + recomputed),
            per_document=passes * c.document_overhead_s,
            per_token=(linear / c.linear_flops_per_s + sent * m.n_layers * (2 + recomputed)) / d,
            per_pair=pair / c.attention_flops_per_s / d,
            fsdp=self._fsdp_seconds(),
            overlap=c.fsdp_overlap,
        )

    def _sp_seconds(self, degree: int) -> tuple[float, float]:
        """Seconds of one layer's sequence-parallel communication in one pass: per local token, and to begin it."""
        m, c = self.model, self.cluster
        ulysses, gather = m.ulysses_degree(degree), m.gather_degree(degree)
        per_token, waiting = 0.0, 0.0
        if ulysses > 1:
            sent = m.alltoall_bytes_per_token(degree, c.dtype_bytes) * (ulysses - 1) / ulysses
            per_token += sent / c.link(ulysses)
            waiting += 2 * c.latency(ulysses)
        if gather > 1:
            # Ranks that gather are a Ulysses group apart: once the whole group leaves a node, so do they.
            per_token += m.gather_bytes_per_token(degree, c.dtype_bytes) / c.link(degree)
            waiting += c.latency(degree)
        return per_token, waiting

    def _fsdp_seconds(self) -> float:
        if self.world_size == 1:
            return 0.0
        m, c, share = self.model, self.cluster, (self.world_size - 1) / self.world_size
        # Layers are gathered for forward and again for backward; what is in one piece stays gathered in between.
        layers = m.n_layers if m.sharded_by_layer else 0
        gathered = (m.parameters() + m.layers_parameters() * (layers > 0)) * c.dtype_bytes
        traffic = share * (gathered + m.parameters() * REDUCE_BYTES) / c.ring(self.world_size)
        return traffic + (3 * layers + 2) * c.latency(self.world_size)

    def bytes(self, tokens: int, sp_degree: int, gc_layers: int) -> float:
        """Peak bytes on a rank that runs a pack of `tokens` tokens."""
        at = moments(self.model, self.cluster, self.world_size, sp_degree, gc_layers)
        return max(moment.bytes(tokens / sp_degree) for moment in at)

    def longest_packs(self, sp_degree: int) -> Float:
        """Most tokens of a pack within the memory budget with 0, 1, … n layers recomputed, float64 ``[n + 1]``."""
        if sp_degree not in self._longest:
            self._longest[sp_degree] = self._find_longest(sp_degree)
            self._longest[sp_degree].flags.writeable = False
        return self._longest[sp_degree]

    @cached_property
    def _longest(self) -> dict[int, Float]:
        """What :meth:`longest_packs` has found so far: planning asks a thousand times."""
        return {}

    def _find_longest(self, sp_degree: int) -> Float:
        budget = self.cluster.memory_bytes
        every = (
            moments(self.model, self.cluster, self.world_size, sp_degree, k) for k in range(self.model.n_layers + 1)
        )
        mine = np.array([min(moment.most_tokens(budget) for moment in at) for at in every])
        return np.maximum.accumulate(mine * sp_degree)

    def fewest_gc_layers(self, tokens: int, sp_degree: int) -> int | None:
        """The fewest recomputed layers with which a pack fits the memory budget; None if even all do not help."""
        fewest = int(np.searchsorted(self.longest_packs(sp_degree), tokens))
        return fewest if fewest <= self.model.n_layers else None

    def degrees(self) -> list[int]:
        """Powers of two that divide the world; beyond the model's heads, keys and values are gathered."""
        powers = (2**i for i in range(self.world_size.bit_length()))
        return [d for d in powers if self.world_size % d == 0]

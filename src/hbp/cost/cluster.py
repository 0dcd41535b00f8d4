"""What a cluster can do: the constants of the cost model, and the clusters that are known by name.

A rate is an *achieved* rate, not a data sheet's peak: it is what `hbp profile` fits on a live machine. The built-in
GPU constants come from published figures (data-sheet peaks times commonly reported utilisations, NCCL bus bandwidths)
and say so in ``origin``; a profile file written by `hbp profile` replaces them with measured ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp.errors import HbpError, did_you_mean

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class ClusterSpec:
    """Devices, links and memory. One *device* is one rank: a GPU, or a process on a CPU."""

    name: str
    device: str
    devices_per_node: int
    memory_bytes: float
    """Budget of one device for everything a run keeps there."""
    dtype_bytes: int
    """Bytes of an activation or a gathered parameter."""
    linear_flops_per_s: float
    """Achieved by matrix products."""
    attention_flops_per_s: float
    """Achieved by flash attention."""
    layer_overhead_s: float
    """Launches and small kernels of one layer, one pass."""
    document_overhead_s: float
    """Per document, layer and pass; zero where one kernel takes the whole pack."""
    link_bytes_per_s: float
    """Per device, within a node."""
    node_bytes_per_s: float
    """Per node, to the other nodes."""
    collective_latency_s: float
    fsdp_overlap: float
    """Share of compute time behind which FSDP's collectives hide, 0 to 1."""
    activation_scale: float = 1.0
    """Measured over modelled activation bytes."""
    fixed_bytes: float = 0.0
    """Memory that no pack length explains: allocator slack, runtime context, measured."""
    step_overhead_s: float = 0.0
    """Optimizer and bookkeeping of one optimizer step."""
    half_rate_tokens: float = 0.0
    """Rows with which a matrix product reaches half of ``linear_flops_per_s``."""
    node_latency_s: float = 0.0
    """Added to ``collective_latency_s`` by a collective that leaves its node."""
    recompute_scale: float = 1.0
    """Computing a layer again, over a third of its forward and backward; checkpointing takes time itself."""
    origin: str = "analytic, published figures"
    offload_activations: bool = False
    """Whether what waits for the backward pass is kept in host memory (``model.offload_activations``)."""

    def link(self, ranks: int) -> float:
        """Bytes a second that each of `ranks` adjacent devices gets in an all-to-all."""
        if ranks <= self.devices_per_node:
            return self.link_bytes_per_s
        return min(self.link_bytes_per_s, self.node_bytes_per_s / self.devices_per_node)

    def ring(self, ranks: int) -> float:
        """Bytes a second of an all-gather or reduce-scatter; nodes receive each byte once and share it inside."""
        if ranks <= self.devices_per_node:
            return self.link_bytes_per_s
        return min(self.link_bytes_per_s, self.node_bytes_per_s)

    def latency(self, ranks: int) -> float:
        """Seconds of a collective of `ranks` adjacent devices, however few its bytes."""
        return self.collective_latency_s + (self.node_latency_s if ranks > self.devices_per_node else 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``plan.json`` and profile files; what came later is named where it differs from before."""
        data = dataclasses.asdict(self)
        for name, before in (("offload_activations", False), ("recompute_scale", 1.0)):
            if data[name] == before:
                del data[name]
        return data


# Published figures, no measurement of ours (a profile replaces them):
# - data sheets: H100 SXM5 80 GB (989 TFLOP/s dense bfloat16, 3.35 TB/s, NVLink 450 GB/s each way), A100 PCIe 80 GB (312
#   TFLOP/s, 1.94 TB/s, PCIe 4.0 x16 32 GB/s each way); ConnectX-7 at 400 Gb/s a GPU is 50 GB/s.
# - matrix products: large cuBLAS ones reach 60 to 75 % of the data sheet in bfloat16; 600 and 210 also carry the norms
#   and activations between them, which have no term of their own.
# - attention: the FlashAttention-3 paper (https://arxiv.org/abs/2407.08608) puts FlashAttention-2, which torch brings,
#   at 35 % of an H100's data sheet and its own forward at 75 %; FlashAttention-2's reports up to 225 TFLOP/s on A100,
#   two thirds of which a causal mask and backward leave.
# - links: NCCL's own tests show 330 to 370 GB/s of bus bandwidth of all-gather within eight H100s, about 45 GB/s a GPU
#   over 400 Gb/s InfiniBand, and about 20 GB/s over PCIe 4.0; small collectives take 20 to 30 us, some 15 more between
#   nodes.
# - half rate: as many rows as it takes to compute as long as to read the weights, rate / memory bandwidth at two bytes
#   a weight.
_H100 = ClusterSpec(
    name="h100-nvlink",
    device="NVIDIA H100 80GB",
    devices_per_node=8,
    memory_bytes=74 * GIB,
    dtype_bytes=2,
    linear_flops_per_s=600e12,
    attention_flops_per_s=350e12,
    layer_overhead_s=60e-6,
    document_overhead_s=0.0,
    link_bytes_per_s=330 * GB,
    node_bytes_per_s=8 * 45 * GB,
    collective_latency_s=25e-6,
    fsdp_overlap=0.8,
    step_overhead_s=0.03,
    half_rate_tokens=180,
    node_latency_s=15e-6,
)

CLUSTERS: Mapping[str, ClusterSpec] = {
    "h100-nvlink": _H100,
    "h100-ethernet": dataclasses.replace(_H100, name="h100-ethernet", node_bytes_per_s=11.5 * GB),
    "a100-pcie": dataclasses.replace(
        _H100,
        name="a100-pcie",
        device="NVIDIA A100 80GB PCIe",
        linear_flops_per_s=210e12,
        attention_flops_per_s=150e12,
        link_bytes_per_s=20 * GB,
        node_bytes_per_s=23 * GB,
        half_rate_tokens=110,
    ),
    "cpu-local": ClusterSpec(
        name="cpu-local",
        device="one CPU core a process",
        devices_per_node=1024,
        memory_bytes=1 * GIB,
        dtype_bytes=4,
        linear_flops_per_s=60e9,
        attention_flops_per_s=60e9,
        layer_overhead_s=1e-3,
        document_overhead_s=150e-6,
        link_bytes_per_s=1 * GB,
        node_bytes_per_s=1 * GB,
        collective_latency_s=300e-6,
        fsdp_overlap=0.0,
        step_overhead_s=0.05,
        origin="analytic, rough figures for one core",
    ),
}


def load_cluster(name_or_file: str) -> ClusterSpec:
    """A built-in cluster by name, or one from a JSON file (a cluster alone, or a profile that holds one).

    Raises:
        HbpError: no such name or file, or a file that does not describe a cluster.
    """
    if name_or_file in CLUSTERS:
        return CLUSTERS[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise HbpError(
            f"no cluster {name_or_file!r}{did_you_mean(name_or_file, CLUSTERS)}: give one of {', '.join(CLUSTERS)}, "
            "or a profile written by `hbp profile`"
        )
    try:
        data = json.loads(path.read_text())
        return cluster_from_json(data.get("cluster", data))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise HbpError(f"{path} does not describe a cluster ({error}); write one with `hbp profile`") from None


def cluster_from_json(data: Mapping[str, Any]) -> ClusterSpec:
    """The inverse of :meth:`ClusterSpec.to_json`; keys may be given over a ``base`` cluster's.

    Raises:
        ValueError, TypeError: an unknown key, a missing key, a value that is not a positive number.
    """
    values = dict(data)
    base = values.pop("base", None)
    if base is not None:
        values = {**load_cluster(base).to_json(), **values}
    cluster = ClusterSpec(**values)
    for field in dataclasses.fields(cluster):
        value = getattr(cluster, field.name)
        if field.type == "str":
            if not isinstance(value, str):
                raise ValueError(f"{field.name} is {value!r}, not a text")
            continue
        if field.type == "bool":
            if not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}, not true or false")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{field.name} is {value!r}, not a number from 0 up")
        if value == 0 and field.name.endswith(("_per_s", "_per_node", "memory_bytes", "dtype_bytes")):
            raise ValueError(f"{field.name} is 0; give more")
    return cluster

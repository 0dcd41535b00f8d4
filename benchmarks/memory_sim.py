"""Predicted peak memory against a simulated allocator, for models that no machine here holds.

The real engine runs one rank of a large world, with a process group that moves nothing and tensors that hold nothing
(:mod:`fake_cuda`): every storage that forward and backward allocate on the device is counted, so the peak is that of
CUDA's allocator but for fragmentation, cuBLAS's workspaces and NCCL's buffers. Experts are given equal shares of the
tokens, as they are in the cost model.

    python benchmarks/memory_sim.py [--quick] [--json] [--out benchmarks/results/memory-sim.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from fake_cuda import DEVICE, fake_cuda

from hbp.cost.cluster import CLUSTERS
from hbp.cost.known_models import KNOWN_MODELS
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.parallel.mesh import make_mesh
from hbp.train.batch import micro_batch_of
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.measure.micro_batch import peak_alone

LAYERS = 4
"""Of each model: what layers add is linear, and a simulated layer takes as long as a real one."""
EXPERTS = {"deepseek-v2-236b": 32}
"""Fewer than the model's."""
WORLD = 32
CASES = (  # tokens a rank, SP degree, recomputed layers
    (8192, 1, 0),
    (32_768, 1, 0),
    (32_768, 1, LAYERS),
    (65_536, 1, LAYERS),
    (16_384, 8, LAYERS // 2),
)
QUICK = ((8192, 1, 0), (8192, 4, LAYERS))
MODELS = ("llama-3.1-8b", "qwen2.5-32b", "qwen3-30b-a3b", "deepseek-v2-236b")


def simulate(name: str, tokens: int, degree: int, gc_layers: int, world_size: int = WORLD) -> dict[str, Any]:
    """Peak of a rank, simulated and predicted, bytes."""
    config = {**KNOWN_MODELS[name], "num_hidden_layers": LAYERS}
    if name in EXPERTS:
        config["n_routed_experts"] = EXPERTS[name]
    spec = spec_from_config(config, name)
    documents = [(np.zeros(tokens * degree // 2, np.int32), np.ones(tokens * degree // 2, np.uint8))] * 2
    with TemporaryDirectory() as folder, fake_world(world_size):
        (Path(folder) / "config.json").write_text(json.dumps(config))
        with fake_cuda():
            mesh = make_mesh(world_size, [degree], "cuda", spec.heads)
            model = drawn_model(
                folder, mesh.world, DEVICE, by_layer=spec.sharded_by_layer, compute_dtype=torch.bfloat16
            )
            batch = micro_batch_of(documents, 0, degree, 0, gc_layers, mesh, DEVICE)
            peak = peak_alone(model, batch, DEVICE)
    predicted = CostModel(spec, CLUSTERS["h100-nvlink"], world_size).bytes(tokens * degree, degree, gc_layers)
    return {
        "model": name,
        "layers": LAYERS,
        "world_size": world_size,
        "tokens_a_rank": tokens,
        "sp_degree": degree,
        "gc_layers": gc_layers,
        "simulated_bytes": peak,
        "predicted_bytes": predicted,
        "predicted_over_simulated": predicted / peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases a model")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, help="also write the JSON to a file")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for case in QUICK if args.quick else CASES:
            rows.append(row := simulate(name, *case))
            print(
                f"{name:18} {row['tokens_a_rank']:6} tokens SP{row['sp_degree']} GC{row['gc_layers']}: "
                f"{row['simulated_bytes'] / 2**30:6.2f} GiB simulated, {row['predicted_bytes'] / 2**30:6.2f} predicted "
                f"({row['predicted_over_simulated']:.3f})",
                file=sys.stderr if args.json else sys.stdout,
            )
    result = {
        "command": "python benchmarks/memory_sim.py" + (" --quick" if args.quick else ""),
        "date": datetime.date.today().isoformat(),
        "device": "none: fake tensors",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
        "worst": max(abs(r["predicted_over_simulated"] - 1) for r in rows),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

"""The GPU benchmark end to end on a CPU, with tiny dimensions: every family measured, nothing failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbp.cost.cluster import load_cluster

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def test_every_model_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_profile.py"), "--quick", "--json", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "out").read_text()) == result
    assert result["failed"] == {}
    assert result["tiny"]
    assert list(result["models"]) == ["llama-3.1-8b", "qwen2.5-32b", "deepseek-v2-236b"]
    cluster = load_cluster(str(tmp_path / "out"))  # what `hbp plan --cluster FILE` does
    assert cluster.origin == f"profiled on {result['device']}"
    assert cluster.to_json() == result["cluster"]
    fitted = (result["cluster"], *(model["cluster"] for model in result["models"].values()))
    assert len({c["layer_overhead_s"] for c in fitted}) == 4  # all models together, and each alone
    for name, model in result["models"].items():
        heights = {p["n_layers"] for p in model["points"]}
        assert len(heights) == 2
        assert {p["gc_layers"] for p in model["points"]} == {0, *heights}
        assert max(len(p["lengths"]) for p in model["points"]) > 1
        assert all(p["seconds"] > 0 and p["peak_bytes"] > 0 for p in model["points"])
        assert model["memory_error_unfitted"]["median"] < 0.15
        assert model["memory_error_unfitted"]["max"] < 0.2
        assert 0 <= model["memory_within_5_percent"] <= 1
        assert all(rate > 0 for rate in result["products"][name]["flops_per_s"])
        assert all(row["both_s"] > 0 and row["forward_s"] > 0 for row in result["attention"][name])

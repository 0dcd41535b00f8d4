"""The cost model's benchmark: fresh packs are fresh, every model runs, the kept output draws the pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from workers import CPU, run_ranks

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_model", BENCHMARKS / "cost_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load()


def test_fresh_packs_cover_degrees_lengths_and_recomputed_layers(benchmark: ModuleType) -> None:
    packs = benchmark.fresh_packs(4096, 8, 40, seed=1)
    assert {degree for _, degree, _ in packs} == {1, 2}
    assert len({gc_layers for _, _, gc_layers in packs}) > 5
    local = np.array([sum(lengths) / degree for lengths, degree, _ in packs])
    assert local.min() < 600
    assert local.max() > 1500
    assert len({len(lengths) for lengths, _, _ in packs}) > 4


def test_kept_result_draws_the_pictures_of_the_documentation(benchmark: ModuleType, tmp_path: Path) -> None:
    result = json.loads((BENCHMARKS / "results" / "cost-model.json").read_text())
    assert result["device"] and result["date"]
    page = (BENCHMARKS.parent / "docs" / "cost-model.md").read_text()
    benchmark.draw(result, tmp_path)
    drawn = {picture.name for picture in tmp_path.glob("*.svg")}
    assert len(drawn) == 4
    for name in drawn:
        assert f"]({name})" in page
        assert (BENCHMARKS.parent / "docs" / name).is_file()


def measure_smaller(rank: int, world: int) -> dict[str, Any]:
    module = load()
    return {
        name: module.measure_model(name, {**config, **module.QUICK_MOE}, 256, 4, CPU, limit_s=1.0)
        for name, config in module.SMALLER.items()
    }


def test_models_with_experts_are_measured(benchmark: ModuleType) -> None:
    found = run_ranks(measure_smaller, benchmark.PROCESSES)[0]
    assert list(found) == ["Qwen3-MoE", "DeepSeek-V2"]
    for name, part in found.items():
        assert {(r["model"], r["profile"]) for r in part["rows"]} == {(name, "whole model"), (name, "nothing fitted")}
        assert [r["quantity"] for r in part["rows"]][1:] == [
            "seconds of fresh packs",
            "peak bytes of fresh packs",
            "peak bytes of fresh packs",
        ]
        assert part["rows"][-1]["n"] == len(part["fresh_points"]) == 4
        assert part["rows"][-1]["median_error"] < 0.2

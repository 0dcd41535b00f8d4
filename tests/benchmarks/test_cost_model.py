"""The cost model's benchmark: its fresh packs are fresh, and its kept raw output draws the documentation's pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_model", BENCHMARKS / "cost_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fresh_packs_cover_degrees_lengths_and_recomputed_layers(benchmark: ModuleType) -> None:
    packs = benchmark.fresh_packs(4096, 8, 40, seed=1)
    assert {degree for _, degree, _ in packs} == {1, 2}
    assert len({gc_layers for _, _, gc_layers in packs}) > 5
    local = np.array([sum(lengths) / degree for lengths, degree, _ in packs])
    assert local.min() < 600
    assert local.max() > 1500
    assert len({len(lengths) for lengths, _, _ in packs}) > 4


def test_kept_result_says_what_the_documentation_says(benchmark: ModuleType, tmp_path: Path) -> None:
    result = json.loads((BENCHMARKS / "results" / "cost-model.json").read_text())
    assert result["device"] and result["date"]
    page = (BENCHMARKS.parent / "docs" / "cost-model.md").read_text()
    for row in result["rows"]:
        errors = f"{100 * row['median_error']:.1f} % | {100 * row['p90_error']:.1f} %"
        assert f"| {row['profile']} | {row['quantity']} | {row['n']} | {errors} |" in page
    benchmark.draw(result, tmp_path)
    drawn = {picture.name for picture in tmp_path.glob("*.svg")}
    assert len(drawn) == 4
    for name in drawn:
        assert f"]({name})" in page
        assert (BENCHMARKS.parent / "docs" / name).is_file()

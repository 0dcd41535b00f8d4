"""The benchmark for an hour with a GPU, every part of it on a CPU in tiny size; and what becomes of parts that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_hour.py"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), "--json", "--out", str(tmp_path / "out.json"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    return result


def test_every_part_of_the_first_call(tmp_path: Path) -> None:
    parts = run(tmp_path, "--parts", "attention", "tables", "packing")["parts"]
    assert {name: part["ended"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    checks = [line for line in parts["attention"]["lines"] if "check" in line]
    assert len(checks) == 8
    assert all(line["error"] < 1e-5 for line in checks)
    tables = parts["tables"]["lines"]
    assert len(tables) == 10
    assert all(line["measured_s"] > 0 and line["peak_bytes"] > 0 for line in tables)
    assert {line["sp_degree"] for line in tables} == {1, 2, 4, 8, 16}
    ratios = parts["packing"]["ratios"]
    assert list(ratios) == ["concat", "hbp", "hbp-mixed"]
    assert ratios["concat"]["over_naive"] == 1


def test_a_part_that_fails_costs_only_itself(tmp_path: Path) -> None:
    """No time for the first: it is ended, and the second runs in what is left."""
    result = run(tmp_path, "--parts", "packing", "attention", "--limit-s", "1")
    assert [part["ended"] for part in result["parts"].values()] == ["time was up", "time was up"]

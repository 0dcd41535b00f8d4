"""The training benchmarks run, small, and say what they promise; no figure of theirs is looked at here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, *arguments: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gpu_train_runs_a_toy_on_cpu(tmp_path):
    result = run("gpu_train.py", "--tiny", "--no-trl", "--out", str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["hbp"]["tokens"] > 0
    (group,) = result["naive"]["groups"]
    assert group["gc_layers"] == 2  # naive packing recomputes every layer
    assert result["speedup_vs_naive"] == result["hbp"]["tokens_per_s"] / result["naive"]["tokens_per_s"]
    assert 0 < result["hbp"]["mfu"] < 1.5


def test_trl_keeps_documents_apart_on_the_same_samples(tmp_path):
    pytest.importorskip("trl")
    trl = run("gpu_train.py", "--tiny")["trl"]
    assert trl["tokens"] == trl["tokens_given"]
    assert trl["position_ids_restart"] == trl["documents_apart"] is True
    assert trl["steps"] > 0


def test_switching_is_measured():
    result = run("train.py", "--quick", "--mix", "switch")
    assert result["switch_overhead"] == pytest.approx(
        sum(result["switch"]["switching_s"]) / sum(result["switch"]["static_s"]) - 1
    )

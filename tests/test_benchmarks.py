"""Every benchmark answers ``--quick --json`` with one object that says what it promises; no figure is looked at here.

(`benchmarks/gpu_profile.py`: `tests/benchmarks/test_gpu_profile.py`.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
WITHOUT = (
    "import runpy, sys; sys.modules[sys.argv[1]] = None; del sys.argv[:2]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script where a module is not installed."""


def run(script: str, *arguments: str, without: str | None = None) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *(["-c", WITHOUT, without] if without else []), str(ROOT / "benchmarks" / script)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [*command, "--quick", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**environment, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["command"] == f"python benchmarks/{script} --quick"
    assert result["date"]
    return result


def is_number(value: Any) -> bool:
    return isinstance(value, float) and value == value


def test_packing() -> None:
    rows = run("packing.py")["rows"]
    assert {row["section"] for row in rows} == {"fitting", "plans", "size", "streaming", "order", "startup"}
    for row in rows:
        assert {"strategy", "set", "samples_per_s", "padding", "abr", "efficiency"} <= set(row)
        assert row["samples_per_s"] or row["section"] == "order"
        assert is_number(row["efficiency"]) or row["section"] in ("fitting", "startup")


def test_paper() -> None:
    rows = run("paper.py")["rows"]
    for row in rows:
        assert {"table", "row", "published", "ours"} <= set(row)
        assert is_number(row["ours"]) or row["metric"] == "gc_layers"
    [stated] = [row for row in rows if row["row"] == "LLaMA-3.1-8B, HBP over SP8, all recomputed"]
    [fewest] = [row for row in rows if row["row"] == "LLaMA-3.1-8B, HBP" and row["metric"] == "speedup"]
    assert stated["published"] == fewest["published"] == pytest.approx(5.22 / 3.73)
    assert stated["ours"] > fewest["ours"], "a naive side that recomputes more is slower"
    assert fewest["same_step"] == fewest["ours"], "the seconds of a step are those of 8B"
    assert {row["table"] for row in rows} == {"2", "4", "5", "6", "11", "12", "13", "14", "17", "18", "18/19", "20"}
    assert [row["published"] for row in rows if row["table"] == "17"] == [0.001, 0.001, 0.002, 0.004, 0.003]


def test_simulator() -> None:
    result = run("simulator.py")
    assert result["step_time_error"] >= 0
    assert result["ratio_error"] >= 0
    assert [row["strategy"] for row in result["rows"]] == ["concat", "hbp"]
    for row in result["rows"]:
        for clock in ("", "busy_"):
            steps = np.median(row[f"{clock}step_rounds_s"], axis=0)
            np.testing.assert_allclose(steps, row[f"{clock}step_measured_s"], atol=1e-4)
            assert row[f"{clock}predicted_s"] > 0
        assert row["busy_measured_s"] < row["measured_s"], "waiting is not work, nor is the optimizer counted"
    assert result["by_processes"]["2"]["busy_ratio_error"] >= 0
    assert result["speed"]["s"] > 0


def test_train() -> None:
    result = run("train.py")
    ((name, mix),) = result["mixes"].items()
    assert result["speedup_vs_naive"] == {name: mix["hbp"]["tokens_per_s"] / mix["naive"]["tokens_per_s"]}
    assert len(mix["naive_trials"]) >= 2, "more than one degree"
    if find_spec("trl"):
        assert result["speedup_vs_trl"] == {name: mix["hbp"]["tokens_per_s"] / mix["trl"]["tokens_per_s"]}
        assert mix["trl"]["tokens"] == mix["trl"]["tokens_given"] == mix["hbp"]["tokens"]
    else:
        assert result["speedup_vs_trl"] == {name: None}
    switch = result["switch"]
    assert result["switch_overhead"] == pytest.approx(sum(switch["switching_s"]) / sum(switch["static_s"]) - 1)


def test_gpu_train_runs_a_toy_on_cpu_without_trl(tmp_path: Path) -> None:
    result = run("gpu_train.py", "--out", str(tmp_path / "out.json"), without="trl")
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["tiny"]
    assert result["hbp"]["tokens"] > 0
    (group,) = result["naive"]["groups"]
    assert group["gc_layers"] == 2, "naive packing recomputes every layer"
    assert result["speedup_vs_naive"] == result["hbp"]["tokens_per_s"] / result["naive"]["tokens_per_s"]
    assert 0 < result["hbp"]["mfu"] < 1.5
    assert result["trl"] == {"failed": "trl is not installed"}
    assert result["speedup_vs_trl"] is None


def test_trl_keeps_documents_apart_on_the_same_samples() -> None:
    pytest.importorskip("trl")
    trl = run("gpu_train.py")["trl"]
    assert trl["tokens"] == trl["tokens_given"]
    assert trl["position_ids_restart"] == trl["documents_apart"] is True
    assert trl["steps"] > 0


def test_models() -> None:
    result = run("models.py")
    assert result["proven"] is True
    for row in result["rows"]:
        assert row["holds"]
        assert {"alone", "packed", "SP 2", "SP 4", "mixed"} < {each["property"] for each in row["properties"]}


def test_rehearse() -> None:
    result = run("rehearse.py")
    rows, checked = result["rows"], result["validation"]
    assert [row["strategy"] for row in rows] == [
        *("naive", "naive, again", "+ hierarchical", "+ balance", "hbp", "hbp-mixed")
    ]
    assert rows[0]["predicted_speedup"] == rows[1]["predicted_speedup"] == 1
    assert max(row["speedup"] for row in rows[:2]) == 1, "over the faster of both"
    for row in rows:
        assert is_number(row["run_s"]) and is_number(row["ratio_error"])
        assert row["micro_steps"].startswith("1 of ")
    assert abs(checked["memory_error"]) < 0.02
    assert checked["processor_s"] > 0 and checked["rehearsed_s"] > 0


def test_faults() -> None:
    """Its hooks are where they were: it ends with an error if a phase was never entered or a mode did nothing."""
    result = run("faults.py")
    assert (result["wrong"], result["hangs"], result["without_a_fault"]) == (0, 0, [])
    assert {row["mode"] for row in result["rows"]} == {"full", "read-errors"}
    assert result["kills"] >= 2
    assert all(sum(row["codes"].values()) == row["attempts"] >= row["kills"] for row in result["rows"])

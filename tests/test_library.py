"""The names of `import hbp`: light, lazy, each where it says, and with what a user needs to know in its docstring."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from plans import tiny_cost

import hbp

PLANNING = ("CostModel", "HbpError", "Plan", "StreamPlanner", "lower_bound", "make_plan", "open_store", "simulate")
TRAINING = ("describe_model", "make_mesh", "register_attention", "set_gc_layers", "steps")


def test_import_is_light_and_planning_needs_no_torch() -> None:
    code = f"""
import sys, hbp
assert not {{"numpy", "torch", "pyarrow"}} & set(sys.modules), "import hbp is not light"
for name in {PLANNING}:
    getattr(hbp, name)
assert "torch" not in sys.modules and "transformers" not in sys.modules
import hbp.simulator, hbp.plan
assert callable(hbp.simulate)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_and_says_what_it_does() -> None:
    assert sorted(hbp.__all__) == sorted((*PLANNING, *TRAINING))
    assert set(hbp.__all__) <= set(dir(hbp))
    for name in hbp.__all__:
        assert len(inspect.getdoc(getattr(hbp, name)) or "") > 30, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hbp.nothing


def test_no_module_hides_a_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(Path(hbp.__file__).parent)])}
    assert not modules & set(hbp.__all__)


def test_cost_model_of() -> None:
    cost = hbp.CostModel.of("llama-3.1-8b", "h100-ethernet", gpus=16, memory_gib=40)
    assert (cost.world_size, cost.cluster.name, cost.model.n_layers) == (16, "h100-ethernet", 32)
    assert cost.cluster.memory_bytes == 40 * 2**30
    for arguments, message in (
        (("llama-3.1-8b", "h100-nvlink", 0), "0 GPUs"),
        (("llama-9", "h100-nvlink", 8), "llama-9"),
        (("llama-3.1-8b", "no-such", 8), "no-such"),
    ):
        with pytest.raises(hbp.HbpError, match=message):
            hbp.CostModel.of(*arguments)
    with pytest.raises(hbp.HbpError, match="-1 GiB"):
        hbp.CostModel.of("llama-3.1-8b", memory_gib=-1)


def test_lower_bound_is_below_a_plan_and_refuses_what_cannot_run() -> None:
    cost = tiny_cost(4, 1000)
    lengths = np.random.default_rng(0).integers(1, 1000, 300).astype(np.int32)
    plan = hbp.make_plan(lengths, cost)
    least = hbp.lower_bound(lengths, cost)
    assert 0 < least <= plan.info.metrics["predicted_s"]
    assert hbp.lower_bound(lengths, cost, steps=10) == pytest.approx(least + 10 * cost.cluster.step_overhead_s)
    short = lengths[lengths <= 100]
    assert hbp.lower_bound(lengths, cost, max_length=100) == hbp.lower_bound(short, cost, max_length=100)
    for wrong in (np.zeros(0, np.int32), np.array([3, 0]), np.array([10**7])):
        with pytest.raises(hbp.HbpError):
            hbp.lower_bound(wrong, cost)

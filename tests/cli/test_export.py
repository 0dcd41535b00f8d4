"""`hbp plan --sp --gc --equal-micro-steps` and `hbp export`, as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from workers import random_samples

from hbp.cli.main import main
from hbp.data.record import Encoded
from hbp.data.store import write_store
from hbp.plan import Plan

pytest.importorskip("datasets")
SAMPLES = random_samples(np.random.default_rng(0).integers(20, 900, 200), 500)


def test_plan_of_one_setting_and_its_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoded = [Encoded(ids, mask) for ids, mask in SAMPLES.documents]
    write_store(tmp_path / "store", encoded, fingerprint="", tokenizer="", vocab_size=500)
    data = ["--data", str(tmp_path / "store")]
    common = [*data, "--model", "llama-3.1-8b", "--gpus", "8", "--global-batch-tokens", "20000", "--json"]
    one = ["--sp", "2", "--gc", "3", "--equal-micro-steps"]
    assert main(["plan", *common, *one, "--out", str(tmp_path / "plan")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 200
    plan = Plan.load(tmp_path / "plan")
    assert set(plan.sp_degree.tolist()) == {2} and set(plan.gc_layers.tolist()) == {3}

    export = ["export", str(tmp_path / "plan"), *data, "--to", "automodel", "--out", str(tmp_path / "out")]
    assert main([*export, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    micro_steps = said["gradient_accumulation_steps"]
    assert said["rows"] == plan.n_steps * micro_steps * 4
    assert said["settings"]["step_scheduler.grad_acc_steps"] == micro_steps
    assert json.loads((tmp_path / "out" / "layout.json").read_text())["rows"] == said["rows"]

"""`hbp profile` end to end on two local processes: the file, its page, and its use as a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from jobs import hbp, hbp_here, write_job

from hbp.cost.profile_file import read_profile


def test_profile_of_stacks(tmp_path: Path) -> None:
    write_job(tmp_path, samples=40)
    wrong = hbp_here("profile", str(tmp_path / "cfg.yaml"), "--layers", "0")
    assert (wrong.returncode, wrong.stderr) == (2, "hbp: error: --layers 0: give at least 1\n")
    too_high = hbp("profile", str(tmp_path / "cfg.yaml"), "--layers", "2")
    assert too_high.returncode == 2
    assert "3 layers, so a stack of 4 cannot be cut from it" in too_high.stderr
    file = tmp_path / "out" / "machine.json"
    done = hbp("profile", str(tmp_path / "cfg.yaml"), "--layers", "1", "--out", str(file), "--json")
    assert done.returncode == 0, done.stderr
    profile = read_profile(file)
    assert {p.n_layers for p in profile.points} == {1, 2}
    assert profile.model.n_layers == 3
    assert profile.world_size == 2
    assert {c.kind for c in profile.collectives} == {"all_to_all", "all_gather", "reduce_scatter"}
    printed = json.loads(done.stdout)
    assert printed["median_error"] == profile.data["median_error"] >= 0
    assert {d["sp_degree"] for d in printed["degrees"] if d["source"] == "predicted; degree measured"} == {1, 2}
    assert Path(printed["page"]).read_text().count("<svg") == 4
    lengths = tmp_path / "lengths.npy"
    np.save(lengths, np.full(20, 100))
    made = hbp_here("plan", "--lengths", str(lengths), "--model", str(tmp_path / "model"), "--cluster", str(file),
               "--gpus", "4", "--out", str(tmp_path / "plan"), "--json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["cluster"]["origin"].startswith("profiled on")

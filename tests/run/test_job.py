"""The main job end to end, small: `hbp train` on two local processes leaves everything that it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from jobs import hbp, hbp_here
from workers import LLAMA, write_config

from hbp.data.stdlib_sft import train_tokenizer
from hbp.plan import read_plan
from hbp.run.baseline import PROBE_STEPS
from hbp.train.model import load_model

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    words = ("pack", "rank", "step", "token", "plan", "group", "wait")
    with (folder / "data.jsonl").open("w") as out:
        for i in range(120):
            length = 150 if i % 20 == 0 else int(RNG.integers(3, 25))
            said = " ".join(RNG.choice(words, length))
            turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}) + "\n")
    train_tokenizer(folder / "data.jsonl", folder / "tokenizer", vocab_size=320)
    config = {
        "run_dir": str(folder / "run"),
        "data": {"source": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer"), "eval_samples": 10},
        "model": {"path": write_config(folder / "model", {**LLAMA, "vocab_size": 320})},
        "cluster": {"memory_gib": 1.0},
        "plan": {"baseline": "concat", "global_batch_tokens": 750},
        "train": {"lr": 1e-2},
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def summary(job: Path) -> dict[str, Any]:
    done = hbp("train", str(job / "cfg.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_both_strategies_train_the_same_tokens_and_learn(job: Path, summary: dict[str, Any]) -> None:
    ours, naive = summary["results"]
    assert (ours["strategy"], naive["strategy"]) == ("hbp-mixed", "concat")
    for key in ("samples", "tokens", "world_size"):
        assert ours[key] == naive[key]
    for result in (ours, naive):
        steps = [json.loads(line) for line in (job / "run" / result["strategy"] / "steps.jsonl").open()]
        assert sum(s["tokens"] for s in steps) == result["tokens"]
        assert result["seconds"] == pytest.approx(sum(s["seconds"] for s in steps))
        assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"])
        assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
        assert result["eval_loss"] < steps[0]["loss"]
        assert result["peak_bytes"] <= summary["memory_budget_bytes"]
    assert summary["speedup"] == pytest.approx(ours["tokens_per_s"] / naive["tokens_per_s"])


def test_baseline_is_the_fastest_static_setting_that_fits(summary: dict[str, Any]) -> None:
    trials = summary["baseline_trials"]
    assert {t["sp_degree"] for t in trials} == {1, 2}
    best = max((t for t in trials if t["fits"]), key=lambda t: t["tokens_per_s"])
    (group,) = summary["results"][1]["groups"]
    assert (group["sp_degree"], group["gc_layers"]) == (best["sp_degree"], best["gc_layers"])
    assert all(t["probe_steps"] == PROBE_STEPS for t in trials if t["fits"])  # and only the fastest is trained whole


def test_run_folder(job: Path, summary: dict[str, Any]) -> None:
    run = job / "run"
    profile = json.loads((run / "profile.json").read_text())
    assert profile["cluster"]["origin"].startswith("profiled on")
    assert {p["sp_degree"] for p in profile["points"]} == {1, 2}
    plan = read_plan(run / "hbp-mixed" / "plan")
    assert plan.info.n_samples == len(np.load(run / "lengths.npy")) == 110
    assert load_model(str(run / "hbp-mixed" / "model")).lm.config.vocab_size == 320
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")


def test_a_plan_of_the_users_own(job: Path, summary: dict[str, Any]) -> None:
    """Plan here for two ranks; run it; then refuse to run it on three, or on other data."""
    run, plan = job / "run", str(job / "own")
    model, lengths = str(job / "model"), str(run / "lengths.npy")
    made = hbp_here("plan", "--lengths", lengths, "--model", model, "--cluster", str(run / "profile.json"),
               "--gpus", "2", "--strategy", "dcp", "--out", plan, "--json")  # fmt: skip
    assert made.returncode == 0, made.stderr
    own = [f"plan.path={plan}", "plan.baseline=null", f"run_dir={job / 'own-run'}"]
    done = hbp("train", str(job / "cfg.yaml"), *own, "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["strategy"] == "dcp"
    assert result["metrics"] == json.loads(made.stdout)["metrics"]
    three = hbp_here("train", str(job / "cfg.yaml"), *own, f"run_dir={job / 'three'}", "cluster.processes=3")
    assert three.returncode == 2
    assert "made for 2 ranks but 3 are running" in three.stderr
    other = hbp_here("train", str(job / "cfg.yaml"), *own, f"run_dir={job / 'other'}", "data.eval_samples=11")
    assert other.returncode == 2
    assert "made for other data" in other.stderr

"""Steps whose numbers are not finite, and spikes of the loss: named, kept, never saved, and JSON stays JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from jobs import config_of, run_here, steps_of, write_job
from plans import plan_of
from safetensors.torch import load_file, save_file
from workers import LLAMA, run_ranks, write_model

from hbp.config import Config
from hbp.errors import RankFailed
from hbp.run.engine import Engine
from hbp.run.steps.odd import OddSteps, finite_or_none
from hbp.train import loop
from hbp.train.checkpoint import list_checkpoints
from hbp.train.loop import StepLosses


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_job(tmp_path_factory.mktemp("odd"), samples=60, train={"save_steps": 1})


def strict(text: str) -> Any:
    """JSON as the standard has it, which knows no NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def overflowing(rank: int, world: int, config: Config, calls: list[int]) -> Any:
    """:func:`run_here`, with an overflow in some of rank 1's micro-steps."""
    plain, count = loop.forward_backward, 0

    def forward_backward(model: Any, batch: Any, scale: float = 1.0) -> Any:
        nonlocal count
        count += 1
        if rank == 1 and count in calls:
            batch.weights.fill_(math.inf)
        return plain(model, batch, scale)

    with mock.patch.object(loop, "forward_backward", forward_backward):
        try:
            return run_here(rank, world, config)
        except RankFailed as failed:
            return str(failed), ""


def test_one_step_is_skipped_and_the_run_ends_well(job):
    """Case run-nonfinite: it used to end with every weight NaN, exported, and exit code 0."""
    run = job / "one"
    ((summary, said), _) = run_ranks(overflowing, 2, config_of(job, f"run_dir={run}"), [4])
    (skipped,) = [step for step in steps_of(run / "hbp") if step["skipped"]]
    assert (skipped["loss"], skipped["grad_norm"]) == (None, None)
    number = skipped["step"] + 1
    assert f"hbp: step {number} of the run was skipped: loss " in said
    assert "pack " in said
    evidence = strict((run / "hbp" / "odd-steps" / f"step-{number:08d}.json").read_text())
    (bad,) = [pack for pack in evidence["packs"] if pack["loss"] in ("inf", "nan")]
    assert f"pack {bad['row']} (samples {', '.join(map(str, bad['samples'][:6]))}" in said
    assert evidence["gradients_not_finite"]
    weights = load_file(run / "hbp" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert math.isfinite(summary["results"][0]["final_train_loss"])
    for file in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            strict(line)


def test_a_few_in_a_row_end_the_run_with_the_state_before(job):
    run = job / "many"
    config = config_of(job, f"run_dir={run}", "train.max_skipped=2", "train.save_steps=1")
    ((said, _), (there, _)) = run_ranks(overflowing, 2, config, list(range(5, 40)))
    assert said == there
    assert said.startswith("2 steps in a row were not finite (train.max_skipped), the last: step ")
    assert "the same command goes on from " in said
    assert not (run / "hbp" / "model").exists()
    assert not (run / "summary.json").exists()
    steps = steps_of(run / "hbp")
    assert [bool(step["skipped"]) for step in steps[-3:]] == [False, True, True]
    assert list_checkpoints(run / "hbp" / "checkpoints")


def test_weights_that_are_not_finite_are_refused_before_a_step(job):
    """Case run-nan-weights."""
    model = Path(write_model(job / "broken", {**LLAMA, "vocab_size": 320}))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    config = config_of(job, f"run_dir={job / 'refused'}", f"model.path={model}")
    ((said, _), (there, _)) = run_ranks(run_here, 2, config)
    assert said == there
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in said
    assert not steps_of(job / "refused" / "hbp")


def blown_up(rank: int, world: int, config: Config) -> Any:
    """:func:`run_here`, with an optimizer that leaves infinity behind in its second step, on one rank."""
    plain, count = torch.optim.AdamW.step, 0

    def step(optimizer: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        result = plain(optimizer, *arguments)
        if rank == 1 and count == 2:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].to_local()[0] = math.inf
        return result

    with mock.patch.object(torch.optim.AdamW, "step", step):
        try:
            return run_here(rank, world, config)
        except RankFailed as failed:
            return str(failed), ""


def test_a_state_that_is_not_finite_is_not_saved(job):
    run = job / "blown"
    ((said, _), (there, _)) = run_ranks(blown_up, 2, config_of(job, f"run_dir={run}"))
    assert said == there
    assert said.startswith("after step 2 of the run ")
    assert "is not saved" in said
    assert [path.name for path in list_checkpoints(run / "hbp" / "checkpoints")] == ["step-00000001"]


def test_two_runs_of_one_seed_drop_the_same(job):
    """Case run-dropout-seed."""
    pytest.importorskip("peft")
    model = write_model(job / "base", {**LLAMA, "vocab_size": 320})
    options = (f"model.path={model}", "lora.rank=4", "lora.dropout=0.3", "train.export=false", "train.save_steps=null")
    losses = []
    for name, seed in (("a", 0), ("b", 0)):
        config = config_of(job, f"run_dir={job / name}", *options, f"seed={seed}", "train.max_steps=3")
        run_ranks(run_unseeded, 2, config, len(losses))
        losses.append([step["loss"] for step in steps_of(job / name / "hbp")])
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def run_unseeded(rank: int, world: int, config: Config, number: int) -> Any:
    """:func:`run_here`, from a random state that no other run begins with."""
    plain = Engine.fresh_model

    def fresh_model(engine: Engine) -> Any:
        model = plain(engine)
        torch.manual_seed(5000 + 10 * number + rank)
        return model

    with mock.patch.object(Engine, "fresh_model", fresh_model):
        return run_here(rank, world, config)


def record(step: int, loss: float | None, skipped: str = "") -> Any:
    return SimpleNamespace(step=step, loss=loss, skipped=skipped, lr=1e-3)


def test_a_spike_names_the_packs_whose_tokens_are_to_blame(capsys, tmp_path):
    plan = plan_of([(0, 0, r, 1, 0, [2 * r, 2 * r + 1]) for r in range(2)], np.full(4, 5, np.int32), 2)
    samples = SimpleNamespace(ids=np.array([40, 41, 42, 43]), loss_tokens=np.array([4, 4, 1, 1]))
    part: Any = SimpleNamespace(plan=plan, samples=samples, number=0)
    odd = OddSteps(tmp_path, 3)
    for step in range(20):
        odd.look(StepLosses(step, [0, 1], [1.0, 1.0]))
        odd.check(part, record(step, 2.0 + 0.01 * (step % 3)), step + 1, str)
    assert capsys.readouterr().err == ""
    odd.look(StepLosses(20, [0, 1], [1.6, 2.4]))  # of 10 tokens in all: 2 a token of pack 0, 12 a token of pack 1
    odd.check(part, record(20, 4.0), 21, str)
    said = capsys.readouterr().err
    assert "loss 4.000 in step 21 of the run stands out from the 2.010 of those before: pack 1 (samples 42, 43" in said
    assert "12.000 a token" in said
    assert "2.000 a token" in said


def test_what_json_cannot_say_is_null():
    found = {"a": [1.0, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": 3}}
    assert finite_or_none(found) == {"a": [1.0, None, [None, "x"]], "b": {"c": None, "d": None, "e": 3}}

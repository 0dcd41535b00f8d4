"""What goes on around the steps of a run: evaluation, trace, writers, the table by group."""

from __future__ import annotations

import gc
import json
import weakref
from unittest import mock

import pytest
from jobs import config_of, run_here, steps_of, write_job
from workers import CPU, run_ranks

from hbp.config import Config
from hbp.run.engine import Engine
from hbp.run.job import run_job
from hbp.run_log import StepRecord, by_group, read_log
from hbp.train.model import CausalLMWithLoss


def models_alive(rank: int, world: int, config: Config) -> list[int]:
    """How many models of before are still there whenever another has been made, and at the end."""
    plain, made, alive = Engine.fresh_model, [], []

    def fresh_model(engine: Engine) -> CausalLMWithLoss:
        model = plain(engine)
        alive.append(sum(earlier() is not None for earlier in made))
        made.append(weakref.ref(model))
        return model

    gc.disable()  # the collector may come at any time, or never
    with mock.patch.object(Engine, "fresh_model", fresh_model):
        run_job(config, CPU)
    return [*alive, sum(model() is not None for model in made)]


def test_there_is_never_more_than_one_model(tmp_path):
    """That packs are tried with, of the run, of each setting of the baseline."""
    job = write_job(tmp_path, samples=40, train={"export": False, "save_steps": None}, plan={"baseline": "concat"})
    (alive, there) = run_ranks(models_alive, 2, config_of(job))
    assert alive == there == [0] * len(alive)
    assert len(alive) > 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("tensorboard")
    options = {"eval_steps": 4, "trace_steps": [2, 1], "save_steps": None, "export": False}
    job = write_job(tmp_path_factory.mktemp("training"), train=options, log={"tensorboard": True})
    (summary, _), (there, _) = run_ranks(run_here, 2, config_of(job))
    assert summary == there
    return job / "run" / "hbp", summary["results"][0]


def test_held_out_loss_is_taken_every_few_steps_and_at_the_end(run):
    folder, result = run
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    steps = len(steps_of(folder))
    assert [line["run_step"] for line in lines] == [*range(4, steps, 4), steps]
    assert lines[-1]["eval_loss"] == result["eval_loss"] < lines[0]["eval_loss"]


def test_trace_shows_the_model_of_every_rank(run):
    folder, _ = run
    for rank in range(2):
        events = json.loads((folder / "trace" / f"rank-{rank}.json").read_text())["traceEvents"]
        names = {event.get("name", "") for event in events}
        assert "ProfilerStep#2" in names
        assert "ProfilerStep#3" not in names
        assert any("mm" in name for name in names)


def test_efficiency_is_logged(run):
    folder, result = run
    records = read_log(folder, StepRecord)
    assert all(0 < record.mfu < 1.5 for record in records)
    assert all(0 <= record.skew <= 1 for record in records)
    assert all(record.memory_bytes > 2**20 for record in records)
    table = by_group(records)
    assert table == result["by_group"]
    assert sum(row["tokens"] for row in table.values()) == result["tokens"]
    assert sum(row["steps"] for row in table.values()) == len(records)
    for name, row in table.items():
        own = [record for record in records if record.group == name]
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / sum(record.seconds for record in own))


def test_writers_get_every_step(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = run
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    steps = steps_of(folder)
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, len(steps) + 1))
    assert [event.value for event in losses] == pytest.approx([step["loss"] for step in steps])
    assert events.Scalars("eval/loss")[0].step == 4

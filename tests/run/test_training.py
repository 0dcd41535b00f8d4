"""What goes on around the steps of a run: evaluation, trace, writers, the table by group."""

from __future__ import annotations

import dataclasses
import gc
import json
import tracemalloc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from jobs import config_of, run_here, steps_of, write_job
from workers import CPU, run_ranks

from hbp.config import Config
from hbp.data.store import open_store
from hbp.run import baseline, training
from hbp.run.engine import Engine
from hbp.run.job import run_job
from hbp.run.training import _mean
from hbp.run_log import EvalRecord, StepRecord, by_group, read_log
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


def several_sources(job: Path) -> None:
    """The job's data as two sources, and two for evaluation."""
    talks = (job / "data.jsonl").read_text().splitlines(keepends=True)
    for name, own in (("a", talks[:90]), ("b", talks[90:-6]), ("c", talks[-6:-2]), ("d", talks[-2:])):
        (job / f"{name}.jsonl").write_text("".join(own))
    config = yaml.safe_load((job / "cfg.yaml").read_text())
    del config["data"]["source"]
    config["data"]["sources"] = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    config["data"]["eval_source"] = [{"path": "c.jsonl"}, {"path": "d.jsonl", "name": "dee"}]
    (job / "cfg.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pytest.importorskip("tensorboard")
    options = {"eval_steps": 4, "trace_steps": [2, 1], "save_steps": None, "export": False}
    job = write_job(tmp_path_factory.mktemp("training"), train=options, log={"tensorboard": True})
    several_sources(job)
    (summary, _), (there, _) = run_ranks(run_here, 2, config_of(job))
    assert summary == there
    return job / "run" / "hbp", summary["results"][0]


def test_held_out_loss_is_taken_every_few_steps_and_at_the_end(run):
    folder, result = run
    lines = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    steps = len(steps_of(folder))
    assert [line["run_step"] for line in lines] == [*range(4, steps, 4), steps]
    assert lines[-1]["eval_loss"] == result["eval_loss"] < lines[0]["eval_loss"]


def test_held_out_loss_by_source_adds_up_to_that_of_all(run):
    folder, result = run
    by_source = result["eval_loss_by_source"]
    assert read_log(folder, EvalRecord)[-1].eval_loss_by_source == by_source
    store = open_store(folder.parent / "store")
    assert [source.name for source in store.sources] == ["a", "b", "c", "dee"]
    tokens = {name: int(store.loss_tokens[store.source == n].sum()) for n, name in ((2, "c"), (3, "dee"))}
    assert by_source.keys() == tokens.keys()
    mean = sum(by_source[name] * n for name, n in tokens.items()) / sum(tokens.values())
    assert result["eval_loss"] == pytest.approx(mean)
    assert by_source["c"] != by_source["dee"]


def held_at_each_part(rank: int, world: int, config: Config) -> tuple[list[int], list[Any]]:
    """Bytes that are held when each part begins, of all that Python allocates; and the records that were kept."""
    held, kept, begin, sums = list[int](), list[Any](), training._begin_part, training._result

    def begin_part(part: Any) -> None:
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        begin(part)

    def result(engine: Any, folder: Any, part: Any, records: Any) -> Any:
        kept.extend(record for own in records for record in own)
        return sums(engine, folder, part, records)

    tracemalloc.start()
    with mock.patch.object(training, "_begin_part", begin_part), mock.patch.object(training, "_result", result):
        run_here(rank, world, config)
    tracemalloc.stop()
    return held, kept


def test_what_a_rank_holds_does_not_grow_with_epochs(tmp_path):
    """But for the few numbers of a step: no plan is held, no batches, nor what only the log is for."""
    options = {"epochs": 7, "save_steps": None, "export": False}
    job = write_job(tmp_path, 24, train=options, data={"eval_samples": 0})
    ((held, kept),) = run_ranks(held_at_each_part, 1, config_of(job))
    folder = job / "run" / "hbp"
    logged = [record for part in (folder, *sorted(folder.glob("part-?"))) for record in read_log(part, StepRecord)]
    assert len(held) == 7 and all(record.rank_wall_s for record in logged)
    assert kept == [dataclasses.replace(record, rank_wall_s=[], rank_busy_s=[]) for record in logged]
    assert float(np.median(np.diff(held[2:]))) < 1500 * len(logged) / 7 + 2000, held


def probed(rank: int, world: int, config: Config) -> Any:
    """The job, and what was trained with how many steps: those of the run, of each probe, of the baseline."""
    trained: list[int] = []

    def counted(plain: Any) -> Any:
        def train(*arguments: Any, **options: Any) -> Any:
            records = plain(*arguments, **options)
            trained.append(len(records))
            return records

        return train

    with (
        mock.patch.object(training, "train", counted(training.train)),
        mock.patch.object(baseline, "train", counted(baseline.train)),
    ):
        summary, said = run_here(rank, world, config)
    return summary, said, trained


def test_a_baseline_is_probed_and_only_the_fastest_trained(tmp_path):
    """On a machine without GPU that is told of one, which is said."""
    job = write_job(tmp_path, train={"export": False, "save_steps": None}, plan={"baseline": "concat"})
    config = config_of(job, "cluster.name=h100-nvlink", "cluster.memory_gib=1", "data.eval_samples=0")
    (summary, said, trained), _ = run_ranks(probed, 2, config)
    ours, theirs = summary["results"]
    assert trained == [ours["steps"], baseline.PROBE_STEPS + 1, baseline.PROBE_STEPS + 1, theirs["steps"]]
    assert theirs["tokens"] == ours["tokens"]
    assert "cluster.name=h100-nvlink describes NVIDIA H100 80GB, but there is no GPU here" in said


def test_a_mean_loss_is_over_loss_tokens_alone():
    assert _mean([(2.0, 30), (9.0, 0), (4.0, 10)]) == pytest.approx(2.5)
    assert _mean([]) is _mean([(0.0, 0)]) is None


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

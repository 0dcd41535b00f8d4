"""Runs that are stopped, killed and resumed: bit for bit, with other numbers of ranks, over several epochs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from jobs import config_of, ranks_of, run_here, start, steps_of, write_job
from safetensors.torch import load_file
from workers import run_ranks

from hbp.config import Config
from hbp.cost.cluster import CLUSTERS, ClusterSpec
from hbp.cost.model_spec import ModelSpec
from hbp.cost.predict import CostModel
from hbp.data.store import open_store
from hbp.errors import HbpError
from hbp.plan import read_plan, write_plan
from hbp.planning.planner import make_plan
from hbp.report.page import write_report
from hbp.run import fit_memory as live_plan
from hbp.run import training
from hbp.run.engine import Samples
from hbp.run.identity import read_record
from hbp.run.resume import Part, fingerprint, remaining
from hbp.simulator import step_seconds
from hbp.train.checkpoint import list_checkpoints, read_position
from hbp.train.loop import learning_rate

EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "loss_tokens", "group")


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_job(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def never_stopped(job) -> Path:
    """The strategy's folder of a run that was left alone, on two ranks."""
    run_ranks(run_here, 2, config_of(job, f"run_dir={job / 'whole'}"))
    return job / "whole" / "hbp"


def test_run_token_counts_the_same_after_the_rest_is_planned_again(job):
    """At a standing model the steps' losses add up to steps ÷ loss tokens of the first plan × the run's cross entropy:
    as in a run that was left alone, whatever was planned again, and twice as much in two epochs."""
    sums = {}
    for name, more, then in (
        ("alone", [], []),
        ("changed", [], ["plan.strategy=bfd"]),
        ("two", ["train.epochs=2"], []),
    ):
        given = (f"run_dir={job / 'run-token' / name}", "train.loss=run-token", "train.lr=1e-30", "train.export=false")
        config = config_of(job, *given, *more)
        run_ranks(run_here, 2, config, *([3] if then else []))
        if then:
            run_ranks(run_here, 2, config_of(job, *given, *more, *then))
        folder = job / "run-token" / name / "hbp"
        sums[name] = sum(step["loss"] for part in (folder, folder / "part-1") for step in steps_of(part))
        assert (folder / "part-1" / "steps.jsonl").is_file() == (name != "alone")
    assert sums["changed"] == pytest.approx(sums["alone"], rel=1e-5)
    assert sums["two"] == pytest.approx(2 * sums["alone"], rel=1e-5)


def same_steps(got: list[dict], want: list[dict]) -> None:
    assert [[s[key] for key in EXACT] for s in got] == [[s[key] for key in EXACT] for s in want]


def same_model(got: Path, want: Path) -> None:
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (got, want))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_killed_and_resumed_equals_never_killed(job, never_stopped):
    """The real command, all its processes killed at once in the middle of a step, the same command again."""
    run = f"run_dir={job / 'killed'}"
    folder = job / "killed" / "hbp"
    running = start(job, run)
    ranks = ranks_of(running, 2)
    deadline = time.monotonic() + 90
    while not list_checkpoints(folder / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in [*ranks, running.pid]:
        os.kill(process, signal.SIGKILL)
    running.communicate(timeout=30)
    done = len(steps_of(folder))
    assert 0 < done < len(steps_of(never_stopped))
    again = start(job, run, "--json")
    out, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "hbp: resuming from" in said
    same_steps(steps_of(folder), steps_of(never_stopped))
    same_model(folder, never_stopped)
    (result,) = json.loads(out)["results"]
    assert result["steps"] == len(steps_of(never_stopped))
    begun = [s["started_s"] for s in steps_of(folder)]
    assert begun == sorted(begun)  # the clock goes on where it stood


def test_signal_saves_at_the_same_step_and_exits(job, never_stopped):
    config = config_of(job, f"run_dir={job / 'stopped'}", "train.save_steps=null")
    folder = job / "stopped" / "hbp"
    (said, _), (there, _) = run_ranks(run_here, 2, config, 3)
    assert said == there  # the signal came to rank 1 alone
    assert said.startswith("SIGTERM: stopped after step 3")
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    assert read_position(checkpoint).step == 3
    assert not (job / "stopped" / "summary.json").exists()
    name = read_record(job / "stopped" / "run.json").id
    (summary, _), _ = run_ranks(run_here, 2, config)
    assert read_record(job / "stopped" / "run.json").id == name != read_record(job / "whole" / "run.json").id
    same_steps(steps_of(folder), steps_of(never_stopped))
    same_model(folder, never_stopped)
    finished = (folder / "steps.jsonl").stat().st_mtime_ns
    (again, said), _ = run_ranks(run_here, 2, config)  # nothing is left to do
    assert again == json.loads(json.dumps(summary))
    assert "holds this run, finished" in said
    assert (folder / "steps.jsonl").stat().st_mtime_ns == finished


@pytest.mark.parametrize("ranks", [4, 1])
def test_another_number_of_ranks_trains_the_rest_once(job, ranks):
    config = config_of(job, f"run_dir={job / f'elastic-{ranks}'}", "train.export=false")
    folder = job / f"elastic-{ranks}" / "hbp"
    run_ranks(run_here, 2, config, 5)
    (summary, said), *_ = run_ranks(run_here, ranks, config)
    (line,) = {line for line in said.splitlines() if "planned again" in line}
    assert f"2 ranks before, {ranks} now: the " in line
    before, after = read_plan(folder / "plan"), read_plan(folder / "part-1" / "plan")
    assert (before.info.world_size, after.info.world_size) == (2, ranks)
    old, new = np.load(folder / "samples.npy"), np.load(folder / "part-1" / "samples.npy")
    done = before.sample_ids[: before.sample_offsets[np.searchsorted(before.step, 5)]]
    trained = np.concatenate([old[done], new[after.sample_ids]])
    assert sorted(trained.tolist()) == sorted(old.tolist())  # each exactly once
    records = steps_of(folder) + steps_of(folder / "part-1")
    assert [s["step"] for s in records] == [*range(5), *range(after.n_steps)]
    assert len(records) == summary["results"][0]["steps"]
    tokens, total = 0, before.info.n_tokens
    for record in records:  # one schedule over both
        assert record["lr"] == learning_rate(config.train, tokens, record["tokens"], total)
        tokens += record["tokens"]
    assert tokens == total == summary["results"][0]["tokens"]
    assert np.mean([s["loss"] for s in records[-3:]]) < records[4]["loss"]  # what was learnt is still known
    assert after.info.settings["global_batch_tokens"] == before.info.settings["global_batch_tokens"]
    parts = summary["results"][0]["parts"]
    assert [(p["world_size"], p["steps"]) for p in parts] == [(2, 5), (ranks, after.n_steps)]
    assert [p["predicted_s"] for p in parts] == [step_seconds(before)[:5].sum(), step_seconds(after).sum()]
    for key in ("tokens", "seconds", "predicted_s"):
        assert summary["results"][0][key] == pytest.approx(sum(p[key] for p in parts))
    assert summary["results"][0]["samples"] == len(before.sample_ids)


def test_baseline_after_a_change_of_ranks(job):
    """It runs on the ranks that there are, and is compared with what was trained on as many."""
    config = config_of(job, f"run_dir={job / 'late-baseline'}", "train.export=false", "plan.baseline=concat")
    run_ranks(run_here, 2, config, 5)
    ((summary, _),) = run_ranks(run_here, 1, config)
    ours, theirs = summary["results"]
    assert (ours["world_size"], theirs["world_size"], theirs["strategy"]) == (1, 1, "concat")
    assert theirs["samples"] == ours["samples"]
    part = ours["parts"][1]
    assert summary["speedup"] == pytest.approx(part["tokens"] / part["seconds"] / theirs["tokens_per_s"])
    hbp, concat = write_report(job / "late-baseline").numbers["strategies"]
    assert [p["world_size"] for p in hbp["stretches"]] == [2, 1]
    assert hbp["tokens_done"] == concat["tokens_done"] == ours["tokens"]


def test_elastic_resume_stopped_again(job):
    """A run that has changed its ranks is resumed in its second part."""
    config = config_of(job, f"run_dir={job / 'twice'}", "train.export=false")
    folder = job / "twice" / "hbp"
    run_ranks(run_here, 2, config, 5)
    run_ranks(run_here, 1, config, 3)
    position = read_position(list_checkpoints(folder / "checkpoints")[0])
    assert (position.part, position.step, position.run_step, position.world_size) == (1, 3, 8, 1)
    ((summary, _),) = run_ranks(run_here, 1, config)
    records = steps_of(folder) + steps_of(folder / "part-1")
    assert sum(s["tokens"] for s in records) == summary["results"][0]["tokens"] == position.tokens_total


def test_epochs_resume_and_are_planned_anew(job):
    options = ("train.epochs=2", "train.export=false")
    whole = config_of(job, f"run_dir={job / 'epochs'}", *options)
    run_ranks(run_here, 2, whole)
    parts = [job / "epochs" / "hbp", job / "epochs" / "hbp" / "part-1"]
    first, second = (read_plan(part / "plan") for part in parts)
    assert sorted(first.sample_ids) == sorted(second.sample_ids)
    assert first.info.groups == second.info.groups
    assert fingerprint(first) != fingerprint(second)
    stopped = config_of(job, f"run_dir={job / 'epochs-stopped'}", *options)
    run_ranks(run_here, 2, stopped, first.n_steps + 2)
    (job / "epochs-stopped" / "hbp" / "part-7").mkdir()  # of a way that the run did not go again
    run_ranks(run_here, 2, stopped)
    assert not (job / "epochs-stopped" / "hbp" / "part-7").exists()
    for part in parts:
        again = job / "epochs-stopped" / part.relative_to(job / "epochs")
        same_steps(steps_of(again), steps_of(part))
    assert steps_of(parts[1])[-1]["lr"] < steps_of(parts[0])[-1]["lr"]  # one schedule over all epochs


def run_without_disk(rank: int, world: int, config: Config) -> Any:
    """:func:`run_here`, but the model cannot be exported."""
    with mock.patch.object(training, "export_model", side_effect=HbpError("the disk is full")):
        return run_here(rank, world, config)


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_failed_export_loses_no_training(job, never_stopped, ranks):
    """A checkpoint is saved before it, whatever is asked for; the same command goes on there, on other ranks too."""
    config = config_of(job, f"run_dir={job / f'full-{ranks}'}", "train.save_steps=null")
    folder = job / f"full-{ranks}" / "hbp"
    ((said, _), _) = run_ranks(run_without_disk, 2, config)
    assert said == "the disk is full"
    ((summary, said), *_) = run_ranks(run_here, ranks, config)
    steps = len(steps_of(never_stopped))
    assert f"step {steps}, " in said
    assert summary["results"][0]["steps"] == steps == len(steps_of(folder))
    same_steps(steps_of(folder), steps_of(never_stopped))
    same_model(folder, never_stopped)


def test_damaged_checkpoint_is_named_and_the_one_before_used(job, never_stopped):
    config = config_of(job, f"run_dir={job / 'damaged'}")
    folder = job / "damaged" / "hbp"
    run_ranks(run_here, 2, config, 5)
    newest, before = list_checkpoints(folder / "checkpoints")
    shard = sorted(newest.glob("*.distcp"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "checkpoints" / "step-00000099.partial").mkdir()  # a save that was under way
    (_, said), _ = run_ranks(run_here, 2, config)
    assert f"hbp: checkpoint {newest} is damaged ({shard.name} has" in said
    assert f"hbp: resuming from {before}: step " in said
    same_steps(steps_of(folder), steps_of(never_stopped))
    same_model(folder, never_stopped)


def test_a_changed_run_is_refused_in_one_line(job, never_stopped):
    run = f"run_dir={job / 'changed'}"
    run_ranks(run_here, 2, config_of(job, run), 2)
    other_data = job / "other.jsonl"
    other_data.write_text("".join((job / "data.jsonl").read_text().splitlines(keepends=True)[:-1]))
    for change, said in [
        ("train.loss=sum", "train.loss was 'ave-token', now 'sum'"),
        ("seed=4", "seed was 0, now 4"),
        ("plan.global_batch_tokens=400", "plan.global_batch_tokens was 150, now 400"),
        (f"data.source={other_data}", "its data or tokenizer has changed"),
    ]:
        ((refusal, _), _) = run_ranks(run_here, 2, config_of(job, run, change))
        assert said in refusal
        assert "\n" not in refusal
    plan = job / "changed" / "hbp" / "plan"
    other = read_plan(never_stopped / "plan")
    assert fingerprint(other) == fingerprint(read_plan(plan))
    (plan / "plan.parquet").write_bytes(b"")
    ((summary, said), _) = run_ranks(run_here, 2, config_of(job, run, "train.export=false"))  # no change: made again
    assert "plan.parquet" in said and summary["results"][0]["steps"] == len(steps_of(never_stopped))
    assert fingerprint(other) == fingerprint(read_plan(plan))
    (summary, _), _ = run_ranks(run_here, 2, config_of(job, run, "train.resume=never", "train.export=false"))
    assert summary["results"][0]["steps"] == len(steps_of(never_stopped))


def test_resume_from_a_checkpoint_of_another_folder(job, never_stopped):
    """An older one, copied into a new run: what came after it is done again."""
    source = config_of(job, f"run_dir={job / 'source'}", "train.keep_checkpoints=5")
    run_ranks(run_here, 2, source, 5)
    checkpoints = list_checkpoints(job / "source" / "hbp" / "checkpoints")
    assert [path.name[-1] for path in checkpoints] == ["5", "4", "2"]
    target = config_of(job, f"run_dir={job / 'target'}", f"train.resume={checkpoints[1]}")
    run_ranks(run_here, 2, target)
    same_steps(steps_of(job / "target" / "hbp"), steps_of(never_stopped))
    same_model(job / "target" / "hbp", never_stopped)
    ((missing, _), _) = run_ranks(run_here, 2, config_of(job, f"train.resume={job / 'nothing'}"))
    assert "is not a whole checkpoint" in missing


def test_remaining_samples(job, never_stopped):
    store = open_store(job / "whole" / "store")
    plan, ids = read_plan(never_stopped / "plan"), np.load(never_stopped / "samples.npy")
    part = Part(0, 0, Samples(store, ids), plan, never_stopped)
    assert remaining(part, 0).ids.tolist() == ids.tolist()
    assert remaining(part, plan.n_steps).ids.tolist() == []
    last = np.flatnonzero(plan.step == plan.n_steps - 1)
    want = np.concatenate([ids[plan.samples(row)[0]] for row in last])
    assert remaining(part, plan.n_steps - 1).ids.tolist() == sorted(want.tolist())


def heavier_than_planned(rank: int, world: int, config: Config, peaks: list[float], stop_after: int | None) -> Any:
    """:func:`run_here`, with plans whose fullest packs take these shares of the budget, one after the other."""
    shares = iter(peaks)

    def measured(model: Any, *_: Any) -> dict[Any, float]:
        assert not any(p.grad is not None for p in model.parameters())
        return {(1, 1, 0): next(shares) * CLUSTERS["cpu-local"].memory_bytes}

    with mock.patch.object(live_plan, "measure_rows", measured):
        return run_here(rank, world, config, stop_after)


def slow_to_end(rank: int, world: int, config: Config, peaks: list[float]) -> Any:
    """The same, where all ranks but the first take their time to say what a strategy came to."""
    result_of = training._part_result

    def slow(*args: Any) -> Any:
        time.sleep(0.3 * rank)
        return result_of(*args)

    with mock.patch.object(training, "_part_result", slow):
        return heavier_than_planned(rank, world, config, peaks, None)


def test_later_epochs_are_held_to_the_memory_that_the_first_was_held_to(job):
    """Each epoch's plan is tried, and made again knowing what every plan before took, in one run or resumed."""
    options = ("train.epochs=3", "train.export=false", "train.save_steps=null")
    peaks = [1.01, 0.9, 1.02, 0.97, 0.95]  # of two plans for each of the first two epochs, and one for the last
    whole, stopped = (config_of(job, f"run_dir={job / name}", *options) for name in ("heavy", "heavy-stopped"))
    (summary, said), _ = run_ranks(heavier_than_planned, 2, whole, peaks, None)
    assert said.count("planning again with that known") == 2
    budget = CLUSTERS["cpu-local"].memory_bytes
    assert summary["results"][0]["peak_bytes"] == 0.97 * budget
    folders = ["", "part-1", "part-2"]
    plans = [read_plan(job / "heavy" / "hbp" / part / "plan") for part in folders]
    assert [plan.info.cluster["fixed_bytes"] / budget for plan in plans] == pytest.approx([0.01, 0.03, 0.03])
    steps = plans[0].n_steps
    run_ranks(heavier_than_planned, 2, stopped, peaks[:2], steps - 1)
    (again, _), _ = run_ranks(heavier_than_planned, 2, stopped, peaks[2:], None)
    assert again["results"][0]["peak_bytes"] == 0.97 * budget
    for plan, part in zip(plans, folders, strict=True):
        assert fingerprint(read_plan(job / "heavy-stopped" / "hbp" / part / "plan")) == fingerprint(plan)


def test_an_epoch_whose_packs_do_not_fit_the_device_is_refused(job):
    options = ("train.epochs=2", "train.export=false")
    config = config_of(job, f"run_dir={job / 'too-heavy'}", *options)
    ((refusal, said), _) = run_ranks(heavier_than_planned, 2, config, [0.9, *[float("inf")] * 4], None)
    assert "no plan keeps within 1.000 GiB a process (a pack of the last took more than the device has)" in refusal
    assert "took more than the device has, over the budget of 1.000 GiB: planning again" in said
    assert len(steps_of(job / "too-heavy" / "hbp")) > 0  # the first epoch was trained


def test_a_baseline_whose_later_epoch_does_not_fit_does_not_fit(job):
    config = config_of(
        job, f"run_dir={job / 'heavy-baseline'}", "train.epochs=2", "train.export=false", "plan.baseline=concat"
    )
    # Of both epochs of each setting: degree 1 is over the budget in the second at first, degree 2 beyond the device.
    peaks = [0.9, 0.9, 0.9, 1.1, 0.8, 0.7, float("inf"), 0.9, 0.9, 0.6]
    (summary, _), _ = run_ranks(slow_to_end, 2, config, peaks)  # a rank reads plans that the first then moves
    budget = CLUSTERS["cpu-local"].memory_bytes
    trials = [(t["sp_degree"], t["gc_layers"], t["fits"], t["peak_bytes"]) for t in summary["baseline_trials"]]
    assert trials == [
        (1, 0, False, 1.1 * budget), (1, 1, True, 0.8 * budget), (2, 0, False, None), (2, 1, True, 0.9 * budget)
    ]  # fmt: skip
    assert "Infinity" not in (job / "heavy-baseline" / "summary.json").read_text()


def test_a_plan_of_ones_own_on_other_ranks_keeps_its_strategy(job, never_stopped):
    """Planned again, twice, as the plan says and not as the configuration does."""
    lengths = np.load(job / "whole" / "lengths.npy")
    info = read_plan(never_stopped / "plan").info
    cost = CostModel(ModelSpec.from_json(info.model), ClusterSpec(**info.cluster), 2)
    write_plan(make_plan(lengths, cost, strategy="bfd", global_batch_tokens=150), job / "own-plan")
    config = config_of(
        job, f"run_dir={job / 'own'}", f"plan.path={job / 'own-plan'}", "train.epochs=2", "train.export=false"
    )
    run_ranks(run_here, 2, config, 3)
    ((summary, _),) = run_ranks(run_here, 1, config)
    plans = [read_plan(job / "own" / "bfd" / part / "plan") for part in ("", "part-1", "part-2")]
    assert [plan.info.strategy for plan in plans] == ["bfd"] * 3
    assert [plan.info.world_size for plan in plans] == [2, 1, 1]
    assert summary["results"][0]["strategy"] == "bfd"


def test_a_plan_in_the_folder_where_the_run_keeps_it(job, never_stopped):
    """It is neither cleared away nor written while other ranks read it."""
    run_ranks(run_here, 2, config_of(job, f"run_dir={job / 'in-place'}", "train.export=false"), 2)
    plan = job / "in-place" / "hbp" / "plan"
    before = (plan / "plan.parquet").stat().st_mtime_ns
    config = config_of(
        job, f"run_dir={job / 'in-place'}", "train.export=false", f"plan.path={plan}", "train.resume=never"
    )
    run_ranks(run_here, 2, config)
    assert (plan / "plan.parquet").stat().st_mtime_ns == before
    same_steps(steps_of(job / "in-place" / "hbp"), steps_of(never_stopped))

"""Runs that are stopped, killed and resumed: bit for bit, with other numbers of ranks, over several epochs."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import config_of, ranks_of, run_here, start, steps_of, write_job
from safetensors.torch import load_file
from workers import run_ranks

from hbp.data.store import open_store
from hbp.plan import read_plan
from hbp.prepare import Samples
from hbp.resume import Part, fingerprint, remaining
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
    out, said = again.communicate(timeout=120)
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
    (summary, _), _ = run_ranks(run_here, 2, config)
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
    run_ranks(run_here, 2, stopped)
    for part in parts:
        again = job / "epochs-stopped" / part.relative_to(job / "epochs")
        same_steps(steps_of(again), steps_of(part))
    assert steps_of(parts[1])[-1]["lr"] < steps_of(parts[0])[-1]["lr"]  # one schedule over all epochs


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
    for change, said in [
        ("train.lr=1e-3", "train.lr was 0.01, now 0.001"),
        ("plan.strategy=bfd", "plan.strategy was 'hbp', now 'bfd'"),
        ("plan.global_batch_tokens=400", "plan.global_batch_tokens was 150, now 400"),
        (f"data.tokenizer={job / 'whole' / 'hbp' / 'model'}", "its data or tokenizer has changed"),
    ]:
        ((refusal, _), _) = run_ranks(run_here, 2, config_of(job, run, change))
        assert said in refusal
        assert "\n" not in refusal
    plan = job / "changed" / "hbp" / "plan"
    other = read_plan(never_stopped / "plan")
    assert fingerprint(other) == fingerprint(read_plan(plan))
    (plan / "plan.parquet").write_bytes(b"")
    ((refusal, _), _) = run_ranks(run_here, 2, config_of(job, run))
    assert "plan.parquet" in refusal
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

"""What was trained on by plans and logs, against counts by hand: two epochs, ranks changed in the first."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import hbp_here
from plans import tiny_cost

from hbp.errors import HbpError
from hbp.plan import Plan, read_plan, write_plan
from hbp.planning.planner import make_plan
from hbp.run.audit import audit_run
from hbp.run_log import StepRecord, read_log, rewrite_log

IDS = np.array([3, 4, 7, 8, 9, 12, 20, 21, 22, 30], np.int64)
LENGTHS = np.array([9, 30, 12, 25, 8, 14, 28, 500, 10, 11], np.int32)  # one is dropped by every plan
DONE = 2
"""Steps of the first part before its ranks changed."""


def record(step: int) -> StepRecord:
    numbers = dict.fromkeys(("loss", "grad_norm", "lr", "started_s", "seconds", "tokens_per_s", "skew"), 1.0)
    counts = dict.fromkeys(("tokens", "loss_tokens", "slowest_rank"), 1)
    return StepRecord(step=step, group="32/SP1/GC0", **numbers, **counts)  # type: ignore[arg-type]


def write(folder: Path, epoch: int, ids: np.ndarray, seed: int, steps: int | None = None) -> Plan:
    lengths = LENGTHS[np.searchsorted(IDS, ids)]
    plan = make_plan(lengths, tiny_cost(2), strategy="bfd", seed=seed, max_length=32, global_batch_tokens=32)
    write_plan(plan, folder / "plan")
    np.save(folder / "samples.npy", ids)
    (folder / "part.json").write_text(json.dumps({"epoch": epoch}))
    rewrite_log(folder, StepRecord, [record(step) for step in range(plan.n_steps if steps is None else steps)])
    return plan


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "bfd"
    first = write(folder, 0, IDS, 0, DONE)
    assert first.n_steps > DONE
    begun = np.searchsorted(first.step, DONE)
    left = np.sort(IDS[first.sample_ids[first.sample_offsets[begun] :]])
    write(folder / "part-1", 0, left, 0)
    write(folder / "part-2", 1, IDS, 1)
    said = {"identity": {}, "id": "x", "folder": "bfd", "trained": True}
    (tmp_path / "run.json").write_text(json.dumps(said))
    return tmp_path


def figures(run: Path) -> list[tuple[int, int, int, int, int]]:
    return [(e.epoch, e.trained, e.missing, e.twice, e.dropped) for e in audit_run(run)]


def test_each_sample_once_an_epoch(run: Path) -> None:
    assert figures(run) == [(0, 9, 0, 0, 1), (1, 9, 0, 0, 1)]
    said = hbp_here("audit", str(run), "--json")
    assert said.returncode == 0
    told = json.loads(said.stdout)
    assert [{k: e[k] for k in ("epoch", "trained", "missing", "twice", "dropped")} for e in told["epochs"]] == [
        {"epoch": epoch, "trained": 9, "missing": 0, "twice": 0, "dropped": 1} for epoch in (0, 1)
    ]
    assert hbp_here("audit", str(run / "bfd")).stdout.splitlines() == [
        f"epoch {n}: 9 samples trained, 1 dropped by the plan, each exactly once" for n in (1, 2)
    ]


def test_a_lost_step_and_one_done_twice_are_named(run: Path) -> None:
    plan = read_plan(run / "bfd" / "part-2" / "plan")
    steps = [np.sort(IDS[np.concatenate([plan.samples(r)[0] for r in np.flatnonzero(plan.step == s)])]) for s in (0, 1)]
    log = read_log(run / "bfd" / "part-2", StepRecord)
    rewrite_log(run / "bfd" / "part-2", StepRecord, [log[0], log[0], *log[2:]])
    second = audit_run(run)[1]
    assert (second.twice_ids, second.missing_ids) == (steps[0].tolist(), steps[1].tolist())
    assert (second.twice, second.missing) == (len(steps[0]), len(steps[1]))
    assert not second.holds
    said = hbp_here("audit", str(run), "--json")
    assert (said.returncode, json.loads(said.stdout)["epochs"][1]["twice"]) == (1, len(steps[0]))


def test_what_is_missing_of_an_unfinished_run_may_come_yet(run: Path) -> None:
    said = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(said | {"trained": False}))
    rewrite_log(run / "bfd" / "part-2", StepRecord, [record(0)])
    first, second = audit_run(run)
    assert first.holds and second.holds and second.missing > 0
    rewrite_log(run / "bfd" / "part-1", StepRecord, [])
    assert [epoch.holds for epoch in audit_run(run)] == [False, True]  # an earlier epoch is over


def test_a_step_that_was_skipped_has_trained_on_nothing(run: Path) -> None:
    plan = read_plan(run / "bfd" / "part-2" / "plan")
    lost = np.sort(IDS[np.concatenate([plan.samples(r)[0] for r in np.flatnonzero(plan.step == 1)])]).tolist()
    log = read_log(run / "bfd" / "part-2", StepRecord)
    skipped = dataclasses.replace(log[1], loss=None, grad_norm=None, skipped="loss nan")
    rewrite_log(run / "bfd" / "part-2", StepRecord, [log[0], skipped, *log[2:]])
    second = audit_run(run)[1]
    assert (second.missing_ids, second.skipped_ids, second.trained) == (lost, lost, 9 - len(lost))
    assert not second.holds
    said = hbp_here("audit", str(run))
    assert said.returncode == 1
    assert f"{len(lost)} of them LOST TO SKIPPED STEPS" in said.stdout.splitlines()[1]
    (run / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"trained": False}))
    assert not audit_run(run)[1].holds  # nor will they come, where the run is under way


def test_a_part_that_trains_a_sample_again(run: Path) -> None:
    write(run / "bfd" / "part-1", 0, IDS, 0)  # as if nothing had been done before
    assert figures(run)[0][2:4] == (0, figures(run)[0][1] - 9)
    assert figures(run)[0][3] > 0


def test_a_sample_that_is_seen_more_often_by_its_weight(tmp_path: Path) -> None:
    folder, twice = tmp_path / "bfd", np.sort(np.concatenate([IDS, IDS[:3]]))
    write(folder, 0, twice, 0)
    assert figures(tmp_path) == [(0, 12, 0, 0, 1)]


@pytest.mark.parametrize("name", ["samples.npy", "part.json", "plan/plan.parquet"])
def test_a_part_without_its_files_is_refused(run: Path, name: str) -> None:
    (run / "bfd" / "part-1" / name).write_bytes(b"{")
    with pytest.raises(HbpError, match=name.rpartition("/")[2]) as error:
        audit_run(run)
    assert "\n" not in str(error.value)


def test_no_run(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "holds no run"), (tmp_path / "none", "no folder")):
        with pytest.raises(HbpError, match=said):
            audit_run(folder)


def test_an_epoch_of_a_finished_run_that_is_gone_shows(run: Path) -> None:
    said = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(said | {"identity": {"train.epochs": 2}}))
    shutil.rmtree(run / "bfd" / "part-2")
    assert figures(run) == [(0, 9, 0, 0, 1), (1, 0, 10, 0, 0)]
    assert hbp_here("audit", str(run)).returncode == 1
    (run / "run.json").write_text(json.dumps(said | {"identity": {"train.epochs": 2}, "trained": False}))
    assert figures(run) == [(0, 9, 0, 0, 1)]  # it may come yet


def test_steps_that_a_checkpoint_alone_knows_of_count_and_are_told(run: Path) -> None:
    part = run / "bfd" / "part-2"
    first, *more = read_log(part, StepRecord)
    rewrite_log(part, StepRecord, [dataclasses.replace(first, lost=True), *more])
    plan = read_plan(part / "plan")
    count = sum(len(plan.samples(row)[0]) for row in np.flatnonzero(plan.step == 0))
    assert [epoch.unlogged for epoch in audit_run(run)] == [0, count]
    lines = hbp_here("audit", str(run)).stdout.splitlines()
    assert lines[1].startswith(f"epoch 2: 9 samples trained ({count} by a checkpoint's word, since lines")
    rewrite_log(part, StepRecord, [dataclasses.replace(first, lost=True, skipped="the loss is nan"), *more])
    assert [(epoch.unlogged, epoch.skipped) for epoch in audit_run(run)] == [(0, 0), (0, count)]

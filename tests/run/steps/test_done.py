"""Lines of a log that are lost, against the checkpoint that is ahead of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from plans import tiny_cost
from records import RECORD

from hbp.plan import Plan, write_plan
from hbp.planning.planner import make_plan
from hbp.run.steps.done import done_steps
from hbp.run_log import StepRecord, read_log, rewrite_log
from hbp.train.checkpoint import Position

LENGTHS = np.array([9, 30, 12, 25, 8, 14, 28, 30, 10, 11], np.int32)
FIRST, SECOND = 2, 1
"""Steps of the first part before what was left of it was planned again, and of the last part up to the checkpoint."""


def write(folder: Path, epoch: int, lengths: np.ndarray, steps: int) -> Plan:
    plan = make_plan(lengths, tiny_cost(2), strategy="bfd", max_length=32, global_batch_tokens=32)
    write_plan(plan, folder / "plan")
    np.save(folder / "samples.npy", np.arange(len(lengths)))
    (folder / "part.json").write_text(json.dumps({"epoch": epoch}))
    rewrite_log(folder, StepRecord, [dataclasses.replace(RECORD, step=step) for step in range(steps)])
    return plan


@pytest.fixture
def plans(tmp_path: Path) -> list[Plan]:
    """An epoch that was planned again after some steps, and the next one, as far as the checkpoint."""
    first = write(tmp_path, 0, LENGTHS, FIRST)
    assert first.n_steps > FIRST + 1
    left = first.sample_ids[first.sample_offsets[np.searchsorted(first.step, FIRST)] :]
    again = write(tmp_path / "part-1", 0, LENGTHS[left], 0)
    rewrite_log(tmp_path / "part-1", StepRecord, [dataclasses.replace(RECORD, step=s) for s in range(again.n_steps)])
    return [first, again, write(tmp_path / "part-2", 1, LENGTHS, SECOND + 1)]


def at(plans: list[Plan]) -> Position:
    return Position(2, SECOND, FIRST + plans[1].n_steps + SECOND, 100, 200, "", 2)


def test_a_whole_log_is_only_cut_back(tmp_path: Path, plans: list[Plan]) -> None:
    found = done_steps(tmp_path, at(plans))
    assert [[record.step for record in own] for own in found] == [
        [*range(FIRST)],
        [*range(plans[1].n_steps)],
        [*range(SECOND)],
    ]
    assert not any(record.lost for own in found for record in own)
    assert not list(tmp_path.rglob("*.damaged"))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("harm", ["removed", "cut", "zeros"])
def test_steps_whose_lines_are_lost_are_known_by_the_plan(
    tmp_path: Path, plans: list[Plan], part: int, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (tmp_path if part == 0 else tmp_path / f"part-{part}") / "steps.jsonl"
    counts = [FIRST, plans[1].n_steps, SECOND]
    lines = log.read_bytes().splitlines(keepends=True)
    if harm == "removed":
        log.unlink()
    else:
        log.write_bytes(lines[0][:30] if harm == "cut" else b"\0" * len(lines[0]) + b"\n" + b"".join(lines[1:]))
    found = done_steps(tmp_path, at(plans))
    assert [[record.step for record in own] for own in found] == [[*range(count)] for count in counts]
    kept = 0 if harm != "zeros" else counts[part] - 1
    assert sum(not record.lost for record in found[part]) == kept
    tokens = np.bincount(plans[part].step, weights=plans[part].tokens())
    assert all(record.tokens == tokens[record.step] and record.loss is None for record in found[part] if record.lost)
    assert read_log(log.parent, StepRecord) == found[part]
    assert (log.parent / "steps.jsonl.damaged").is_file() == (harm != "removed")
    assert f"{counts[part] - kept} of the {counts[part]} steps" in capsys.readouterr().err


def test_a_lost_step_that_was_skipped_is_a_skipped_one(tmp_path: Path, plans: list[Plan]) -> None:
    (tmp_path / "steps.jsonl").unlink()
    (tmp_path / "odd-steps").mkdir()
    evidence = {"problem": "the loss is nan", "part": 0, "step": 1}
    (tmp_path / "odd-steps" / "step-00000002.json").write_text(json.dumps(evidence))
    assert [record.skipped for record in done_steps(tmp_path, at(plans))[0]] == ["", "the loss is nan"]

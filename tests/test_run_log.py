"""The log of a run survives its file, its writer's death and other versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from records import RECORD

from hbp.run_log import EvalRecord, StepRecord, append_record, by_group, read_log, rewrite_log


def test_records_survive_their_file(tmp_path: Path) -> None:
    assert read_log(tmp_path, StepRecord) == []
    later = dataclasses.replace(RECORD, step=4, loss=1 / 3)
    for record in (RECORD, later):
        append_record(tmp_path, record)
    whole = (tmp_path / "steps.jsonl").read_text()
    assert [json.loads(line)["loss"] for line in whole.splitlines()] == [2.5, 1 / 3]
    (tmp_path / "steps.jsonl").write_text(whole + whole[:40])  # cut off with its run
    assert read_log(tmp_path, StepRecord) == [RECORD, later]
    rewrite_log(tmp_path, StepRecord, [later])
    assert read_log(tmp_path, StepRecord) == [later]
    rewrite_log(tmp_path, StepRecord, [])
    assert list(tmp_path.iterdir()) == []


def test_another_version_may_know_other_fields(tmp_path: Path) -> None:
    fields = dataclasses.asdict(RECORD)
    later = {**fields, "of_a_later_version": 1}
    earlier = {name: fields[name] for name in fields if name not in ("mean_wall_s", "mean_busy_s", "signal")}
    (tmp_path / "steps.jsonl").write_text(f"{json.dumps(later)}\n{json.dumps(earlier)}\n")
    assert read_log(tmp_path, StepRecord) == [RECORD, dataclasses.replace(RECORD, mean_wall_s=0.0, mean_busy_s=0.0)]


NO_RECORDS = (b"[]", b"\0" * 40, b"\xff\xfe{}", b'{"step": -1}', b'{"step": "1"}', b"{}", b'{"step": 3, "lo')


@pytest.mark.parametrize("line", NO_RECORDS)
def test_a_line_that_is_no_record_is_passed_over(tmp_path: Path, line: bytes) -> None:
    whole = json.dumps(dataclasses.asdict(RECORD)).encode()
    (tmp_path / "steps.jsonl").write_bytes(b"\n".join([whole, line, whole]))
    assert read_log(tmp_path, StepRecord) == [RECORD, RECORD]


def test_evaluations_have_a_log_of_their_own(tmp_path: Path) -> None:
    by_source = {"chats": 2.25, "silent": None}
    append_record(tmp_path, EvalRecord(4, 1000, 2.25, by_source))
    append_record(tmp_path, RECORD)
    line = {"run_step": 4, "tokens": 1000, "eval_loss": 2.25, "eval_loss_by_source": by_source}
    assert json.loads((tmp_path / "eval.jsonl").read_text()) == line
    assert read_log(tmp_path, EvalRecord) == [EvalRecord(4, 1000, 2.25, by_source)]


def test_groups_are_summed_apart() -> None:
    faster = dataclasses.replace(RECORD, seconds=0.25, mfu=0.8, memory_bytes=2**31)
    other = dataclasses.replace(RECORD, group="512/SP1/GC0", mfu=None)
    lost = dataclasses.replace(RECORD, seconds=0.0, lost=True)
    table = by_group([RECORD, faster, other, lost])
    assert list(table) == [RECORD.group, "512/SP1/GC0"]
    both = table[RECORD.group]
    assert (both["steps"], both["tokens"], both["seconds"], both["memory_bytes"]) == (2, 2000, 0.75, 2**31)
    assert both["tokens_per_s"] == 2000 / 0.75
    assert both["mfu"] == (0.5 * 0.4 + 0.25 * 0.8) / 0.75
    assert table["512/SP1/GC0"]["mfu"] is None

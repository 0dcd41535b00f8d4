"""Kept results that are measured anew in part: which rows are replaced, and that each says of when it is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
PACKING, TABLES = importlib.import_module("packing"), importlib.import_module("doc_tables")
GAIN, PAGE = importlib.import_module("gain"), importlib.import_module("gain_page")
Row = dict[str, Any]


def plan_row(name: str, **other: Any) -> Row:
    return {"section": "plans", "strategy": "hbp", "set": name, "samples": 10, "samples_per_s": 1.0, **other}


OLD = {"date": "2026-01-01", "rows": [plan_row("a"), plan_row("b"), {**plan_row("c"), "section": "order"}]}


def test_some_rows_of_a_section_are_replaced_where_they_stand() -> None:
    new = plan_row("b", date="2026-01-02", efficiency=0.5)
    rows = PACKING.merge(OLD, [new, plan_row("d", date="2026-01-02")], ["plans"], whole=False, keep_times=False)
    assert [row["set"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["date"][-1] for row in rows] == ["1", "2", "1", "2"]
    assert rows[1] == new


def test_a_whole_section_leaves_the_others() -> None:
    rows = PACKING.merge(OLD, [plan_row("d", date="2026-01-02")], ["plans"], whole=True, keep_times=False)
    assert [(row["set"], row["date"][-1]) for row in rows] == [("c", "1"), ("d", "2")]


def test_times_are_kept_with_their_date() -> None:
    for _ in range(2):  # a second run does not make them younger
        new = plan_row("a", date="2026-01-03", samples_per_s=7.0)
        [row] = PACKING.merge(OLD, [new], ["plans", "order"], whole=True, keep_times=True)
        assert (row["samples_per_s"], row["timed"], row["date"]) == (1.0, "2026-01-01", "2026-01-03")
        [row] = PACKING.merge({"date": "x", "rows": [row]}, [{**new}], ["plans"], whole=True, keep_times=True)
        assert row["timed"] == "2026-01-01"


def test_tables_mark_what_is_of_an_earlier_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [plan_row("a"), plan_row("b", date="2026-01-02", timed="2026-01-01")]
    kept = {"date": "2026-01-01", "device": "d", "command": "c", "section_s": {"plans": 5.0}, "rows": rows}
    (tmp_path / "packing.json").write_text(json.dumps(kept))
    monkeypatch.setattr(TABLES, "RESULTS", tmp_path)
    found, source = TABLES.packing("plans")
    assert [row["mark"] for row in found] == [" †", ""]
    assert "2026-01-02, rows with † 2026-01-01, samples/s 2026-01-01;" in source
    [alone], source = TABLES.packing("plans", lambda row: row["set"] == "a")
    assert alone["mark"] == ""
    assert "d, 2026-01-01, 5 s;" in source


def test_the_page_names_the_date_of_each_section() -> None:
    rows = [
        {"section": "map", "strategy": "hbp", "date": "2026-01-02"},
        {"section": "map", "strategy": "dcp"},
        {"section": "few", "strategy": "dcp"},
    ]
    text = PAGE.made(
        {"date": "2026-01-01", "command": "c", "model": "m", "rows": rows},
        {"command": "p", "date": "2026-01-03", "rows": [{"date": "2026-01-01"}, {"date": "2026-01-03"}]},
    )
    assert "map 2026-01-02 (of `dcp` rows of 2026-01-01), few 2026-01-01." in text
    assert text.endswith("`p`, 2026-01-03, rows with † 2026-01-01.")


def test_claims_are_of_their_own_models_and_settings() -> None:
    places = {(case.model, case.network): case for case, _ in GAIN.cases(quick=False) if case.section == "claims"}
    case = places["qwen3-30b-a3b", GAIN.IN_PLACE]
    lengths = case.lengths()
    assert 1024 <= lengths.min() < 1100
    assert 15_000 < lengths.max() <= 16 * 1024
    assert np.median(lengths) == pytest.approx(4096, rel=0.05), "log-uniform"
    few = GAIN.Case("claims", case.data, 500, 64, case.network, case.context, model=case.model)
    static, fastest = GAIN.measure(few, "isf-sp4"), GAIN.measure(few, "isf")
    assert static["groups"].startswith("16K SP4 ")
    assert static["tokens_per_s"] <= fastest["tokens_per_s"]
    assert GAIN.key(static) != GAIN.key({**static, "model": "llama-3.1-8b"})
    assert "error" in GAIN.measure(GAIN.Case("claims", "mix-1m", 500, 8, case.network, 256 * 1024), "isf-sp1")


def test_an_older_row_keeps_its_speedup_over_the_reference_of_its_date() -> None:
    place = {"section": "map", "data": "d", "gpus": 8, "network": "n", "context": 1, "share": None}
    rows = [
        {**place, "strategy": "bfd", "tokens_per_s": 2.0, "date": "2026-01-02"},
        {**place, "strategy": "hbp", "tokens_per_s": 3.0, "date": "2026-01-02", "speedup": 9.0},
        {**place, "strategy": "dcp", "tokens_per_s": 3.0, "date": "2026-01-01", "speedup": 1.4},
    ]
    GAIN.add_speedups(rows)
    assert [row["speedup"] for row in rows] == [1.0, 1.5, 1.4]

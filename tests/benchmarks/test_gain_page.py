"""The page "How much will I gain?" says what the kept results say: after a new measurement run `gain.py --draw`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
GAIN, GAIN_PAGE = importlib.import_module("gain"), importlib.import_module("gain_page")


def test_numbers_of_the_page_are_those_of_the_results(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    page = ROOT / "docs" / "how-much-will-i-gain.md"
    shutil.copy(page, tmp_path / "docs")
    GAIN_PAGE.draw(json.loads((tmp_path / "benchmarks" / "results" / "gain.json").read_text()), tmp_path / "docs")
    assert (tmp_path / "docs" / page.name).read_text() == page.read_text(), "run benchmarks/gain.py --draw"
    for picture in ("map", "share", "gpus", "contexts"):
        text = (tmp_path / "docs" / f"gain-{picture}.svg").read_text()
        assert text.startswith("<svg") and "var(--" not in text
        assert f"(gain-{picture}.svg)" in page.read_text()


def test_speedups_are_over_the_reference_in_the_same_place() -> None:
    place = {"section": "gpus", "data": "a", "network": "n", "context": 1, "share": None}
    rows = [
        place | {"gpus": 8, "strategy": GAIN.REFERENCE, "tokens_per_s": 10.0},
        place | {"gpus": 8, "strategy": "hbp", "tokens_per_s": 15.0},
        place | {"gpus": 16, "strategy": "hbp", "tokens_per_s": 40.0},
        place | {"gpus": 16, "strategy": GAIN.REFERENCE, "error": "does not fit"},
    ]
    GAIN.add_speedups(rows)
    assert rows[1]["speedup"] == pytest.approx(1.5)
    assert "speedup" not in rows[2], "nothing to compare with"

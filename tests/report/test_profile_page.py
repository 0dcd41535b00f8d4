"""The page of a profile holds its pictures, its errors and where each degree's seconds come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from profiles import make_profile

from hbp.errors import HbpError
from hbp.report.profile_page import write_cost_page


def test_page_of_a_profile(tmp_path: Path) -> None:
    fit, points, data = make_profile(world_size=2)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    page = write_cost_page(file)
    assert page == tmp_path / "profile.html"
    text = page.read_text()
    assert text.count("<svg") == 4
    assert f"{100 * fit.held_out_error:.1f} %" in text
    assert f"{len(points)}\n micro-batches" in text
    assert text.count("predicted from measured collectives") == 5
    assert text.count("predicted; degree measured") == 2
    assert "<th>predicted seconds</th>" in text
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(HbpError, match="not a profile"):
        write_cost_page(tmp_path / "none.json")

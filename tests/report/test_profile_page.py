"""The page of a profile holds its pictures, its errors and where each degree's seconds come from; every point and curve
that the data asks for is drawn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from profiles import MODEL, make_profile

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.report.figures import PALETTE, standalone
from hbp.report.profile_page import (
    memory_over_length,
    memory_scatter,
    seconds_scatter,
    time_per_token,
    write_cost_page,
)

H100 = CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS["h100-nvlink"], 64)


def paths(svg: str, colour: str) -> list[str]:
    """Style of every path that is drawn in a colour."""
    root = ET.fromstring(svg)
    styles = [e.get("style", "") for e in root.iter("{http://www.w3.org/2000/svg}path")]
    return [s for s in styles if f"stroke: {colour}" in s]


def test_every_measured_point_is_in_the_scatters() -> None:
    fit, points, _ = make_profile(world_size=2)
    for svg in (
        seconds_scatter(points, fit.held_out_s),
        memory_scatter(points, fit.predicted_bytes),
    ):
        root = ET.fromstring(svg)
        marks = list(root.iter("{http://www.w3.org/2000/svg}use"))
        assert "SP 1" in svg and "SP 2" in svg and "SP 4" not in svg
        in_colours = [m for m in marks if any(c in m.get("style", "") for c in PALETTE[:2])]
        assert len(in_colours) == len(points) + 2  # and the legend's


def test_time_is_drawn_only_where_memory_allows() -> None:
    svg = time_per_token(H100, 131072, degrees=[1, 2, 64])
    assert "SP 64" in svg and "128K" in svg
    assert len(paths(svg, PALETTE[0])) == 3  # no layer and all of them recomputed, and the legend
    tight = CostModel(load_model_spec("llama-3.1-70b"), CLUSTERS["h100-nvlink"], 8)
    assert len(paths(time_per_token(tight, 131072, degrees=[1]), PALETTE[0])) == 1  # the legend alone


def test_memory_is_drawn_with_its_budget() -> None:
    svg = memory_over_length(H100, 131072, degrees=[1, 8])
    assert "budget" in svg
    assert len(paths(svg, PALETTE[0])) == len(paths(svg, PALETTE[1])) == 3


def test_pictures_stand_alone_and_are_the_same_every_time() -> None:
    cost = CostModel(MODEL, CLUSTERS["cpu-local"], 2)
    first, second = (memory_over_length(cost, 4096) for _ in range(2))
    assert first == second
    assert "var(--" in first
    assert "var(--" not in standalone(first)


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

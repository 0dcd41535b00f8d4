"""A profile file is a cluster, and reads back as what it was made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from profiles import COLLECTIVES, MODEL, make_profile

from hbp.cost.cluster import load_cluster
from hbp.cost.profile_file import read_profile
from hbp.errors import HbpError


def test_round_trip_and_use_as_a_cluster(tmp_path: Path) -> None:
    fit, points, data = make_profile(world_size=2)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    assert load_cluster(str(file)) == fit.cluster
    profile = read_profile(file)
    assert (profile.points, profile.collectives) == (points, COLLECTIVES)
    assert (profile.model, profile.world_size, profile.held_out_s) == (MODEL, 2, fit.held_out_s)
    assert data["median_error"] == fit.held_out_error <= data["p90_error"]
    for row, point in zip(data["points"], points, strict=True):
        assert row["seconds"] == point.seconds
        assert row["predicted_s"] == pytest.approx(point.seconds, rel=0.2)


def test_degrees_say_where_their_seconds_come_from() -> None:
    _, _, data = make_profile(world_size=2)
    sources = {d["sp_degree"]: d["source"] for d in data["degrees"]}
    assert sources[1] == sources[2] == "predicted; degree measured"
    assert sources[4] == sources[64] == "predicted from measured collectives"
    seconds = [d["seconds"] for d in data["degrees"][:3]]
    assert seconds == sorted(seconds, reverse=True)
    _, _, alone = make_profile(world_size=1, devices_per_node=8)
    sources = {d["sp_degree"]: d["source"] for d in alone["degrees"]}
    assert sources[1] == "predicted; degree measured"
    assert sources[8] == "predicted from the links of the cluster that was profiled over"
    assert sources[16] == sources[8] + " and the cluster's links between nodes"
    _, _, spans = make_profile(world_size=2, devices_per_node=1)  # so the network is measured
    assert {d["source"] for d in spans["degrees"][2:]} == {"predicted from measured collectives"}


def test_what_is_not_a_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    _, _, data = make_profile(world_size=1)
    file = tmp_path / "profile.json"
    with pytest.raises(HbpError, match="cannot read the profile"):
        read_profile(file)
    for content in ("{", "[]", "{}", json.dumps({**data, "points": [{"lengths": 3}]}), json.dumps(data["cluster"])):
        file.write_text(content)
        with pytest.raises(HbpError, match="is not a profile with its points") as caught:
            read_profile(file)
        assert "\n" not in str(caught.value)


def test_a_stack_is_named() -> None:
    _, points, data = make_profile(world_size=1, height=2)
    assert {p["n_layers"] for p in data["points"]} == {2}
    assert dataclasses.asdict(points[0])["n_layers"] == 2

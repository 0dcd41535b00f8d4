"""Clusters by name and from files; a file that does not describe one is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hbp.cost.cluster import CLUSTERS, GB, ClusterSpec, cluster_from_json, load_cluster
from hbp.errors import HbpError

H100 = CLUSTERS["h100-nvlink"]


def refusal(name: Path | str) -> str:
    with pytest.raises(HbpError) as caught:
        load_cluster(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", CLUSTERS)
def test_built_in_clusters(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert 0 <= cluster.fsdp_overlap <= 1
    assert cluster.attention_flops_per_s <= cluster.linear_flops_per_s
    assert cluster.origin.startswith("analytic")
    file = tmp_path / "c.json"
    file.write_text(json.dumps(cluster.to_json()))
    assert load_cluster(str(file)) == cluster
    file.write_text(json.dumps({"cluster": cluster.to_json(), "points": [], "anything": 1}))  # a profile
    assert load_cluster(str(file)) == cluster


def test_keys_over_a_base(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"base": "h100-nvlink", "name": "mine", "linear_flops_per_s": 5e14}))
    assert load_cluster(str(file)) == dataclasses.replace(H100, name="mine", linear_flops_per_s=5e14)
    again = {"cluster": {"base": str(file), "fsdp_overlap": 0}}
    assert cluster_from_json(again["cluster"]).linear_flops_per_s == 5e14


def test_keys_with_a_default_may_be_absent() -> None:
    data = H100.to_json()
    for field in dataclasses.fields(ClusterSpec):
        if field.default is not dataclasses.MISSING:
            data.pop(field.name, None)  # offloading is named only where there is any
    assert cluster_from_json(data).activation_scale == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("", "Expecting"),
        ("[]", ""),
        ("3", ""),
        ('{"cluster": 3}', ""),
        ("{}", "missing"),
        ('{"base": "h100-nvlink", "colour": "red"}', "colour"),
        ('{"base": 3}', ""),
        ('{"base": "h100-nvlink", "memory_bytes": "80 GB"}', "memory_bytes is '80 GB', not a number from 0 up"),
        ('{"base": "h100-nvlink", "memory_bytes": -1}', "memory_bytes is -1"),
        ('{"base": "h100-nvlink", "link_bytes_per_s": 0}', "link_bytes_per_s is 0"),
        ('{"base": "h100-nvlink", "devices_per_node": true}', "devices_per_node is True"),
        ('{"base": "h100-nvlink", "name": 5}', "name is 5"),
        ('{"base": "h100-nvlink", "fixed_bytes": null}', "fixed_bytes is None"),
        ('{"base": "h100-nvlink", "linear_flops_per_s": NaN}', "linear_flops_per_s is nan"),
    ],
)
def test_damaged_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    assert f"{file} does not describe a cluster" in refusal(file)
    assert message in refusal(file)
    file.write_bytes(b"\xff\xfe")
    refusal(file)


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(ClusterSpec) if f.default is dataclasses.MISSING])
def test_lost_key_is_named(tmp_path: Path, key: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({k: v for k, v in H100.to_json().items() if k != key}))
    assert f"'{key}'" in refusal(file)


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    for name in ("h200", str(tmp_path), str(tmp_path / "none.json"), ""):
        message = refusal(name)
        assert message.startswith(f"no cluster {name!r}")
        assert all(known in message for known in CLUSTERS)


def test_unknown_base(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"base": "h200"}')
    assert "no cluster 'h200'" in refusal(tmp_path / "c.json")


def test_links() -> None:
    def cluster(link: float, node: float, **changes: Any) -> ClusterSpec:
        return dataclasses.replace(H100, link_bytes_per_s=link, node_bytes_per_s=node, **changes)

    slow = cluster(330 * GB, 8 * GB)
    assert [slow.link(n) for n in (1, 2, 8, 16, 64)] == [330 * GB] * 3 + [1 * GB] * 2
    assert [slow.ring(n) for n in (1, 2, 8, 16, 64)] == [330 * GB] * 3 + [8 * GB] * 2
    fast = cluster(10 * GB, 4000 * GB)  # the link within the node stays the bottleneck
    assert fast.link(16) == fast.ring(16) == 10 * GB


def test_latency_of_a_collective_that_leaves_the_node() -> None:
    cluster = dataclasses.replace(H100, collective_latency_s=2.0, node_latency_s=3.0)
    assert [cluster.latency(n) for n in (2, 8, 16)] == [2.0, 2.0, 5.0]

"""The parts of a prediction add up to it, and each is caused by what it is called after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.cost.cluster import CLUSTERS
from hbp.cost.parts import PARTS, pack_parts

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    degree=st.sampled_from([1, 2, 4]),
    gc_layers=st.integers(0, 4),
    cluster=st.sampled_from(sorted(CLUSTERS)),
)
def test_parts_add_up_to_the_prediction(lengths: list[int], degree: int, gc_layers: int, cluster: str) -> None:
    cost = tiny_cost(4, cluster=cluster)
    work = cost.work(np.array(lengths), np.array([0, len(lengths)]))
    parts = pack_parts(cost, work, degree, gc_layers)
    assert tuple(parts) == PARTS
    assert all((seconds >= 0).all() for seconds in parts.values())
    np.testing.assert_allclose(sum(parts.values()), cost.seconds(degree, gc_layers).of(work), rtol=1e-9)
    assert (parts["alltoall"] > 0).all() == (degree > 1)
    assert (parts["recompute"] > 0).all() == (gc_layers > 0)


@pytest.mark.parametrize(
    ("part", "rate"),
    [("linear", "linear_flops_per_s"), ("attention", "attention_flops_per_s"), ("overhead", "layer_overhead_s")],
)
def test_a_part_scales_with_its_constant_alone(part: str, rate: str) -> None:
    cost = tiny_cost(2)
    cluster = dataclasses.replace(cost.cluster, document_overhead_s=0.0)
    cost = dataclasses.replace(cost, cluster=cluster)
    slower = 0.5 if rate.endswith("flops_per_s") else 2.0
    other = dataclasses.replace(cost, cluster=dataclasses.replace(cluster, **{rate: getattr(cluster, rate) * slower}))
    work = cost.work(np.array([700, 300]), np.array([0, 2]))
    before, after = pack_parts(cost, work, 2, 0), pack_parts(other, work, 2, 0)
    for name in PARTS:
        factor = 2.0 if name == part else 1.0
        np.testing.assert_allclose(after[name], before[name] * factor, rtol=1e-9, err_msg=name)

"""Plans of one SP degree, one number of recomputed layers and one number of micro-steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.errors import HbpError
from hbp.plan import validate
from hbp.planning.one_setting import one_setting_plan

MOST = 1000


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, MOST), min_size=1, max_size=200),
    st.sampled_from([(2, 1, None), (4, 2, 4), (4, None, None), (8, 4, None)]),
    st.sampled_from(["hbp-mixed", "bfd", "lb"]),
    st.sampled_from([None, 9000]),
    st.integers(0, 3),
)
def test_one_setting_and_equal_micro_steps(found, setting, strategy, batch, seed):
    world, degree, layers = setting
    lengths = np.array(found, np.int32)
    options = {"sp_degree": degree, "gc_layers": layers, "strategy": strategy, "seed": seed}
    plan = one_setting_plan(lengths, tiny_cost(world), equal_micro_steps=True, global_batch_tokens=batch, **options)
    validate(plan)
    assert sorted(plan.sample_ids.tolist()) == list(range(len(lengths)))
    assert set(plan.sp_degree.tolist()) == {degree or 1}
    assert len(set(plan.gc_layers.tolist())) == 1
    assert layers is None or plan.gc_layers[0] == layers
    counts = [int(plan.micro_step[plan.step == step].max()) + 1 for step in range(plan.n_steps)]
    assert len(set(counts[:-1])) <= 1 and counts[-1] <= counts[0]
    if len(counts) > 1:
        assert counts[0] == plan.info.settings["micro_steps"]


def test_memory_chooses_what_is_not_given():
    cost, lengths = tiny_cost(8, 300), np.array([900, 20, 30], np.int32)
    plan = one_setting_plan(lengths, cost)
    degree, layers = int(plan.sp_degree[0]), int(plan.gc_layers[0])
    assert degree > 1 and layers == cost.fewest_gc_layers(900, degree)
    assert cost.fewest_gc_layers(900, degree // 2) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sp_degree": 3}, "--sp 3: 8 GPUs form groups of 1, 2, 4, 8"),
        ({"gc_layers": 9}, "--gc 9: the model has 4 layers"),
        ({"sp_degree": 1}, r"packs of 900 tokens do not fit memory so; give --sp \d --gc \d"),
        ({"max_length": 10}, "every sample is longer than 10"),
    ],
)
def test_wrong_input_is_one_line(options, message):
    with pytest.raises(HbpError, match=message) as caught:
        one_setting_plan(np.array([900, 20, 30], np.int32), tiny_cost(8, 300), **options)
    assert "\n" not in str(caught.value)

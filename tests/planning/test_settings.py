"""Which packing lengths and degrees are tried: none is missed that would be faster, and no promise is beaten."""

from __future__ import annotations

import numpy as np
import pytest

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.planning.settings import Choice, Wanted, every_degree

SEVERAL = [name for name, strategy in STRATEGIES.items() if not strategy.finds_groups]
PACKS_LONGER = [name for name in SEVERAL if STRATEGIES[name].settings is not every_degree]
SETS = {"short-32k": "h100-ethernet", "tulu3-longcite": "a100-pcie", "mix-32k": "h100-nvlink"}


def llama(cluster: str, gpus: int = 16) -> CostModel:
    return CostModel(load_model_spec("llama-3.1-8b"), CLUSTERS[cluster], gpus)


def settings_of(strategy: str, cost: CostModel, lengths: np.ndarray, longest: int) -> list[Choice]:
    """The most promising first."""
    found = STRATEGIES[strategy].settings(Wanted(cost, lengths, longest, longer=True, batch=None))
    return sorted(found, key=lambda choice: choice.seconds)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("strategy", SEVERAL)
def test_no_plan_beats_its_setting_and_none_that_is_tried_beats_the_one_kept(strategy: str, name: str) -> None:
    lengths, cost = generate(name, 600, 0), llama(SETS[name])
    longest = -(-int(lengths.max()) // 1024) * 1024
    kept = make_plan(lengths, cost, strategy=strategy)
    choices = settings_of(strategy, cost, lengths, longest)
    assert len({choice.group.capacity for choice in choices}) > (strategy not in ("sorted", "hbp"))
    for choice in choices:
        if strategy == "hbp":
            plan = make_plan(lengths, cost, strategy=strategy, max_length=choice.group.capacity)
        else:
            plan = make_plan(lengths, cost, strategy=strategy, static=choice.group)
        assert plan.info.metrics["predicted_s"] >= choice.seconds * (1 - 1e-6)
        assert plan.info.metrics["predicted_s"] >= kept.info.metrics["predicted_s"]


@pytest.mark.parametrize("strategy", PACKS_LONGER)
def test_short_samples_are_packed_longer_where_the_network_is_slow(strategy: str) -> None:
    lengths, cost = generate("short-32k", 3000, 0), llama("h100-ethernet")
    longest = -(-int(lengths.max()) // 1024) * 1024
    plan, short = (make_plan(lengths, cost, strategy=strategy, max_length=most) for most in (None, longest))
    assert plan.info.groups[-1].capacity > longest == short.info.groups[-1].capacity
    assert 1.5 * plan.info.metrics["predicted_s"] < short.info.metrics["predicted_s"]


@pytest.mark.parametrize("strategy", PACKS_LONGER)
@pytest.mark.parametrize("batch", [2**18, 2**19])
def test_no_micro_step_of_longer_packs_exceeds_the_global_batch_asked_for(strategy: str, batch: int) -> None:
    plan = make_plan(
        generate("short-32k", 3000, 0), llama("h100-ethernet"), strategy=strategy, global_batch_tokens=batch
    )
    assert plan.info.groups[-1].capacity > 8192
    assert max(16 // group.sp_degree * group.capacity for group in plan.info.groups) <= batch


def test_packs_are_no_longer_than_the_samples_fill() -> None:
    """Memory for anything, so only the samples are a limit."""
    lengths = np.full(64, 500, np.int32)
    choices = settings_of("bfd", llama("h100-nvlink", 4), lengths, 512)
    assert max(4 // c.group.sp_degree * c.group.capacity for c in choices) < 2 * 64 * 500
    assert {c.group.capacity for c in choices} == {512 << i for i in range(7)}

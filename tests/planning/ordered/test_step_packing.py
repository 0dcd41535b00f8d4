"""One step's samples in micro-steps of mixed degrees: they fit, they tile, and they finish together."""

from __future__ import annotations

import numpy as np
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.cost.predict import CostModel
from hbp.data.length_sets import generate
from hbp.planning.lower_bound import rank_seconds
from hbp.planning.ordered.step_packing import StepCosts


def seconds(cost: CostModel, lengths: np.ndarray, packed: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """Predicted, of all micro-steps; every pack with the fewest recomputed layers that its tokens need."""
    pack_of, micro, degree = packed
    slowest = np.zeros(int(micro.max()) + 1)
    for p in range(len(micro)):
        own = lengths[pack_of == p]
        gc_layers = cost.fewest_gc_layers(int(own.sum()), int(degree[p]))
        assert gc_layers is not None
        work = cost.work(own, np.array([0, len(own)]))
        slowest[micro[p]] = max(slowest[micro[p]], float(cost.seconds(int(degree[p]), gc_layers).of(work)[0]))
    return float(slowest.sum())


@given(
    st.lists(st.one_of(st.integers(1, 20), st.integers(1, 1500)), min_size=1, max_size=60),
    st.sampled_from([1, 2, 3, 4, 12, 64]),
    st.one_of(st.none(), st.integers(1500, 4000)),
)
@cases(60)
def test_packs_fit_memory_and_micro_steps_the_world(found: list[int], world: int, limit: int | None) -> None:
    cost = tiny_cost(world, 2000)
    lengths = -np.sort(-np.array(found))
    pack_of, micro, degree = StepCosts(cost, int(lengths.max()), limit).pack(lengths)
    assert (np.bincount(pack_of, minlength=len(micro)) > 0).all()
    assert np.bincount(micro, degree).max() <= world
    assert (np.bincount(micro) > 0).all()
    assert (world % degree == 0).all()
    tokens = np.bincount(pack_of, lengths).astype(np.int64)
    assert tokens.max() <= (limit or np.inf)
    assert all(cost.fewest_gc_layers(int(t), int(d)) is not None for t, d in zip(tokens, degree, strict=True))


def test_a_step_of_the_mix_is_near_the_lower_bound() -> None:
    """8M tokens, a tenth of the samples up to 128K, on 32 GPUs: mixed degrees that finish together."""
    cost, lengths = CostModel.of("llama-3.1-8b", "h100-nvlink", 32), -np.sort(-generate("mix-128k", 2000, 0))
    lengths = lengths.astype(np.int64)
    packed = StepCosts(cost, int(lengths[0]), None).pack(lengths)
    least = rank_seconds(cost, np.bincount(lengths)) / cost.world_size
    assert seconds(cost, lengths, packed) < 1.12 * least
    assert len(np.unique(packed[2])) > 1


def test_a_long_sample_shares_its_micro_step() -> None:
    """A sample that takes one of two nodes about as long as the short ones take the other."""
    cost = CostModel.of("llama-3.1-8b", "h100-nvlink", 16)
    pack_of, micro, degree = StepCosts(cost, 40_000, None).pack(np.array([40_000] + [1000] * 100))
    assert micro.max() == 0
    assert degree[pack_of[0]] == 8
    assert np.sort(degree).tolist() == [1] * 8 + [8]


def test_a_micro_step_holds_what_hides_behind_its_traffic() -> None:
    """70B over 100 Gb/s a node: 49 s of FSDP's traffic a micro-step, in which a step of 2,000 tokens a GPU is done."""
    cost = CostModel.of("llama-3.1-70b", "h100-ethernet", 64)
    lengths = np.array([32_768, 16_000, 9_000] + [700] * 100)
    packed = StepCosts(cost, 32_768, None).pack(lengths)
    assert packed[1].max() == 0
    assert seconds(cost, lengths, packed) < 50

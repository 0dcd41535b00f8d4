from __future__ import annotations

import numpy as np
import pytest
import torch
from plans import Row, plan_of
from workers import CPU, LLAMA

from hbp.cost.model_spec import spec_from_config
from hbp.report.explorer import MOST_CELLS, MOST_RANKS
from hbp.train.records import (
    TIMELINE_CELLS,
    TIMELINE_RANKS,
    _timeline,
    groups_of_steps,
    peak_flops_per_s,
    step_flops,
    timeline_micro_steps,
)


def test_flops_of_steps_are_those_of_the_operators():
    """PyTorch counts the products of a plain forward and backward, and the same comes out of the dimensions."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{k: v for k, v in LLAMA.items() if k != "model_type"}, model_type="llama")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 48
    ids = torch.randint(0, 64, (1, length))
    with FlopCounterMode(display=False) as counted:
        model(ids).logits.sum().backward()
    spec = spec_from_config(LLAMA)
    plan = plan_of([(0, 0, 0, 1, 0, [0]), (1, 0, 0, 1, 0, [1, 2])], np.array([length, 20, 28], np.int32), 1)
    steps = step_flops(plan, spec)
    # Eager attention computes all pairs, the causal mask keeps about half of them.
    unmasked = 3 * spec.attention_flops_per_pair() * (length**2 - length * (length + 1) / 2)
    rotary = counted.get_total_flops() - steps[0] - unmasked
    assert abs(rotary) < 0.02 * steps[0]
    assert steps[1] < steps[0]  # as many tokens in two documents see fewer pairs
    pairs = [n * (n + 1) / 2 for n in (20, 28)]
    want = 48 * (spec.linear_flops_per_token() + spec.head_flops_per_token())
    assert steps[1] == pytest.approx(3 * (want + sum(pairs) * spec.attention_flops_per_pair()))


def test_peak_of_a_cpu_is_measured():
    peak = peak_flops_per_s(CPU)
    assert peak is not None
    assert 1e8 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("X", None)],
)
def test_peak_of_a_gpu_is_its_data_sheets(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_s(torch.device("cuda")) == peak


def test_groups_of_steps():
    lengths = np.array([4, 6, 5], np.int32)
    rows: list[Row] = [(0, 0, 0, 1, 0, [2]), (0, 0, 1, 1, 0, [0]), (1, 0, 0, 2, 3, [1])]
    plan = plan_of(rows, lengths, 2)
    assert groups_of_steps(plan) == ["4/SP1/GC0 + 5/SP1/GC0", "6/SP2/GC3"]


def test_micro_steps_are_logged_as_far_as_the_report_draws():
    """However many ranks and steps there are: a line without them is as long as any other."""
    assert (TIMELINE_RANKS, TIMELINE_CELLS) == (MOST_RANKS, MOST_CELLS)
    world, steps, micro = 64, 90, 3
    rows: list[Row] = [(s, m, 0, 64, 0, [s * micro + m]) for s in range(steps) for m in range(micro)]
    plan = plan_of(rows, np.ones(steps * micro, np.int32), world)
    drawn = timeline_micro_steps(plan)
    assert drawn == [3] * 83 + [1] + [0] * 6
    seconds = np.ones((world, micro))
    assert np.shape(_timeline(seconds, drawn[0])) == (TIMELINE_RANKS, micro)
    assert sum(np.size(_timeline(seconds, n)) for n in drawn) == TIMELINE_CELLS
    assert _timeline(seconds, drawn[-1]) == []

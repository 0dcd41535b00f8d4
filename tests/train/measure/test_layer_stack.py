"""Stacks of a model's first layers, from its configuration alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from workers import CPU, LLAMA, write_config

from hbp.cost.model_spec import spec_from_config
from hbp.errors import HbpError
from hbp.train.measure.layer_stack import cut_config, load_stack, stack_heights

DEEP = {**LLAMA, "num_hidden_layers": 6}


def test_stack_is_the_first_layers_of_the_configuration(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        **LLAMA,
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
        "head_dim": 8,
    }
    model = load_stack(write_config(tmp_path / "qwen", config), 3, CPU, vocab_size=100)
    assert model.lm.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert model.lm.config.vocab_size == 100
    spec = dataclasses.replace(spec_from_config(config).with_layers(3), vocab=100)
    assert sum(p.numel() for p in model.parameters()) == spec.parameters()
    assert next(model.parameters()).dtype == torch.float32


def test_stacks_that_cannot_be(tmp_path: Path) -> None:
    for count in (0, 7):
        with pytest.raises(HbpError, match=f"6 layers, so a stack of {count}"):
            cut_config(DEEP, count)
    with pytest.raises(HbpError, match="cannot load a model"):
        load_stack(str(tmp_path / "none"), 1, CPU)


def test_small_models_are_measured_whole() -> None:
    assert stack_heights(10**6, 32) == ()
    assert stack_heights(8 * 10**9, 32) == (2, 4)
    assert stack_heights(8 * 10**9, 4) == ()

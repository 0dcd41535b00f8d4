"""Predicted peaks against the allocator's, of layers with the real dimensions of large dense models."""

from __future__ import annotations

import pytest
from memory_sim import simulate


@pytest.mark.parametrize(
    ("name", "tokens", "degree", "gc_layers"),
    [
        ("llama-3.1-8b", 8192, 1, 0),  # at the loss
        ("llama-3.1-8b", 32_768, 1, 4),  # in backward, every layer recomputed
        ("qwen2.5-32b", 32_768, 1, 0),  # in backward, none
        ("llama-3.1-8b", 16_384, 8, 2),
    ],
)
def test_dense_peaks_are_predicted(name, tokens, degree, gc_layers):
    assert simulate(name, tokens, degree, gc_layers)["predicted_over_simulated"] == pytest.approx(1, abs=0.005)

"""A few layers of a model, with its real dimensions: what a profile measures when the whole model is too large.

Embedding, head and loss are there in full; only decoder layers are left out. Two stacks of different height tell the
layers' cost from that of the ends, and a fit to both predicts any height (:mod:`hbp.cost.fit`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hbp.errors import HbpError
from hbp.train.model import CausalLMWithLoss, load_model, read_config

WHOLE_MODEL_PARAMETERS = 300e6
"""Up to so many a model is measured whole."""
STACK_LAYERS = 2


def stack_heights(parameters: int, n_layers: int) -> tuple[int, ...]:
    """Layers of the stacks to measure, shortest first; none where the whole model is measured."""
    if parameters <= WHOLE_MODEL_PARAMETERS or n_layers <= 2 * STACK_LAYERS:
        return ()
    return STACK_LAYERS, 2 * STACK_LAYERS


def load_stack(
    name_or_folder: str,
    n_layers: int,
    device: torch.device,
    *,
    vocab_size: int | None = None,
    seed: int = 0,
    attention: str = "auto",
) -> CausalLMWithLoss:
    """The first `n_layers` of a model, freshly initialised on a device; its weights are not read.

    Args:
        name_or_folder: as for :func:`~hbp.train.model.load_model`.
        n_layers: at most the model's.
        device: where the parameters are made.
        vocab_size: replaces the configuration's.
        seed: of the initialisation.
        attention: kernel.

    Raises:
        HbpError: no configuration that transformers can load, or one with fewer layers.
    """
    config = read_config(name_or_folder).to_dict()
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cut_config(config, n_layers)))
        with torch.device(device):
            return load_model(folder, vocab_size=vocab_size, seed=seed, attention=attention).to(device)


def cut_config(config: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """A transformers configuration with only its first layers.

    Raises:
        HbpError: it has fewer, or none are asked for.
    """
    every = config["num_hidden_layers"]
    if not 1 <= n_layers <= every:
        raise HbpError(f"the model has {every} layers, so a stack of {n_layers} cannot be cut from it")
    cut = {**config, "num_hidden_layers": n_layers}
    if cut.get("layer_types"):
        cut["layer_types"] = list(cut["layer_types"])[:n_layers]
    return cut

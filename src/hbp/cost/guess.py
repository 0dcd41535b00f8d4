"""The dimensions of a model whose family is not known here, guessed from its configuration and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hbp.cost.dimensions import FAMILIES, guess_dimensions
from hbp.cost.model_spec import ModelSpec, spec_from_config
from hbp.errors import HbpError

GUESSED_WITHIN = 0.2
"""Of a model's parameters, what may be unexplained where its family is not known."""


def spec_of_any(config: Mapping[str, Any], parameters: Callable[[], int], name: str = "") -> ModelSpec:
    """The dimensions of a model of a family that need not be known.

    Of an unknown family the MLP is taken to have three matrices or two, whichever comes nearer to the model's number of
    parameters; what is left of these is spread over the layers.

    Args:
        config: ``config.to_dict()``.
        parameters: counts those of the model; asked where the family is not known.
        name: as for :func:`~hbp.cost.model_spec.spec_from_config`.

    Raises:
        HbpError: a key is missing or makes no sense, or the model is no plain decoder.
    """
    family = config.get("model_type")
    if family in FAMILIES:
        return spec_from_config(config, name)
    dimensions, count = guess_dimensions(config), parameters()
    specs = [ModelSpec(name=name or str(family), **dimensions, mlp_matrices=matrices) for matrices in (2, 3)]
    nearest = min(specs, key=lambda spec: abs(count - spec.parameters()))
    rest = count - nearest.parameters()
    if abs(rest) > count * GUESSED_WITHIN:
        raise HbpError(
            f"model_type {family!r} is not known to the cost model, and {count:,} parameters do not look like those "
            "of a plain decoder with its dimensions; train a model of a known family"
        )
    return dataclasses.replace(nearest, other_parameters=max(0, rest) // nearest.n_layers)

"""What the cost model takes a model for: for planning as for training, so that both make the same plan.

Families that it knows are read from their configuration alone. Of another the parameters are counted on the meta
device, and it is taken for a plain decoder with as many.
"""

from __future__ import annotations

from typing import Any

from hbp.cost.guess import spec_of_any
from hbp.cost.model_spec import ModelSpec
from hbp.errors import HbpError
from hbp.train.check.families import decoder_of
from hbp.train.model import meta_model, read_config

SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
"""What some families call by names of their own, which transformers' configurations translate"""


def describe_model(name_or_folder: str, vocab_size: int | None = None, name: str = "") -> ModelSpec:
    """The dimensions of a model that can be trained here.

    Args:
        name_or_folder: a folder, a configuration file, or a hub name.
        vocab_size: of the tokenizer; replaces the configuration's where there are no weights.
        name: of the model in plans and reports; the family's if empty.

    Raises:
        HbpError: nothing there, a family or setting that cannot be trained, or no plain decoder.
    """

    def count() -> int:
        model = meta_model(name_or_folder, vocab_size=vocab_size)
        decoder_of(model.lm)
        return int(model.lm.num_parameters())

    try:
        return spec_of_any(plain_names(read_config(name_or_folder, vocab_size)), count, name)
    except (HbpError, ImportError):
        raise
    except Exception as error:  # a family's own code raises what it likes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise HbpError(f"no model can be made of {name_or_folder!r}: {reason}") from None


def plain_names(config: Any) -> dict[str, Any]:
    """The contents of a transformers configuration, sizes under the names that most families give them."""
    given: dict[str, Any] = config.to_dict()
    sizes = {key: getattr(config, key) for key in SIZES if key not in given and hasattr(config, key)}
    return given | sizes

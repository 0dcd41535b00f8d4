"""Which families train here: those shown to, and what is known not to.

The proven are held against plain transformers in the tests; another has to pass the same comparison before it is
trained (:mod:`hbp.train.check.compare`).
"""

from __future__ import annotations

import sys
from typing import Any

from hbp.errors import HbpError

PROVEN_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_oss",
    "granite",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2_moe",
    "smollm3",
)
"""Shown to train as their documents alone do (``tests/parallel/test_families.py``)."""
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on what else is in the pack."""
RECURRENT_LAYERS = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid")
"""Kinds of layers that carry a state from token to token, past the ends of documents and ranks."""


def check_trainable(config: Any) -> None:
    """Refuse a model of which it is known that it would not train as its documents alone do.

    Args:
        config: transformers configuration.

    Raises:
        HbpError: names the family or the setting.
    """
    for kind in getattr(config, "layer_types", None) or ():
        if kind in RECURRENT_LAYERS:
            raise HbpError(
                f"{config.model_type} models have {kind} layers, whose state would run from one document of a pack "
                "into the next and is not carried from rank to rank; train a model whose layers all attend"
            )
    _check_chunks(config)
    if not _attention_is_looked_up(config):
        raise HbpError(
            f"{config.model_type} models compute attention in their own code and not through transformers' attention "
            "interface, which is where documents and ranks are kept apart; train a model of another family"
        )
    if config.get_text_config() is not config:
        raise HbpError(
            f"{config.model_type} models take more than text; give the configuration and weights of their text model "
            f"({config.get_text_config().model_type}) alone"
        )
    for rope in _rope_kinds(config):
        if rope in LENGTH_DEPENDENT_ROPE:
            raise HbpError(
                f"the model's rotary embedding is {rope!r}, which depends on the longest document of a pack; "
                "set rope_parameters to yarn, llama3, linear or default"
            )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise HbpError(
            f"the model is quantized ({method}); give its weights in bfloat16 or float32 (model.quantize packs them)"
        )
    for name in ("attention_dropout", "attn_pdrop", "attn_dropout"):
        if getattr(config, name, 0):
            raise HbpError(f"the model's {name} is {getattr(config, name)}; set it to 0 in its config.json")


def _check_chunks(config: Any) -> None:
    """Refuse what goes by a token's place in the pack, or is cut by a mask alone (Llama 4)."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise HbpError(
            f"{config.model_type} models have chunked_attention layers, which a mask cuts and not the attention "
            f"interface; where no document is longer than {config.attention_chunk_size} tokens, set each of "
            "layer_types to full_attention in its config.json"
        )
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        raise HbpError(
            f"{config.model_type} models scale queries by their place in the pack (attn_temperature_tuning); where no "
            f"document is longer than {config.floor_scale - 1} tokens, set it to false in its config.json"
        )


def _attention_is_looked_up(config: Any) -> bool:
    """Whether the family's code asks transformers' attention interface; true of code that is not transformers' own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    lm = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not isinstance(lm, type) or not lm.__module__.startswith("transformers.models."):
        return True
    return hasattr(sys.modules[lm.__module__], "ALL_ATTENTION_FUNCTIONS")


def decoder_of(lm: Any) -> Any:
    """The part of a transformers causal language model that has its ``layers`` in a list.

    Raises:
        HbpError: no part has; names the family.
    """
    for part in (lm.get_decoder(), getattr(lm, "model", None)):  # Llama 4's text model names no decoder
        if hasattr(part, "layers"):
            return part
    raise HbpError(
        f"{lm.config.model_type} models have no list of decoder layers, which are what is sharded and recomputed here; "
        "train a model of another family"
    )


def _rope_kinds(config: Any) -> set[str]:
    """Of all layers; Gemma 3 has one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {each.get("rope_type", "default") for each in nested or [parameters]}

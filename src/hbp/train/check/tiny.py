"""A tiny instance of a model, from its own configuration: two to four layers of every kind, heads in their ratio.

Sizes shrink, relations stay: query to key/value heads, whether heads fill the hidden size, how the softmax is scaled
against the head size, which layers attend to a window, rotate, or have experts. A window is made shorter than the
documents of the comparison, and a rotary embedding that stretches is made to stretch within them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hbp.errors import HbpError
from hbp.train.check.families import decoder_of

HEAD_DIM = 8
WIDE_HEAD_DIM = 16
"""Where heads do not fill the hidden size, or are two"""
HIDDEN = 48
"""Of models whose heads do not fill it"""
VOCAB = 64
WINDOW = 8
LAYERS = 2, 4
"""At least and at most"""
FEW_HEADS = 2
MOST_PARAMETERS = 5_000_000

SIZES = {
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "intermediate_size_mlp": 56,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "max_position_embeddings": 512,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "n_shared_experts": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "floor_scale": WINDOW,
    "original_max_position_embeddings": 24,
}
"""At most, where the configuration has a number"""
NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NUMBERS_OF_LAYERS = "mlp_only_layers", "moe_layers"
"""Lists of layers' numbers: of dense ones, of those with experts"""
N_EXPERTS, CHOSEN = 8, 3
GROUPS = {"n_group": 4, "topk_group": 2}


def tiny_config(config: Any, few_heads: bool = False) -> dict[str, Any]:
    """The contents of a ``config.json`` of a tiny model of the same family.

    Args:
        config: transformers configuration.
        few_heads: two query heads, so that degree 4 is beyond them, in place of a multiple of 4.

    Raises:
        HbpError: the family does not say how many layers or heads it has.
    """
    given = config.to_dict()
    names = getattr(config, "attribute_map", None) or {}
    for key in NEEDED:
        if key not in given and names.get(key) in given:  # GPT-2's n_layer; transformers takes both
            given[key] = given.pop(names[key])
        if not isinstance(given.get(key), int):
            raise HbpError(f"the {config.model_type} configuration has no {key}, so no tiny instance can be made of it")
    tiny = dict(given)
    for key in ("quantization_config", "transformers_version", "architectures", "_name_or_path", "auto_map"):
        tiny.pop(key, None)
    tiny |= {key: min(size, given[key]) for key, size in SIZES.items() if _is_number(given.get(key))}
    _heads(tiny, given, few_heads)
    _experts(tiny, given)
    _layers(tiny, given)
    _rope(tiny, given)
    tiny |= {key: 0.0 for key in given if "drop" in key and _is_number(given[key])}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    tiny |= {key: token for key, token in tokens.items() if given.get(key) is not None}
    return tiny | {"use_cache": False, "dtype": "float32"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def head_dim(config: Mapping[str, Any]) -> int:
    """Of the queries and keys of a configuration."""
    if "qk_nope_head_dim" in config:
        return int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _heads(tiny: dict[str, Any], given: Mapping[str, Any], few: bool) -> None:
    heads = given["num_attention_heads"]
    kv = given.get("num_key_value_heads") or heads
    ratio, latent = heads // kv, "qk_nope_head_dim" in given
    fills = not latent and head_dim(given) * heads == given["hidden_size"]
    size = HEAD_DIM if fills and not few else WIDE_HEAD_DIM
    if few:
        tiny["num_attention_heads"], kv = FEW_HEADS, 1 if ratio > 1 else FEW_HEADS
    else:
        tiny["num_attention_heads"] = math.lcm(ratio, 4)
        kv = tiny["num_attention_heads"] // ratio
    if given.get("num_key_value_heads") is not None:
        tiny["num_key_value_heads"] = kv
    tiny["hidden_size"] = tiny["num_attention_heads"] * size if fills else HIDDEN
    if latent:
        if given.get("v_head_dim"):
            tiny["v_head_dim"] = 16 if given["v_head_dim"] == given["qk_nope_head_dim"] else 12
        if "head_dim" in given:
            tiny["head_dim"] = tiny["qk_rope_head_dim"]
    elif given.get("head_dim") is not None:
        tiny["head_dim"] = size
    shrunk = head_dim(tiny) / head_dim(given)
    if _is_number(given.get("query_pre_attn_scalar")):
        tiny["query_pre_attn_scalar"] = max(1, round(given["query_pre_attn_scalar"] * shrunk))
    if _is_number(given.get("attention_multiplier")):
        tiny["attention_multiplier"] = min(given["attention_multiplier"] / shrunk, head_dim(tiny) ** -0.5)


def _experts(tiny: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key in EXPERTS:
        if given.get(key):
            tiny[key] = min(N_EXPERTS, given[key])
    for key in ("num_experts_per_tok", "top_k_experts", "experts_per_token"):
        if given.get(key):
            tiny[key] = min(CHOSEN, given[key])
    if (given.get("n_group") or 1) > 1:
        tiny |= {key: min(size, given[key]) for key, size in GROUPS.items()}


def _layers(tiny: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Choose layers: the first of each kind, in their order, and repeat the kinds up to the least number."""
    count = given["num_hidden_layers"]
    lists = {
        key: value
        for key, value in given.items()
        if isinstance(value, (list, tuple)) and len(value) == count > 1 and key not in NUMBERS_OF_LAYERS
    }
    step, first = given.get("decoder_sparse_step"), "first_k_dense_replace"
    only, sparse = (given.get(key) for key in NUMBERS_OF_LAYERS)

    def dense(layer: int) -> bool:
        skipped = layer in (only or ()) or (sparse is not None and layer not in sparse)
        skipped = skipped or (step is not None and (layer + 1) % max(step, 1) != 0)
        return skipped or layer < (given.get(first) or 0)

    kinds = [(dense(i), *(json.dumps(value[i]) for value in lists.values())) for i in range(count)]
    chosen = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[: LAYERS[1]]
    while len(chosen) < min(LAYERS[0], count):
        chosen.append(chosen[-1])
    tiny |= {key: [value[i] for i in chosen] for key, value in lists.items()}
    tiny["num_hidden_layers"] = len(chosen)
    if step is not None:
        tiny["decoder_sparse_step"] = 1
    if only is not None or step is not None:
        tiny["mlp_only_layers"] = [at for at, i in enumerate(chosen) if dense(i)]
    if sparse is not None:
        tiny["moe_layers"] = [at for at, i in enumerate(chosen) if not dense(i)]
    if given.get(first) is not None:
        tiny[first] = sum(map(dense, chosen))


def _rope(tiny: dict[str, Any], given: Mapping[str, Any]) -> None:
    ropes = given.get("rope_parameters")
    if not isinstance(ropes, dict):
        return

    def shrink(rope: dict[str, Any]) -> dict[str, Any]:
        rope = dict(rope)
        if rope.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = SIZES["original_max_position_embeddings"]
        for key in ("short_factor", "long_factor"):
            if key in rope:
                share = rope.get("partial_rotary_factor") or given.get("partial_rotary_factor") or 1.0
                rope[key] = list(rope[key])[: int(head_dim(tiny) * share) // 2]
        return rope

    nested = any(isinstance(value, dict) for value in ropes.values())
    tiny["rope_parameters"] = {k: shrink(v) if v else v for k, v in ropes.items()} if nested else shrink(ropes)


def write_tiny(folder: Path, config: Mapping[str, Any], seed: int = 0) -> str:
    """Save a tiny model whose weights are large enough that attention is far from uniform; returns the folder.

    Args:
        folder: to write, made if it is not there.
        config: contents of its ``config.json``.
        seed: of the weights.

    Raises:
        HbpError: transformers cannot make it, it is not tiny, or its decoder's layers are not to be found.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # a family's own code raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise HbpError(f"no tiny {config['model_type']} model can be made: {reason}") from None
    decoder_of(lm)
    largest = max(lm.named_parameters(), key=lambda item: item[1].numel())
    if lm.num_parameters() > MOST_PARAMETERS:
        raise HbpError(
            f"no tiny {config['model_type']} model can be made: {largest[0]} stays {list(largest[1].shape)}; its size "
            "follows from a setting that is not known here"
        )
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in lm.state_dict().items():
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator)
                spread = 0.3 if x.ndim < 2 or "embed" in name else 1.2 * _fan_in(name, x) ** -0.5
                x.copy_(1 + 0.3 * noise if "norm" in name else spread * noise)
    lm.save_pretrained(folder)
    return str(folder)


def _fan_in(name: str, x: torch.Tensor) -> int:
    return x.size(-1) if x.ndim < 3 else min(x.shape[1:])

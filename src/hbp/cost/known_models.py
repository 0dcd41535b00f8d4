"""Where a model's dimensions come from: models known by name, and transformers configurations.

The built-in numbers are those of the models' public ``config.json``. Reading a configuration applies the
defaults that transformers 5 gives to keys that may be absent, and refuses what it cannot know: a wrong guess
here would put every plan wrong without a word. Nothing of transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbp.errors import HbpError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")

# What transformers takes where a key is absent (a key that is null follows from the heads instead).
DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}
DEFAULT_HEAD_DIM = {"qwen3": 128}
DEFAULT_WINDOW = 4096
DEFAULT_MAX_WINDOW_LAYERS = 28
DEFAULT_DENSE_LAYERS = {"deepseek_v2": 0, "deepseek_v3": 3}

ATTENTION_BIAS_FAMILIES = ("llama", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")
MLP_BIAS_FAMILIES = ("llama", "deepseek_v2")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): ranks of the compressed queries and keys/values, key parts."""

    q_lora_rank: int | None
    """None where queries are not compressed."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int


@dataclass(frozen=True)
class Experts:
    """Mixture of experts."""

    n_experts: int
    experts_per_token: int
    intermediate: int
    """Width of one expert."""
    n_shared: int
    """Experts that every token goes to."""
    dense_layers: tuple[int, ...]
    """Layers with an ordinary MLP."""
    float32_router: bool = False
    """The router casts its input to float32."""


def _dense(
    model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": _dense("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-70b": _dense("llama", 80, 8192, 64, 8, 28672, 128256),
    "qwen2.5-32b": _dense("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "qwen2.5-72b": _dense("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "qwen3-30b-a3b": {
        **_dense("qwen3_moe", 48, 2048, 32, 4, 6144, 151936),
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek-v2-236b": {
        **_dense("deepseek_v2", 60, 5120, 128, 128, 12288, 102400),
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1536,
        "first_k_dense_replace": 1,
    },
}


def load_config(name_or_path: str) -> tuple[Mapping[str, Any], str]:
    """A configuration and the model's name, from a built-in name, a folder with ``config.json``, or the file.

    Raises:
        HbpError: no such name or file, or not a JSON object.
    """
    if name_or_path in KNOWN_MODELS:
        return KNOWN_MODELS[name_or_path], name_or_path
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise HbpError(
            f"no model {name_or_path!r}: give one of {', '.join(KNOWN_MODELS)}, or a folder with config.json"
        ) from None
    except ValueError as error:
        raise HbpError(f"{path} is not JSON ({error}); give a transformers config.json") from None
    if not isinstance(config, dict):
        raise HbpError(f"{path} holds no JSON object; give a transformers config.json")
    return config, path.resolve().parent.name if path.name == "config.json" else path.stem


def read_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`hbp.cost.model_spec.ModelSpec`, all but its name.

    Raises:
        HbpError: an unknown family, or a key that is missing or makes no sense.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise HbpError(f"model_type {family!r} is not known to the cost model; known are {', '.join(FAMILIES)}")
    deepseek = family.startswith("deepseek")
    layers, hidden = _int(config, "num_hidden_layers"), _int(config, "hidden_size")
    heads = _int(config, "num_attention_heads")
    latent = None
    if deepseek:
        latent = _latent(config)
        kv_heads, qk_dim = heads, latent.qk_nope_head_dim + latent.qk_rope_head_dim
        v_dim = _int(config, "v_head_dim")
    else:
        kv_heads = _int(config, "num_key_value_heads", DEFAULT_KV_HEADS.get(family, heads), null=heads)
        head_dim = hidden // heads
        if not head_dim and not config.get("head_dim"):
            raise HbpError(f"{heads} heads of a hidden_size of {hidden} gives no head size; mend the config.json")
        qk_dim = v_dim = _int(config, "head_dim", DEFAULT_HEAD_DIM.get(family, head_dim), null=head_dim)
    if heads % kv_heads:
        raise HbpError(
            f"the {family} configuration has {heads} num_attention_heads, which its {kv_heads} "
            "num_key_value_heads do not divide; give the model's whole config.json"
        )
    bias = family in ATTENTION_BIAS_FAMILIES and bool(config.get("attention_bias"))
    return {
        "model_type": family,
        "n_layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "qk_head_dim": qk_dim,
        "v_head_dim": v_dim,
        "intermediate": _int(config, "intermediate_size"),
        "vocab": _int(config, "vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "qkv_bias": bias or family == "qwen2",
        "out_bias": bias,
        "mlp_bias": family in MLP_BIAS_FAMILIES and bool(config.get("mlp_bias")),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "windows": _windows(config, family, layers),
        "latent": latent,
        "experts": _experts(config, family, layers),
    }


_REQUIRED = object()


def _int(config: Mapping[str, Any], key: str, default: Any = _REQUIRED, null: Any = _REQUIRED, least: int = 1) -> Any:
    """A whole number, at least ``least``; ``default`` if absent, ``null`` if null (errors if not given)."""
    family = config.get("model_type")
    if key not in config:
        if default is _REQUIRED:
            raise HbpError(f"the {family} configuration lacks {key!r}; give the model's whole config.json")
        return default
    value = config[key]
    if value is None and null is not _REQUIRED:
        return null
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise HbpError(f"the {family} configuration has {key} {value!r}; it must be a whole number of at least {least}")
    return value


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=_int(config, "q_lora_rank", null=None),
        kv_lora_rank=_int(config, "kv_lora_rank"),
        qk_nope_head_dim=_int(config, "qk_nope_head_dim"),
        qk_rope_head_dim=_int(config, "qk_rope_head_dim"),
    )


def _windows(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """Of each layer; empty where all attend in full. Only Qwen2 and Qwen3 tell their layers apart."""
    used = family == "mistral" or (family.startswith("qwen") and config.get("use_sliding_window"))
    window = _int(config, "sliding_window", DEFAULT_WINDOW, null=None) if used else None
    if window is None:
        return ()
    if family not in ("qwen2", "qwen3"):
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = _int(config, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, least=0)
        kinds = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(0, layers - first)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise HbpError(f"the {family} configuration's layer_types do not name each of its {layers} layers; mend it")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _experts(config: Mapping[str, Any], family: str, layers: int) -> Experts | None:
    if family == "qwen3_moe":
        # transformers 5 writes num_local_experts where the published configurations say num_experts
        count = _int(config, "num_local_experts" if "num_local_experts" in config else "num_experts", least=0)
        step = _int(config, "decoder_sparse_step", 1)
        named = config.get("mlp_only_layers") or []
        if not isinstance(named, (list, tuple)) or not all(isinstance(i, int) for i in named):
            raise HbpError(f"the configuration has mlp_only_layers {named!r}; it must be a list of layer numbers")
        dense = {i for i in range(layers) if (i + 1) % step} | set(named)
        shared = 0
    elif family.startswith("deepseek"):
        count = _int(config, "n_routed_experts", null=0, least=0)
        dense = set(range(_int(config, "first_k_dense_replace", DEFAULT_DENSE_LAYERS[family], null=0, least=0)))
        shared = _int(config, "n_shared_experts", null=0, least=0) if count else 0
    else:
        return None
    if not count:
        return None
    chosen = _int(config, "num_experts_per_tok")
    if chosen > count:
        raise HbpError(f"the {family} configuration sends a token to {chosen} of {count} experts; mend its config.json")
    return Experts(
        n_experts=count,
        experts_per_token=chosen,
        intermediate=_int(config, "moe_intermediate_size"),
        n_shared=shared,
        dense_layers=tuple(sorted(dense & set(range(layers)))),
        float32_router=family.startswith("deepseek"),
    )

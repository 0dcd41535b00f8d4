"""A model's dimensions, from its transformers configuration.

Reading applies the defaults that transformers 5 gives to keys that may be absent, and refuses what it cannot know: a
wrong guess here would put every plan wrong without a word. Nothing of transformers is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hbp.errors import HbpError


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
    shared_intermediate: int | None = None
    """Width of a shared expert; None: that of the others."""
    shared_gate: bool = False
    """Shared experts are weighted by a gate of their own."""
    biases: bool = False
    """On experts and router; their gate is clamped (gpt-oss)."""

    @property
    def shared_width(self) -> int:
        """Of all shared experts side by side."""
        return self.n_shared * (self.shared_intermediate or self.intermediate)


Windows = Literal["none", "all", "if used", "layers if used", "every second", "all but every sixth", "no rope"]
"""Which layers attend to a window, where the configuration does not list their types"""


@dataclass(frozen=True)
class Family:
    """What a family's configuration may say, and what it means where it says nothing."""

    kv_heads: int | None = None
    """Default of ``num_key_value_heads``; None: as many as query heads."""
    head_dim: int | None = None
    """Default of ``head_dim``; None: the hidden size over the heads."""
    attention_bias: str | None = None
    """Key that puts biases on the attention's projections,"""
    bias_default: bool = False
    out_bias: bool = True
    """the output's included."""
    mlp_bias: bool = False
    """Has the key ``mlp_bias``."""
    qk_norm: Literal["head", "all"] | None = None
    """Norms of queries and keys: of each head, or over all heads at once."""
    layer_norms: int = 2
    float32_norms: bool = False
    """Norms are scaled before they are cast back."""
    windows: Windows = "none"
    window: int | None = None
    """Default of ``sliding_window``."""
    tied: bool = False
    """Default of ``tie_word_embeddings``."""
    fused_qkv: bool = False
    sinks: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(attention_bias="attention_bias", mlp_bias=True),
    "mistral": Family(kv_heads=8, windows="all", window=4096),
    "qwen2": Family(kv_heads=32, bias_default=True, out_bias=False, windows="layers if used", window=4096),
    "qwen3": Family(
        kv_heads=32,
        head_dim=128,
        attention_bias="attention_bias",
        qk_norm="head",
        windows="layers if used",
        window=4096,
    ),
    "qwen3_moe": Family(kv_heads=4, attention_bias="attention_bias", qk_norm="head", windows="if used", window=4096),
    "deepseek_v2": Family(attention_bias="attention_bias", mlp_bias=True),
    "deepseek_v3": Family(attention_bias="attention_bias"),
    "gemma2": Family(
        kv_heads=4,
        head_dim=256,
        attention_bias="attention_bias",
        layer_norms=4,
        float32_norms=True,
        windows="every second",
        window=4096,
        tied=True,
    ),
    "gemma3_text": Family(
        kv_heads=4,
        head_dim=256,
        attention_bias="attention_bias",
        qk_norm="head",
        layer_norms=4,
        float32_norms=True,
        windows="all but every sixth",
        window=4096,
        tied=True,
    ),
    "phi3": Family(windows="all", fused_qkv=True),
    "olmo2": Family(attention_bias="attention_bias", qk_norm="all", float32_norms=True),
    "smollm3": Family(kv_heads=4, attention_bias="attention_bias", mlp_bias=True, windows="no rope", tied=True),
    "glm": Family(kv_heads=2, head_dim=128, attention_bias="attention_bias", bias_default=True, out_bias=False),
    "glm4": Family(
        kv_heads=2, head_dim=128, attention_bias="attention_bias", bias_default=True, out_bias=False, layer_norms=4
    ),
    "granite": Family(attention_bias="attention_bias", mlp_bias=True),
    "gpt_oss": Family(
        kv_heads=8,
        head_dim=64,
        attention_bias="attention_bias",
        bias_default=True,
        float32_norms=True,
        windows="every second",
        window=128,
        sinks=True,
    ),
    "mixtral": Family(kv_heads=8, windows="all"),
    "qwen2_moe": Family(
        kv_heads=16, attention_bias="qkv_bias", bias_default=True, out_bias=False, windows="layers if used", window=4096
    ),
}
DEFAULT_MAX_WINDOW_LAYERS = 28
DEFAULT_DENSE_LAYERS = {"deepseek_v2": 0, "deepseek_v3": 3}


def known_family(config: Mapping[str, Any]) -> str | None:
    """The family of a configuration, or of its text part, if it is known here."""
    name = (config["text_config"] if isinstance(config.get("text_config"), Mapping) else config).get("model_type")
    return name if isinstance(name, str) and name in FAMILIES else None


def read_dimensions(config: Mapping[str, Any], like: str | None = None) -> dict[str, Any]:
    """The fields of :class:`hbp.cost.model_spec.ModelSpec`, all but its name.

    Args:
        config: contents of a ``config.json``.
        like: the family to read it as, in place of its own.

    Raises:
        HbpError: an unknown family, or a key that is missing or makes no sense.
    """
    if isinstance(config.get("text_config"), Mapping):  # of a model that sees pictures too
        config = config["text_config"]
    name = like or known_family(config)
    if name is None:
        raise HbpError(
            f"model_type {config.get('model_type')!r} is not known to the cost model; known are {', '.join(FAMILIES)}; "
            "of another give what hbp.describe_model makes of it"
        )
    family = FAMILIES[name]
    layers, hidden = _int(config, "num_hidden_layers"), _int(config, "hidden_size")
    heads, latent = _int(config, "num_attention_heads"), None
    if name.startswith("deepseek"):
        latent = _latent(config)
        kv_heads, qk_dim = heads, latent.qk_nope_head_dim + latent.qk_rope_head_dim
        v_dim = _int(config, "v_head_dim")
    else:
        kv_heads = _int(config, "num_key_value_heads", family.kv_heads or heads, null=heads)
        qk_dim = v_dim = _head_dim(config, family, hidden, heads)
    if heads % kv_heads:
        raise HbpError(
            f"the {config.get('model_type')} configuration has {heads} num_attention_heads, which its {kv_heads} "
            "num_key_value_heads do not divide; give the model's whole config.json"
        )
    given = config.get(family.attention_bias, family.bias_default) if family.attention_bias else family.bias_default
    return {
        "model_type": config.get("model_type"),
        "n_layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "qk_head_dim": qk_dim,
        "v_head_dim": v_dim,
        "intermediate": _int(config, "intermediate_size"),
        "vocab": _int(config, "vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
        "qkv_bias": bool(given),
        "out_bias": bool(given) and family.out_bias,
        "mlp_bias": family.mlp_bias and bool(config.get("mlp_bias")),
        "qk_norm": family.qk_norm is not None,
        "wide_qk_norm": family.qk_norm == "all",
        "layer_norms": family.layer_norms,
        "float32_norms": family.float32_norms,
        "fused_qkv": family.fused_qkv,
        "sinks": family.sinks,
        "windows": _windows(config, family, layers),
        "latent": latent,
        "experts": _experts(config, name, layers),
    }


def guess_dimensions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a family that is not known here, taken for a Llama-like one without biases.

    Args:
        config: a transformers configuration with its defaults filled in.

    Raises:
        HbpError: a key is missing.
    """
    plain = {key: value for key, value in config.items() if not key.endswith("_bias")}
    plain["intermediate_size"] = config.get("intermediate_size") or 4 * _int(config, "hidden_size")
    dimensions = read_dimensions(plain, like="llama")
    dimensions["experts"] = _guess_experts(config)
    kinds, window = config.get("layer_types") or [], config.get("sliding_window")
    if window and any("sliding" in str(kind) for kind in kinds):
        dimensions["windows"] = tuple(window if "sliding" in str(kind) else None for kind in kinds)
    return dimensions


def _guess_experts(config: Mapping[str, Any]) -> Experts | None:
    count = next((config[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(k)), None)
    if not count or not config.get("num_experts_per_tok"):
        return None
    width = config.get("moe_intermediate_size") or _int(config, "intermediate_size")
    shared = config.get("n_shared_experts") or 0
    dense = tuple(range(config.get("first_k_dense_replace") or 0))
    return Experts(count, _int(config, "num_experts_per_tok"), width, shared, dense)


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


def _head_dim(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> int:
    follows = hidden // heads
    if not follows and not config.get("head_dim"):
        raise HbpError(f"{heads} heads of a hidden_size of {hidden} gives no head size; mend the config.json")
    size: int = _int(config, "head_dim", family.head_dim or follows, null=follows)
    return size


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=_int(config, "q_lora_rank", null=None),
        kv_lora_rank=_int(config, "kv_lora_rank"),
        qk_nope_head_dim=_int(config, "qk_nope_head_dim"),
        qk_rope_head_dim=_int(config, "qk_rope_head_dim"),
    )


def _windows(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Of each layer; empty where all attend in full."""
    if family.windows == "none" or ("used" in family.windows and not config.get("use_sliding_window")):
        return ()
    window = _int(config, "sliding_window", family.window, null=None, least=0)
    if not window:
        return ()
    if family.windows in ("all", "if used"):
        return (window,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if _slides(config, family, i) else "full_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise HbpError(
            f"the {config.get('model_type')} configuration's layer_types do not name each of its {layers} layers; "
            "mend it"
        )
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


def _slides(config: Mapping[str, Any], family: Family, layer: int) -> bool:
    """Whether a layer attends to a window where the configuration does not list the layers' types."""
    if family.windows == "every second":
        return layer % 2 == 0
    if family.windows == "all but every sixth":
        return bool((layer + 1) % _int(config, "sliding_window_pattern", 6) != 0)
    if family.windows == "no rope":
        rotates = config.get("no_rope_layers") or []
        every = _int(config, "no_rope_layer_interval", 4)
        turns = rotates[layer] if layer < len(rotates) else (layer + 1) % every != 0
        return bool(config.get("use_sliding_window")) and not turns
    first = _int(config, "max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, least=0)
    if config.get("model_type") == "qwen2_moe":  # as transformers has it
        return bool(layer % 2 == 0 and layer < first)
    return bool(layer >= first)


def _experts(config: Mapping[str, Any], family: str, layers: int) -> Experts | None:
    shared_intermediate, dense, shared = None, set[int](), 0
    width = "moe_intermediate_size"
    if family in ("qwen2_moe", "qwen3_moe"):
        # transformers 5 writes num_local_experts where the published configurations say num_experts
        count = _int(config, "num_local_experts" if "num_local_experts" in config else "num_experts", least=0)
        step = _int(config, "decoder_sparse_step", 1)
        named = config.get("mlp_only_layers") or []
        if not isinstance(named, (list, tuple)) or not all(isinstance(i, int) for i in named):
            raise HbpError(f"the configuration has mlp_only_layers {named!r}; it must be a list of layer numbers")
        dense = {i for i in range(layers) if (i + 1) % step} | set(named)
        if family == "qwen2_moe":
            shared, shared_intermediate = 1, _int(config, "shared_expert_intermediate_size")
    elif family.startswith("deepseek"):
        count = _int(config, "n_routed_experts", null=0, least=0)
        dense = set(range(_int(config, "first_k_dense_replace", DEFAULT_DENSE_LAYERS[family], null=0, least=0)))
        shared = _int(config, "n_shared_experts", null=0, least=0) if count else 0
    elif family in ("mixtral", "gpt_oss"):
        count, width = _int(config, "num_local_experts", least=0), "intermediate_size"
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
        intermediate=_int(config, width),
        n_shared=shared,
        dense_layers=tuple(sorted(dense & set(range(layers)))),
        float32_router=family.startswith("deepseek"),
        shared_intermediate=shared_intermediate,
        shared_gate=family == "qwen2_moe",
        biases=family == "gpt_oss",
    )

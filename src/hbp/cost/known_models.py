"""Models known by name, and where a configuration is found: a name, a folder, a file, the hub.

The built-in numbers are those of the models' public ``config.json``, text models alone (Gemma 3 from 4B on sees
pictures too). Nothing of transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hbp.errors import HbpError


def _dense(
    model_type: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocab: int, **more: Any
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
        **more,
    }


def _granite(attention: float, logits: float) -> dict[str, Any]:
    return {
        "attention_multiplier": attention,
        "logits_scaling": logits,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
    }


USUAL = ("llama-3.1-8b", "qwen3-8b", "qwen3-30b-a3b", "gemma-3-12b", "deepseek-v3-671b")
"""Named to a user whose own name is like no other"""
TIED = {"tie_word_embeddings": True}
QWEN3 = {"head_dim": 128}
GEMMA = {"head_dim": 256, **TIED}
QWEN3_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], **QWEN3}
MLA = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0] * 48,
        "long_factor": [1.0] * 48,
    },
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 131072,
}

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-1b": _dense("llama", 16, 2048, 32, 8, 8192, 128256, **TIED),
    "llama-3.2-3b": _dense("llama", 28, 3072, 24, 8, 8192, 128256, **TIED),
    "llama-3.1-8b": _dense("llama", 32, 4096, 32, 8, 14336, 128256),
    "llama-3.1-70b": _dense("llama", 80, 8192, 64, 8, 28672, 128256),
    "llama-3.1-405b": _dense("llama", 126, 16384, 128, 8, 53248, 128256),
    "mistral-7b": _dense("mistral", 32, 4096, 32, 8, 14336, 32768, sliding_window=None),
    "mistral-nemo-12b": _dense("mistral", 40, 5120, 32, 8, 14336, 131072, sliding_window=None, head_dim=128),
    "mistral-small-24b": _dense("mistral", 40, 5120, 32, 8, 32768, 131072, sliding_window=None, head_dim=128),
    "qwen2.5-0.5b": _dense("qwen2", 24, 896, 14, 2, 4864, 151936, **TIED),
    "qwen2.5-1.5b": _dense("qwen2", 28, 1536, 12, 2, 8960, 151936, **TIED),
    "qwen2.5-3b": _dense("qwen2", 36, 2048, 16, 2, 11008, 151936, **TIED),
    "qwen2.5-7b": _dense("qwen2", 28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-14b": _dense("qwen2", 48, 5120, 40, 8, 13824, 152064),
    "qwen2.5-32b": _dense("qwen2", 64, 5120, 40, 8, 27648, 152064),
    "qwen2.5-72b": _dense("qwen2", 80, 8192, 64, 8, 29568, 152064),
    "qwen3-0.6b": _dense("qwen3", 28, 1024, 16, 8, 3072, 151936, **QWEN3, **TIED),
    "qwen3-1.7b": _dense("qwen3", 28, 2048, 16, 8, 6144, 151936, **QWEN3, **TIED),
    "qwen3-4b": _dense("qwen3", 36, 2560, 32, 8, 9728, 151936, **QWEN3, **TIED),
    "qwen3-8b": _dense("qwen3", 36, 4096, 32, 8, 12288, 151936, **QWEN3),
    "qwen3-14b": _dense("qwen3", 40, 5120, 40, 8, 17408, 151936, **QWEN3),
    "qwen3-32b": _dense("qwen3", 64, 5120, 64, 8, 25600, 151936, **QWEN3),
    "qwen3-30b-a3b": _dense("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, **QWEN3_MOE, moe_intermediate_size=768),
    "qwen3-235b-a22b": _dense("qwen3_moe", 94, 4096, 64, 4, 12288, 151936, **QWEN3_MOE, moe_intermediate_size=1536),
    "gemma-2-2b": _dense("gemma2", 26, 2304, 8, 4, 9216, 256000, **GEMMA, sliding_window=4096),
    "gemma-2-9b": _dense("gemma2", 42, 3584, 16, 8, 14336, 256000, **GEMMA, sliding_window=4096),
    "gemma-2-27b": _dense(
        "gemma2", 46, 4608, 32, 16, 36864, 256000, head_dim=128, **TIED, sliding_window=4096, query_pre_attn_scalar=144
    ),
    "gemma-3-270m": _dense("gemma3_text", 18, 640, 4, 1, 2048, 262144, **GEMMA, sliding_window=512),
    "gemma-3-1b": _dense("gemma3_text", 26, 1152, 4, 1, 6912, 262144, **GEMMA, sliding_window=512),
    "gemma-3-4b": _dense("gemma3_text", 34, 2560, 8, 4, 10240, 262208, **GEMMA, sliding_window=1024),
    "gemma-3-12b": _dense("gemma3_text", 48, 3840, 16, 8, 15360, 262208, **GEMMA, sliding_window=1024),
    "gemma-3-27b": _dense(
        "gemma3_text",
        62,
        5376,
        32,
        16,
        21504,
        262208,
        head_dim=128,
        **TIED,
        sliding_window=1024,
        query_pre_attn_scalar=168,
    ),
    "phi-3-mini": _dense("phi3", 32, 3072, 32, 32, 8192, 32064, sliding_window=2047),
    "phi-3-medium": _dense("phi3", 40, 5120, 40, 10, 17920, 32064, sliding_window=2047),
    "phi-4": _dense("phi3", 40, 5120, 40, 10, 17920, 100352, sliding_window=None, pad_token_id=100349),
    "phi-4-mini": _dense("phi3", 32, 3072, 24, 8, 8192, 200064, **TIED, **LONG_ROPE, pad_token_id=199999),
    "olmo-2-1b": _dense("olmo2", 16, 2048, 16, 16, 8192, 100352),
    "olmo-2-7b": _dense("olmo2", 32, 4096, 32, 32, 11008, 100352),
    "olmo-2-13b": _dense("olmo2", 40, 5120, 40, 40, 13824, 100352),
    "olmo-2-32b": _dense("olmo2", 64, 5120, 40, 8, 27648, 100352),
    "smollm3-3b": _dense("smollm3", 36, 2048, 16, 4, 11008, 128256, **TIED),
    "glm-4-9b": _dense("glm4", 40, 4096, 32, 2, 13696, 151552, head_dim=128, attention_bias=True),
    "glm-4-32b": _dense("glm4", 61, 6144, 48, 2, 23040, 151552, head_dim=128, attention_bias=False),
    "granite-3.3-2b": _dense("granite", 40, 2048, 32, 8, 8192, 49159, **TIED, **_granite(0.015625, 8.0)),
    "granite-3.3-8b": _dense("granite", 40, 4096, 32, 8, 12800, 49159, **TIED, **_granite(0.0078125, 16.0)),
    "gpt-oss-20b": _dense(
        "gpt_oss",
        24,
        2880,
        64,
        8,
        2880,
        201088,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
    ),
    "gpt-oss-120b": _dense(
        "gpt_oss",
        36,
        2880,
        64,
        8,
        2880,
        201088,
        head_dim=64,
        num_local_experts=128,
        num_experts_per_tok=4,
        sliding_window=128,
    ),
    "mixtral-8x7b": _dense("mixtral", 32, 4096, 32, 8, 14336, 32000, num_local_experts=8, num_experts_per_tok=2),
    "mixtral-8x22b": _dense("mixtral", 56, 6144, 48, 8, 16384, 32768, num_local_experts=8, num_experts_per_tok=2),
    "qwen1.5-moe-a2.7b": _dense(
        "qwen2_moe",
        24,
        2048,
        16,
        16,
        5632,
        151936,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    "qwen2-57b-a14b": _dense(
        "qwen2_moe",
        28,
        3584,
        28,
        4,
        18944,
        151936,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480,
    ),
    "deepseek-v2-236b": _dense(
        "deepseek_v2",
        60,
        5120,
        128,
        128,
        12288,
        102400,
        **MLA,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        first_k_dense_replace=1,
    ),
    "deepseek-v3-671b": _dense(
        "deepseek_v3",
        61,
        7168,
        128,
        128,
        18432,
        129280,
        **MLA,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
    ),
}


def load_config(name_or_path: str) -> tuple[Mapping[str, Any], str]:
    """A configuration and the model's name, from a built-in name, a folder with ``config.json``, the file, or the hub.

    Raises:
        HbpError: no such name or file, or not a JSON object.
    """
    if name_or_path in KNOWN_MODELS:
        return KNOWN_MODELS[name_or_path], name_or_path
    path = Path(name_or_path)
    if not path.exists() and name_or_path.count("/") == 1:
        path = _from_hub(name_or_path) or path
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError:
        near = get_close_matches(name_or_path.rpartition("/")[2].lower(), KNOWN_MODELS, 3) or USUAL
        raise HbpError(
            f"no model {name_or_path!r}: give a built-in name, such as {', '.join(near)} (docs/models.md has all), a "
            "folder with config.json, or a hub name that can be reached"
        ) from None
    except ValueError as error:
        raise HbpError(f"{path} is not JSON ({error}); give a transformers config.json") from None
    if not isinstance(config, dict):
        raise HbpError(f"{path} holds no JSON object; give a transformers config.json")
    if not Path(name_or_path).exists():  # on the hub
        return config, name_or_path.rpartition("/")[2]
    return config, path.resolve().parent.name if path.name == "config.json" else path.stem


def _from_hub(name: str) -> Path | None:
    """The configuration of a model on the hub, fetched or from its cache; None where neither works."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return None
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None

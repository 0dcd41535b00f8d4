"""Helpers of the distributed tests: run a function in several gloo processes, tiny models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from hbp.train.check import ranks

torch.set_num_threads(1)  # these models are too small for more
CPU = torch.device("cpu")
PRELOADED = [
    "hbp.run.job",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "warm",
]
"""Imported once, by the server that ranks fork from: seven seconds of processor time a rank."""
LLAMA = {  # grouped queries, tied embeddings
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False}
QWEN2 = {  # biases; the first layer attends to everything, the others to a window
    **LLAMA,
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 1,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16}
QWEN3_MOE = {  # the first layer is dense
    **QWEN3,
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
DEEPSEEK_V2 = {  # latent attention with unequal head sizes, shared and grouped experts, the first layer dense
    "model_type": "deepseek_v2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.0,
    "output_router_logits": True,
    "aux_loss_alpha": 0.1,
}
FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "deepseek_v2": DEEPSEEK_V2,
}


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 300) -> list[Any]:
    """As :func:`hbp.train.check.ranks.run_ranks`, in processes that have imported :data:`PRELOADED`."""
    here = str(Path(__file__).parent)  # which the server that they fork from would not look into
    with mock.patch.dict(os.environ, PYTHONPATH=f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"):
        return ranks.run_ranks(function, world, *args, timeout=timeout, preloaded=PRELOADED)


def write_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> str:
    """A Hugging Face folder whose weights are large enough that attention is far from uniform."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write_config(folder, config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)
    model.save_pretrained(folder)
    return str(folder)


class Samples:
    """Documents in memory, as the trainer asks for them."""

    def __init__(self, documents: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.documents = documents
        self.lengths = np.array([len(ids) for ids, _ in documents], np.int32)
        self.loss_tokens = np.array([int(mask[1:].sum()) for _, mask in documents], np.int32)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.documents[index]


def random_samples(lengths: Iterable[int], vocab: int, seed: int = 0) -> Samples:
    """Random tokens, about two thirds of them with loss."""
    rng = np.random.default_rng(seed)
    return Samples(
        [(rng.integers(0, vocab, n).astype(np.int32), (rng.random(n) < 0.67).astype(np.uint8)) for n in lengths]
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the largest entry."""
    return float((got - want).abs().max() / want.abs().max())

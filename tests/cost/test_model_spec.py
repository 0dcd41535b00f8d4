"""Model dimensions against the real thing: transformers' modules, torch's FLOP counter, saved tensors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp.cost.known_models import KNOWN_MODELS
from hbp.cost.model_spec import ModelSpec, load_model_spec, spec_from_config
from hbp.errors import HbpError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 256,
}
MLA = {
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}
MOE = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **BASE},
    "llama-biases-tied": {
        "model_type": "llama",
        **BASE,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **BASE, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **BASE, "sliding_window": None},
    "qwen2-ignores-biases": {"model_type": "qwen2", **BASE, "attention_bias": True, "mlp_bias": True},
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 16},
    "qwen3-bias": {"model_type": "qwen3", **BASE, "head_dim": 32, "attention_bias": True},
    "qwen3_moe": {"model_type": "qwen3_moe", **BASE, **MOE},
    "qwen3_moe-mixed": {
        "model_type": "qwen3_moe",
        **BASE,
        **MOE,
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    },
    "deepseek_v2": {"model_type": "deepseek_v2", **BASE, **MLA},
    "deepseek_v2-biases": {
        "model_type": "deepseek_v2",
        **BASE,
        **MLA,
        "q_lora_rank": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "deepseek_v2-wide-values": {"model_type": "deepseek_v2", **BASE, **MLA, "v_head_dim": 24},
    "deepseek_v3": {"model_type": "deepseek_v3", **BASE, **MLA, "n_group": 2, "topk_group": 1},
    "deepseek_v3-bias": {"model_type": "deepseek_v3", **BASE, **MLA, "attention_bias": True},
    "gemma2": {"model_type": "gemma2", **BASE, "head_dim": 16},
    "gemma3_text": {"model_type": "gemma3_text", **BASE, "head_dim": 16, "num_hidden_layers": 7},
    "phi3": {"model_type": "phi3", **BASE, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", **BASE},
    "olmo2-bias": {"model_type": "olmo2", **BASE, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", **BASE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "glm": {"model_type": "glm", **BASE, "head_dim": 16, "pad_token_id": 0},
    "glm4": {"model_type": "glm4", **BASE, "head_dim": 16, "pad_token_id": 0, "attention_bias": False},
    "glm4-bias": {"model_type": "glm4", **BASE, "pad_token_id": 0},
    "granite": {"model_type": "granite", **BASE, "attention_bias": True, "mlp_bias": True},
    "gpt_oss": {"model_type": "gpt_oss", **BASE, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"model_type": "mixtral", **BASE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **BASE,
        **{key: MOE[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")},
        "shared_expert_intermediate_size": 80,
        "mlp_only_layers": [1],
    },
}
PLAIN = ("llama", "qwen2", "qwen3")
DENSE = ("gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "glm", "glm4", "glm4-bias", "granite")
MOE_FAMILIES = ("qwen3_moe", "deepseek_v2", "deepseek_v3")
MORE_MOE = ("mixtral", "qwen2_moe", "gpt_oss")
TOKENS = 128


def build(config: dict[str, Any], device: str = "cpu", **options: Any) -> Any:
    values = {key: value for key, value in config.items() if key != "model_type"}
    hf = transformers.AutoConfig.for_model(config["model_type"], **values)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.float32, **options)


def part_sizes(model: Any) -> dict[str, int]:
    """Parameters by part, from the names that transformers gives them."""
    sizes = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = (
            "norms"
            if "norm" in name
            else "attention"
            if "self_attn" in name
            else "mlp"
            if ".mlp." in name
            else "embedding"
            if "embed_tokens" in name
            else "lm_head"
        )
        sizes[part] += parameter.numel()
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_transformers(name: str) -> None:
    spec, model = spec_from_config(CONFIGS[name]), build(CONFIGS[name], "meta")
    count, real = spec.parameter_count, part_sizes(model)
    assert dataclasses.asdict(count) == {
        "embedding": real["embedding"],
        "lm_head": real["lm_head"],
        "attention": real["attention"],
        "norms": real["norms"],
        "dense_mlp": count.dense_mlp,
        "moe_mlp": real["mlp"] - count.dense_mlp,
    }
    assert spec.parameters() == model.num_parameters()
    for i, layer in enumerate(model.get_decoder().layers):
        assert spec.layer_parameters(i) == sum(p.numel() for p in layer.parameters())
        assert spec.is_moe(i) == hasattr(layer.mlp, "experts")


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_own_dictionary_and_file_give_the_same_spec(name: str, tmp_path: Path) -> None:
    """`job.py` reads config.to_dict(); users have folders that save_pretrained wrote."""
    spec = spec_from_config(CONFIGS[name], tmp_path.name)
    config = build(CONFIGS[name], "meta").config
    assert spec_from_config(config.to_dict(), tmp_path.name) == spec
    config.save_pretrained(tmp_path)
    assert load_model_spec(str(tmp_path)) == spec
    assert load_model_spec(str(tmp_path / "config.json")) == spec


PUBLISHED = {
    "llama-3.2-1b": 1.24e9,
    "llama-3.2-3b": 3.21e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.1-70b": 70.6e9,
    "llama-3.1-405b": 406e9,
    "mistral-7b": 7.25e9,
    "mistral-nemo-12b": 12.2e9,
    "mistral-small-24b": 23.6e9,
    "qwen2.5-0.5b": 0.494e9,
    "qwen2.5-1.5b": 1.54e9,
    "qwen2.5-3b": 3.09e9,
    "qwen2.5-7b": 7.62e9,
    "qwen2.5-14b": 14.8e9,
    "qwen2.5-32b": 32.8e9,
    "qwen2.5-72b": 72.7e9,
    "qwen3-0.6b": 0.596e9,
    "qwen3-1.7b": 1.72e9,
    "qwen3-4b": 4.02e9,
    "qwen3-8b": 8.19e9,
    "qwen3-14b": 14.8e9,
    "qwen3-32b": 32.8e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen3-235b-a22b": 235e9,
    "gemma-2-2b": 2.61e9,
    "gemma-2-9b": 9.24e9,
    "gemma-2-27b": 27.2e9,
    "gemma-3-270m": 0.268e9,
    "gemma-3-1b": 1.0e9,
    "gemma-3-4b": 3.88e9,
    "gemma-3-12b": 11.77e9,
    "gemma-3-27b": 27.0e9,
    "phi-3-mini": 3.82e9,
    "phi-3-medium": 14.0e9,
    "phi-4": 14.7e9,
    "phi-4-mini": 3.84e9,
    "olmo-2-1b": 1.48e9,
    "olmo-2-7b": 7.30e9,
    "olmo-2-13b": 13.7e9,
    "olmo-2-32b": 32.2e9,
    "smollm3-3b": 3.08e9,
    "glm-4-9b": 9.40e9,
    "glm-4-32b": 32.6e9,
    "granite-3.3-2b": 2.53e9,
    "granite-3.3-8b": 8.17e9,
    "gpt-oss-20b": 20.9e9,
    "gpt-oss-120b": 116.8e9,
    "mixtral-8x7b": 46.7e9,
    "mixtral-8x22b": 140.6e9,
    "qwen1.5-moe-a2.7b": 14.3e9,
    "qwen2-57b-a14b": 57.4e9,
    "deepseek-v2-236b": 235.7e9,
    "deepseek-v3-671b": 671e9,
}


def test_built_in_models_match_published_figures() -> None:
    """As the models' cards and reports give them, to three digits."""
    assert PUBLISHED.keys() == KNOWN_MODELS.keys()
    for name, published in PUBLISHED.items():
        assert load_model_spec(name).parameters() == pytest.approx(published, rel=0.006), name


@pytest.mark.parametrize(
    "name",
    ["llama-3.1-8b", "qwen2.5-72b", "qwen3-30b-a3b", "gemma-2-2b", "gemma-3-1b", "gpt-oss-20b", "deepseek-v2-236b"],
)
def test_built_in_models_are_those_that_transformers_makes(name: str) -> None:
    assert load_model_spec(name).parameters() == build(dict(KNOWN_MODELS[name]), "meta").num_parameters()


# FLOPs


def counted_flops(model: Any, tokens: int = TOKENS, **extra: Any) -> int:
    """But for the rotary angles, once a pass, which transformers 5.17 finds by a product of matrices."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(0, 256, (1, tokens)), use_cache=False, **extra)
    of_module = counter.get_flop_counts()
    angles = sum(sum(count.values()) for name, count in of_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - angles


@pytest.mark.parametrize("name", [*PLAIN, *DENSE, *MOE_FAMILIES, *MORE_MOE, "qwen3_moe-mixed", "deepseek_v2-biases"])
def test_flops_equal_torch_counter(name: str) -> None:
    """The counter takes every pair, masked or not; it sees the products of eager experts."""
    model = build(CONFIGS[name], attn_implementation="eager", experts_implementation="eager")
    spec = spec_from_config(CONFIGS[name])
    per_token = spec.linear_flops_per_token() + spec.head_flops_per_token()
    predicted = TOKENS * per_token + TOKENS**2 * spec.attention_flops_per_pair()
    assert counted_flops(model) == predicted


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_window_is_what_transformers_masks(name: str) -> None:
    """A query's output moves with the tokens that its window holds, and with no other."""
    config = {**CONFIGS[name], "num_hidden_layers": 1, "sliding_window": 5, "use_sliding_window": True}
    config["max_window_layers"] = 0
    model = build(config, attn_implementation="eager").eval()
    with torch.no_grad():
        mask = model(torch.arange(12)[None], output_attentions=True).attentions[0][0, 0] > 0
    assert int(mask.sum()) == int(spec_from_config(config).attention_pairs(np.array([12]))[0])


# Activation bytes


class SavesQkvo(torch.autograd.Function):  # type: ignore[misc]
    """Keeps for backward what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        tokens, heads, size = q.shape
        out = v.new_zeros(tokens, heads, size)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> str:
    """Our own attention on its way to torch's kernel, in whose place another keeps as much; its name."""
    from hbp.parallel import ulysses, varlen

    def varlen_attn(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        assert q.size(2) == k.size(2) == v.size(2)  # it knows one head size
        return SavesQkvo.apply(q, k, v)

    def flex(q: Any, k: Any, v: Any, *_: Any) -> Any:
        return SavesQkvo.apply(q, k, v)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(varlen, "KERNELS", {**varlen.KERNELS, "sdpa": varlen.KERNELS["varlen"]})
    monkeypatch.setattr(varlen, "FEATURES", {**varlen.FEATURES, "sdpa": varlen.FEATURES["flex"]})
    monkeypatch.setattr(varlen, "_flex", flex)
    return ulysses.register_attention("sdpa")


def on_one_rank() -> Any:
    from hbp.parallel import ulysses, varlen

    return ulysses.PackLayout(varlen.make_documents((TOKENS,), torch.device("cpu")))


def saved_bytes_per_token(layer: Any, hidden: Any, layer_inputs: dict[str, Any], skip: set[int]) -> float:
    """Bytes of the distinct storages that autograd saves in one layer's forward."""
    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            saved[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(hidden, attention_mask=None, **layer_inputs)
    return sum(storage.nbytes() for storage in saved.values()) / TOKENS


def measured_activations(model: Any, index: int, dtype: Any, **extra: Any) -> float:
    decoder = model.to(dtype).train().get_decoder()
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, dtype=dtype, requires_grad=True)
    position_ids = torch.arange(TOKENS)[None]
    kinds = getattr(model.config, "layer_types", None)
    by_kind = model.config.model_type == "gemma3_text"
    rotary = decoder.rotary_emb(hidden, position_ids, *([kinds[index]] if by_kind else []))
    shared = [*model.parameters(), *model.buffers(), *(rotary if isinstance(rotary, tuple) else (rotary,))]
    skip = {tensor.untyped_storage().data_ptr() for tensor in shared}
    inputs = {"position_embeddings": rotary, "position_ids": position_ids, **extra}
    return saved_bytes_per_token(decoder.layers[index], hidden, inputs, skip)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PLAIN, "mistral", "llama-biases-tied"])
def test_activation_bytes_equal_saved_tensors(name: str, dtype: str) -> None:
    """Through torch's own fused attention, causal, one document."""
    model = build({**CONFIGS[name], "sliding_window": None}, attn_implementation="sdpa")
    real = measured_activations(model, 1, getattr(torch, dtype))
    spec = spec_from_config(CONFIGS[name])
    assert spec.activation_bytes_per_token_per_layer(4 if dtype == "float32" else 2) == pytest.approx(real)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*MOE_FAMILIES, "deepseek_v2-biases", "deepseek_v2-wide-values"])
def test_activation_bytes_of_moe_and_mla(name: str, dtype: str, as_on_cuda: str) -> None:
    """Through our own attention: MLA's values are padded, unless they are as wide as the keys."""
    model = build(CONFIGS[name], attn_implementation=as_on_cuda)
    spec = spec_from_config(CONFIGS[name])
    for layer in (0, 2):  # DeepSeek's first is dense
        real = measured_activations(model, layer, getattr(torch, dtype), hbp_layout=on_one_rank())
        ours = spec.layer_activation_bytes(layer, 4 if dtype == "float32" else 2)
        assert ours == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*DENSE, *MORE_MOE])
def test_activation_bytes_of_more_families(name: str, dtype: str, as_on_cuda: str) -> None:
    """Each with its own norms, fused projections, gates; within the 5 % that a plan's memory leaves room for."""
    model = build(CONFIGS[name], attn_implementation=as_on_cuda)
    spec = spec_from_config(CONFIGS[name])
    for layer in (0, 1):
        real = measured_activations(model, layer, getattr(torch, dtype), hbp_layout=on_one_rank())
        ours = spec.layer_activation_bytes(layer, 4 if dtype == "float32" else 2)
        print(f"{name} {dtype} {layer}: {ours:.0f} of {real:.0f}")
        assert ours == pytest.approx(real, rel=0.05)


def test_flops_of_the_kernel(as_on_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch counts of two products over the tensors that reach the kernel, every pair of them."""
    config = CONFIGS["deepseek_v2"]
    model = build(config, attn_implementation=as_on_cuda, experts_implementation="eager")
    spec = spec_from_config(config)

    def products(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> Any:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return ((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", products)
    per_token = spec.linear_flops_per_token() + spec.head_flops_per_token()
    predicted = TOKENS * per_token + TOKENS**2 * spec.attention_kernel_flops_per_pair()
    assert counted_flops(model, hbp_layout=on_one_rank()) == predicted
    assert spec.attention_kernel_flops_per_pair() == spec.attention_flops_per_pair() * (24 + 24) / (24 + 16)


@pytest.fixture
def fake_group() -> Iterator[Any]:
    """Sixteen ranks of which only this one exists: collectives return at once, with the right storages."""
    if torch.distributed.is_initialized():
        pytest.skip("another test holds the process group")
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=16)
    yield torch.distributed.new_group
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "heads"), [("llama", 8), ("qwen3", 8), ("deepseek_v2", 8), ("qwen3", 3), ("deepseek_v2", 3)]
)
def test_activation_bytes_under_ulysses(name: str, heads: int, fake_group: Any, as_on_cuda: str) -> None:
    """Through our own exchange and gather; at 16, 8 heads are gathered over 2, and 3 over all ranks."""
    from hbp.parallel import ulysses, varlen
    from hbp.parallel.gather_kv import make_gather
    from hbp.parallel.mesh import SequenceGroups

    config = {**CONFIGS[name], "hidden_size": 96, "num_attention_heads": heads}
    if heads == 3:
        config["num_key_value_heads"] = 3
    model, spec, cpu = build(config, attn_implementation=as_on_cuda), spec_from_config(config), torch.device("cpu")
    for degree in (1, 2, 4, 8, 16):  # K/V heads are repeated from 4 on, except under MLA
        u, g = spec.ulysses_degree(degree), spec.gather_degree(degree)
        exchange, across = (fake_group(list(range(n))) if n > 1 else None for n in (u, g))
        lengths = (TOKENS * degree,)
        gather = make_gather(lengths, SequenceGroups(u, g, exchange, across), 0, cpu)
        layout = ulysses.PackLayout(varlen.make_documents(lengths, cpu), degree, exchange, gather)
        real = measured_activations(model, 0, torch.bfloat16, hbp_layout=layout)
        assert spec.layer_activation_bytes(0, 2, degree) == pytest.approx(real), degree


def test_activation_bytes_are_the_mean_over_layers() -> None:
    spec = spec_from_config(CONFIGS["deepseek_v2"])
    layers = [spec.layer_activation_bytes(i, 2) for i in range(3)]
    assert layers[0] != layers[1]
    assert spec.activation_bytes_per_token_per_layer(2) == pytest.approx(np.mean(layers))
    assert spec.checkpoint_bytes_per_token(2) == 128


# Communication


def test_alltoall_bytes() -> None:
    spec = load_model_spec("llama-3.1-8b")  # 32 query heads, 8 key/value heads, head size 128
    for degree in (1, 2, 4, 8, 16, 32):
        assert spec.kv_heads_at(degree) == max(8, degree)
        assert spec.alltoall_bytes_per_token(degree, 2) == 2 * 128 * (2 * 32 + 2 * max(8, degree))
    deepseek = load_model_spec("deepseek-v2-236b")
    assert deepseek.alltoall_bytes_per_token(8, 2) == 2 * 128 * (192 + 192 + 128 + 128)
    assert dataclasses.replace(spec, heads=12, kv_heads=6).kv_heads_at(4) == 12


def test_degrees_beyond_the_heads_gather_keys_and_values() -> None:
    spec = load_model_spec("llama-3.1-8b")
    for degree, ulysses, gather in ((8, 8, 1), (32, 32, 1), (64, 32, 2), (256, 32, 8)):
        assert (spec.ulysses_degree(degree), spec.gather_degree(degree)) == (ulysses, gather)
        # All heads' keys and values, once repeated to 32, of each of the other slices; 128 per head and bfloat16.
        received = (gather - 1) * max(8, ulysses) * (128 + 128) * 2
        assert spec.gather_bytes_per_token(degree, 2) == received
        assert spec.alltoall_bytes_per_token(degree, 2) == 2 * 128 * (2 * 32 + 2 * max(8, ulysses))
    odd = load_model_spec("qwen2.5-32b")  # 40 heads
    assert (odd.ulysses_degree(16), odd.gather_degree(16), odd.kv_heads_at(16)) == (8, 2, 8)


# Cut to a few layers


@pytest.mark.parametrize("name", CONFIGS)
def test_first_layers_are_those_of_the_configuration_with_fewer(name: str) -> None:
    spec = spec_from_config(CONFIGS[name])
    for count in range(1, spec.n_layers + 1):
        config = {**CONFIGS[name], "num_hidden_layers": count}
        assert spec.with_layers(count).parameters() == build(config, "meta").num_parameters()
    for count in (0, spec.n_layers + 1):
        with pytest.raises(HbpError, match=f"stack of {count} cannot be cut"):
            spec.with_layers(count)


# As plain data


@pytest.mark.parametrize("name", [*CONFIGS, *KNOWN_MODELS])
def test_json_round_trip(name: str) -> None:
    spec = load_model_spec(name) if name in KNOWN_MODELS else spec_from_config(CONFIGS[name])
    packed = dataclasses.replace(spec, packed_parameters=100)
    for each in (spec, packed):
        assert ModelSpec.from_json(json.loads(json.dumps(each.to_json()))) == each
    assert packed.to_json().keys() - spec.to_json().keys() == {"packed_parameters"}  # plans of others stay as they were


@pytest.mark.parametrize("change", [{"heads": None}, {"colour": "red"}, {"latent": {"rank": 1}}, {"experts": 3}])
def test_damaged_json_is_refused_in_one_line(change: dict[str, Any]) -> None:
    data = {**load_model_spec("llama-3.1-8b").to_json(), **change}
    if change == {"heads": None}:
        del data["heads"]
    with pytest.raises(HbpError, match="damaged") as caught:
        ModelSpec.from_json(data)
    assert "\n" not in str(caught.value)


def test_needs_no_torch() -> None:
    code = "import sys, hbp.cost.model_spec as m; m.load_model_spec('llama-3.1-8b').parameters()"
    check = f"{code}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)

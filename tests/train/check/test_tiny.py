"""A tiny instance keeps what its family's code looks at: kinds of layers, heads in their ratio, what scales."""

from __future__ import annotations

import json

import pytest
from workers import write_config

from hbp.cost.known_models import KNOWN_MODELS
from hbp.cost.model_spec import load_model_spec, spec_from_config
from hbp.errors import HbpError
from hbp.train.check.compare import model_config
from hbp.train.check.tiny import VOCAB, WINDOW, head_dim, tiny_config, write_tiny

AutoConfig = pytest.importorskip("transformers").AutoConfig


@pytest.mark.parametrize("few_heads", [False, True])
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_what_stays(name, few_heads):
    given = model_config(name).to_dict()
    tiny = tiny_config(model_config(name), few_heads=few_heads)
    whole, small = load_model_spec(name), spec_from_config(tiny)
    assert small.parameters() < 600_000
    assert 2 <= small.n_layers <= 4
    assert small.vocab == VOCAB
    kinds = {(bool(whole.window(i)), whole.is_moe(i)) for i in range(whole.n_layers)}
    assert {(bool(small.window(i)), small.is_moe(i)) for i in range(small.n_layers)} == kinds
    assert {window for window in small.windows if window} <= {WINDOW}
    if few_heads:
        assert small.heads == 2
    else:
        assert small.heads % 4 == 0
        assert small.heads * whole.kv_heads == whole.heads * small.kv_heads
    fills = whole.heads * whole.qk_head_dim == whole.hidden and whole.latent is None
    assert (small.heads * small.qk_head_dim == small.hidden and small.latent is None) == fills
    same = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "layer_norms", "tied_embeddings", "model_type")
    assert [getattr(small, key) for key in same] == [getattr(whole, key) for key in same]
    if "query_pre_attn_scalar" in given:
        share = tiny["query_pre_attn_scalar"] / head_dim(tiny)
        assert share == pytest.approx(given["query_pre_attn_scalar"] / head_dim(given), rel=0.1)
    for key in ("final_logit_softcapping", "logits_scaling", "embedding_multiplier", "residual_multiplier"):
        assert tiny.get(key) == given.get(key)


def test_every_kind_of_layer_once_in_order():
    tiny = tiny_config(model_config("gemma-3-12b"))
    assert tiny["layer_types"] == ["sliding_attention", "full_attention"]
    assert tiny_config(model_config("smollm3-3b"))["no_rope_layers"] == [1, 0]
    deepseek = tiny_config(model_config("deepseek-v3-671b"))
    assert (deepseek["num_hidden_layers"], deepseek["first_k_dense_replace"]) == (2, 1)
    mixed = model_config("qwen3-30b-a3b")
    mixed.mlp_only_layers = [0, 7]
    assert tiny_config(mixed)["mlp_only_layers"] == [0]


def test_what_shows_beyond_a_length_shows_within_the_documents():
    tiny = tiny_config(AutoConfig.for_model("llama4_text"))
    assert (tiny["floor_scale"], tiny["attention_chunk_size"], tiny["intermediate_size_mlp"]) == (WINDOW, WINDOW, 56)
    assert (tiny["no_rope_layers"], tiny["moe_layers"]) == ([1, 0], [0, 1])
    alternating = tiny_config(AutoConfig.for_model("llama4_text", interleave_moe_layer_step=2))
    assert (alternating["no_rope_layers"], alternating["moe_layers"]) == ([1, 1, 0], [1, 2])
    bert = tiny_config(AutoConfig.for_model("ernie", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    assert (bert["hidden_dropout_prob"], bert["attention_probs_dropout_prob"]) == (0.0, 0.0)


def test_what_cannot_be_made_small(tmp_path):
    config = json.loads(json.dumps(tiny_config(model_config("llama-3.1-8b"))))
    with pytest.raises(
        HbpError, match=r"no tiny llama model can be made: model.embed_tokens.weight stays \[999999, 32\]"
    ):
        write_tiny(tmp_path / "large", {**config, "vocab_size": 999_999})
    for family, why in (
        ("t5", "no tiny t5 model can be made: Unrecognized configuration class"),
        ("gpt2", "gpt2 models have no list of decoder layers"),  # its sizes have names of their own, too
        ("rwkv", "the rwkv configuration has no num_attention_heads"),
    ):
        config = model_config(write_config(tmp_path / family, {"model_type": family}))
        with pytest.raises(HbpError, match=why):
            write_tiny(tmp_path / f"tiny-{family}", tiny_config(config))

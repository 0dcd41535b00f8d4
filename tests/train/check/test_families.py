"""Families that are known not to train are refused by name, and a decoder is found wherever a family keeps it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hbp.errors import HbpError
from hbp.train.check.families import PROVEN_FAMILIES, check_trainable, decoder_of


@pytest.mark.parametrize("family", ["falcon", "bloom", "mpt"])
def test_attention_of_its_own_is_refused_by_name(family: str) -> None:
    with pytest.raises(HbpError, match=f"{family} models compute attention in their own code"):
        check_trainable(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", [*PROVEN_FAMILIES, "opt", "olmoe", "exaone4"])
def test_attention_that_is_looked_up_is_not(family: str) -> None:
    check_trainable(AutoConfig.for_model(family))


def test_what_goes_by_a_tokens_place_in_the_pack_is_refused_by_its_setting() -> None:
    """With both settings off Llama 4 passes the check: documents are no longer than a chunk, and are what they were."""
    with pytest.raises(HbpError, match=r"chunked_attention layers.* longer than 8192 tokens, set each of layer_types"):
        check_trainable(AutoConfig.for_model("llama4_text"))
    with pytest.raises(HbpError, match=r"place in the pack \(attn_temperature_tuning\);.* longer than 8191 tokens"):
        check_trainable(AutoConfig.for_model("llama4_text", layer_types=["full_attention"] * 48))
    whole = {"layer_types": ["full_attention"] * 48, "attn_temperature_tuning": False}
    check_trainable(AutoConfig.for_model("llama4_text", **whole))


def test_a_decoder_that_the_family_does_not_name() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
    with torch.device("meta"):
        llama4 = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **sizes, num_local_experts=2))
        bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes))
    assert len(decoder_of(llama4).layers) == 2
    with pytest.raises(HbpError, match="bert models have no list of decoder layers"):
        decoder_of(bert)

"""Reading configurations: transformers' defaults, windows by family, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbp.cost.dimensions import FAMILIES
from hbp.cost.guess import spec_of_any
from hbp.cost.known_models import KNOWN_MODELS
from hbp.cost.model_spec import load_model_spec, spec_from_config
from hbp.errors import HbpError

LLAMA, QWEN2, QWEN3_MOE, DEEPSEEK = (
    dict(KNOWN_MODELS[name]) for name in ("llama-3.1-8b", "qwen2.5-32b", "qwen3-30b-a3b", "deepseek-v2-236b")
)
MISTRAL = {**LLAMA, "model_type": "mistral"}
OPTIONAL = {
    "model_type",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "decoder_sparse_step",
    "mlp_only_layers",
    "first_k_dense_replace",
    "sliding_window",
    "attention_bias",
    "pad_token_id",
}
REQUIRED = [(c, key) for c in (LLAMA, QWEN3_MOE, DEEPSEEK) for key in c if key not in OPTIONAL]


def refusal(config: dict[str, Any]) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(HbpError) as caught:
        spec_from_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("config", "key"), REQUIRED, ids=[f"{c['model_type']}-{key}" for c, key in REQUIRED])
def test_a_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    family = config["model_type"]
    message = f"the {family} configuration lacks '{key}'; give the model's whole config.json"
    assert refusal({k: v for k, v in config.items() if k != key}) == message


def of_known(family: str) -> dict[str, Any]:
    return next(dict(config) for config in KNOWN_MODELS.values() if config["model_type"] == family)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "glm"])  # of which no size is known by name
def test_absent_keys_get_transformers_defaults(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = {k: v for k, v in of_known(family).items() if k not in OPTIONAL}
    if family in ("qwen2", "qwen3"):  # whose smallest have not as many heads as the default of key/value heads
        config = {k: v for k, v in LLAMA.items() if k not in OPTIONAL}
    hf = transformers.AutoConfig.for_model(family, **config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    spec = spec_from_config({"model_type": family, **config})
    assert spec.parameters() == model.num_parameters()
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None) or None
    for layer, kind in enumerate(kinds):
        assert spec.window(layer) == (window if kind == "sliding_attention" else None)
    assert spec.kv_heads == (hf.num_key_value_heads or hf.num_attention_heads)


def test_windows_of_each_layer() -> None:
    qwen = {**QWEN2, "num_hidden_layers": 3, "sliding_window": 16, "max_window_layers": 1}
    used = {**qwen, "use_sliding_window": True}
    assert spec_from_config(qwen).windows == ()
    assert spec_from_config(used).windows == (None, 16, 16)
    assert spec_from_config({**used, "max_window_layers": 3}).windows == ()
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    spec = spec_from_config({**used, "layer_types": kinds})
    assert [spec.window(layer) for layer in range(3)] == [16, None, None]
    mistral = {**MISTRAL, "num_hidden_layers": 2, "sliding_window": 16}
    assert spec_from_config(mistral).windows == (16, 16)
    assert spec_from_config({**mistral, "sliding_window": None}).windows == ()
    moe = {**QWEN3_MOE, "num_hidden_layers": 2, "sliding_window": 16, "use_sliding_window": True}
    assert spec_from_config({**moe, "max_window_layers": 1}).windows == (
        16,
        16,
    )  # transformers does not look at it


def test_null_experts_are_a_dense_model() -> None:
    assert spec_from_config({**DEEPSEEK, "n_routed_experts": None}).experts is None
    assert spec_from_config({**QWEN3_MOE, "num_experts": 0}).experts is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not known to the cost model; known are llama, mistral, qwen2,",
        ),
        ({"model_type": None}, "model_type None is not known"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not known"),
        ({"hidden_size": "wide"}, "hidden_size 'wide'; it must be a whole number of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0; it must be a whole number of at least 1"),
        ({"vocab_size": None}, "vocab_size None; it must be"),
        ({"num_key_value_heads": 3}, "32 num_attention_heads, which its 3 num_key_value_heads do not divide"),
        ({"hidden_size": 16}, "gives no head size"),
        ({**QWEN3_MOE, "num_experts_per_tok": 129}, "sends a token to 129 of 128 experts"),
        (
            {**QWEN3_MOE, "mlp_only_layers": "all"},
            "mlp_only_layers 'all'; it must be a list of layer numbers",
        ),
        (
            {**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types do not name each of its 64 layers",
        ),
    ],
)
def test_nonsense_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    assert message in refusal({**LLAMA, **change})


def test_a_name_that_is_almost_right() -> None:
    with pytest.raises(HbpError, match=r"no model 'Qwen/qwen3-8': give a built-in name, such as qwen3-8b,"):
        load_model_spec("Qwen/qwen3-8")


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file: str(tmp_path / file))
    assert load_model_spec("lab/Model-7B") == spec_from_config(MISTRAL, "Model-7B")


def test_the_text_part_of_a_model_that_sees_pictures() -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "head_dim": 128}
    assert spec_from_config({"model_type": "gemma3", "text_config": text}) == spec_from_config(text)


def test_a_family_that_is_not_known_is_guessed_from_its_parameters() -> None:
    config = {**LLAMA, "model_type": "starcoder2"}
    gated = spec_from_config(LLAMA)
    two = gated.parameters() - gated.n_layers * gated.hidden * gated.intermediate
    guess = spec_of_any(config, lambda: two + 3200)  # a hundred parameters more in each layer
    assert (guess.mlp_matrices, guess.parameters(), guess.model_type) == (2, two + 3200, "starcoder2")
    assert spec_of_any(config, gated.parameters).mlp_matrices == 3
    with pytest.raises(HbpError, match=r"'starcoder2' is not known to the cost model, and .* do not look like"):
        spec_of_any(config, lambda: 2 * gated.parameters())
    assert spec_of_any(LLAMA, lambda: 0) == gated  # it is not asked


def test_files(tmp_path: Path) -> None:
    with pytest.raises(HbpError, match=r"no model 'nowhere': give a built-in name, such as llama-3\.1-8b"):
        load_model_spec("nowhere")
    with pytest.raises(HbpError, match="no model"):
        load_model_spec(str(tmp_path))
    file = tmp_path / "config.json"
    for content, message in (
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "holds no JSON object"),
    ):
        file.write_bytes(content)
        with pytest.raises(HbpError, match=message) as caught:
            load_model_spec(str(file))
        assert "\n" not in str(caught.value)

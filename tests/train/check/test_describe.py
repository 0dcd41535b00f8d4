"""A family that the cost model does not know is planned as it is trained, or refused alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hbp
from hbp.cli.main import main
from hbp.errors import HbpError
from hbp.plan import read_info
from hbp.train.check.describe import plain_names

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
STRANGERS: dict[str, dict[str, Any]] = {
    "exaone4": SMALL | {"sliding_window": 16},
    "apertus": SMALL,
    "stablelm": SMALL | {"use_qkv_bias": True},
    "cohere": SMALL,  # tied
    "olmoe": SMALL | {"num_experts": 8, "num_experts_per_tok": 2},
    "biogpt": {"attention_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("family", STRANGERS)
def test_a_family_that_is_not_known_is_planned_as_it_is_trained(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": family, "attention_dropout": 0.0} | STRANGERS[family]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = hbp.describe_model(str(tmp_path))  # what a run stands on
    np.save(tmp_path / "lengths.npy", np.array([12, 7, 30]))
    asked = ("--lengths", str(tmp_path / "lengths.npy"), "--cluster", "cpu-local", "--memory-gib", "4", "--gpus", "2")
    assert main(["plan", *asked, "--model", str(tmp_path), "--out", str(tmp_path / "plan")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "unproven" in line]
    assert [line.split("; ")[0] for line in said] == [
        f"hbp: {family} models are unproven and planned as a plain decoder of {spec.parameters():,} parameters"
    ]
    assert f"`hbp check {tmp_path}`" in said[0]
    planned = read_info(tmp_path / "plan").model
    assert json.loads(json.dumps(spec.to_json())) == {**planned, "name": family}
    assert hbp.CostModel.of(spec, "cpu-local", 2).model == spec
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert spec.parameters() == pytest.approx(model.num_parameters(), rel=0.005)  # Cohere has one norm a layer
    assert (spec.n_layers, spec.hidden, spec.vocab) == (
        model.config.num_hidden_layers,
        model.config.hidden_size,
        model.config.vocab_size,
    )


def test_sizes_by_a_familys_own_names() -> None:
    given = {"d_model": 32, "num_layers": 3, "attention_heads": 4, "vocab_size": 320}
    sizes = plain_names(transformers.AutoConfig.for_model("xglm", **given))
    assert (sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]) == (32, 3, 4)
    assert sizes["vocab_size"] == 320


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3_next"}, "qwen3_next models have linear_attention layers, whose state would run"),
        ({"model_type": "llama4_text"}, "llama4_text models have chunked_attention layers, which a mask cuts"),
        ({"model_type": "falcon"}, "falcon models compute attention in their own code"),
        ({"model_type": "olmoe", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "embedding is 'dynamic'"),
        ({"model_type": "olmoe", "quantization_config": {"quant_method": "gptq"}}, "the model is quantized"),
        ({"model_type": "gpt2", "attn_pdrop": 0.0}, "gpt2 models have no list of decoder layers"),
        ({"model_type": "jetmoe"}, "no model can be made of .*: ValueError: JetMoeForCausalLM does not support"),
        ({"model_type": "no_such"}, "cannot load a model from .* model type `no_such`"),
    ],
)
def test_what_cannot_be_trained_is_not_planned_either(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HbpError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        hbp.describe_model(str(tmp_path))


def test_without_transformers_a_family_that_is_not_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "exaone4"}))
    np.save(tmp_path / "lengths.npy", np.array([12, 7, 30]))
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("hbp.train")]:
        monkeypatch.delitem(sys.modules, name)
    asked = ("--lengths", str(tmp_path / "lengths.npy"), "--gpus", "2", "--out", str(tmp_path / "plan"))
    assert main(["plan", *asked, "--model", str(tmp_path)]) == 2
    assert "this needs transformers; install with" in capsys.readouterr().err
    with pytest.raises(HbpError, match=r"'exaone4' is not known .*; known are llama,.*hbp\.describe_model"):
        hbp.CostModel.of(tmp_path)

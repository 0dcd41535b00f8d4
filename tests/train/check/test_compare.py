"""What `hbp check` says of families that pass, of those that do not, and when `hbp train` asks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import config_of, hbp, write_job
from workers import write_config

import hbp as hbp_library
from hbp.errors import HbpError
from hbp.run.job import check_ready
from hbp.train.check import compare
from hbp.train.check.compare import TOLERANCE, findings, model_config, require_checked
from hbp.train.check.properties import NAMES, NEIGHBOUR, PROPERTIES, RankRun, documents
from hbp.train.check.reference import alone, draws_at_random, rounded_away, worst
from hbp.train.check.tiny import tiny_config, write_tiny

STARCODER = {  # no gate in its MLP, layer norms with biases, a family that nothing here knows
    "model_type": "starcoder2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "residual_dropout": 0.0,
    "embedding_dropout": 0.0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, and runs of four ranks that are right in everything, made from the reference."""
    folder = write_tiny(tmp_path_factory.mktemp("tiny") / "a", tiny_config(model_config("llama-3.1-8b")))
    loss, gradients = alone(folder, documents())

    def split(scale: float = 1.0, name: str | None = None) -> list[RankRun]:
        changed = {key: x * (scale if key == name else 1.0) for key, x in gradients.items()}
        return [
            (loss / 4, {key: (0, x.chunk(4)[rank] if rank < len(x.chunk(4)) else x[:0]) for key, x in changed.items()})
            for rank in range(4)
        ]

    return folder, split


def runs_of(split: Any, changes: dict[str, Any]) -> list[dict[tuple[str, str], Any]]:
    keys = [*(each.name for each in PROPERTIES), f"{NEIGHBOUR} 1", f"{NEIGHBOUR} 2"]
    right = split()
    return [{("m", key): changes.get(key, right)[rank] for key in keys} for rank in range(4)]


def test_right_runs_hold(tiny):
    folder, split = tiny
    found = findings("m", (folder, folder), runs_of(split, {}))
    assert [each.property for each in found] == list(NAMES)
    assert all(each.holds and not each.why for each in found)


def test_a_wrong_gradient_is_named_with_its_property(tiny):
    folder, split = tiny
    wrong = split(1.001, "model.layers.1.mlp.up_proj.weight")
    raised = ["ValueError: no such mask"] * 4
    found = findings("m", (folder, folder), runs_of(split, {"SP 2": wrong, f"{NEIGHBOUR} 2": wrong, "packed": raised}))
    failed = {each.property: each for each in found if not each.holds}
    assert failed.keys() == {"SP 2", NEIGHBOUR, "packed"}
    assert failed["SP 2"].where == failed[NEIGHBOUR].where == "model.layers.1.mlp.up_proj.weight"
    assert failed["SP 2"].error == pytest.approx(1e-3, rel=0.01)
    assert failed["SP 2"].why == "layers other than attention look at more than one token"
    assert (failed["packed"].error, failed["packed"].why) == (None, "ValueError: no such mask")


def test_missing_and_undefined_gradients_are_no_small_errors():
    one = {"a": torch.ones(2), "b": torch.ones(2)}
    loss = torch.ones(())
    assert worst((loss, {"a": torch.ones(2)}), (loss, one)) == (float("inf"), "b")
    error, where = worst((loss, {**one, "b": torch.tensor([1.0, torch.nan])}), (loss, one))
    assert where == "b"
    assert not error < TOLERANCE
    assert worst((loss, {**one, "c": torch.zeros(1)}), (loss, one))[0] == 0  # frozen there
    assert worst((loss, {**one, "c": torch.ones(1)}), (loss, one)) == (float("inf"), "c")


def test_what_is_rounding_in_the_plain_model_is_no_fault(tmp_path):
    """Without rotary embedding the gradient of a key's bias is zero: the softmax takes out what all keys share."""
    opt = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "dropout": 0.0}
    config = model_config(write_config(tmp_path / "opt", opt | {"num_hidden_layers": 2, "word_embed_proj_dim": 32}))
    folder = write_tiny(tmp_path / "tiny", tiny_config(config))
    want, (loss, exact) = alone(folder, documents()), alone(folder, documents(), torch.float64)
    error, where = worst((loss, exact), want)
    assert error > 0.1 and where.endswith("k_proj.bias")
    least = rounded_away(folder, documents(), TOLERANCE)
    assert all(name.endswith("k_proj.bias") for name in least) and least
    assert worst((loss, exact), want, least)[0] < TOLERANCE
    name = "model.decoder.layers.0.self_attn.k_proj.bias"
    seen = {**exact, name: exact[name] + 1e-3 * exact[name.replace("k_proj", "v_proj")]}
    error, where = worst((loss, seen), want, least)
    assert error > 10 * TOLERANCE and where == name  # a thousandth of its neighbour's is a fault


def test_a_layout_that_is_lost_on_the_way_is_said_in_plain_words(tiny):
    folder, split = tiny
    raised = ["HbpError: the attention function 'hbp' needs the pack's layout: call the model with ..."] * 4
    failed = [each for each in findings("m", (folder, folder), runs_of(split, {"alone": raised})) if not each.holds]
    assert [each.why.split(",")[0] for each in failed] == [
        "its layers do not hand on to attention what the model is called with"
    ]


def test_what_differs_document_by_document_is_no_fault_of_packs(tiny):
    folder, split = tiny
    wrong = split(1.5, "model.layers.1.mlp.up_proj.weight")
    changes = {"alone": wrong, "packed": wrong, "SP 4": ["ValueError: no such mask"] * 4, f"{NEIGHBOUR} 1": wrong}
    whys = {each.property: each.why for each in findings("m", (folder, folder), runs_of(split, changes)) if each.why}
    assert whys.keys() == {"alone", "packed", "SP 4", NEIGHBOUR}
    assert whys["alone"].startswith("even single documents come out otherwise")
    assert (whys["packed"], whys["SP 4"]) == ("'alone' does not hold", "ValueError: no such mask")
    assert whys[NEIGHBOUR].startswith("documents of a pack are not told apart")


def test_a_family_that_draws_random_numbers_in_training_is_told_so(tmp_path, tiny):
    """PhiMoE samples a token's experts while it is trained: nothing that it does is the same twice."""
    folder = tiny[0]
    moe = model_config(write_config(tmp_path / "moe", {"model_type": "phimoe"}))
    drawn = write_tiny(tmp_path / "tiny", tiny_config(moe))
    assert draws_at_random(drawn, documents()[0])
    assert not draws_at_random(folder, documents()[0])
    loss, gradients = alone(drawn, documents())
    other = [(loss / 4, {key: (0, 2 * x.chunk(4)[0]) for key, x in gradients.items()}) for _ in range(4)]
    runs = runs_of(lambda *_: other, {f"{NEIGHBOUR} 1": [(2 * loss, grads) for loss, grads in other]})
    found = [each for each in findings("m", (drawn, drawn), runs) if not each.holds]
    assert found[0].property == "alone"
    assert found[0].why.startswith("in training the family draws random numbers of its own")
    assert {each.why for each in found[1:]} == {"'alone' does not hold"}


def test_what_plain_transformers_cannot_run_is_said_in_a_line(tmp_path, tiny):
    with pytest.raises(HbpError, match=r"a tiny model like m does not run in plain transformers: [^\n]*\Z"):
        findings("m", (str(tmp_path), str(tmp_path)), runs_of(tiny[1], {}))


def test_proven_families_are_not_checked_again_and_others_once(tmp_path, monkeypatch):
    asked: list[str] = []
    answer: dict[str, Any] = {"refused": None, "properties": [{"property": "alone", "holds": True, "why": ""}]}

    def check(names: list[str]) -> list[dict[str, Any]]:
        asked.extend(names)
        return [answer]

    monkeypatch.setattr(compare, "check_models", check)
    record = tmp_path / "run" / "model-check.json"
    require_checked("a", model_config("llama-3.1-8b"), record)
    assert (asked, record.exists()) == ([], False)
    config = model_config(write_config(tmp_path / "model", STARCODER))
    require_checked("b", config, record)
    require_checked("b", config, record)
    assert asked == ["b"]
    config.num_hidden_layers = 3
    answer["properties"] = [
        {"property": "alone", "holds": True, "why": ""},
        {"property": "packed", "holds": False, "why": "masks are made elsewhere"},
    ]
    for _ in range(2):
        with pytest.raises(
            HbpError, match=r"starcoder2 models do not .*: 'packed' does not hold \(masks are made else"
        ):
            require_checked("b", config, record)
    assert asked == ["b", "b"]
    answer["refused"] = "no way"
    record.unlink()
    with pytest.raises(HbpError, match="no way"):
        require_checked("b", config, record)


def test_refused_by_name(tmp_path):
    """Known not to train: told without a run, exit code 1."""
    path = write_config(tmp_path / "next", {"model_type": "qwen3_next"})
    done = hbp("check", path, "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["holds"], result["model_type"], result["properties"]) == (False, "qwen3_next", [])
    assert "qwen3_next models have linear_attention layers, whose state would run" in result["refused"]
    with pytest.raises(HbpError, match=r"cannot read the configuration of .*: there is no such file or folder"):
        model_config(str(tmp_path / "nowhere"))
    for config, part in (
        (
            {"model_type": "gemma3"},
            "gemma3 models take more than text; give the configuration and weights of their text",
        ),
        (model_config("phi-4-mini").to_dict(), "the model's rotary embedding is 'longrope', which depends on"),
    ):
        job = write_job(tmp_path / config["model_type"], samples=20)
        write_config(job / "model", config)
        with pytest.raises(HbpError, match=part):
            check_ready(config_of(job))


def test_a_family_that_nothing_here_knows_is_checked_and_trained(tmp_path):
    """Once, before the ranks start; then its parameters stand in for a cost model."""
    job = write_job(tmp_path, samples=20, data={"eval_samples": 2})
    write_config(job / "model", STARCODER)
    done = hbp("train", str(job / "cfg.yaml"), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("starcoder2 models are not on the proven list") == 1
    record = json.loads(Path(job, "run", "model-check.json").read_text())
    assert record["holds"]
    assert [each["property"] for each in record["properties"]] == list(NAMES)
    assert len(json.loads(done.stdout)["results"][0]["parts"]) == 1
    assert (job / "run" / "hbp" / "model" / "model.safetensors").is_file()
    planned = json.loads(next(Path(job, "run").glob("**/plan.json")).read_text())["model"]
    spec = hbp_library.describe_model(str(job / "model"))  # as `hbp plan --model` has it
    assert planned | {"name": spec.name, "vocab": spec.vocab} == json.loads(json.dumps(spec.to_json()))

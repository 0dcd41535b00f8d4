"""What `from_pretrained` makes of a checkpoint is what is trained here, and what is exported loads there."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from workers import CPU, LLAMA, QWEN3_MOE, run_ranks, write_config, write_model

from hbp.cost.known_models import KNOWN_MODELS
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.train.batch import micro_batch_of
from hbp.train.check.compare import model_config
from hbp.train.check.families import PROVEN_FAMILIES
from hbp.train.check.tiny import tiny_config, write_tiny
from hbp.train.export import export_model, source_dtype
from hbp.train.model import load_sharded
from hbp.train.weights.stored import BIN, BIN_INDEX, WEIGHTS

IDS = np.random.default_rng(0).integers(0, 64, 40).astype(np.int32)


def plain_loss(folder: str | Path) -> float:
    """Of transformers alone."""
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(IDS).long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return float(F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]))


def as_bin(folder: str, to: Path, files: int = 1) -> str:
    """The same checkpoint in PyTorch's own format."""
    to.mkdir()
    (to / "config.json").write_text(Path(folder, "config.json").read_text())
    tensors = load_file(Path(folder, WEIGHTS))
    if files == 1:
        torch.save(tensors, to / BIN)
        return str(to)
    names = sorted(tensors)
    places = {name: f"pytorch_model-{i % files}.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, to / file)
    (to / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return str(to)


def load(rank: int, world: int, folders: dict[str, str], exports: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """Loss or refusal of each folder, and what was said; exported where a place is given."""
    mesh, found = make_mesh(world, [1], "cpu", 4), {}
    mask = np.ones(len(IDS), np.uint8)
    for name, folder in folders.items():
        with redirect_stderr(io.StringIO()) as said:
            try:
                model = load_sharded(folder, mesh.world, CPU)
                with torch.no_grad():
                    batch = micro_batch_of([(IDS, mask)], 0, 1, 0, 0, mesh, CPU)
                    result: Any = float(model(*batch.inputs)) / (len(IDS) - 1)
                if name in exports:
                    export_model(model, Path(exports[name]), dtype=torch.float32)
            except HbpError as error:
                result = str(error)
        found[name] = (result, said.getvalue())
    return found


FAMILY = {
    family: next(
        (name for name, config in KNOWN_MODELS.items() if config["model_type"] == family and name != "phi-4-mini"), None
    )
    for family in PROVEN_FAMILIES
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    from transformers import AutoConfig

    root = tmp_path_factory.mktemp("families")
    folders, exports = {}, {}
    for family, name in FAMILY.items():
        config = model_config(name) if name else AutoConfig.for_model(family)
        folders[family] = write_tiny(root / family, tiny_config(config))
        folders[f"{family}, bin"] = as_bin(folders[family], root / f"{family}-bin")
        exports[family] = str(root / f"{family}-out")
    return folders, exports, run_ranks(load, 2, folders, exports)


@pytest.mark.parametrize("family", PROVEN_FAMILIES)
def test_there_and_back(families, family):
    """The loss of one checkpoint, in both formats, is transformers' own, and so is that of the exported folder."""
    folders, exports, ranks = families
    want = plain_loss(folders[family])
    for rank in ranks:
        for name in (family, f"{family}, bin"):
            got, said = rank[name]
            assert got == pytest.approx(want, rel=1e-5), name
            assert said == ""
    assert plain_loss(exports[family]) == pytest.approx(want, rel=1e-6)
    before, after = (load_file(Path(f, WEIGHTS)) for f in (folders[family], exports[family]))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]), name


def change(folder: str, edit) -> str:
    path = Path(folder, WEIGHTS)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def own_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * 0.5


def same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def no_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


UNTIED = {**LLAMA, "tie_word_embeddings": False}
AS_TRANSFORMERS = {
    "a head of its own under a tied configuration": (LLAMA, own_head),
    "the embedding stored twice": (LLAMA, same_head),
    "the head stored in place of the embedding": (LLAMA, head_alone),
    "names without the prefix": (LLAMA, no_prefix),
    "rotary frequencies of old": (
        LLAMA,
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": t["model.norm.weight"][:4].clone()}),
    ),
    "a head that is not tied": (UNTIED, lambda t: None),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    folders, exports = {}, {}
    for number, (name, (config, edit)) in enumerate(AS_TRANSFORMERS.items()):
        folders[name] = change(write_model(root / str(number), config), edit)
        folders[f"{name}, bin"] = as_bin(folders[name], root / f"{number}-bin", files=2)
        exports[name] = str(root / f"{number}-out")
    bias = write_model(root / "bias", {**LLAMA, "attention_bias": True})
    write_config(root / "bias", LLAMA)
    folders["unused"] = bias
    folders["unused, bin"] = as_bin(bias, root / "bias-bin")
    missing = {"head": (UNTIED, "lm_head.weight"), "norm": (LLAMA, "model.norm.weight")}
    for name, (config, tensor) in missing.items():
        folders[name] = change(write_model(root / name, config), lambda t, tensor=tensor: t.pop(tensor))
        folders[f"{name}, bin"] = as_bin(folders[name], root / f"{name}-bin")
    Path(write_config(root / "strange", LLAMA), "consolidated.safetensors").write_bytes(b"")
    folders["strange"] = str(root / "strange")
    return folders, exports, run_ranks(load, 2, folders, exports)


@pytest.mark.parametrize("name", AS_TRANSFORMERS)
def test_as_from_pretrained_takes_it(odd, name):
    folders, exports, ranks = odd
    want = plain_loss(folders[name])
    for rank in ranks:
        assert rank[name][0] == pytest.approx(want, rel=1e-5)
        assert rank[f"{name}, bin"][0] == pytest.approx(want, rel=1e-5)
        apart = "lm_head.weight apart from model.embed_tokens.weight" in rank[name][1]
        assert apart == ("of its own" in name)
    assert plain_loss(exports[name]) == pytest.approx(want, rel=1e-6)
    tied = json.loads(Path(exports[name], "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in load_file(Path(exports[name], WEIGHTS)))


@pytest.mark.parametrize("name", ["unused", "unused, bin"])
def test_tensors_without_a_place_are_named(odd, name):
    folders, _, ranks = odd
    for rank in ranks:
        loss, said = rank[name]
        assert loss == pytest.approx(plain_loss(folders[name]), rel=1e-5)  # transformers leaves them out too
        assert "model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.o_proj.bias" in said
        assert "and 9 more" in said


@pytest.mark.parametrize("form", ["", ", bin"])
def test_missing_tensors_are_refused_by_name(odd, form):
    for rank in odd[2]:
        assert "has no tensor lm_head.weight; is it of another model?" in rank[f"head{form}"][0]
        assert "has no tensor model.norm.weight; is it of another model?" in rank[f"norm{form}"][0]


def test_weights_under_a_name_that_nothing_loads(odd):
    for rank in odd[2]:
        assert "has consolidated.safetensors but none of model.safetensors" in rank["strange"][0]


def test_the_type_is_that_of_the_weights_where_the_configuration_says_nothing(tmp_path):
    folder = write_model(tmp_path / "a", LLAMA)
    change(folder, lambda t: t.update({name: x.bfloat16() for name, x in t.items()}))
    write_config(tmp_path / "a", LLAMA)
    assert source_dtype(folder) == torch.bfloat16
    assert source_dtype(as_bin(folder, tmp_path / "b")) == torch.bfloat16
    assert source_dtype(write_config(tmp_path / "a", {**LLAMA, "dtype": "float16"})) == torch.float16


def export_half(rank: int, world: int, folder: str, out: str) -> None:
    export_model(load_sharded(folder, make_mesh(world, [], "cpu").world, CPU), Path(out), dtype=torch.bfloat16)


def test_what_must_stay_float32_does(tmp_path):
    """DeepSeek-V3's routers and the correction of their scores, rounded, would send tokens to other experts."""
    folder = write_tiny(tmp_path / "in", tiny_config(model_config("deepseek-v3-671b")))
    run_ranks(export_half, 1, folder, str(tmp_path / "out"))
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("in", "out"))
    for name, x in before.items():
        kept = "e_score_correction_bias" in name or name.endswith("mlp.gate.weight")
        assert after[name].dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(after[name], x if kept else x.bfloat16()), name


GENERATION = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [1, 2], "max_length": 77}
"""Sampling settings without sampling: published, and refused by transformers where it writes them"""


def test_generation_config_and_template_go_along(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    from hbp.data.stdlib_sft import CHAT_TEMPLATE, train_tokenizer

    lines = [{"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "pack rank"}]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines * 20))
    train_tokenizer(tmp_path / "data.jsonl", tmp_path / "tokenizer", vocab_size=300)
    folder = write_model(tmp_path / "in", QWEN3_MOE)
    Path(folder, "generation_config.json").write_text(json.dumps(GENERATION))
    run_ranks(export_with_tokenizer, 2, folder, str(tmp_path / "out"), str(tmp_path / "tokenizer"))
    written = GenerationConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {key: written[key] for key in GENERATION} == GENERATION
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert plain_loss(tmp_path / "out") == pytest.approx(plain_loss(folder), rel=1e-6)


def export_with_tokenizer(rank: int, world: int, folder: str, out: str, tokenizer: str) -> None:
    export_model(load_sharded(folder, make_mesh(world, [], "cpu").world, CPU), Path(out), tokenizer)

"""The exported folder: files of bounded size that `from_pretrained` loads, in the type that the model came in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from workers import LLAMA, QWEN3_MOE, run_ranks, write_config, write_model

from hbp.errors import RankFailed
from hbp.parallel.mesh import make_mesh
from hbp.train import export
from hbp.train.export import export_model, source_dtype
from hbp.train.model import load_model, shard

SHARD_BYTES = 20_000


def exported(rank: int, world: int, source: str, out: str) -> tuple[int, str]:
    """Bytes that rank 0 held at most for a file, and what came of writing where there is a file."""
    model, held = load_model(source), [0]
    shard(model, make_mesh(world, [], "cpu").world)
    plain = export._write_file

    def write(lm: Any, values: dict[str, torch.Tensor], folder: Path, file: str) -> list[str]:
        held.append(sum(value.nbytes for value in values.values()))
        return plain(lm, values, folder, file)

    with mock.patch.object(export, "_write_file", write):
        export_model(model, Path(out), dtype=torch.bfloat16, shard_bytes=SHARD_BYTES)
    try:
        export_model(model, Path(source) / "config.json" / "model")
    except (RankFailed, NotADirectoryError) as error:
        return max(held), type(error).__name__
    return max(held), ""


@pytest.mark.parametrize("family", [LLAMA, QWEN3_MOE], ids=lambda family: family["model_type"])
def test_files_are_bounded_and_hold_the_model(tmp_path, family):
    from transformers import AutoModelForCausalLM

    source, out = write_model(tmp_path / "source", family), tmp_path / "out"
    (held, failed), (nothing, others) = run_ranks(exported, 2, source, str(out))
    assert nothing == 0
    assert (failed, others) == ("NotADirectoryError", "RankFailed")  # no rank waits for what will not come
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert held <= SHARD_BYTES
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as published:
        assert set(index["weight_map"]) == set(published.keys())  # experts one by one
    assert sorted(set(index["weight_map"].values())) == files
    assert (
        index["metadata"]["total_size"]
        == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters()) * 2
    )
    assert source_dtype(str(out)) == torch.bfloat16
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype="auto") for f in (source, out))
    there = dict(after.named_parameters())
    assert there.keys() == dict(before.named_parameters()).keys()
    for name, parameter in before.named_parameters():
        assert torch.equal(there[name], parameter.to(torch.bfloat16)), name


def test_a_configuration_that_says_nothing_means_float32(tmp_path):
    assert source_dtype(write_config(tmp_path / "none", LLAMA)) == torch.float32
    assert source_dtype(write_config(tmp_path / "half", {**LLAMA, "dtype": "bfloat16"})) == torch.bfloat16

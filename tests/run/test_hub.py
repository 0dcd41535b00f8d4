"""The model on a hub, with a stub of it: no test has a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch.distributed as dist

from hbp.config import Config
from hbp.errors import HbpError
from hbp.run.hub import check_hub, push


class Hub:
    """What huggingface_hub.HfApi was asked for."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault, self.made, self.files = fault, dict[str, bool](), dict[str, list[str]]()

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        if self.fault:
            raise self.fault
        assert exist_ok
        self.made[repo_id] = private

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        if self.fault:
            raise self.fault
        assert commit_message
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())


@pytest.fixture
def hub(monkeypatch) -> Hub:
    there = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: there)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    return there


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config(**train: Any) -> Config:
    return Config.model_validate({"model": {"path": "x"}, "train": train})


def test_the_repository_is_made_before_the_run_and_private(hub):
    check_hub(config())
    assert hub.made == {}
    check_hub(config(push_to_hub="lab/packed"))
    assert hub.made == {"lab/packed": True}


def test_what_cannot_be_uploaded_is_refused_before_the_run(hub, monkeypatch):
    with pytest.raises(HbpError, match=r"leave out train\.export=false"):
        check_hub(config(push_to_hub="lab/packed", export=False))
    hub.fault = OSError("403: you may not\nwrite to lab")
    with pytest.raises(HbpError, match=r"train\.push_to_hub: lab/packed: 403: you may not write to lab"):
        check_hub(config(push_to_hub="lab/packed"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HbpError, match=r"needs a token: run `hf auth login`"):
        check_hub(config(push_to_hub="lab/packed"))


def test_an_upload_that_fails_loses_nothing(hub, one_rank, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    assert push(folder, "lab/packed") == "lab/packed"
    assert hub.files == {"lab/packed": ["model.safetensors"]}
    hub.fault = ConnectionError("no way there")
    assert push(folder, "lab/packed") is None
    assert f"(no way there); it is whole in {folder}: `hf upload lab/packed {folder}`" in capsys.readouterr().err

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest
import torch
from records import RECORD

from hbp.config import LogConfig, validated
from hbp.errors import HbpError
from hbp.train import logs as writers
from hbp.train.logs import check_writers, open_writers, scalars_of


def test_scalars_are_kept_apart_by_group():
    scalars = scalars_of(RECORD)
    assert scalars["train/loss"] == 2.5
    group = "group/4096-SP2-GC1+512-SP1-GC0"
    assert (scalars[f"{group}/mfu"], scalars[f"{group}/memory_gib"], scalars[f"{group}/skew"]) == (0.4, 1.0, 0.25)
    assert not any(name.endswith("mfu") for name in scalars_of(dataclasses.replace(RECORD, mfu=None)))


def test_tensorboard_events_are_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_writers(LogConfig(tensorboard=True), tmp_path, {}) as writers:
        for step, loss in enumerate([3.0, 2.0], start=1):
            for write in writers:
                write(scalars_of(dataclasses.replace(RECORD, loss=loss)), step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.0)]
    assert events.Scalars("group/4096-SP2-GC1+512-SP1-GC0/tokens_per_s")[0].value == 2000.0


def test_what_was_logged_after_the_last_checkpoint_is_taken_back(tmp_path):
    """A run that was killed at step 3 and resumed after step 1: every step once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, losses in ((1, [3.0, 2.0, 1.0]), (2, [2.5, 1.5])):
        with open_writers(LogConfig(tensorboard=True), tmp_path, {}, step=first - 1) as (write,):
            for step, loss in enumerate(losses, start=first):
                write({"train/loss": loss}, step)
        time.sleep(1.1)  # files are read in the order of their names, which say the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3.0), (2, 2.5), (3, 1.5)]


def log_records(data: bytes) -> list[bytes]:
    """The records of a LevelDB log, which a ``.wandb`` file is after its seven bytes of header."""
    at, found, piece = 7, [], b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + size]
        if kind in (1, 4):  # whole, or the last part
            found.append(piece)
            piece = b""
        at += 7 + size
    return found


def test_wandb_offline(tmp_path):
    """The history is in the file that `wandb sync` would send."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    config = LogConfig(wandb_project="packing", wandb_name="tiny", wandb_mode="offline")
    with open_writers(config, tmp_path, {"train": {"lr": 1e-3}}, "runs-own-name") as writers:
        writers[0](scalars_of(RECORD), 1)
        writers[0](scalars_of(dataclasses.replace(RECORD, loss=1.25)), 2)
    (file,) = tmp_path.glob("wandb/offline-run-*-runs-own-name/run-runs-own-name.wandb")

    def losses() -> list[float]:
        found = []
        for data in log_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                found += [i.value_json for i in record.history.item if "train/loss" in (i.key, *i.nested_key)]
        return [float(loss) for loss in found]

    for _ in range(100):  # its own process writes the file, and on a busy machine ends after us
        if losses() == [2.5, 1.25]:
            break
        time.sleep(0.3)
    assert losses() == [2.5, 1.25]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(HbpError, match=r"log.tensorboard needs tensorboard; install with"):
        open_writers(LogConfig(tensorboard=True), tmp_path, {}).__enter__()


def test_a_writer_that_cannot_write_is_refused_before_anything_is_run(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(writers, "find_spec", lambda package: package)
    config = LogConfig(tensorboard=True, wandb_project="packing")
    with pytest.raises(HbpError, match="needs a key of Weights & Biases: run `wandb login`"):
        check_writers(config)
    check_writers(LogConfig(wandb_project="packing", wandb_mode="offline"))
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "secret")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            check_writers(config)
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password secret\n")
    with pytest.raises(HbpError, match="needs a key"):
        check_writers(config)
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    check_writers(config)
    for option, package in (("log.tensorboard", "tensorboard"), ("log.wandb_project", "wandb")):
        monkeypatch.setattr(writers, "find_spec", lambda name, missing=package: None if name == missing else name)
        with pytest.raises(HbpError, match=f"{option} needs {package}; install with"):
            check_writers(config)


TRACKIO = """
import json
from pathlib import Path

LOG = Path(__file__).with_name("calls.jsonl")


def note(*call):
    with LOG.open("a") as file:
        file.write(json.dumps(call) + "\\n")


class Run:
    def log(self, values, step):
        if step == 3:
            raise ConnectionError("gone")
        note("log", values, step)

    def finish(self):
        note("finish")


class Config:
    def update(self, values, allow_val_change):
        note("config", values)


config = Config()


def init(**options):
    if options["project"] == "closed":
        raise ValueError("no such\\nproject")
    note("init", options)
    return Run()
"""


@pytest.fixture
def trackio(tmp_path, monkeypatch):
    """A package of that name which writes down how it is called."""
    pytest.importorskip("accelerate")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    yield tmp_path / "packages" / "calls.jsonl"
    sys.modules.pop("trackio", None)


def test_trackers_of_accelerate(tmp_path, trackio, capsys):
    config = LogConfig(trackers=("trackio",), project="packing")
    check_writers(config)
    threads = torch.get_num_threads()
    with open_writers(config, tmp_path, {"seed": 1, "train": {"lr": 1e-3, "betas": [0.9, 0.95]}}, "own") as (write,):
        for step in (1, 2, 3, 4):
            write(scalars_of(RECORD), step)
    calls = [json.loads(line) for line in trackio.read_text().splitlines()]
    assert calls[:2] == [
        ["init", {"project": "packing", "name": "own", "resume": "allow"}],
        ["config", {"seed": 1, "train.lr": 1e-3, "train.betas": "[0.9, 0.95]"}],
    ]
    assert [(name, step) for name, _, step in calls[2:]] == [("log", 1), ("log", 2)]  # not after what failed
    assert calls[2][1]["train/loss"] == 2.5
    assert "group/4096-SP2-GC1_512-SP1-GC0/skew" in calls[2][1]
    assert capsys.readouterr().err.count("log.trackers: trackio fails, and gets no more of this run: gone") == 1
    assert torch.get_num_threads() == threads


def test_a_tracker_that_does_not_open_ends_the_run(tmp_path, trackio):
    config = LogConfig(trackers=("trackio",), project="closed")
    with pytest.raises(HbpError, match=r"log\.trackers: trackio: no such project"):
        open_writers(config, tmp_path, {}).__enter__()


def test_trackers_that_are_not_installed_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(writers, "find_spec", lambda name: None if name == "comet_ml" else name)
    with pytest.raises(HbpError, match=r"comet_ml is not installed; `pip install comet-ml`"):
        check_writers(LogConfig(trackers=("mlflow", "comet_ml")))
    monkeypatch.setattr(writers, "find_spec", lambda name: None if name == "accelerate" else name)
    with pytest.raises(HbpError, match=r"mlflow needs accelerate; .*\[trackers\]"):
        check_writers(LogConfig(trackers=("mlflow",)))
    with pytest.raises(HbpError, match=r"log\.trackers\.0.*'trackio'.*got 'tensorbord'"):
        validated({"model": {"path": "x"}, "log": {"trackers": ["tensorbord"]}}, (), "run.yaml")

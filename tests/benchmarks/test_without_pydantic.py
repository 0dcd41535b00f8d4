"""The benchmarks for a lent GPU run where only torch, numpy and the like are installed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules['pydantic'] = None; sys.path[:0] = sys.argv[1:]; "


def test_they_import_without_it_and_train_with_the_same_settings() -> None:
    code = WITHOUT + "import gpu_hour, gpu_profile, gpu_train"
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    from hbp.config import TrainConfig

    default = TrainConfig()
    sys.path.insert(0, paths[1])
    from gpu_train import Settings

    for field in dataclasses.fields(Settings):
        assert getattr(Settings(), field.name) == getattr(default, field.name), field.name

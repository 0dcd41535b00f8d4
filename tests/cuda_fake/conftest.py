"""A CUDA device that is not there, for every test of this folder (``benchmarks/fake_cuda.py``)."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

"""For all tests: no user's cache is touched, and property tests try a fixed set of cases.

`make test` tries the same cases every time; `make test-more` fresh ones, ten times as many.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup are of runs that are not

settings.register_profile("default", derandomize=True, deadline=None)
settings.register_profile("more", max_examples=1000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("default")  # pytest's --hypothesis-profile=more comes after it


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """A cache of tokenized data for the session; other processes inherit it."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBP_CACHE", str(Path(folder) / "hbp"))
        patch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "false"))
        yield

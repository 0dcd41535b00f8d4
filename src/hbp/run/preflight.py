"""What can be known to go wrong before data are tokenized and processes started."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hbp.config import Config
from hbp.errors import HbpError
from hbp.train.check.compare import require_checked
from hbp.train.logs import check_writers
from hbp.train.model import read_config


def check_ready(config: Config, *, logs: bool = True) -> None:
    """Refuse a model that cannot be trained, packages that are missing and writers that nobody is logged in to.

    A family that is not proven has to pass the comparison with transformers first.

    Args:
        config: of the run.
        logs: the run writes logs.

    Raises:
        HbpError: says what is missing.
    """
    model = read_config(config.model.path)
    require_checked(config.model.path, model, Path(config.run_dir) / "model-check.json")
    if config.lora.rank and find_spec("peft") is None:
        raise HbpError("lora.rank needs peft; install with `pip install 'hierarchical-balance-packing[lora]'`")
    if logs:
        check_writers(config.log)

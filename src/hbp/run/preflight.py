"""What can be known to go wrong before data are tokenized and processes started."""

from __future__ import annotations

from importlib.util import find_spec

from hbp.config import Config
from hbp.errors import HbpError
from hbp.train.logs import check_writers
from hbp.train.model import read_config


def check_ready(config: Config, *, logs: bool = True) -> None:
    """Refuse a model that cannot be trained, packages that are missing and writers that nobody is logged in to.

    Args:
        config: of the run.
        logs: the run writes logs.

    Raises:
        HbpError: says what is missing.
    """
    read_config(config.model.path)
    if config.lora.rank and find_spec("peft") is None:
        raise HbpError("lora.rank needs peft; install with `pip install 'hierarchical-balance-packing[lora]'`")
    if logs:
        check_writers(config.log)

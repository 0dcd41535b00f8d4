"""The exported model on a hub, if that is wanted: its repository is made before the run, and filled after it.

A run of days must neither find out at its end that its token may not write, nor be lost because an upload failed: the
model is in the run's folder in any case, and what uploads it by hand is said.
"""

from __future__ import annotations

from pathlib import Path

from hbp.config import Config
from hbp.errors import HbpError
from hbp.progress import say
from hbp.train.launch import rank_zero_first


def check_hub(config: Config) -> None:
    """Make the repository, private if it is new.

    Raises:
        HbpError: nothing is exported, no token, one that may not make it, or no way to the hub.
    """
    name = config.train.push_to_hub
    if name is None:
        return
    if not config.train.export:
        raise HbpError("train.push_to_hub uploads what train.export writes; leave out train.export=false")
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise HbpError("train.push_to_hub needs a token: run `hf auth login` or set HF_TOKEN")
    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # of the name, of HTTP, of the network
        raise HbpError(f"train.push_to_hub: {name}: {_one_line(error)}") from None


def push(folder: Path, name: str) -> str | None:
    """Upload the exported model from rank 0 while the others wait. A collective.

    Returns:
        Where it is, on rank 0; None if it could not be uploaded, which is said, and on the other ranks.
    """
    with rank_zero_first() as first:
        return _upload(folder, name) if first else None


def _upload(folder: Path, name: str) -> str | None:
    from huggingface_hub import HfApi

    say(f"uploading {folder} to {name}")
    try:
        HfApi().upload_folder(repo_id=name, folder_path=str(folder), commit_message="Trained with hbp")
    except Exception as error:
        say(f"could not upload the model ({_one_line(error)}); it is whole in {folder}: `hf upload {name} {folder}`")
        return None
    return name


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

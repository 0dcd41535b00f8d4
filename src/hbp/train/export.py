"""Write the trained model as a Hugging Face folder that ``from_pretrained`` loads; of a model with adapters, those."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from hbp.train.lora import frozen_names, has_adapters, save_adapters
from hbp.train.model import CausalLMWithLoss

PREFIX = "lm."


def export_model(model: CausalLMWithLoss, folder: Path, tokenizer_folder: str | None = None) -> None:
    """Gather the full parameters on rank 0 and save them there, with the tokenizer. A collective.

    The folder appears whole or not at all: it is written beside its place and renamed.
    """
    adapters = has_adapters(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapters)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        partial = folder.with_name(folder.name + ".partial")
        import transformers

        shutil.rmtree(partial, ignore_errors=True)
        left_out = frozen_names(model) if adapters else set()
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name not in left_out}
        transformers.utils.logging.disable_progress_bar()
        if adapters:
            save_adapters(model, state, partial)
        else:
            model.lm.save_pretrained(partial, state_dict=state)
        if tokenizer_folder:
            transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()

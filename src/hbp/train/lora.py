"""Low-rank adapters through `peft`: injected into the transformers model in place, trained, saved, exported alone.

The model keeps its class, so that sharding, checkpointing of layers and sequence parallelism see what they always see;
the base's parameters are frozen and FSDP2 reduces gradients of the adapters only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hbp.config import LoraConfig
from hbp.errors import HbpError
from hbp.train.model import CausalLMWithLoss, meta_model

ADAPTER = "default"


def add_adapters(model: CausalLMWithLoss, config: LoraConfig, base: str, seed: int) -> None:
    """Give a model adapters and freeze the rest, in place, before it is sharded; the same bits on every rank.

    Args:
        model: not sharded yet.
        config: section ``lora``.
        base: folder or name of the base model, noted in the exported configuration.
        seed: of the adapters' first values.

    Raises:
        HbpError: peft is not installed, or no layer has the wanted name.
    """
    try:
        import peft
    except ImportError:
        raise HbpError(
            "lora.rank needs peft; install with `pip install 'hierarchical-balance-packing[lora]'`"
        ) from None
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(wanted, model.lm, ADAPTER)
    except ValueError as error:
        raise HbpError(f"lora.targets={config.targets!r}: {' '.join(str(error).split())[:200]}") from None


def adapter_parameters(config: LoraConfig, base: str) -> int:
    """Parameters of the adapters that :func:`add_adapters` gives a base model, counted on the meta device."""
    model = meta_model(base)
    add_adapters(model, config, base, seed=0)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not trained, all of those that tied ones have."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def has_adapters(model: CausalLMWithLoss) -> bool:
    """Whether :func:`add_adapters` was here."""
    return getattr(model.lm, "peft_config", None) is not None


def save_adapters(model: CausalLMWithLoss, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained(base, folder)`` loads.

    Args:
        model: with adapters.
        state: full values of the trained parameters, by their names in the transformers model.
        folder: to write to.
    """
    from safetensors.torch import save_file

    config: Any = model.lm.peft_config[ADAPTER]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    named = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": x.contiguous() for name, x in state.items()}
    save_file(named, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})

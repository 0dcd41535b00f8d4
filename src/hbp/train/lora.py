"""Low-rank adapters through `peft`: injected into the transformers model in place, trained, saved, exported alone.

The model keeps its class, so that sharding, checkpointing of layers and sequence parallelism see what they always see;
the base's parameters are frozen and FSDP2 reduces gradients of the adapters only.

What `peft` leaves out without a word is covered or refused: a name that matches nothing; and in mixtures of experts,
whose names `peft` takes for the stacked experts alone, the matrices of dense layers and shared experts.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hbp.config import LoraConfig
from hbp.errors import HbpError
from hbp.train.model import CausalLMWithLoss, meta_model
from hbp.train.weights.nf4 import pack_base, packed_layers

ADAPTER = "default"
ALL_LINEAR = "all-linear"
EXPERTS = "experts"
OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate")
"""Names from when experts were modules of their own, which `peft` still takes for the stacked ones"""


def add_adapters(model: CausalLMWithLoss, config: LoraConfig, base: str, seed: int) -> None:
    """Give a model adapters and freeze the rest, in place, before it is sharded; the same bits on every rank.

    Args:
        model: not sharded yet.
        config: section ``lora``.
        base: folder or name of the base model, noted in the exported configuration.
        seed: of the adapters' first values.

    Raises:
        HbpError: peft is not installed, or adapters as they are wanted cannot be trained; names the option.
    """
    try:
        import peft
    except ImportError:
        raise HbpError(
            "lora.rank needs peft; install with `pip install 'hierarchical-balance-packing[lora]'`"
        ) from None
    lm = model.lm
    _check_names(lm, config)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(lm, config),
        bias=config.bias,
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.rslora,
        use_dora=config.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else base,
    )
    if stacked := _stacked_experts(lm):
        trial = copy.deepcopy(wanted)
        trial.lora_dropout = 0.0  # on experts refused below, by our own option's name
        if trial.target_modules:
            _inject(trial, copy.deepcopy(lm).to("meta"), config, seed)
        wanted.target_parameters = _left_out(lm, config, stacked, trial)
        if config.dropout and (wanted.target_parameters or trial.target_parameters):
            raise HbpError(
                f"lora.dropout={config.dropout} is not possible on stacked experts; set it to 0, or give lora.targets "
                "without them, such as [q_proj, k_proj, v_proj, o_proj]"
            )
    _inject(wanted, lm, config, seed)


def _inject(wanted: Any, lm: Any, config: LoraConfig, seed: int) -> None:
    import peft

    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that peft itself adds
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(wanted, lm, ADAPTER)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise HbpError(f"lora.targets={config.targets!r}: {' '.join(str(error).split())[:200]}") from None


def _has(names: list[str], wanted: str) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for name in names)


def _named(config: LoraConfig) -> tuple[str, ...]:
    return (config.targets,) if isinstance(config.targets, str) else config.targets


def _check_names(lm: Any, config: LoraConfig) -> None:
    """Refuse names that match nothing."""
    modules = [name for name, _ in lm.named_modules() if name]
    parameters = [name for name, _ in lm.named_parameters()]
    layers = sorted({name.rpartition(".")[2] for name, m in lm.named_modules() if isinstance(m, nn.Linear)})
    experts = OF_EXPERTS if _stacked_experts(lm) else ()
    for name in _named(config):
        if name == ALL_LINEAR or name in experts or _has(modules, name) or _has(parameters, name):
            continue
        if isinstance(config.targets, str) and any(re.fullmatch(name, module) for module in modules):
            continue
        raise HbpError(
            f"lora.targets={name!r}: no layer has that name; give {ALL_LINEAR} or some of {', '.join(layers)}"
        )
    for name in config.modules_to_save:
        if not _has(modules, name):
            raise HbpError(f"lora.modules_to_save={name!r}: no module has that name; give some such as lm_head")
    embeddings = [name for name, module in lm.named_modules() if isinstance(module, nn.Embedding)]
    if config.dora and any(_has(embeddings, name) for name in _named(config)):
        raise HbpError("lora.dora is not possible on embeddings; take them out of lora.targets")
    if config.dora and _stacked_experts(lm):
        raise HbpError("lora.dora is not possible on stacked experts; set it to false")


def _targets(lm: Any, config: LoraConfig) -> str | list[str] | None:
    """What `peft` is given: a name as a list, since it takes text for an expression that matches a whole path.

    Names of stacked experts are none of modules (:func:`_left_out`).
    """
    if ALL_LINEAR in _named(config):
        return ALL_LINEAR
    modules, stacked = [name for name, _ in lm.named_modules() if name], _stacked_experts(lm)
    names = [name for name in _named(config) if not any(_means(name, each) for each in stacked) or _has(modules, name)]
    names = [name for name in names if name != EXPERTS or not stacked]
    if isinstance(config.targets, str) and names and not (_has(modules, names[0]) or names[0] in OF_EXPERTS):
        return config.targets
    return names or None


def _means(name: str, stacked: str) -> bool:
    """Whether a name is that of stacked experts: of one matrix, or of all."""
    return name == EXPERTS or _has([stacked], name)


def _stacked_experts(lm: Any) -> list[str]:
    """Parameters that hold a matrix for each expert."""
    return [name for name, p in lm.named_parameters() if p.ndim == 3 and ".experts." in name]


def _left_out(lm: Any, config: LoraConfig, stacked: list[str], done: Any) -> list[str]:
    """Parameters, by the ends of their names, that are wanted but that `peft` by itself does not adapt.

    Args:
        lm: without adapters.
        config: section ``lora``.
        stacked: of :func:`_stacked_experts`.
        done: configuration of `peft` as it was after a trial.
    """
    wanted, everything = set(_named(config)), ALL_LINEAR in _named(config)
    modules = {str(name).rpartition(".")[2] for name in done.target_modules or ()}
    head = lm.get_output_embeddings()
    missed = set()
    for name, module in lm.named_modules():
        leaf = name.rpartition(".")[2]
        adapted = not isinstance(module, nn.Linear) or module is head or leaf in modules
        if not adapted and (everything or leaf in wanted):
            missed.add(f"{leaf}.weight")
    taken = set(done.target_parameters or ())
    for name in stacked:
        end = ".".join(name.split(".")[-2:])
        if not taken & {end, end.rpartition(".")[2]} and (everything or any(_means(w, name) for w in wanted)):
            missed.add(end)
    return sorted(missed)


def adapter_parameters(config: LoraConfig, base: str, quantize: str = "none") -> tuple[int, int]:
    """Counted on the meta device: parameters of the adapters that :func:`add_adapters` gives a base model, and of the
    layers beneath that are packed in four bits.

    Raises:
        HbpError: as :func:`add_adapters` and :func:`~hbp.train.weights.nf4.pack_base`.
    """
    model = meta_model(base)
    add_adapters(model, config, base, seed=0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if quantize == "none":
        return trained, 0
    pack_base(model.lm)
    return trained, sum(layer.dense_shape.numel() for layer in packed_layers(model.lm).values())


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
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config: Any = model.lm.peft_config[ADAPTER]
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    own = get_peft_model_state_dict(model.lm, state, ADAPTER, save_embedding_layers=False)
    named = {f"base_model.model.{name}": x.contiguous() for name, x in own.items()}
    save_file(named, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})

"""What everything is held against: plain transformers, every document alone, eager attention, nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Document = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Token ids and loss mask"""
Run = tuple[Tensor, dict[str, Tensor]]
"""Loss and gradients by parameter name"""


def alone(folder: str, documents: Sequence[Document], dtype: torch.dtype = torch.float32) -> Run:
    """Mean loss over the loss tokens of all documents, with the family's router loss, and its gradients.

    Args:
        folder: of a model.
        documents: token ids and loss masks.
        dtype: of parameters and computation.
    """
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **eager)
    routed: list[tuple[Tensor, Tensor, Tensor]] = []
    balanced = getattr(model.config, "output_router_logits", False)
    if balanced and model.config.model_type == "deepseek_v2":  # transformers has no balance loss for it
        for module in model.modules():
            if type(module).__name__ == "DeepseekV2TopkRouter":
                module.register_forward_hook(lambda module, inputs, output: routed.append(output))
    total = torch.zeros(())
    count = sum(int(mask[1:].sum()) for _, mask in documents)
    tokens = sum(len(ids) for ids, _ in documents)
    for ids, mask in documents:
        sample, picked = torch.from_numpy(ids).long(), torch.from_numpy(mask[1:]).bool()
        routed.clear()
        out = model(sample[None], use_cache=False)
        logits = out.logits[0, :-1].float()
        total = total + F.cross_entropy(logits[picked], sample[1:][picked], reduction="sum") / count
        if balanced and getattr(out, "aux_loss", None) is not None:
            total = total + model.config.router_aux_loss_coef * out.aux_loss * len(ids) / tokens
        for scores, _, choice in routed:
            total = total + model.config.aux_loss_alpha * deepseek_balance(scores, choice) * len(ids) / tokens
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def deepseek_balance(logits: Tensor, choice: Tensor) -> Tensor:
    """DeepSeek-V2's balance loss of a sequence and layer, without its factor (its ``seq_aux``).

    Args:
        logits: of the router ``[T, experts]``.
        choice: experts of each token ``[T, k]``.
    """
    tokens, experts = logits.shape
    chosen = F.one_hot(choice, experts).float().sum(dim=(0, 1)) * experts / (choice.size(1) * tokens)
    return (chosen * logits.softmax(-1).mean(0)).sum()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest entry; 0 where both are zero throughout."""
    difference, largest = float((got - want).abs().max()), float(want.abs().max())
    return difference / largest if largest else float("inf") if difference else 0.0


def worst(got: Run, want: Run) -> tuple[float, str]:
    """The largest :func:`relative_error` of the loss and all gradients, and where it is."""
    errors = {"the loss": relative_error(got[0], want[0])}
    for name, gradient in got[1].items():
        expected = want[1].get(name)
        errors[name] = relative_error(gradient, torch.zeros_like(gradient) if expected is None else expected)
    errors |= {name: float("inf") for name in want[1].keys() - got[1].keys()}
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[where], where


def distance(got: Run, want: Run) -> float:
    """Of all gradients together: norm of the difference over the norm."""
    names = sorted(want[1])
    a, b = (torch.cat([run[1][name].float().flatten() for name in names]) for run in (got, want))
    return float((a - b).norm() / b.norm())

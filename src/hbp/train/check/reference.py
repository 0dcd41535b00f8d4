"""What everything is held against: plain transformers, every document alone, eager attention, nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
ROUNDINGS = 6.0
"""Of the plain model, how many may lie between two orders of summation"""


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


def draws_at_random(folder: str, document: Document) -> bool:
    """Whether the plain model draws random numbers in training though its dropout is off: noise, sampled experts."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).train()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        model(torch.from_numpy(document[0]).long()[None], use_cache=False)
        return not torch.equal(before, torch.get_rng_state())


def deepseek_balance(logits: Tensor, choice: Tensor) -> Tensor:
    """DeepSeek-V2's balance loss of a sequence and layer, without its factor (its ``seq_aux``).

    Args:
        logits: of the router ``[T, experts]``.
        choice: experts of each token ``[T, k]``.
    """
    tokens, experts = logits.shape
    chosen = F.one_hot(choice, experts).float().sum(dim=(0, 1)) * experts / (choice.size(1) * tokens)
    return (chosen * logits.softmax(-1).mean(0)).sum()


def relative_error(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """Largest difference over the largest entry, or over ``least`` if that is more; 0 where both are zero."""
    difference, largest = float((got - want).abs().max()), max(float(want.abs().max()), least)
    return difference / largest if largest else float("inf") if difference else 0.0


def worst(got: Run, want: Run, least: Mapping[str, float] | None = None) -> tuple[float, str]:
    """The largest :func:`relative_error` of the loss and all gradients, and where it is."""
    errors = {"the loss": relative_error(got[0], want[0])}
    for name, gradient in got[1].items():
        expected = want[1].get(name)
        other = torch.zeros_like(gradient) if expected is None else expected
        errors[name] = relative_error(gradient, other, (least or {}).get(name, 0.0))
    errors |= {name: float("inf") for name in want[1].keys() - got[1].keys()}
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[where], where


def rounded_away(folder: str, documents: Sequence[Document], bound: float) -> dict[str, float]:
    """Gradients of which the plain model itself keeps too few digits in float32, and what to measure them against.

    A key's bias without rotary embedding has a gradient of exactly zero, and one number for a whole layer is a sum in
    which most cancels: what differs there is rounding, in any order of summation. Where the plain model's own distance
    from float64 takes half the bound, a difference is measured against what makes the bound :data:`ROUNDINGS` such
    distances.
    """
    single, double = (alone(folder, documents, dtype)[1] for dtype in (torch.float32, torch.float64))
    least = {}
    for name, exact in double.items():
        own = float((single[name] - exact).abs().max())
        if own > bound / 2 * float(exact.abs().max()):
            least[name] = ROUNDINGS * own / bound
    return least


def distance(got: Run, want: Run) -> float:
    """Of all gradients together: norm of the difference over the norm."""
    names = sorted(want[1])
    a, b = (torch.cat([run[1][name].float().flatten() for name in names]) for run in (got, want))
    return float((a - b).norm() / b.norm())

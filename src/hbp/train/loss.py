"""The loss of an optimizer step, defined over its global batch: the same whatever the packing, degree or world size.

With a mean per micro-batch (the paper's Token-Mean baseline, Section 4.3) a token in a pack of few loss tokens weighs
more than one in a full pack, so the loss depends on the packing. Here every token's weight follows from its sample and
from the whole step alone (:class:`GlobalBatch`), each rank sums weight × cross entropy, and FSDP's mean over ranks is
undone by a factor of the world size:

- ``ave-token``, ``token-mean``: 1 ÷ loss tokens of the global batch, every token alike. The paper's Ave-Token divides a
  rank's sum by the mean loss tokens a rank, which is this. A token mean over the global batch is the same number, so
  the two names mean one loss here.
- ``sample-mean``: 1 ÷ (loss tokens of the sample × samples with any), every sample alike.
- ``sum``: 1.

The vocabulary projection runs in chunks, so that a 128K-token pack never holds 128K × vocabulary logits. Each chunk's
gradients are taken at once, while its logits are there: nothing is recomputed, and what waits for backward is a
gradient of the hidden states and one of the projection. The latter is summed over the chunks in float32 and rounded
once, as one product over all tokens would be; in bfloat16 each of a hundred sums would round (1 % off at 128 chunks,
4 % at 256). The trade: 4 bytes an entry of the projection while the loss is taken. torch's own `linear_cross_entropy`
(from 2.13) does much the same, knows no weights of tokens, and takes 15 % longer on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hbp.errors import HbpError
from hbp.plan import Plan

IGNORE = -100
CHUNK = 2048
"""Tokens. Each chunk reads and writes the whole of the projection's gradient once."""
LOSSES = ("ave-token", "token-mean", "sample-mean", "sum")


@dataclass(frozen=True)
class GlobalBatch:
    """What the loss of one optimizer step is taken over."""

    loss: str
    """One of :data:`LOSSES`."""
    tokens: int
    loss_tokens: int
    samples: int
    """That have a loss token."""

    def token_weight(self, sample_loss_tokens: int) -> float:
        """What each loss token of a sample counts."""
        if self.loss == "sum":
            return 1.0
        if self.loss == "sample-mean":
            return 1.0 / max(sample_loss_tokens * self.samples, 1)
        return 1.0 / max(self.loss_tokens, 1)


def global_batches(plan: Plan, loss_tokens: npt.NDArray[np.integer], loss: str = "ave-token") -> list[GlobalBatch]:
    """The global batch of each step of a plan.

    Args:
        plan: to be run.
        loss_tokens: targets of each sample, int ``[N]``.
        loss: one of :data:`LOSSES`.

    Raises:
        HbpError: no such loss.
    """
    if loss not in LOSSES:
        raise HbpError(f"no loss {loss!r}: give one of {', '.join(LOSSES)}")
    step = np.repeat(plan.step, np.diff(plan.sample_offsets))
    targets = loss_tokens[plan.sample_ids]
    counts = [
        np.bincount(step, weights=weights, minlength=plan.n_steps).astype(np.int64)
        for weights in (plan.lengths, targets, targets > 0)
    ]
    return [GlobalBatch(loss, *(int(count[i]) for count in counts)) for i in range(plan.n_steps)]


def summed_cross_entropy(
    hidden_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, weights_T: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """Cross entropy in float32, summed over the tokens that have a label.

    Args:
        hidden_TE: last hidden states ``[T, E]``.
        weight_VE: vocabulary projection ``[V, E]``.
        labels_T: next token of each position ``[T]`` int64, ``-100`` for none. Already shifted within documents.
        weights_T: what each token counts, float32 ``[T]``; none: 1.
        chunk: tokens whose logits exist at a time.

    Returns:
        Scalar float32.
    """
    counted = (labels_T != IGNORE).float()
    weights_T = counted if weights_T is None else counted * weights_T
    wanted = torch.is_grad_enabled()  # inside, it never is
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden_TE, weight_VE, labels_T.clamp_min(0), weights_T, chunk, wanted)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk, all in forward; backward only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, projection: Tensor, labels: Tensor, weights: Tensor, chunk: int, wanted: bool
    ) -> Tensor:
        wants_hidden, wants_projection = (wanted and needed for needed in ctx.needs_input_grad[:2])
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_projection = torch.zeros_like(projection, dtype=torch.float32) if wants_projection else None
        for start in range(0, len(labels), chunk):
            here = slice(start, start + chunk)
            h, label, weight = hidden[here], labels[here, None], weights[here, None]
            p = (h @ projection.T).float()  # scores, in place to probabilities: no second copy of a chunk's logits
            p.sub_(p.amax(1, keepdim=True))
            score, summed = p.gather(1, label), p.exp_().sum(1, keepdim=True)
            total += ((summed.log() - score) * weight).sum()
            if of_hidden is None and of_projection is None:
                continue
            of_logits = p.mul_(weight / summed).scatter_add_(1, label, -weight).to(h.dtype)
            del p
            if of_hidden is not None:
                torch.mm(of_logits, projection, out=of_hidden[here])
            if of_projection is not None:
                _add_product(of_projection, of_logits.T, h)
            del of_logits
        ctx.gradients = of_hidden, None if of_projection is None else of_projection.to(projection.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_projection = (None if x is None else x.mul_(gradient) for x in ctx.gradients)
        ctx.gradients = None, None
        return of_hidden, of_projection, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to a float32 `total`, not rounded to the factors' type in between."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), out=total)

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

The vocabulary projection runs in chunks that are recomputed in backward, so that a 128K-token pack never holds
128K × vocabulary logits. It costs one more projection; the cost model counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hbp.config import LOSSES
from hbp.errors import HbpError
from hbp.plan import Plan

IGNORE = -100
CHUNK = 1024


@dataclass(frozen=True)
class GlobalBatch:
    """What the loss of one optimizer step is taken over."""

    loss: str
    """One of :data:`hbp.config.LOSSES`."""
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
        loss: one of :data:`hbp.config.LOSSES`.

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
    total = hidden_TE.new_zeros((), dtype=torch.float32)
    weights = [None] * -(-len(labels_T) // chunk) if weights_T is None else weights_T.split(chunk)
    for inputs in zip(hidden_TE.split(chunk), labels_T.split(chunk), weights, strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, weight_VE, *inputs, use_reentrant=False)
        else:
            total = total + _chunk_loss(weight_VE, *inputs)
    return total


def _chunk_loss(projection: Tensor, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    logits = (hidden @ projection.T).float()
    if weights is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") @ weights

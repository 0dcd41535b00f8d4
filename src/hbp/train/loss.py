"""The Ave-Token loss: every token weighs the same, wherever it was packed (paper, Section 4.3).

With a mean per micro-batch (Token-Mean) a token in a pack of few loss tokens weighs more than one in a full pack, so
the loss depends on the packing. Here each rank sums its cross entropy and divides by one number for the whole
optimizer step: the loss tokens of the global batch. FSDP averages gradients over ranks, hence the factor
``world_size``; written per rank that is "summed loss ÷ mean loss tokens a rank", the paper's Ave-Token.

The vocabulary projection runs in chunks that are recomputed in backward, so that a 128K-token pack never holds
128K × vocabulary logits. It costs one more projection; the cost model counts it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
CHUNK = 1024


def summed_cross_entropy(hidden_TE: Tensor, weight_VE: Tensor, labels_T: Tensor, chunk: int = CHUNK) -> Tensor:
    """Cross entropy in float32, summed over the tokens that have a label.

    Args:
        hidden_TE: last hidden states ``[T, E]``.
        weight_VE: vocabulary projection ``[V, E]``.
        labels_T: next token of each position ``[T]`` int64, ``-100`` for none. Already shifted within documents.
        chunk: tokens whose logits exist at a time.

    Returns:
        Scalar float32.
    """
    total = hidden_TE.new_zeros((), dtype=torch.float32)
    for hidden, labels in zip(hidden_TE.split(chunk), labels_T.split(chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, hidden, weight_VE, labels, use_reentrant=False)
        else:
            total = total + _chunk_loss(hidden, weight_VE, labels)
    return total


def _chunk_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE, reduction="sum")


def ave_token_scale(global_loss_tokens: int, world_size: int) -> float:
    """What a rank multiplies its summed loss by, so that FSDP's mean over ranks is the mean over the global batch."""
    return world_size / max(global_loss_tokens, 1)

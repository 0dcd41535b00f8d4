"""A transformers model that, called with a micro-batch, returns its part of the loss instead of logits.

Or, where it is asked for them, the log-probabilities of the pack's documents, which preferences are learnt from.

The vocabulary projection of a 128K-token pack would hold 128K × vocabulary logits, so the loss is taken in chunks, as
our own engine takes it. Trainers wrap a model in many ways (DDP, FSDP2, autocast, peft), all of which end in its
``forward``: that is what is replaced, in this one model, and every other call goes to the one that was there.

Under FSDP2 a vocabulary projection may be sharded apart from the root, so its weight is whole only inside its own
``forward``. The loss is therefore taken there, in one call of the projection, so that its hooks run once each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from hbp.parallel.ulysses import Sealed
from hbp.train.batch import MicroBatch
from hbp.train.check.families import decoder_of
from hbp.train.loss import RouterLoss, documents_of_tokens, summed_cross_entropy, token_log_probs
from hbp.train.model import finish_logits

ARGUMENT = "hbp_batch"
"""Name of the micro-batch among the model's arguments"""


class BatchArgument:
    """A micro-batch that wrappers hand on as it is: FSDP2 casts every tensor that it finds, in dataclasses too, and the
    loss's weights must stay float32."""

    def __init__(self, batch: MicroBatch, by_document: bool = False) -> None:
        """Ask for the loss of a micro-batch, or for what its documents' targets are worth to the model."""
        self.batch, self.by_document = batch, by_document


def give_pack_loss(lm: Any) -> None:
    """Let a causal language model take ``hbp_batch=`` (:class:`BatchArgument`), in place, once.

    The result is this rank's weighted sum of cross entropies, plus router losses: a float32 scalar. Or, by document,
    the sum of the log-probabilities of the targets of each document of the pack ``[documents]``, filler last: float32,
    the same on every rank of the pack, with gradients as if each rank's own copy were used (:func:`_by_document`).

    Args:
        lm: the transformers model itself, without wrappers, before accelerate prepares it.
    """
    if getattr(lm, "_hbp_pack_loss", False):
        return
    original, router_loss, finish = lm.forward, RouterLoss(lm), finish_logits(lm.config)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked: BatchArgument | None = kwargs.pop(ARGUMENT, None)
        if asked is None:
            return original(*args, **kwargs)
        if asked.by_document:
            return _by_document(self, asked.batch, finish)
        return _loss(self, asked.batch, router_loss, finish)

    # `generate` and the Trainer read the names of a model's arguments off its forward.
    forward.__signature__ = inspect.signature(type(lm).forward)  # type: ignore[attr-defined]
    lm.forward = MethodType(forward, lm)
    lm._hbp_pack_loss = True


Finish = Callable[[Tensor], Tensor] | None
"""What a family does to its logits after the projection."""


def _loss(lm: Any, batch: MicroBatch, router_loss: RouterLoss, finish: Finish) -> Tensor:
    routed = bool(router_loss.coefficient and batch.token_share)
    if routed:
        with router_loss.listening():
            hidden = _hidden(lm, batch)
    else:
        hidden = _hidden(lm, batch)

    def in_chunks(hidden: Tensor, projection: Any) -> Tensor:
        return summed_cross_entropy(hidden, projection, batch.labels, batch.weights, finish=finish)

    loss = _in_head(lm, hidden, in_chunks)
    return loss + batch.token_share * router_loss.of_pack(batch.layout) if routed else loss


def _by_document(lm: Any, batch: MicroBatch, finish: Finish) -> Tensor:
    """Sums over the ranks of a pack, whose every rank then computes the same of them.

    So the gradient of a sum is that of this rank's part, times the ranks: divide what is computed by the degree, and it
    is counted once over all of them, gradient and value.
    """

    def in_chunks(hidden: Tensor, projection: Any) -> Tensor:
        return token_log_probs(hidden, projection, batch.labels, finish=finish)

    log_probs = _in_head(lm, _hidden(lm, batch), in_chunks)
    document, _ = documents_of_tokens(batch.layout, log_probs.device)
    own = log_probs.new_zeros(len(batch.layout.documents.lengths)).index_add(0, document, log_probs)
    total = batch.layout.sum_over_ranks(own.detach().clone())
    return total + batch.layout.sp_degree * (own - own.detach())


def _hidden(lm: Any, batch: MicroBatch) -> Tensor:
    """Last hidden states of this rank's tokens ``[T, E]``."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "hbp_layout": Sealed(batch.layout)}
    out = decoder_of(lm)(**inputs, use_cache=False)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def _in_head(lm: Any, hidden: Tensor, function: Callable[[Tensor, Any], Tensor]) -> Tensor:
    """A function of hidden states and projection, called in the vocabulary projection's place."""
    head = lm.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None
    own = head.forward
    with _forward_of(head, lambda x: function(x, head.weight if plain else own)):
        found: Tensor = head(hidden)
    return found


@contextmanager
def _forward_of(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Call another function where a module's own forward would be, its hooks around it."""
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def attention_of(lm: Any, name: str) -> Iterator[None]:
    """Another attention function inside; what the model had before, after."""
    before = lm.config._attn_implementation
    lm.config._attn_implementation = name
    try:
        yield
    finally:
        lm.config._attn_implementation = before

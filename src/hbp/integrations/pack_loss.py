"""A transformers model that, called with a micro-batch, returns its part of the loss instead of logits.

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

from hbp.train.batch import MicroBatch
from hbp.train.loss import RouterLoss, summed_cross_entropy

ARGUMENT = "hbp_batch"
"""Name of the micro-batch among the model's arguments"""


class Sealed:
    """A micro-batch that wrappers hand on as it is: FSDP2 casts every tensor that it finds, in dataclasses too, and the
    loss's weights must stay float32."""

    def __init__(self, batch: MicroBatch) -> None:
        self.batch = batch


def give_pack_loss(lm: Any) -> None:
    """Let a causal language model take ``hbp_batch=`` (:class:`Sealed`), in place, once.

    The result is this rank's weighted sum of cross entropies, plus router losses: a float32 scalar.

    Args:
        lm: the transformers model itself, without wrappers, before accelerate prepares it.
    """
    if getattr(lm, "_hbp_pack_loss", False):
        return
    original, router_loss = lm.forward, RouterLoss(lm)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        sealed: Sealed | None = kwargs.pop(ARGUMENT, None)
        return original(*args, **kwargs) if sealed is None else _loss(self, sealed.batch, router_loss)

    # `generate` and the Trainer read the names of a model's arguments off its forward.
    forward.__signature__ = inspect.signature(type(lm).forward)  # type: ignore[attr-defined]
    lm.forward = MethodType(forward, lm)
    lm._hbp_pack_loss = True


def _loss(lm: Any, batch: MicroBatch, router_loss: RouterLoss) -> Tensor:
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "hbp_layout": batch.layout}
    routed = bool(router_loss.coefficient and batch.token_share)
    if routed:
        with router_loss.listening():
            out = lm.get_decoder()(**inputs, use_cache=False)
    else:
        out = lm.get_decoder()(**inputs, use_cache=False)
    head = lm.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None
    own = head.forward

    def in_chunks(hidden: Tensor) -> Tensor:
        return summed_cross_entropy(hidden, head.weight if plain else own, batch.labels, batch.weights)

    with _forward_of(head, in_chunks):
        loss: Tensor = head(out.last_hidden_state[0])
    return loss + batch.token_share * router_loss.of_pack(batch.layout) if routed else loss


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

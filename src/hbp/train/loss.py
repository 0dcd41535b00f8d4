"""The loss of an optimizer step, defined over its global batch: the same whatever the packing, degree or world size.

With a mean per micro-batch (the paper's Token-Mean baseline, Section 4.3) a token in a pack of few loss tokens weighs
more than one in a full pack, so the loss depends on the packing. In the others every token's weight follows from its
sample, the whole step and the whole plan (:class:`GlobalBatch`). Each rank sums weight × cross entropy, and FSDP's mean
over ranks is undone by a factor of the world size:

- ``ave-token``: 1 ÷ loss tokens of the global batch, every token of a step alike. The paper's Ave-Token divides a
  rank's sum by the mean loss tokens a rank, which is this, and so is a token mean over the global batch.
- ``run-token``: 1 ÷ the mean loss tokens of a step of the plan, every token of the plan alike.
- ``sample-mean``: 1 ÷ (loss tokens of the sample × samples with any), every sample of a step alike.
- ``sum``: 1.
- ``token-mean``: 1 ÷ loss tokens of the token's own micro-batch, averaged over ranks and micro-steps. For comparison:
  the one that depends on the packing. A rank is a data-parallel one: the ranks of an SP group share a pack, so a pack
  counts once for each of its ranks; ranks that idle, or have no loss token, count with 0.

What each choice does to training is in ``docs/losses.md``.

The vocabulary projection runs in chunks, so that a 128K-token pack never holds 128K × vocabulary logits. Each chunk's
gradients are taken at once, while its logits are there: nothing is recomputed, and what waits for backward is a
gradient of the hidden states and one of the projection. The latter is summed over the chunks in float32 and rounded
once, as one product over all tokens would be; in bfloat16 each of a hundred sums would round (1 % off at 128 chunks,
4 % at 256). The trade: 4 bytes an entry of the projection while the loss is taken. torch's own `linear_cross_entropy`
(from 2.13) does much the same, knows no weights of tokens, and takes 15 % longer on a CPU.

**The load-balancing loss of mixture-of-experts routers** (:class:`RouterLoss`) is taken by document, so that it does
not depend on the packing either. Balance losses multiply how often an expert is chosen by how probable the router finds
it. That product is not a sum over tokens, so over "the batch" it would change with what shares a micro-batch. Here, as
in DeepSeek-V2's own training (its ``seq_aux``), it is taken over each document; and documents are averaged by their
tokens over the global batch of the optimizer step. That is what the unpacked model computes with one document a batch.
Under sequence parallelism the counts of choices, which carry no gradient, are summed over the ranks of the pack:
``layers × documents × experts`` numbers, once a pack. The trade: balance is asked of each document, which is stricter
than of the batch.

The families' own formulas, for a document of ``T`` tokens, ``E`` experts, ``k`` chosen of them, ``L`` layers, with
``f`` choices of an expert ÷ ``T`` and ``p`` its mean probability:

- Qwen2-MoE, Qwen3-MoE, Mixtral and gpt-oss (Switch Transformer): ``E · Σ f·p``, both averaged over the layers first;
  ``router_aux_loss_coef``;
- DeepSeek-V2: ``E / k · Σ f·p``, summed over the layers; ``aux_loss_alpha``.

Off unless the configuration says ``output_router_logits``, as in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hbp.errors import HbpError
from hbp.parallel.gather_kv import tokens_of_rank
from hbp.parallel.mesh import SequenceGroups
from hbp.parallel.ulysses import PackLayout
from hbp.plan import Plan

IGNORE = -100
CHUNK = 2048
"""Tokens. Each chunk reads and writes the whole of the projection's gradient once."""


@dataclass(frozen=True)
class GlobalBatch:
    """What the loss of one optimizer step is taken over."""

    loss: str
    """One of :data:`hbp.config.LOSSES`."""
    tokens: int
    loss_tokens: int
    samples: int
    """That have a loss token."""
    mean_tokens: float = 0.0
    """Of a step of the run's plan."""
    mean_loss_tokens: float = 0.0
    """Of a step of the run's plan."""
    turns: int = 1
    """Ranks × micro-steps."""

    def token_weight(self, sample_loss_tokens: int, pack_loss_tokens: int = 0, sp_degree: int = 1) -> float:
        """What each loss token of a sample counts.

        Args:
            sample_loss_tokens: of the sample.
            pack_loss_tokens: of the pack that it is in.
            sp_degree: ranks of that pack.
        """
        match self.loss:
            case "sum":
                return 1.0
            case "sample-mean":
                return 1.0 / max(sample_loss_tokens * self.samples, 1)
            case "run-token":
                return 1.0 / (self.mean_loss_tokens or 1.0)
            case "token-mean":
                return sp_degree / (self.turns * max(pack_loss_tokens, 1))
        return 1.0 / max(self.loss_tokens, 1)

    @property
    def token_share(self) -> float:
        """What a token counts in the mean of router losses: over the step, or over the plan with `run-token`."""
        return 1.0 / (self.mean_tokens if self.loss == "run-token" else self.tokens)


@dataclass(frozen=True)
class MeanStep:
    """What `run-token` divides by: the mean step of the plan that a run began with."""

    tokens: float
    loss_tokens: float

    @classmethod
    def of(cls, plan: Plan, loss_tokens: npt.NDArray[np.integer]) -> MeanStep:
        """Args: `loss_tokens` are the targets of each sample, int ``[N]``."""
        steps = max(plan.n_steps, 1)
        return cls(float(plan.lengths.sum()) / steps, float(loss_tokens[plan.sample_ids].sum()) / steps)


def global_batches(
    plan: Plan, loss_tokens: npt.NDArray[np.integer], loss: str = "ave-token", mean: MeanStep | None = None
) -> list[GlobalBatch]:
    """The global batch of each step of a plan.

    `run-token` divides by the mean step of the plan that the run began with, in every epoch and piece and after what is
    left was planned again, so that a token counts the same in all of them.

    Args:
        plan: to be run, the whole of it.
        loss_tokens: targets of each sample, int ``[N]``.
        loss: one of :data:`hbp.config.LOSSES`.
        mean: of the plan that the run began with; none: this is that plan.

    Raises:
        HbpError: no such loss.
    """
    if loss != "ave-token":
        from hbp.config import LOSSES  # and with it pydantic, which a machine to measure on may lack

        if loss not in LOSSES:
            raise HbpError(f"no loss {loss!r}: give one of {', '.join(LOSSES)}")
    step = np.repeat(plan.step, np.diff(plan.sample_offsets))
    targets = loss_tokens[plan.sample_ids]
    counts = [
        np.bincount(step, weights=weights, minlength=plan.n_steps).astype(np.int64)
        for weights in (plan.lengths, targets, targets > 0)
    ]
    micro_steps = np.zeros(plan.n_steps, np.int64)
    np.maximum.at(micro_steps, plan.step, plan.micro_step.astype(np.int64) + 1)
    mean = mean or MeanStep.of(plan, loss_tokens)
    turns = micro_steps * plan.info.world_size
    return [
        GlobalBatch(loss, tokens, loss_tokens, samples, mean.tokens, mean.loss_tokens, ranks)
        for tokens, loss_tokens, samples, ranks in zip(*(x.tolist() for x in (*counts, turns)), strict=True)
    ]


def summed_cross_entropy(
    hidden_TE: Tensor,
    projection: Tensor | Callable[[Tensor], Tensor],
    labels_T: Tensor,
    weights_T: Tensor | None = None,
    chunk: int = CHUNK,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross entropy in float32, summed over the tokens that have a label.

    Args:
        hidden_TE: last hidden states ``[T, E]``.
        projection: weights of the vocabulary projection ``[V, E]``, or a function from hidden states to logits where
            it is more than a product (an adapter on it, a bias).
        labels_T: next token of each position ``[T]`` int64, ``-100`` for none. Already shifted within documents.
        weights_T: what each token counts, float32 ``[T]``; none: 1.
        chunk: tokens whose logits exist at a time.
        finish: what the family does to logits after the projection (scale, softcap), in float32.

    Returns:
        Scalar float32.
    """
    counted = (labels_T != IGNORE).float()
    weights_T = counted if weights_T is None else counted * weights_T
    labels_T = labels_T.clamp_min(0)
    if isinstance(projection, Tensor) and finish is None:
        wanted = torch.is_grad_enabled()  # inside, it never is
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden_TE, projection, labels_T, weights_T, chunk, wanted)
        return loss
    total = hidden_TE.new_zeros((), dtype=torch.float32)
    for inputs in zip(hidden_TE.split(chunk), labels_T.split(chunk), weights_T.split(chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, projection, finish, *inputs, use_reentrant=False)
        else:
            total = total + _chunk_loss(projection, finish, *inputs)
    return total


def token_log_probs(
    hidden_TE: Tensor,
    projection: Tensor | Callable[[Tensor], Tensor],
    labels_T: Tensor,
    chunk: int = CHUNK,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Log-probability of each label, float32 ``[T]``; 0 where there is none. Logits are made again in backward.

    Args:
        hidden_TE: as for :func:`summed_cross_entropy`, and so `projection`, `labels_T`, `chunk` and `finish`.
    """

    def of_chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(_logits(projection, finish, hidden), labels, ignore_index=IGNORE, reduction="none")

    parts = zip(hidden_TE.split(chunk), labels_T.split(chunk), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(of_chunk, *each, use_reentrant=False) for each in parts])
    return torch.cat([of_chunk(*each) for each in parts])


def _chunk_loss(
    projection: Tensor | Callable[[Tensor], Tensor],
    finish: Callable[[Tensor], Tensor] | None,
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    """Of a projection that is more than one product, whose gradients autograd finds."""
    return F.cross_entropy(_logits(projection, finish, hidden), labels, reduction="none") @ weights


def _logits(
    projection: Tensor | Callable[[Tensor], Tensor], finish: Callable[[Tensor], Tensor] | None, hidden: Tensor
) -> Tensor:
    product = hidden @ projection.T if isinstance(projection, Tensor) else projection(hidden)
    return product.float() if finish is None else finish(product.float())


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


ROUTERS = ("TopKRouter", "TopkRouter")
"""Ends of the class names of modules that return logits, weights and choices."""
DEFAULT_ALPHA = 0.001
"""DeepSeek-V2's, where the configuration leaves `aux_loss_alpha` out."""


Routed = tuple[Tensor, Tensor]
"""Logits ``[T, E]`` and choices ``[T, k]`` of a layer"""


class RouterLoss:
    """Listens to the routers of a model and turns what they did into the loss of a pack."""

    def __init__(self, lm: Any) -> None:
        config = lm.config
        self.pooled = config.model_type != "deepseek_v2"
        self._seen: list[Routed] | None = None
        self._heard: list[Routed] = []
        routers = [module for module in lm.modules() if type(module).__name__.endswith(ROUTERS)]
        self.coefficient = 0.0
        if routers and getattr(config, "output_router_logits", False):
            name, default = ("router_aux_loss_coef", 0.0) if self.pooled else ("aux_loss_alpha", DEFAULT_ALPHA)
            self.coefficient = float(getattr(config, name, default))
        for router in routers if self.coefficient else ():
            router.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if self._seen is not None:  # not while a layer is recomputed
            self._seen.append((output[0], output[2]))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what the routers do inside."""
        self._seen = []
        try:
            yield
        finally:
            self._heard, self._seen = self._seen, None

    def of_pack(self, layout: PackLayout) -> Tensor:
        """This rank's part of: the loss of each document × its tokens, times the coefficient; float32 scalar."""
        heard, self._heard = self._heard, []
        logits, chosen = zip(*heard, strict=True)
        document, counted = documents_of_tokens(layout, logits[0].device)
        n_experts, k, n_layers = logits[0].size(-1), chosen[0].size(-1), len(heard)
        lengths = layout.documents.cu_seqlens.diff()  # on the device already
        counts = torch.zeros(n_layers, len(lengths), n_experts, device=document.device)
        for layer, choice in zip(counts, chosen, strict=True):
            layer.index_put_((document[:, None], choice), torch.ones((), device=document.device), accumulate=True)
        often = layout.sum_over_ranks(counts) / lengths[:, None]  # [L, documents, E]
        if self.pooled:
            often, scale = often.mean(0, keepdim=True).expand_as(often), n_experts / n_layers
        else:
            scale = n_experts / k
        total = torch.zeros((), device=document.device)
        for layer_often, layer_logits in zip(often, logits, strict=True):
            probable = layer_logits.float().softmax(-1)
            total = total + ((layer_often[document] * probable).sum(-1) * counted).sum()
        return self.coefficient * scale * total


def documents_of_tokens(layout: PackLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Document of each token of this rank ``[T]`` int64, and whether it belongs to a sample ``[T]`` bool."""
    lengths = layout.documents.lengths
    total = sum(lengths)
    groups = SequenceGroups(layout.ulysses_degree, layout.sp_degree // layout.ulysses_degree)
    place = torch.cat(  # made where it is needed: nothing waits for a copy
        [torch.arange(run.start, run.stop, device=device) for run in tokens_of_rank(lengths, groups, layout.sp_rank)]
    )
    ends = layout.documents.cu_seqlens[1:].long()
    return torch.searchsorted(ends, place, right=True), place < total - layout.filler

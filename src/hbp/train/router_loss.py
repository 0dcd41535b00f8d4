"""The load-balancing loss of mixture-of-experts routers, by document, so that it does not depend on the packing.

Balance losses multiply how often an expert is chosen by how probable the router finds it. That product is not a sum
over tokens, so over "the batch" it would change with what shares a micro-batch. Here, as in DeepSeek-V2's own training
(its ``seq_aux``), it is taken over each document; and documents are averaged by their tokens over the global batch of
the optimizer step. That is what the unpacked model computes with one document a batch. Under sequence parallelism the
counts of choices, which carry no gradient, are summed over the ranks of the pack: ``layers × documents × experts``
numbers, once a pack. The trade: balance is asked of each document, which is stricter than of the batch.

Both families' own formulas, for a document of ``T`` tokens, ``E`` experts, ``k`` chosen of them, ``L`` layers, with
``f`` choices of an expert ÷ ``T`` and ``p`` its mean probability:

- Qwen3-MoE (Switch Transformer): ``E · Σ f·p``, both averaged over the layers first; ``router_aux_loss_coef``;
- DeepSeek-V2: ``E / k · Σ f·p``, summed over the layers; ``aux_loss_alpha``.

Off unless the configuration says ``output_router_logits``, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hbp.parallel.gather_kv import tokens_of_rank
from hbp.parallel.mesh import SequenceGroups
from hbp.parallel.ulysses import PackLayout

ROUTERS = ("Qwen3MoeTopKRouter", "DeepseekV2TopkRouter")
"""Modules that return logits, weights and choices."""
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
        routers = [module for module in lm.modules() if type(module).__name__ in ROUTERS]
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
        [torch.arange(run.start, run.stop, device=device) for run in tokens_of_rank(total, groups, layout.sp_rank)]
    )
    ends = layout.documents.cu_seqlens[1:].long()
    return torch.searchsorted(ends, place, right=True), place < total - layout.filler

"""Losses of preference pairs over packs: a step's mean over its pairs, whatever the packing, degree and accumulation.

A pack of pairs comes out of the model as one log-probability a document (:mod:`hbp.integrations.pack_loss`), chosen and
rejected side by side, from the trained model and from the reference. From those two numbers a side, each loss of a pair
follows on its own; packs hold unequal numbers of pairs, so the mean is over the pairs of the optimizer step and not
over those of a micro-batch. Losses of TRL's `DPOTrainer` that compare pairs with each other (`aot`), or average over
the tokens of a batch (`sft`), would depend on what shares a pack.

Legend: ``P`` pairs; ``2`` chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hbp.errors import HbpError
from hbp.train.batch import IDLE, MicroBatch
from hbp.train.loss import IGNORE, documents_of_tokens


@dataclass(frozen=True)
class Preference:
    """Which losses of a pair are taken, and their constants, by the names of TRL's `DPOConfig`."""

    types: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    """Of each type."""
    beta: float = 0.1
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, args: Any) -> Preference:
        """What a `DPOConfig` asks for.

        Raises:
            HbpError: something that a plan cannot follow; names the option.
        """
        types = (args.loss_type,) if isinstance(args.loss_type, str) else tuple(args.loss_type)
        for kind in types:
            if kind not in LOSSES_OF_A_PAIR:
                raise HbpError(
                    f"loss_type={kind!r} is not among the losses that do not depend on what shares a pack; give some "
                    f"of {', '.join(LOSSES_OF_A_PAIR)}"
                )
        for name, plain in (("f_divergence_type", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False)):
            value = getattr(args, name, plain)
            if getattr(value, "value", value) != plain:
                raise HbpError(f"{name}={value} is not among the losses of a plan of pairs; leave it out")
        weights = tuple(getattr(args, "loss_weights", None) or [1.0] * len(types))
        return cls(types, weights, args.beta, args.label_smoothing)


@dataclass(frozen=True)
class Pairs:
    """What is known of the pairs of a pack."""

    ratios_P2: Tensor  # log-probability under the model less that under the reference
    tokens_P2: Tensor  # targets of each side, at least 1


def _sigmoid(pairs: Pairs, how: Preference) -> Tensor:
    return -F.logsigmoid(how.beta * _margin(pairs.ratios_P2))


def _hinge(pairs: Pairs, how: Preference) -> Tensor:
    return F.relu(1 - how.beta * _margin(pairs.ratios_P2))


def _ipo(pairs: Pairs, how: Preference) -> Tensor:
    return (_margin(pairs.ratios_P2 / pairs.tokens_P2) - 1 / (2 * how.beta)) ** 2


def _robust(pairs: Pairs, how: Preference) -> Tensor:
    score, flipped = how.beta * _margin(pairs.ratios_P2), how.label_smoothing
    return (flipped * F.logsigmoid(-score) - (1 - flipped) * F.logsigmoid(score)) / (1 - 2 * flipped)


def _sigmoid_norm(pairs: Pairs, how: Preference) -> Tensor:
    return -F.logsigmoid(how.beta * _margin(pairs.ratios_P2 / pairs.tokens_P2))


def _nca_pair(pairs: Pairs, how: Preference) -> Tensor:
    rewards = how.beta * pairs.ratios_P2
    return -F.logsigmoid(rewards[:, 0]) - 0.5 * F.logsigmoid(-rewards).sum(1)


def _bco_pair(pairs: Pairs, how: Preference) -> Tensor:
    rewards = how.beta * pairs.ratios_P2
    return -F.logsigmoid(rewards[:, 0]) - F.logsigmoid(-rewards[:, 1])


def _sppo_hard(pairs: Pairs, how: Preference) -> Tensor:
    half = 0.5 / how.beta
    return (pairs.ratios_P2[:, 0] - half) ** 2 + (pairs.ratios_P2[:, 1] + half) ** 2


def _apo_zero(pairs: Pairs, how: Preference) -> Tensor:
    rewards = how.beta * pairs.ratios_P2
    return 1 - rewards[:, 0].sigmoid() + rewards[:, 1].sigmoid()


def _apo_down(pairs: Pairs, how: Preference) -> Tensor:
    score = how.beta * _margin(pairs.ratios_P2)
    return (how.beta * pairs.ratios_P2[:, 0]).sigmoid() + 1 - score.sigmoid()


LOSSES_OF_A_PAIR: dict[str, Callable[[Pairs, Preference], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "sigmoid_norm": _sigmoid_norm,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
}
"""By TRL's names; TRL's source names the paper of each."""


def _margin(sides_P2: Tensor) -> Tensor:
    return sides_P2[:, 0] - sides_P2[:, 1]


def pair_losses(pairs: Pairs, how: Preference) -> Tensor:
    """The loss of each pair, float32 ``[P]``."""
    parts = (weight * LOSSES_OF_A_PAIR[kind](pairs, how) for kind, weight in zip(how.types, how.weights, strict=True))
    total = pairs.ratios_P2.new_zeros(len(pairs.ratios_P2))
    for part in parts:
        total = total + part
    return total


def pair_count(batch: MicroBatch) -> int:
    """Pairs of the pack that a micro-batch is of."""
    documents = len(batch.layout.documents.lengths)
    return 0 if batch.row == IDLE else (documents - (batch.layout.filler > 0)) // 2


def sides(by_document: Tensor, batch: MicroBatch) -> Tensor:
    """Values of a pack's documents ``[documents]`` as those of its pairs ``[P, 2]``, without the filler."""
    return by_document[: 2 * pair_count(batch)].view(-1, 2)


def targets_of_sides(batch: MicroBatch) -> Tensor:
    """Targets of each side of the pack, over all its ranks, float32 ``[P, 2]``; at least 1."""
    document, _ = documents_of_tokens(batch.layout, batch.labels.device)
    counts = batch.labels.new_zeros(len(batch.layout.documents.lengths), dtype=document.dtype)
    counts.index_add_(0, document, (batch.labels != IGNORE).to(counts.dtype))
    return sides(batch.layout.sum_over_ranks(counts), batch).clamp_min(1).float()

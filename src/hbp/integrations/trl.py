"""A plan of preference pairs followed by TRL's `DPOTrainer`: chosen and rejected of a pair in one pack, unpatched.

Each pack runs once through the model and once, without gradients, through the reference (a model of its own, or the
model without its adapters), at the SP degree that the plan says; the loss of a step is the mean over its pairs
(:mod:`hbp.integrations.preference`). What is around it is TRL's: the reference model, adapters, wrapping, optimizer,
schedule, logs, evaluation, checkpoints.

A plan's seconds and bytes are those of training on its samples. The reference adds a forward to each pack, a third of
its time at most and in the same proportion everywhere, and its own weights, which want room: plan with less memory
(`memory_bytes` of a cluster file).

Needs torch alone to be imported, TRL (1.16) when :class:`HBPDPOTrainer` is asked for.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from hbp.errors import HbpError
from hbp.integrations.pack_loss import ARGUMENT, BatchArgument, attention_of, give_pack_loss
from hbp.integrations.pair_rows import as_pair_rows, check_pairs
from hbp.integrations.pair_rows import pair_lengths as pair_lengths
from hbp.integrations.preference import Pairs, Preference, pair_losses, sides, targets_of_sides
from hbp.integrations.rows import Rows
from hbp.integrations.transformers import FALLBACK, FollowsPlan
from hbp.parallel.ulysses import ATTENTION_NAMES
from hbp.train.batch import MicroBatch

LOGGED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""TRL's names of what is the mean over a step's pairs."""


class FollowsPairs(FollowsPlan):
    """Before `DPOTrainer`: it trains by a plan of preference pairs.

    Takes the trainer's own arguments, and those of :class:`~hbp.integrations.transformers.FollowsPlan` but for `loss`,
    which `DPOConfig.loss_type` says. ``train_dataset`` is a token store of pairs, or has TRL's columns ``prompt_ids``,
    ``chosen_ids`` and ``rejected_ids``: row *i* is then samples 2 *i* and 2 *i* + 1 (:func:`pair_lengths`). Its rows
    are taken as they are: ``max_length`` cuts those of evaluation alone.

    Raises:
        HbpError: the plan is of other data or another world size, parts a pair, or something is asked for that cannot
            work with one.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if "loss" in kwargs:
            raise HbpError(f"loss={kwargs['loss']!r} is of single samples; args.loss_type says that of pairs")
        if getattr(args, "precompute_ref_log_probs", False):
            raise HbpError("precompute_ref_log_probs runs the rows one by one; the plan runs the reference beside")
        self.preference = Preference() if args is None else Preference.of(args)
        super().__init__(model=model, ref_model=ref_model, args=args, **kwargs)
        if getattr(self, "aux_loss_enabled", False):
            raise HbpError("a plan of pairs has no router loss; set router_aux_loss_coef=0.0 in DPOConfig")
        for plan in self.plans:
            check_pairs(plan, self._rows)
        self._step_pairs = 0
        if self.ref_model is not None:
            give_pack_loss(self.ref_model)
            if self.ref_model.config._attn_implementation in ATTENTION_NAMES.values():
                self.ref_model.config._attn_implementation = FALLBACK

    def _rows_of(self, dataset: Any) -> Rows:
        return as_pair_rows(dataset)

    def _shown(self, rows: Rows) -> Any:
        """One pair: TRL takes no other kind of data, and would tokenize it anew."""
        from datasets import Dataset

        return Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As :class:`FollowsPlan`, with what TRL logs of pairs."""
        if "micro_batches" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step_pairs = inputs["samples"] // 2
        self._seen = torch.zeros(len(LOGGED), dtype=torch.float64)
        with nullcontext() if self.ref_model is None else attention_of(self.ref_model, self._ours):
            loss = super().training_step(model, inputs, num_items_in_batch)
        means = self.accelerator.reduce(self._seen.to(self.args.device, torch.float32), "sum") / self._step_pairs
        for name, value in zip(LOGGED, means.tolist(), strict=True):
            self._metrics["train"][name].append(value)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of a micro-batch: its pairs' part of the step's mean, times the ranks (gradients are averaged over them)."""
        if ARGUMENT not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        batch: MicroBatch = inputs[ARGUMENT].batch
        asked = {ARGUMENT: BatchArgument(batch, by_document=True)}
        with torch.no_grad(), self.accelerator.autocast():
            if self.ref_model is None:
                from trl.trainer.utils import use_adapter

                lm = self.accelerator.unwrap_model(self.model)
                with use_adapter(lm, adapter_name="ref" if "ref" in lm.peft_config else None):
                    reference = self.model(**asked)
            else:
                reference = self.ref_model(**asked)
        trained = model(**asked)
        pairs = Pairs(sides(trained - reference, batch), targets_of_sides(batch))
        degree = batch.layout.sp_degree  # every rank of the pack computes the same
        self._see(pairs.ratios_P2.detach(), sides(trained.detach(), batch), degree)
        own = pair_losses(pairs, self.preference).sum() + 0 * trained.sum()  # of no pair, where this rank is idle
        return own * (self.args.world_size / (degree * self._step_pairs))

    def _see(self, ratios_P2: torch.Tensor, log_probs_P2: torch.Tensor, degree: int) -> None:
        """Add up what is logged, so that all ranks together count each pair once."""
        rewards = self.preference.beta * ratios_P2
        chosen, rejected = rewards.unbind(1)
        of_each = (chosen, rejected, chosen > rejected, chosen - rejected, *log_probs_P2.unbind(1))
        self._seen += torch.stack([x.double().sum() for x in of_each]).cpu() / degree


if TYPE_CHECKING:
    from trl import DPOTrainer as _DPOTrainer

    class HBPDPOTrainer(FollowsPairs, _DPOTrainer):
        """TRL's DPOTrainer, by a plan of preference pairs."""


def __getattr__(name: str) -> Any:
    if name != "HBPDPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl import DPOTrainer

    text = "TRL's DPOTrainer, by a plan of preference pairs (:class:`FollowsPairs`)."
    made = type(name, (FollowsPairs, DPOTrainer), {"__doc__": text, "__module__": __name__})
    globals()[name] = made
    return made

"""A plan followed by transformers' Trainer and TRL's SFTTrainer: adaptive SP degrees and recomputation, unpatched.

:class:`FollowsPlan` goes before a trainer's class (:class:`HBPTrainer` and :class:`HBPSFTTrainer` are that). One
"batch" of the trainer is one optimizer step of the plan, a list of micro-batches; each is run with its own SP degree,
its own number of recomputed layers and our document attention, and everything else is the trainer's own: the wrapping
(DDP, FSDP2 by Accelerate's plugin or `DistributedConfig`, peft), mixed precision, the optimizer, clipping, schedules,
callbacks, loggers, evaluation, checkpoints. Evaluation and `generate` run with the attention that the model came with.

What cannot work with a plan is refused, with the reason (:func:`refuse`).

Needs torch alone to be imported; transformers (5.5 or newer) when :class:`HBPTrainer` is asked for, and TRL when
:class:`HBPSFTTrainer` is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from hbp.config import LOSSES, TrainConfig
from hbp.errors import HbpError
from hbp.integrations.pack_loss import ARGUMENT, BatchArgument, attention_of, give_pack_loss
from hbp.integrations.plan_steps import Item, PlanSteps, loader_of
from hbp.integrations.rows import Rows, as_rows, check_ids, check_made_for
from hbp.parallel.ulysses import ATTENTION_NAMES, register_attention
from hbp.parallel.varlen import check_features
from hbp.plan import Plan
from hbp.train.batch import MicroBatch
from hbp.train.check.families import PROVEN_FAMILIES, check_trainable
from hbp.train.model import attention_features, set_gc_layers

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

PlanLike = Plan | str | Path
PLAN_FILE = "hbp_plan.json"
"""In each checkpoint: which plan its steps are counted in."""
FALLBACK = "sdpa"
"""Attention of evaluation, for a model that came with ours."""


class FollowsPlan(_Trainer):
    """Before a trainer's class: it trains by a plan.

    Takes the trainer's own arguments, and these by name:

    Args:
        plan: a :class:`~hbp.plan.Plan` or its folder; or a sequence with one for each epoch, the last of which goes on
            for those after it. Made for as many ranks as train.
        loss: as ``train.loss`` of `hbp train`: what a step's loss is taken over, whatever the packing.
        lr_by: ``steps``, or ``tokens``: the schedule follows the share of the plan's tokens seen at the middle of a
            step, so that plans which cut the same tokens into other steps see the same rates.
        kernel: of document attention, as ``model.attention`` of `hbp train`.

    Row *i* of ``train_dataset`` is sample *i* of the plan: a `datasets.Dataset` or a sequence of rows with
    ``input_ids`` and ``labels``, or anything with ``sample(i)`` (:mod:`hbp.integrations.rows`).
    ``per_device_train_batch_size`` and the data collator are not used in training, and ``gradient_checkpointing`` has
    no say: the plan decides.

    Raises:
        HbpError: the plan is of other data or another world size, or something is asked for that cannot work with one.
    """

    def __init__(
        self,
        *args: Any,
        plan: PlanLike | Sequence[PlanLike],
        train_dataset: Any,
        loss: str = TrainConfig.model_fields["loss"].default,
        lr_by: str = "steps",
        kernel: str = "auto",
        **kwargs: Any,
    ) -> None:
        plans = [plan] if isinstance(plan, Plan | str | Path) else list(plan)
        self.plans = [p if isinstance(p, Plan) else Plan.load(p) for p in plans]
        if not self.plans or not all(p.n_steps for p in self.plans):
            raise HbpError("there is no plan to follow, or one without a step; make one with `hbp plan`")
        if loss not in LOSSES:
            raise HbpError(f"no loss {loss!r}: give one of {', '.join(LOSSES)}")
        if lr_by not in ("steps", "tokens"):
            raise HbpError(f"lr_by={lr_by!r}: give steps or tokens")
        self.plan_loss, self.lr_by = loss, lr_by
        self._ours = register_attention(kernel)
        self._plan_steps: PlanSteps | None = None
        if kwargs.get("model_init") is not None:
            raise HbpError("model_init makes another model when training starts; give the model itself")
        given: Any = kwargs.get("args") or next(iter(args[1:2]), None)
        if getattr(given, "ddp_find_unused_parameters", False) is None:
            given.ddp_find_unused_parameters = False  # every parameter is used in every micro-batch
        self._rows = self._rows_of(train_dataset)
        super().__init__(*args, train_dataset=self._shown(self._rows), **kwargs)
        self.train_dataset = self._rows
        refuse(self)
        for each in self.plans:
            check_made_for(each, self._rows.lengths, self.args.world_size)
        self._lm = _without_wrappers(self.model)
        check_trainable(self._lm.config)
        embeds = self._lm.get_input_embeddings()
        check_ids(self._rows, getattr(embeds, "num_embeddings", self._lm.config.vocab_size))
        check_features(kernel, attention_features(self._lm))
        if self._lm.config.model_type not in PROVEN_FAMILIES:
            warnings.warn(
                f"{self._lm.config.model_type} is not among the families that are shown to train packed as they do "
                "unpacked; hold it against plain transformers with `hbp check`",
                stacklevel=2,
            )
        give_pack_loss(self._lm)
        if self._lm.config._attn_implementation in ATTENTION_NAMES.values():
            self._lm.config._attn_implementation = FALLBACK
        self.add_callback(_callback(self))

    def _rows_of(self, dataset: Any) -> Rows:
        """The training data as the plan's samples."""
        return as_rows(dataset)

    def _shown(self, rows: Rows) -> Any:
        """What the trainer's own constructor sees of the training data."""
        return rows

    # ---- Steps and epochs -------------------------------------------------------------------------------------------

    def plan_of_epoch(self, epoch: int) -> Plan:
        """The plan that an epoch follows."""
        return self.plans[min(epoch, len(self.plans) - 1)]

    def _steps_before(self, epochs: int) -> list[int]:
        """Optimizer steps before each epoch ``[epochs + 1]``."""
        return [0, *itertools.accumulate(self.plan_of_epoch(epoch).n_steps for epoch in range(epochs))]

    def get_train_dataloader(self) -> Any:
        """This rank's micro-batches, an optimizer step an item; not prepared by accelerate, as it is this rank's."""
        if self._plan_steps is None:
            heads = self._lm.config.get_text_config().num_attention_heads
            self._plan_steps = PlanSteps(self.plans, self._rows, self.args.device, heads, self.plan_loss)
        enable = getattr(self._lm, "activation_checkpointing_enable", None) or self._lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # a layer's arguments, the pack's layout, are kept for the recomputation
        return loader_of(self._plan_steps)

    def num_examples(self, dataloader: Any) -> int:
        """Samples of the plan."""
        if isinstance(dataloader.dataset, PlanSteps):
            return len(self.plans[0].sample_ids)
        return int(super().num_examples(dataloader))

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """As the trainer, for plans of unequal numbers of steps."""
        values = list(super().set_initial_training_values(args, dataloader))
        epochs = max(int(values[0]), 1)
        longest = max(plan.n_steps for plan in self.plans[:epochs])
        values[1] = values[5] = longest  # a shorter epoch ends when its plan does
        if args.max_steps <= 0:
            whole, part = divmod(args.num_train_epochs, 1)
            before = self._steps_before(int(whole))[-1]
            values[6] = max(1, before + int(np.ceil(part * self.plan_of_epoch(int(whole)).n_steps)))
        else:
            values[0] = next(n for n in itertools.count(1) if self._steps_before(n)[-1] >= args.max_steps)
            values[1] = values[5] = max(self.plan_of_epoch(epoch).n_steps for epoch in range(values[0]))
        return tuple(values)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, resume: str | None, trial: Any) -> Any:
        """Where in which epoch a run goes on: epochs may have unequal numbers of steps."""
        if resume is not None:
            self._check_checkpoint(Path(resume))
        found = super()._init_training_state(max_steps, steps, epochs, resume, trial)
        before = self._steps_before(epochs)
        done = self.state.global_step
        epoch = int(np.searchsorted(before, done, side="right")) - 1
        if resume is None:
            return found
        return epoch, 0 if self.args.ignore_data_skip else done - before[epoch]

    def _check_checkpoint(self, folder: Path) -> None:
        path = folder / PLAN_FILE
        if path.is_file() and json.loads(path.read_text())["plans"] != self._plan_hashes():
            raise HbpError(f"{folder} was trained by another plan than this; give the plan that it was trained by")

    def _plan_hashes(self) -> list[str]:
        return [_hash(plan) for plan in self.plans]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The trainer's schedule; by tokens, evaluated where the tokens seen at the middle of a step stand."""
        if self.lr_scheduler is not None or self.lr_by == "steps":
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            raise HbpError(f"lr_by=tokens: {self.args.lr_scheduler_type} is no function of the step; take another")
        at = self._token_positions(num_training_steps)
        schedule.lr_lambdas = [_at(at, rate) for rate in schedule.lr_lambdas]
        first = [base * rate(0) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, lr in zip(schedule.optimizer.param_groups, first, strict=True):
            group["lr"] = lr
        schedule._last_lr = first
        return schedule

    def _token_positions(self, steps: int) -> Any:
        """For each step the share of the run's tokens seen at its middle, times the steps ``[steps]``."""
        tokens, epoch = np.zeros(0), 0
        while len(tokens) < steps:
            plan, epoch = self.plan_of_epoch(epoch), epoch + 1
            tokens = np.concatenate([tokens, np.bincount(plan.step, plan.tokens(), plan.n_steps)])
        tokens = tokens[:steps]
        return (np.cumsum(tokens) - tokens / 2) / tokens.sum() * steps

    # ---- One step ---------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of an optimizer step's micro-batches; the sum of their losses, times the ranks."""
        if "micro_batches" not in inputs:
            step: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            return step
        batches: list[MicroBatch] = inputs["micro_batches"]
        total = torch.zeros((), device=self.args.device)
        with attention_of(self._lm, self._ours):
            for left, batch in zip(range(len(batches) - 1, -1, -1), batches, strict=True):
                set_gc_layers(self._lm, batch.gc_layers)
                # DDP reduces gradients with the last. FSDP2 reduces and shards them each time: unsharded they would
                # not fit, and the plan's memory model counts them sharded.
                alone = model.no_sync() if left and isinstance(model, DistributedDataParallel) else nullcontext()
                with alone:
                    total += super().training_step(model, {ARGUMENT: BatchArgument(batch.to(self.args.device))}, None)
        self._count_tokens(inputs["tokens"])
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Of a micro-batch: its part of the step's loss, times the ranks, as gradients are averaged over them."""
        if ARGUMENT not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        return model(**inputs) * self.args.world_size

    def _count_tokens(self, tokens: int) -> None:
        """For the figures that TRL logs."""
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens += tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def _track_num_input_tokens(self, inputs: Item) -> None:
        if self.args.include_num_input_tokens_seen not in ("no", False):
            self.state.num_input_tokens_seen += inputs["tokens"]

    def floating_point_ops(self, inputs: Any) -> int:
        """Of this rank's share of a step."""
        if "micro_batches" not in inputs:
            return int(super().floating_point_ops(inputs))
        return 6 * inputs["tokens"] // self.args.world_size * int(self._lm.num_parameters(exclude_embeddings=True))


def refuse(trainer: Any) -> None:
    """Refuse what cannot work with a plan, with the reason.

    Args:
        trainer: just made, before it trains.

    Raises:
        HbpError: the first that cannot.
    """
    args, accelerator = trainer.args, trainer.accelerator
    parallel = getattr(accelerator, "parallelism_config", None)
    static = {k: getattr(parallel, f"{k}_size", 1) for k in ("tp", "cp", "sp")} if parallel else {}
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    sampling = str(getattr(args, "train_sampling_strategy", "random"))
    reasons = {
        "DeepSpeed shards and reduces gradients by its own schedule, and cannot change the sequence-parallel degree "
        "from pack to pack; use DDP or FSDP2": trainer.is_deepspeed_enabled,
        f"parallelism_config has a static degree ({', '.join(f'{k} {n}' for k, n in static.items() if n > 1)}); the "
        "plan gives each pack its own, so leave it out": any(n > 1 for n in static.values()),
        "FSDP1 is not supported; set fsdp_version to 2": fsdp is not None and getattr(fsdp, "fsdp_version", 1) != 2,
        "fsdp_config's activation_checkpointing recomputes every layer; the plan says which, so leave it out": bool(
            getattr(fsdp, "activation_checkpointing", False)
        ),
        f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; the plan has the micro-batches of every "
        "step, so set it to 1": args.gradient_accumulation_steps != 1,
        f"{args.n_gpu} GPUs in one process (DataParallel) cannot follow a plan; start it with torchrun or accelerate "
        "launch": args.n_gpu > 1,
        "auto_find_batch_size changes the batch; the plan has it": args.auto_find_batch_size,
        f"train_sampling_strategy={sampling} orders samples by itself; the plan has their order, so leave it out": not (
            sampling.endswith("random") or sampling.endswith("sequential")
        )
        or bool(getattr(args, "group_by_length", False)),
        "packing packs the rows anew; the plan has the packs, so set packing=False": bool(
            getattr(args, "packing", False)
        ),
        "padding_free belongs to TRL's own batches; a plan's packs have no padding, so set padding_free=False": bool(
            getattr(args, "padding_free", False)
        ),
        f"loss_type={getattr(args, 'loss_type', '')!r} is not among the losses of a plan; give loss= one of "
        f"{', '.join(LOSSES)}": isinstance(getattr(args, "loss_type", None), str)
        and args.loss_type != "nll",  # of pairs, a list
        "label smoothing is not among the losses of a plan; set label_smoothing_factor to 0": bool(
            args.label_smoothing_factor
        ),
        "compute_loss_func would need the logits of a whole pack; the loss of a plan is one of "
        f"{', '.join(LOSSES)}": trainer.compute_loss_func is not None,
    }
    for reason, there in reasons.items():
        if there:
            raise HbpError(reason)


def _at(positions: Sequence[float], rate: Callable[[Any], float]) -> Callable[[int], float]:
    """A rate of positions as one of steps."""
    return lambda step: rate(float(positions[min(step, len(positions) - 1)]))


def _without_wrappers(model: Any) -> Any:
    """The transformers model inside peft's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hash(plan: Plan) -> str:
    """Of what a plan has ranks do, in which order."""
    digest = hashlib.sha256()
    for column in (plan.step, plan.micro_step, plan.rank_start, plan.sp_degree, plan.sample_offsets, plan.sample_ids):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _callback(trainer: FollowsPlan) -> Any:
    """Which epoch it is, and which plan a checkpoint is of."""
    from transformers import TrainerCallback

    class PlanCallback(TrainerCallback):
        """Keeps the plan's steps and the trainer's in step."""

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """The steps done say which epoch begins."""
            epoch = next(n for n in itertools.count() if trainer._steps_before(n + 1)[-1] > state.global_step)
            assert trainer._plan_steps is not None
            trainer._plan_steps.start_epoch(epoch)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Beside the trainer's own state."""
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if args.should_save and folder.is_dir():
                (folder / PLAN_FILE).write_text(json.dumps({"plans": trainer._plan_hashes()}))

    return PlanCallback()


if TYPE_CHECKING:
    from trl import SFTTrainer as _SFTTrainer

    class HBPTrainer(FollowsPlan):
        """transformers' Trainer, by a plan."""

    class HBPSFTTrainer(FollowsPlan, _SFTTrainer):
        """TRL's SFTTrainer, by a plan."""


def __getattr__(name: str) -> Any:
    if name == "HBPTrainer":
        from transformers import Trainer

        made: Any = type("HBPTrainer", (FollowsPlan, Trainer), {"__doc__": "transformers' Trainer, by a plan."})
    elif name == "HBPSFTTrainer":
        made = _sft_trainer()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made.__module__ = __name__
    globals()[name] = made
    return made


def _sft_trainer() -> Any:
    from datasets import Dataset
    from trl import SFTTrainer

    class HBPSFTTrainer(FollowsPlan, SFTTrainer):
        """TRL's SFTTrainer, by a plan. The training rows are tokenized already; the evaluation's need not be.

        Entropy and token accuracy, which TRL logs in training, need the logits and are logged in evaluation alone.
        """

        def _shown(self, rows: Rows) -> Any:
            """One row, prepared: TRL takes no other kind of data, and would pack, cut or tokenize it anew."""
            return Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})

    return HBPSFTTrainer

"""Plans followed by transformers' and TRL's trainers in gloo processes, and by our own engine beside them.

One launch of processes runs every case, since what costs is the launch. Accelerate knows FSDP on accelerators alone:
:func:`_sharded_on_cpu` tells it that the processes are such, so that its own wrapping is what runs here.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from plans import Row, plan_of
from workers import CPU, LLAMA, random_samples

from hbp.config import LoraConfig, TrainConfig
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan
from hbp.train.loop import Learner, Start, train
from hbp.train.lora import add_adapters
from hbp.train.model import load_sharded

LR = 1e-2
LORA = LoraConfig(rank=4, alpha=8)
SAMPLES = random_samples(np.random.default_rng(0).integers(3, 40, 24), LLAMA["vocab_size"])


@dataclass(frozen=True)
class Case:
    """How a plan is followed."""

    trainer: str = "hf"  # or sft, dpo
    wrapping: str = "ddp"  # or plugin (Accelerate's FSDP2), config (transformers' DistributedConfig)
    loss: str = "ave-token"
    lora: bool = False
    bf16: bool = False
    lr_by: str = "steps"
    epochs: float = 1
    plans: int = 1
    """Of so many epochs each its own."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Of TrainingArguments."""


def plan(world: int, seed: int = 0) -> Plan:
    """Three steps (four of another seed): degrees mixed in a micro-step, idle ranks, 0 to 3 recomputed layers."""
    ids = iter(np.random.default_rng(seed).permutation(len(SAMPLES.lengths)).tolist())

    def take(n: int) -> list[int]:
        return [next(ids) for _ in range(n)]

    rows: list[Row] = [(0, 0, rank, 1, rank % 4, take(1)) for rank in range(world)]
    rows += [(0, 1, 0, world, 2, take(3))]
    rows += [(1, 0, world - 1, 1, 3, take(2))]  # the others are idle
    if world == 4:
        rows += [(1, 1, 0, 2, 3, take(2)), (1, 1, 2, 1, 0, take(1)), (1, 1, 3, 1, 1, take(2))]
    rows += [(2, 0, 0, 2, 1, take(4)), (2, 1, 0, 1, 0, take(1)), (2, 1, 1, 1, 2, take(2))]
    if seed:
        rows += [(3, 0, 0, world, 3, take(2))]
    return plan_of(rows, SAMPLES.lengths, world)


def plans_of(case: Case, world: int) -> list[Plan]:
    return [plan(world, seed) for seed in range(case.plans)]


def rows_of_samples() -> list[dict[str, list[int]]]:
    """As a data set of labels before the shift."""
    return [
        {"input_ids": ids.tolist(), "labels": np.where(mask != 0, ids, -100).tolist()}
        for ids, mask in SAMPLES.documents
    ]


def by_our_engine(rank: int, world: int, folder: str, case: Case) -> dict[str, Any]:
    """Losses, gradient norms, rates and weights of the engine that the trainers are held against."""
    mesh = make_mesh(world, [], "cpu", LLAMA["num_attention_heads"])
    adapt = (lambda model: add_adapters(model, LORA, folder, seed=1)) if case.lora else None
    model = load_sharded(folder, mesh.world, CPU, adapt=adapt)
    first = full_state(model.lm)
    final = 0.1 if case.lr_by == "tokens" else 1.0
    config = TrainConfig(lr=LR, warmup=0, final_lr=final, weight_decay=0, loss=case.loss)
    records = []
    plans = [plans_of(case, world)[min(epoch, case.plans - 1)] for epoch in range(int(case.epochs))]
    learner = Learner.of(model, mesh, config, CPU)
    total, done = sum(each.info.n_tokens for each in plans), 0
    for each in plans:
        start = Start(0, done, total)
        records += train(learner, each, SAMPLES, start=start)
        done += each.info.n_tokens
    return {
        "losses": [record.loss for record in records],
        "norms": [record.grad_norm for record in records],
        "rates": [record.lr for record in records],
        "first": first,
        "weights": full_state(model.lm),
    }


def unpacked(world: int, folder: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """Losses, norms and weights of the plain model, each document alone; computed in `dtype`, states in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.95), weight_decay=0.0)
    the_plan, found = plan(world), {"losses": [], "norms": []}
    for step in range(the_plan.n_steps):
        in_step = np.repeat(the_plan.step, np.diff(the_plan.sample_offsets)) == step
        ids = the_plan.sample_ids[in_step].tolist()
        targets, total = int(SAMPLES.loss_tokens[ids].sum()), 0.0
        optimizer.zero_grad()
        for tokens, mask in (SAMPLES.sample(i) for i in ids):
            labels = torch.tensor(np.where(mask != 0, tokens, -100)[1:]).long()
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                logits = model(input_ids=torch.tensor(tokens[None]).long()).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum") / targets
            loss.backward()
            total += float(loss.detach())
        found["losses"].append(total)
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return {**found, "weights": full_state(model)}


def full_state(model: Any) -> dict[str, torch.Tensor]:
    """Whole parameters by their names in the transformers model, copied."""
    named = {}
    for name, value in model.named_parameters():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        named[name.removeprefix("base_model.model.")] = whole.detach().float().clone()
    return named


def by_trainer(rank: int, world: int, folder: str, out: str, case: Case, first: dict[str, Any]) -> dict[str, Any]:
    """The same of a trainer."""
    with trainer_of(rank, world, folder, out, case, first) as trainer:
        trainer.train(resume_from_checkpoint=case.options.get("resume_from_checkpoint"))
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": [entry["loss"] for entry in logs],
            "norms": [entry["grad_norm"] for entry in logs],
            "rates": [entry["learning_rate"] for entry in logs],
            "weights": full_state(trainer._lm if not case.lora else trainer.model),
        }


@contextlib.contextmanager
def trainer_of(
    rank: int, world: int, folder: str, out: str, case: Case, first: dict[str, Any] | None = None, **kwargs: Any
) -> Iterator[Any]:
    """A trainer that is ready to train, in this rank of a process group that is there."""
    from transformers import AutoModelForCausalLM

    import hbp.integrations.transformers as integration

    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)):
        os.environ[name] = str(value)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # never used: the group is there
    forget_accelerate()
    sharded: dict[str, Any] = {}
    if case.wrapping == "config":
        from transformers.distributed import DistributedConfig

        sharded = {"distributed_config": DistributedConfig(fsdp_size=world)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **sharded)
    if case.lora:
        model = with_adapters(model, first or {})
    kind: Any = integration.HBPTrainer if case.trainer == "hf" else integration.HBPSFTTrainer
    if case.trainer == "dpo":
        from hbp.integrations.trl import HBPDPOTrainer as kind
    else:
        kwargs = {"loss": case.loss, **kwargs}
    if case.trainer != "hf":
        kwargs = {"processing_class": tokenizer(), **kwargs}
    dataset: Any = kwargs.pop("train_dataset", None) or SAMPLES
    plans = kwargs.pop("plan", None) or plans_of(case, world)
    with _sharded_on_cpu() if case.wrapping == "plugin" else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = arguments(case, out)
        yield kind(model=model, args=args, plan=plans, train_dataset=dataset, lr_by=case.lr_by, **kwargs)
    forget_accelerate()


def arguments(case: Case, out: str) -> Any:
    """TrainingArguments, or TRL's."""
    if case.trainer == "sft":
        from trl import SFTConfig as Arguments
    elif case.trainer == "dpo":
        from trl import DPOConfig as Arguments
    else:
        from transformers import TrainingArguments as Arguments
    schedule: dict[str, Any] = {"lr_scheduler_type": "constant"}
    if case.lr_by == "tokens":
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    plugin = (
        {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, **WRAP}} if case.wrapping == "plugin" else {}
    )
    options = {k: v for k, v in case.options.items() if k != "resume_from_checkpoint"}
    defaults: dict[str, Any] = {
        "output_dir": out,
        "use_cpu": True,
        "bf16": case.bf16,
        "num_train_epochs": case.epochs,
        "learning_rate": LR,
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_backend": "gloo",
    }
    return Arguments(**{**defaults, **schedule, **plugin, **options})


WRAP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}


def with_adapters(model: Any, first: dict[str, torch.Tensor]) -> Any:
    import peft

    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(first[name.removeprefix("base_model.model.")])
    return wrapped


def tokenizer() -> Any:
    """One that TRL accepts; nothing is tokenized with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(LLAMA["vocab_size"] - 2)} | {"</s>": 62, "<unk>": 63}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def forget_accelerate() -> None:
    """What one trainer told accelerate would stay for the next."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@contextlib.contextmanager
def _sharded_on_cpu() -> Iterator[None]:
    import transformers.trainer as module
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    def make(*args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> Accelerator:
        made = Accelerator(*args, **kwargs)
        fsdp_plugin.fsdp_version = 2
        if made.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(made.mixed_precision)
        made.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=fsdp_plugin)
        made.state.__dict__.update(made.state._shared_state)
        return made

    before, module.Accelerator = module.Accelerator, make
    try:
        yield
    finally:
        module.Accelerator = before


def run_cases(rank: int, world: int, folder: str, out: str, cases: dict[str, Case]) -> dict[str, Any]:
    """For :func:`workers.run_ranks`: each case by a trainer, and what it is held against."""
    references: dict[Any, Any] = {}
    found: dict[str, Any] = {}
    for name, case in cases.items():
        key = (case.loss, case.lora, case.lr_by, case.epochs, case.plans)
        if key not in references:
            references[key] = by_our_engine(rank, world, folder, case)
        got = by_trainer(rank, world, folder, str(Path(out) / name), case, references[key]["first"])
        found[name] = {"got": got, "want": references[key]}
        if case.bf16:
            found[name]["unpacked"] = unpacked(world, folder, torch.bfloat16)
        dist.barrier()
    return found

"""One rank of TRL's SFTTrainer on a token store: what `benchmarks/train.py` and `gpu_train.py` run and measure against.

Packing is TRL's own (`packing=True`, best-fit decreasing), the loss is masked as the store says, the model is the same
folder. Before training it looks which attention runs and whether documents of a pack see each other: it changes the
first document of a real batch and compares the logits of the second.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbp.data.store import open_store


class StepClock(TrainerCallback):
    """Wall seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def documents_apart(trainer: SFTTrainer) -> dict[str, Any]:
    """Whether the second document of a pack's logits ignore the first, on the batch that the trainer makes."""
    packs = [row for row in trainer.train_dataset if len(row["seq_lengths"]) > 1]
    row = min(packs, key=lambda row: len(row["input_ids"]))
    batch = trainer.data_collator([row])
    model, first = trainer.model, int(row["seq_lengths"][0])
    inputs = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][0, :first] = (changed["input_ids"][0, :first] + 1) % model.config.vocab_size
    with torch.no_grad():
        before, after = (model(**x).logits[0, first:].float() for x in (inputs, changed))
    starts = (batch["position_ids"][0] == 0).sum()
    return {
        "attention": model.config._attn_implementation,
        "position_ids_restart": int(starts) == len(row["seq_lengths"]),
        "documents_apart": bool((before - after).abs().max() <= 1e-4 * before.abs().max()),
        "has_attention_mask": "attention_mask" in batch,
    }


def main() -> None:
    wanted = json.loads(Path(sys.argv[1]).read_text())
    store = open_store(Path(wanted["store"]))
    rows = []
    for index in np.load(wanted["samples"]):
        ids, mask = store.sample(int(index))
        rows.append({"input_ids": ids.tolist(), "labels": np.where(mask != 0, ids, -100).tolist()})
    on_gpu = torch.cuda.is_available()
    config = SFTConfig(
        output_dir=wanted["out"],
        max_length=wanted["max_length"],
        packing=True,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=wanted["accumulation"],
        gradient_checkpointing=wanted["gradient_checkpointing"],
        num_train_epochs=1,
        max_steps=wanted.get("max_steps", -1),
        learning_rate=wanted["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=0,
        weight_decay=0.01,
        adam_beta2=0.95,
        seed=wanted["seed"],
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    model = AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(wanted["tokenizer"])
    clock = StepClock()
    trainer = SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
    )
    apart = documents_apart(trainer)
    packed = [sum(row["seq_lengths"]) for row in trainer.train_dataset]
    trainer.train()
    if trainer.args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = sum(packed) if config.max_steps < 0 else None
        result = {
            **apart,
            "gradient_checkpointing": wanted["gradient_checkpointing"],
            "packs": len(packed),
            "tokens": trained or clock_tokens(trainer),
            "tokens_given": int(sum(len(row["input_ids"]) for row in rows)),
            "steps": len(clock.seconds),
            "seconds": sum(clock.seconds),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
        result["tokens_per_s"] = result["tokens"] / result["seconds"]
        Path(wanted["result"]).write_text(json.dumps(result))


def clock_tokens(trainer: SFTTrainer) -> int:
    """Tokens that the trainer has counted."""
    return int(next(e["num_tokens"] for e in reversed(trainer.state.log_history) if "num_tokens" in e))


if __name__ == "__main__":
    main()

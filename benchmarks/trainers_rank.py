"""One rank of `benchmarks/trainers.py`: profile and plan, then every setting in turn, in the same process.

Our document attention can be had by the stock trainer too (:func:`document_attention_for_stock`): it reads the
documents of a batch off its position ids, or off the attention mask where rows are padded, as flash attention does. So
what is left between such a run and one that follows a plan is the plan.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hbp.config import Config
from hbp.cost.cluster import load_cluster
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.integrations.rows import as_rows
from hbp.integrations.transformers import HBPSFTTrainer
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import document_attention, make_documents
from hbp.plan import Plan
from hbp.planning.planner import make_plan
from hbp.run.engine import Engine, profile_cluster

OURS = "bench_documents"


class Clock(TrainerCallback):
    """Wall and processor seconds of this rank from one optimizer step's end to the next's: data and logs are in it."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.busy: list[float] = []
        self.began = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = (time.perf_counter(), time.process_time())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        self.wall.append(now[0] - self.began[0])
        self.busy.append(now[1] - self.began[1])
        self.began = now


def document_attention_for_stock(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Any, None]:
    """``[B, H, T, D]``: each document of each row apart, padding left out."""
    out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
    positions = kwargs.get("position_ids")
    for row in range(query.shape[0]):
        real = query.shape[2] if attention_mask is None else int(attention_mask[row].sum())
        if positions is not None and positions.shape[0] == query.shape[0] and attention_mask is None:
            starts = torch.nonzero(positions[row] == 0).flatten().tolist()
        else:
            starts = [0]
        lengths = tuple(b - a for a, b in zip(starts, [*starts[1:], real], strict=True))
        q, k, v = (x[row, :, :real].transpose(0, 1) for x in (query, key, value))
        out[row, :real] = document_attention(q, k, v, make_documents(lengths, query.device), scale=scaling)
    return out, None


def padding_alone(attention_mask: Any = None, **_: Any) -> Any:
    """The mask of padded rows, as they came; none where nothing is padded."""
    return None if attention_mask is None or bool(attention_mask.all()) else attention_mask


class Bench:
    """What every setting shares on this rank."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.wanted, self.rank = wanted, dist.get_rank()
        data = np.load(wanted["data"])
        offsets, tokens = data["offsets"], data["tokens"]
        self.rows = [{"input_ids": tokens[a:b].tolist()} for a, b in itertools.pairwise(offsets)]
        for row in self.rows:
            row["labels"] = list(row["input_ids"])
        self.lengths = np.diff(offsets).astype(np.int32)
        self.cost = CostModel(load_model_spec(wanted["model"]), load_cluster("cpu-local"), dist.get_world_size())
        AttentionInterface.register(OURS, document_attention_for_stock)
        AttentionMaskInterface.register(OURS, padding_alone)

    def profile(self) -> None:
        """The cost model, measured here if there is time for it, with a memory budget."""
        world = dist.get_world_size()
        config = Config.model_validate({"model": {"path": self.wanted["model"]}, "cluster": {"processes": world}})
        samples: Any = SimpleNamespace(lengths=self.lengths, store=SimpleNamespace(vocab_size=self.wanted["vocab"]))
        mesh = make_mesh(world, [], "cpu", self.cost.model.heads)
        engine = Engine(config, torch.device("cpu"), mesh, samples, samples, self.cost)
        cluster = self.cost.cluster
        if self.wanted["profile_s"]:
            cluster = profile_cluster(engine, Path(self.wanted["profile"]), limit_s=self.wanted["profile_s"])
        self.cost = CostModel(self.cost.model, cluster, world)
        budget = self.cost.bytes(self.wanted["budget_tokens"], 1, self.cost.model.n_layers)
        self.cost = CostModel(self.cost.model, _with_memory(cluster, budget), world)

    def plan(self, strategy: str) -> Plan:
        """Rank 0's, the same on every rank."""
        made: list[Any] = [None]
        if self.rank == 0:
            options: dict[str, Any] = {"global_batch_tokens": self.wanted["batch_tokens"], "short_steps": 0}
            if strategy != "hbp-mixed":
                options["max_length"] = int(self.lengths.max())
            made = [make_plan(self.lengths, self.cost, strategy=strategy, **options)]
        dist.broadcast_object_list(made)
        plan: Plan = made[0]
        return plan

    def fits(self, tokens: int, gc_layers: int) -> bool:
        """Whether a micro-batch keeps within the budget."""
        return self.cost.bytes(tokens, 1, gc_layers) <= self.cost.cluster.memory_bytes

    def settings(self) -> list[dict[str, Any]]:
        """Every stock setting, its batch chosen for the step's tokens and the memory, recomputing only if it must."""
        longest, mean = int(self.lengths.max()), float(self.lengths.mean())
        world, batch, layers = dist.get_world_size(), self.wanted["batch_tokens"], self.cost.model.n_layers
        found = []
        for name, attention in (("sdpa", "theirs"), (OURS, "ours")):
            packs = max(1, round(batch / (world * longest)))
            bfd = {"packing": True, "packing_strategy": "bfd", "max_length": longest}
            found.append(self._stock("packing bfd", name, attention, bfd, 1, packs, longest))
            most = next(k for k in range(64, 0, -1) if k == 1 or self.fits(int((k - 1) * 2 * mean + longest), layers))
            for kind, options, per_row in (
                ("padding-free", {"padding_free": True}, 2 * mean),
                ("group by length", {"train_sampling_strategy": "group_by_length"}, longest),
                ("batch_rebalance", {"train_sampling_strategy": "batch_rebalance"}, longest),
            ):
                k = (
                    most
                    if per_row < longest
                    else max(1, next(k for k in (4, 3, 2, 1) if self.fits(k * longest, layers)))
                )
                accumulation = max(1, round(batch / (world * k * mean)))
                tokens = int((k - 1) * per_row + longest)
                found.append(
                    self._stock(kind, name, attention, {**options, "max_length": None}, k, accumulation, tokens)
                )
        return found

    def _stock(
        self, name: str, function: str, attention: str, options: dict[str, Any], k: int, accumulation: int, tokens: int
    ) -> dict[str, Any]:
        recompute = not self.fits(tokens, 0)
        arguments = {
            **options,
            "per_device_train_batch_size": k,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": recompute,
            "dataset_kwargs": {"skip_prepare_dataset": True} if not options.get("packing") else None,
        }
        return {"name": name, "attention": attention, "function": function, "arguments": arguments}

    def run(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Train once over the data by a setting."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(
            self.wanted["model"], dtype="float32", attn_implementation=setting.get("function", "sdpa")
        )
        clock, plan = Clock(), setting.get("plan")
        arguments = {k: v for k, v in setting.get("arguments", {}).items() if v is not None or k == "max_length"}
        args = SFTConfig(
            self.wanted["out"],
            use_cpu=True,
            bf16=False,
            ddp_backend="gloo",
            ddp_find_unused_parameters=False,
            num_train_epochs=1,
            learning_rate=self.wanted["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=1,
            **{"gradient_checkpointing": False, **arguments},
        )
        common = {"processing_class": tokenizer(self.wanted["vocab"]), "callbacks": [clock]}
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            if plan is None:
                trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(self.rows), **common)
            else:
                trainer = HBPSFTTrainer(model, args, plan=plan, train_dataset=as_rows(self.rows), **common)
            trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, (clock.wall, clock.busy))
        wall, busy = (np.array([rank[i] for rank in every]) for i in (0, 1))  # [ranks, steps]
        tokens = int(self.lengths.sum()) if plan is None else plan.info.n_tokens
        return {
            "setting": setting["name"],
            "attention": setting["attention"],
            "gradient_checkpointing": args.gradient_checkpointing if plan is None else None,
            "per_device_train_batch_size": args.per_device_train_batch_size if plan is None else None,
            "gradient_accumulation_steps": args.gradient_accumulation_steps if plan is None else None,
            "groups": None if plan is None else [str(group) for group in plan.info.groups],
            "steps": len(logs),
            "tokens": tokens,
            "tokens_per_step": tokens / len(logs),
            "wall_s": float(wall.max(0).sum()),
            "busy_s": float(busy.max(0).sum()),
            "all_busy_s": float(busy.sum()),
            "tokens_per_s": tokens / float(wall.max(0).sum()),
            "tokens_per_busy_s": tokens / float(busy.max(0).sum()),
            "losses": [entry["loss"] for entry in logs],
        }


def _with_memory(cluster: Any, budget: float) -> Any:
    import dataclasses

    return dataclasses.replace(cluster, memory_bytes=budget)


def tokenizer(size: int) -> Any:
    """One that TRL accepts; the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(size - 2)} | {"</s>": size - 2, "<unk>": size - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>", unk_token="<unk>")


def main() -> None:
    wanted = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    PartialState(cpu=True)
    bench = Bench(wanted)
    bench.profile()
    plans = {name: bench.plan(name) for name in ("hbp-mixed", "bfd")}
    settings = bench.settings()
    settings += [{"name": f"plan: {name}", "attention": "ours", "plan": plan} for name, plan in plans.items()]
    for warm_up in (settings[0], settings[len(settings) // 2], settings[-2]):
        bench.run({**warm_up, "arguments": {**warm_up.get("arguments", {}), "max_steps": 1}})
    rows = []
    for repeat in range(wanted["repeats"]):
        for setting in settings if repeat % 2 == 0 else settings[::-1]:
            rows.append({**bench.run(setting), "repeat": repeat})
            if bench.rank == 0:
                print(f"{rows[-1]['setting']}, {rows[-1]['attention']}: {rows[-1]['wall_s']:.1f} s", file=sys.stderr)
    if bench.rank == 0:
        info = plans["hbp-mixed"].info
        result = {
            "rows": rows,
            "budget_bytes": bench.cost.cluster.memory_bytes,
            "plan_metrics": dict(info.metrics),
            "samples": len(bench.lengths),
            "longest": int(bench.lengths.max()),
        }
        Path(wanted["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

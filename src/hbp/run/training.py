"""Train one strategy from its first plan to its result, part after part, with everything that goes on around a step.

Logs, writers, evaluation, checkpoints, the trace and ending on a signal all hang on the record of a step, which is the
same on every rank: so every rank saves, evaluates and ends at the same step without asking the others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hbp.errors import RankFailed, Stopped, report_to_parent
from hbp.plan import Plan, read_plan
from hbp.progress import Progress
from hbp.run.engine import Engine
from hbp.run.resume import CHECKPOINTS, Part, Point, fingerprint, part_folder, run_id, write_part
from hbp.simulator import step_seconds
from hbp.train.checkpoint import Checkpoints, Position, load_checkpoint
from hbp.train.export import export_model, source_dtype
from hbp.train.launch import device_name, free_memory
from hbp.train.logs import Writer, line_of, open_writers, read_records, scalars_of
from hbp.train.loop import Efficiency, Start, StepFailed, StepRecord, evaluate, make_optimizer, train
from hbp.train.mfu import peak_flops_per_s, step_flops
from hbp.train.model import CausalLMWithLoss
from hbp.train.signals import Received, stop_signals
from hbp.train.trace import trace
from hbp.train.watch import current

SHOWN_SAMPLES = 8


@dataclass
class _Run:
    """What the parts of one strategy's training share on this rank."""

    engine: Engine
    folder: Path
    model: CausalLMWithLoss
    optimizer: torch.optim.Optimizer
    eval_plan: Plan | None
    tokens_total: int
    peak_flops: float | None
    received: Received
    checkpoints: Checkpoints | None = None
    writers: list[Writer] = field(default_factory=list)
    traced: Callable[[], None] = lambda: None
    step: int = 0
    """Of the whole run."""
    tokens: int = 0
    mark: str = ""
    """Fingerprint of the part's plan."""
    saved_s: float = 0.0
    """Seconds of the part at which the state was last saved."""
    saved_step: int = 0
    """Step of the run at which it was."""
    evaluated: tuple[int, int] = (0, 0)
    """Step and tokens at which the held-out loss was last taken."""
    eval_loss: float | None = None
    stopped_by: int = 0

    def evaluate(self) -> float | None:
        """Loss of the held-out samples; logged."""
        if self.eval_plan is None:
            return None
        if self.step and self.evaluated[0] == self.step and self.eval_loss is not None:
            return self.eval_loss  # the last step's turn came, and the end of training too
        held_out, engine = self.engine.held_out, self.engine
        loss = evaluate(self.model, self.eval_plan, held_out, held_out.loss_tokens, engine.mesh, engine.device)
        self.evaluated, self.eval_loss = (self.step, self.tokens), loss
        self.write({"eval/loss": loss})
        if dist.get_rank() == 0:
            with (self.folder / "eval.jsonl").open("a") as log:
                log.write(json.dumps({"run_step": self.step, "tokens": self.tokens, "eval_loss": loss}) + "\n")
        return loss

    def write(self, scalars: Mapping[str, float]) -> None:
        """To every writer."""
        for writer in self.writers:
            writer(scalars, self.step)

    def evaluation_due(self) -> bool:
        """By steps or by tokens."""
        config = self.engine.config.train
        steps, tokens = self.step - self.evaluated[0], self.tokens - self.evaluated[1]
        by_steps = config.eval_steps is not None and steps >= config.eval_steps
        return by_steps or (config.eval_tokens is not None and tokens >= config.eval_tokens)

    def save(self, part: Part, step: int) -> None:
        """Save a checkpoint after the first `step` steps of a part, unless there is one; if any are kept."""
        if self.checkpoints is None or self.step == self.saved_step:
            return
        position = Position(
            part.number, step, self.step, self.tokens, self.tokens_total, self.mark, dist.get_world_size()
        )
        self.checkpoints.save(self.model, self.optimizer, position)
        self.saved_step = self.step

    def save_due(self, seconds: float) -> bool:
        """By steps or by time."""
        config = self.engine.config.train
        by_steps = config.save_steps is not None and self.step % config.save_steps == 0
        return by_steps or (config.save_minutes is not None and seconds - self.saved_s >= 60 * config.save_minutes)


def train_strategy(
    engine: Engine,
    folder: Path,
    part: Part,
    next_part: Callable[[Part, CausalLMWithLoss], Part],
    eval_plan: Plan | None,
    *,
    point: Point | None = None,
    keeps_state: bool = False,
) -> dict[str, Any]:
    """Train a fresh model, or go on with a checkpoint's, to the end of the last epoch. A collective.

    Args:
        engine: of this rank.
        folder: of the strategy; gets its steps, checkpoints and model.
        part: to begin with; where its plan is the checkpoint's, after the steps that are done.
        next_part: makes the part of the next epoch; gets the last one, and the model to try packs with.
        eval_plan: of the held-out samples.
        point: to go on from.
        keeps_state: save checkpoints, end on signals, and log to the writers.

    Returns:
        The result of the whole run, what was done before it was resumed included; the same on every rank.

    Raises:
        Stopped: a signal came; the state is saved.
        RankFailed: a step raised on this rank; names it, the step, the pack and the error.
    """
    config = engine.config.train
    folder.mkdir(parents=True, exist_ok=True)
    dtype, model = source_dtype(engine.config.model.path), engine.fresh_model()
    records, step = _take_up_logs(folder, part, point)
    optimizer = make_optimizer(model, config)
    with ExitStack() as stack:
        received = stack.enter_context(stop_signals()) if keeps_state else Received()
        total = point.position.tokens_total if point else part.plan.info.n_tokens * config.epochs
        peak = [peak_flops_per_s(engine.device)]
        dist.broadcast_object_list(peak)  # a measured one differs between ranks, and records must not
        run = _Run(engine, folder, model, optimizer, eval_plan, total, peak[0], received)
        if point:
            load_checkpoint(point.checkpoint, model, optimizer, engine.config.seed)
            run.step, run.tokens = point.position.run_step, point.position.tokens
            run.evaluated, run.saved_step = (run.step, run.tokens), run.step
        if keeps_state:
            run.checkpoints = Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints)
            if dist.get_rank() == 0:
                shown = engine.config.model_dump(mode="json")
                run.writers = stack.enter_context(
                    open_writers(engine.config.log, folder, shown, run_id(engine.config), run.step)
                )
            run.traced = stack.enter_context(trace(folder / "trace", *(config.trace_steps or (0, 0))))
        while True:
            records[-1] += _train_part(run, part, step, before_here=_seconds(records[-1]))
            if run.stopped_by:
                raise _stopped(run)
            if part.epoch + 1 >= config.epochs:
                break
            part, step = next_part(part, model), 0
            _begin_part(part)
            records.append([])
        run.save(part, part.plan.n_steps)  # whatever becomes of the export
        if run.checkpoints:
            run.checkpoints.close()
        eval_loss = run.evaluate()
        if config.export:
            export_model(model, folder / "model", engine.samples.store.tokenizer, dtype=dtype)
        del run, model, optimizer
        free_memory()
    return _result(engine, folder, part, records, eval_loss)


def _begin_part(part: Part) -> None:
    """Rank 0 clears the logs of a part that is to begin, and notes what it needs to be resumed."""
    if dist.get_rank() == 0:
        (part.folder / "steps.jsonl").unlink(missing_ok=True)
        write_part(part)
    dist.barrier()


def _take_up_logs(folder: Path, part: Part, point: Point | None) -> tuple[list[list[StepRecord]], int]:
    """Cut the logs back to the checkpoint.

    Returns:
        The records of what is done, part by part up to the one at hand, and the first step to run of that.
    """
    if point is None:
        if dist.get_rank() == 0:
            (folder / "eval.jsonl").unlink(missing_ok=True)
        _begin_part(part)
        return [[]], 0
    at = point.position
    logs = [part_folder(folder, number) / "steps.jsonl" for number in range(at.part + 1)]
    records = [_read_log(log) for log in logs]
    records[-1] = records[-1][: at.step]
    if dist.get_rank() == 0:
        logs[-1].write_text("".join(map(line_of, records[-1])))
        _cut_evaluations(folder / "eval.jsonl", at.run_step)
        for later in folder.glob("part-*"):  # of a way that the run is not going again
            if later.name[5:].isdecimal() and int(later.name[5:]) > part.number:
                shutil.rmtree(later)
    if part.number == at.part:
        dist.barrier()
        return records, at.step
    _begin_part(part)
    return [*records, []], 0


def _read_log(log: Path) -> list[StepRecord]:
    """The records of a log on every rank, read by the first. A collective."""
    records: list[Any] = [read_records(log) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(records)
    return list(records[0])


def _cut_evaluations(log: Path, run_step: int) -> None:
    if not log.is_file():
        return
    kept = []
    for line in log.read_text().splitlines(keepends=True):
        try:
            kept += [line] if json.loads(line)["run_step"] <= run_step else []
        except ValueError:  # cut off with its run
            break
    log.write_text("".join(kept))


def _train_part(run: _Run, part: Part, first_step: int, before_here: float) -> list[StepRecord]:
    engine, plan = run.engine, part.plan
    run.mark = fingerprint(plan)
    if first_step == plan.n_steps:  # resumed for what comes after; the plan may be one of other ranks
        return []
    run.saved_s = before_here
    efficiency = Efficiency(step_flops(plan, engine.cost.model), run.peak_flops)
    start = Start(first_step, run.tokens, run.tokens_total, before_here)
    tokens = plan.tokens()
    left = int(tokens[np.searchsorted(plan.step, first_step) :].sum())
    with ExitStack() as stack:
        log = stack.enter_context((part.folder / "steps.jsonl").open("a")) if dist.get_rank() == 0 else None
        progress = stack.enter_context(Progress(plan.info.strategy, left))

        def on_step(record: StepRecord) -> bool:
            run.step, run.tokens = run.step + 1, run.tokens + record.tokens
            if log:
                log.write(line_of(record))
                log.flush()
            run.write(scalars_of(record))
            run.traced()
            progress.advance(
                f"step {record.step + 1}/{plan.n_steps} {record.group} loss {record.loss:.3f} "
                f"{record.tokens_per_s:,.0f} tok/s",
                record.tokens,
            )
            if run.evaluation_due():
                run.evaluate()
            seconds = record.started_s + record.seconds
            if run.checkpoints and (record.signal or run.save_due(seconds)):
                run.save(part, record.step + 1)
                run.saved_s = seconds
                run.stopped_by = record.signal
            return run.stopped_by != 0

        samples, config = part.samples, engine.config.train
        try:
            return train(
                run.model, plan, samples, samples.loss_tokens, engine.mesh, config, engine.device, on_step,
                optimizer=run.optimizer, start=start, signal=run.received, efficiency=efficiency,
            )  # fmt: skip
        except StepFailed as failed:
            raise _rank_failed(failed, part) from failed.__cause__


def _rank_failed(failed: StepFailed, part: Part) -> RankFailed:
    """The one line about a step that raised, left for the parent before the others see that this rank is gone."""
    cause = failed.__cause__
    ids = part.samples.ids[np.array(failed.sample_ids, np.int64)].tolist()
    shown = ", ".join(map(str, ids[:SHOWN_SAMPLES]))
    more = f", … {len(ids)} in all" if len(ids) > SHOWN_SAMPLES else ""
    pack = f"pack {failed.row} (samples {shown}{more})" if ids else "without a pack"
    where = "after its micro-steps" if failed.micro_step is None else f"micro-step {failed.micro_step}, {pack}"
    reason = " ".join(str(cause).split()) or "no message"
    rank = dist.get_rank()
    message = f"rank {rank} failed in step {failed.step}, {where}: {type(cause).__name__}: {reason[:500]}"
    watch = current()
    earlier = watch.report(message) if watch else None
    error = RankFailed(f"rank {rank} ends in step {failed.step}, since {earlier}" if earlier else message)
    if earlier is None:
        traceback.print_exception(cause)
    report_to_parent(error)
    return error


def _stopped(run: _Run) -> Stopped:
    assert run.checkpoints is not None
    run.checkpoints.close()
    name = signal.Signals(run.stopped_by).name
    return Stopped(
        f"{name}: stopped after step {run.step}, {run.tokens:,} of {run.tokens_total:,} tokens, and saved in "
        f"{run.checkpoints.folder}; the same command goes on from there"
    )


def _seconds(records: Sequence[StepRecord]) -> float:
    """Seconds that the recorded steps of a part took."""
    return records[-1].started_s + records[-1].seconds if records else 0.0


def _result(
    engine: Engine, folder: Path, part: Part, parts: Sequence[Sequence[StepRecord]], eval_loss: float | None
) -> dict[str, Any]:
    """Of all parts together; groups and metrics are those of the first plan."""
    plans = [*(read_plan(part_folder(folder, number) / "plan") for number in range(part.number)), part.plan]
    each = [_part_result(plan, own) for plan, own in zip(plans, parts, strict=True)]
    records = [record for own in parts for record in own]
    seconds, tokens = sum(record.seconds for record in records), sum(record.tokens for record in records)
    tail = records[-max(1, len(records) // 10) :]
    info = plans[0].info
    return {
        "strategy": info.strategy,
        "world_size": part.plan.info.world_size,
        "device": device_name(engine.device),
        "samples": len(plans[0].sample_ids),
        "dropped": len(info.dropped),
        "epochs": engine.config.train.epochs,
        "tokens": tokens,
        "steps": len(records),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "predicted_s": sum(own["predicted_s"] for own in each),
        "final_train_loss": float(np.average([r.loss for r in tail], weights=[max(r.loss_tokens, 1) for r in tail])),
        "eval_loss": eval_loss,
        "peak_bytes": part.peak_bytes,
        "groups": [dataclasses.asdict(group) for group in info.groups],
        "metrics": dict(info.metrics),
        "parts": each,
        "by_group": by_group(records),
    }


def _part_result(plan: Plan, records: Sequence[StepRecord]) -> dict[str, Any]:
    """What was done of one part's plan, and the seconds that were predicted for as much of it."""
    return {
        "world_size": plan.info.world_size,
        "steps": len(records),
        "tokens": sum(record.tokens for record in records),
        "seconds": sum(record.seconds for record in records),
        "predicted_s": float(step_seconds(plan)[: len(records)].sum()),
    }


def by_group(records: Sequence[StepRecord]) -> dict[str, dict[str, float | None]]:
    """Speed, utilisation, skew and memory of each packing group's steps."""
    table: dict[str, dict[str, float | None]] = {}
    for name in sorted({record.group for record in records}):
        own = [record for record in records if record.group == name]
        seconds = sum(record.seconds for record in own)
        known = [record.mfu * record.seconds for record in own if record.mfu is not None]
        table[name] = {
            "steps": len(own),
            "tokens": sum(record.tokens for record in own),
            "seconds": seconds,
            "tokens_per_s": sum(record.tokens for record in own) / seconds,
            "mfu": sum(known) / seconds if known else None,
            "skew": float(np.median([record.skew for record in own])),
            "memory_bytes": max(record.memory_bytes for record in own),
        }
    return table

"""Train one strategy from its first plan to its result, part after part, with everything that goes on around a step.

Logs, writers, evaluation, checkpoints, the trace and ending on a signal all hang on the record of a step, which is the
same on every rank: so every rank saves, evaluates and ends at the same step without asking the others. How far the run
is stands in one place, the :class:`~hbp.train.checkpoint.Position` that a checkpoint keeps.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hbp.config import TrainConfig
from hbp.cost.cluster import GIB
from hbp.data.samples import Samples
from hbp.errors import HbpError, OutOfMemory, RankFailed, Stopped, report_to_parent
from hbp.plan import Plan, read_plan
from hbp.progress import Progress, say
from hbp.run.engine import Engine
from hbp.run.identity import RUN, read_record
from hbp.run.resume import CHECKPOINTS, Part, fingerprint, part_folder, write_part
from hbp.run.steps.done import done_steps
from hbp.run.steps.less_memory import count_on_less, ran_out
from hbp.run.steps.odd import OddSteps, finite_or_none
from hbp.run.steps.saving import Saving
from hbp.run_log import (
    EvalRecord,
    StepRecord,
    append_record,
    by_group,
    read_log,
    rewrite_log,
    sync_log,
    without_timeline,
)
from hbp.simulator import plan_cost_model, step_seconds
from hbp.train.checkpoint import Checkpoint, Checkpoints, Position, list_checkpoints, load_checkpoint
from hbp.train.export import export_model, source_dtype
from hbp.train.hub import push
from hbp.train.launch import STARTED, TIME_IS_UP, Received, device_name, free_memory, stop_signals
from hbp.train.logs import Writer, open_writers, scalars_of, trace
from hbp.train.loop import Learner, Start, StepFailed, evaluate, not_finite, train
from hbp.train.loss import MeanStep
from hbp.train.model import CausalLMWithLoss
from hbp.train.records import Efficiency, peak_flops_per_s, step_flops
from hbp.train.watch import current

SHOWN_SAMPLES = 8
EvalPlans = Mapping[str, tuple[Plan, Samples]]
"""What is evaluated, by source."""


@dataclass
class _HeldOut:
    """The held-out samples, and when their loss was last taken."""

    plans: EvalPlans
    run_step: int
    tokens: int
    loss: float | None = None
    by_source: dict[str, float | None] = field(default_factory=dict)

    def due(self, config: TrainConfig, at: Position) -> bool:
        """By steps or by tokens."""
        steps, tokens = at.run_step - self.run_step, at.tokens - self.tokens
        by_steps = config.eval_steps is not None and steps >= config.eval_steps
        return by_steps or (config.eval_tokens is not None and tokens >= config.eval_tokens)


@dataclass
class _Run:
    """One strategy's training on this rank: what its parts share, and how far it is."""

    engine: Engine
    folder: Path
    learner: Learner
    at: Position
    """Moves on with every step."""
    held_out: _HeldOut
    peak_flops: float | None
    received: Received
    odd: OddSteps
    mean: MeanStep | None = None
    """Step of the plan that the run began with."""
    saving: Saving | None = None
    """None: no state is kept."""
    writers: Sequence[Writer] = ()
    traced: Callable[[], None] = lambda: None

    def signal(self) -> int:
        """What this rank has received; on rank 0 also :data:`TIME_IS_UP`."""
        limit = self.engine.config.train.max_minutes
        if dist.get_rank() == 0 and limit is not None and time.monotonic() - STARTED >= 60 * limit:
            return TIME_IS_UP
        return self.received()

    def write(self, scalars: Mapping[str, float]) -> None:
        """To every writer."""
        for writer in self.writers:
            writer(scalars, self.at.run_step)

    def evaluate(self) -> float | None:
        """Loss of the held-out samples, of all and by source; logged."""
        last, at = self.held_out, self.at
        if not last.plans or (last.loss is not None and last.run_step == at.run_step):
            return last.loss  # the last step's turn came, and the end of training too
        last.by_source = {name: evaluate(self.learner, *packed) for name, packed in last.plans.items()}
        targets = {name: int(samples.loss_tokens.sum()) for name, (_, samples) in last.plans.items()}
        known = [(loss, targets[name]) for name, loss in last.by_source.items() if loss is not None]
        last.loss = _mean(known)
        if last.loss is not None and not math.isfinite(last.loss):
            say(f"the evaluation loss after step {at.run_step} of the run is {last.loss}; it is logged as null")
            last.loss, last.by_source = None, finite_or_none(last.by_source)
        last.run_step, last.tokens = at.run_step, at.tokens
        losses = {"eval/loss": last.loss}
        if len(last.by_source) > 1:
            losses |= {f"eval/{name}/loss": loss for name, loss in last.by_source.items()}
        self.write({name: loss for name, loss in losses.items() if loss is not None})
        if dist.get_rank() == 0:
            append_record(self.folder, EvalRecord(at.run_step, at.tokens, last.loss, last.by_source))
        say(f"evaluation after step {at.run_step} of the run: loss {_shown(last.loss)}{_by_source(last.by_source)}")
        return last.loss


def train_strategy(
    engine: Engine,
    folder: Path,
    part: Part,
    next_part: Callable[[Part, CausalLMWithLoss], Part | None],
    eval_plans: EvalPlans,
    tokens_total: int,
    *,
    checkpoint: Checkpoint | None = None,
    keeps_state: bool = False,
) -> dict[str, Any]:
    """Train a fresh model, or go on with a checkpoint's, to the end of the last part. A collective.

    Args:
        engine: of this rank.
        folder: of the strategy; gets its steps, checkpoints and model.
        part: to begin with; where its plan is the checkpoint's, after the steps that are done.
        next_part: makes the part after the one given, None after the last; the model is there to try packs with.
        eval_plans: of the held-out samples, by source.
        tokens_total: that the run is to see, for the learning rate.
        checkpoint: to go on from.
        keeps_state: save checkpoints, end on signals, and log to the writers.

    Returns:
        The result of the whole run, what was done before it was resumed included; the same on every rank.

    Raises:
        Stopped: a signal came; the state is saved.
        RankFailed: a step raised on this rank; names it, the step, the pack and the error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = source_dtype(engine.config.model.path)
    learner = Learner.of(engine.fresh_model(), engine.mesh, engine.config.train, engine.device)
    records = _take_up_logs(folder, part, checkpoint)
    with ExitStack() as stack:
        at = checkpoint.position if checkpoint else Position(part.number, 0, 0, 0, tokens_total, "", 0)
        at = dataclasses.replace(at, tokens_total=tokens_total)
        run = _open(stack, engine, folder, learner, at, eval_plans, keeps_state)
        if checkpoint:
            load_checkpoint(checkpoint.folder, learner.model, learner.optimizer, engine.config.seed)
        else:
            torch.manual_seed(engine.config.seed + dist.get_rank())  # dropout differs between ranks, not between runs
            _refuse_not_finite(engine, learner)
        run.mean = _mean_step(folder, part, engine.config.train.loss)
        run.odd = OddSteps.of(folder, engine.config.train.max_skipped, [record for own in records for record in own])
        first_step = at.step if part.number == at.part else 0
        if run.saving and (why := _why_it_ends(run)):  # as many steps as are wanted were done before
            raise _stopped(run, why)
        while True:
            new = _train_part(run, part, first_step, before_s=_seconds(records[-1]))
            records[-1] += map(without_timeline, new)
            if run.saving and new and (why := _why_it_ends(run, new[-1].signal)):
                raise _stopped(run, why)
            following = next_part(part, learner.model)
            if following is None:
                break
            part, first_step = following, 0
            _begin_part(part)
            records.append([])
        if run.saving:  # whatever becomes of the export
            run.saving.save_now(learner, run.at, 0.0)
            run.saving.checkpoints.close()
        evaluated = {"eval_loss": run.evaluate(), "eval_loss_by_source": run.held_out.by_source}
        if engine.config.train.export:
            export_model(learner.model, folder / "model", engine.samples.store.tokenizer, dtype=dtype)
        if keeps_state and engine.config.train.push_to_hub is not None:  # a baseline's model stays here
            push(folder / "model", engine.config.train.push_to_hub)
        del run, learner
        free_memory()
    return {**_result(engine, folder, part, records), **evaluated}


def _open(
    stack: ExitStack,
    engine: Engine,
    folder: Path,
    learner: Learner,
    at: Position,
    eval_plans: EvalPlans,
    keeps_state: bool,
) -> _Run:
    """A run at a position, with its writers, trace and checkpoints open if it keeps state. A collective."""
    config = engine.config.train
    received = stack.enter_context(stop_signals()) if keeps_state else Received()
    peak = [peak_flops_per_s(engine.device)]
    dist.broadcast_object_list(peak)  # a measured one differs between ranks, and records must not
    held_out, odd = _held_out(folder, eval_plans), OddSteps(folder, config.max_skipped)
    run = _Run(engine, folder, learner, at, held_out, peak[0], received, odd)
    if not keeps_state:
        return run
    whose = read_record(Path(engine.config.run_dir) / RUN)
    kept = {} if whose is None else dataclasses.asdict(whose)
    run.saving = Saving(Checkpoints(folder / CHECKPOINTS, config.keep_checkpoints, kept), at.run_step)
    if dist.get_rank() == 0:
        shown, name = engine.config.model_dump(mode="json"), None if whose is None else whose.id
        run.writers = stack.enter_context(open_writers(engine.config.log, folder, shown, name, at.run_step))
    run.traced = stack.enter_context(trace(folder / "trace", *(config.trace_steps or (0, 0))))
    return run


def _held_out(folder: Path, plans: EvalPlans) -> _HeldOut:
    """With the last evaluation that the log holds, so that a resumed run keeps the cadence. A collective."""
    last: list[Any] = [None]
    if dist.get_rank() == 0 and (log := read_log(folder, EvalRecord)):
        last = [(log[-1].run_step, log[-1].tokens, log[-1].eval_loss, log[-1].eval_loss_by_source)]
    dist.broadcast_object_list(last)
    return _HeldOut(plans, 0, 0) if last[0] is None else _HeldOut(plans, *last[0])


def _begin_part(part: Part) -> None:
    """Rank 0 clears the log of a part that is to begin, and notes what it needs to be resumed."""
    if dist.get_rank() == 0:
        rewrite_log(part.folder, StepRecord, [])
        write_part(part)
    dist.barrier()


def _take_up_logs(folder: Path, part: Part, checkpoint: Checkpoint | None) -> list[list[StepRecord]]:
    """Cut the logs back to the checkpoint; the records of what is done, part by part up to the one at hand."""
    first = dist.get_rank() == 0
    if checkpoint is None:
        if first:
            rewrite_log(folder, EvalRecord, [])
        _begin_part(part)
        return [[]]
    at = checkpoint.position
    records: list[Any] = [done_steps(folder, at) if first else None]
    dist.broadcast_object_list(records)
    done: list[list[StepRecord]] = records[0]
    if first:
        rewrite_log(part_folder(folder, at.part), StepRecord, done[-1])
        evaluations = read_log(folder, EvalRecord)
        rewrite_log(folder, EvalRecord, [record for record in evaluations if record.run_step <= at.run_step])
        for later in folder.glob("part-*"):  # of a way that the run is not going again
            if later.name[5:].isdecimal() and int(later.name[5:]) > part.number:
                shutil.rmtree(later)
    slim = [[*map(without_timeline, own)] for own in done]
    if part.number == at.part:
        dist.barrier()
        return slim
    _begin_part(part)
    return [*slim, []]


def _mean_step(folder: Path, part: Part, loss: str) -> MeanStep:
    """Of the plan that the run began with, where the loss is divided by that; `part` is the one at hand."""
    plan, samples = part.plan, part.samples
    if part.number and loss == "run-token":
        plan, ids = read_plan(folder / "plan"), np.load(folder / "samples.npy", allow_pickle=False)
        samples = Samples(samples.store, ids)
    return MeanStep.of(plan, samples.loss_tokens)


def _train_part(run: _Run, part: Part, first_step: int, before_s: float) -> list[StepRecord]:
    """The records of the steps from `first_step` on; `before_s` seconds were spent on the part before."""
    engine, plan = run.engine, part.plan
    if first_step == plan.n_steps:  # resumed for what comes after; the plan may be one of other ranks
        return []
    run.at = dataclasses.replace(
        run.at, part=part.number, step=first_step, plan=fingerprint(plan), world_size=plan.info.world_size
    )
    if run.saving:
        run.saving.part_s = before_s
    start = Start(first_step, run.at.tokens, run.at.tokens_total, before_s)
    efficiency = Efficiency(step_flops(plan, engine.cost.model), run.peak_flops)
    left = int(plan.tokens()[np.searchsorted(plan.step, first_step) :].sum())
    with Progress(plan.info.strategy, left) as progress:
        on_step = _around_a_step(run, part, progress)
        try:
            return train(
                run.learner,
                plan,
                part.samples,
                on_step,
                look=run.odd.look,
                start=start,
                signal=run.signal,
                efficiency=efficiency,
                mean=run.mean,
            )
        except StepFailed as failed:
            raise _rank_failed(run, failed, part) from failed.__cause__


def _around_a_step(run: _Run, part: Part, progress: Progress) -> Callable[[StepRecord], bool]:
    """What is done after each step, the same on every rank: log, evaluate, save; True ends training."""
    config, first = run.engine.config.train, dist.get_rank() == 0

    def on_step(record: StepRecord) -> bool:
        run.at = dataclasses.replace(
            run.at, step=record.step + 1, run_step=run.at.run_step + 1, tokens=run.at.tokens + record.tokens
        )
        if first:
            append_record(part.folder, record)
        run.write(scalars_of(record))
        run.traced()
        progress.advance(
            f"epoch {part.epoch + 1}/{config.epochs} step {record.step + 1}/{part.plan.n_steps} {record.group} "
            f"loss {_shown(record.loss)} {record.tokens_per_s:,.0f} tok/s",
            record.tokens,
        )
        run.odd.check(part, record, run.at.run_step, lambda: _last_state(run))
        part_s = record.started_s + record.seconds
        ends, due = bool(_why_it_ends(run, record.signal)), run.saving and run.saving.due(config, run.at, part_s)
        if first and (ends or due):
            sync_log(part.folder, StepRecord)
        if run.saving and ends:  # saved at once, whatever else is due
            run.saving.save_now(run.learner, run.at, part_s)
            return True
        if run.held_out.due(config, run.at):
            run.evaluate()
        if run.saving and due:
            run.saving.save(run.learner, run.at, part_s)
        return False

    return on_step


def _shown(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _rank_failed(run: _Run, failed: StepFailed, part: Part) -> RankFailed:
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
    if ran_out(cause) and run.saving and run.engine.config.train.on_oom == "replan":
        return _out_of_memory(run, part, message)
    watch = current()
    earlier = watch.report(message) if watch else None
    error = RankFailed(f"rank {rank} ends in step {failed.step}, since {earlier}" if earlier else message)
    if earlier is None:
        traceback.print_exception(cause)
    report_to_parent(error)
    return error


def _out_of_memory(run: _Run, part: Part, message: str) -> OutOfMemory:
    """The run's state says that plans are to count on less; said at once, since this rank knows that it is to blame."""
    planned, budget = plan_cost_model(part.plan), run.engine.cost.cluster.memory_bytes
    budget = budget if planned is None else planned.cluster.memory_bytes
    less = count_on_less(run.folder, run.engine.config, budget, part.peak_bytes, message)
    error = OutOfMemory(
        f"{message}; what is left is planned again for {less.budget_bytes / GIB:.3f} GiB in place of "
        f"{budget / GIB:.3f} GiB a process (train.on_oom); {_last_state(run)}"
    )
    report_to_parent(error)
    if watch := current():
        watch.report(str(error), patience=0)
    return error


def _why_it_ends(run: _Run, number: int = 0) -> str:
    """What ends this job here, a signal's `number` or enough steps, for people; empty: nothing. As on every rank."""
    config = run.engine.config.train
    if number == TIME_IS_UP:
        return f"train.max_minutes={config.max_minutes:g}"
    if number:
        return signal.Signals(number).name
    if config.max_steps is not None and run.at.run_step >= config.max_steps and run.at.tokens < run.at.tokens_total:
        return f"train.max_steps={config.max_steps}"
    return ""


def _stopped(run: _Run, why: str) -> Stopped:
    """After all is saved."""
    assert run.saving
    run.saving.checkpoints.close()
    at = run.at
    return Stopped(
        f"{why}: stopped after step {at.run_step}, {at.tokens:,} of {at.tokens_total:,} tokens, "
        f"and saved in {run.saving.checkpoints.folder}; the same command goes on from there"
    )


def _last_state(run: _Run) -> str:
    """Where the last state is, for people, after a save that is under way is whole."""
    if run.saving:
        with suppress(HbpError):
            run.saving.checkpoints.wait()
    if run.saving is None or not list_checkpoints(run.saving.checkpoints.folder):
        return "no state was saved before"
    return f"the same command goes on from {list_checkpoints(run.saving.checkpoints.folder)[0]}"


def _refuse_not_finite(engine: Engine, learner: Learner) -> None:
    """A model that holds NaN or infinity before anything is trained. A collective."""
    bad = not_finite(learner.model.named_parameters(), engine.device)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise HbpError(
            f"{engine.config.model.path}: {bad[0].removeprefix('lm.')}{more} holds values that are not finite; "
            "give model.path weights that are whole"
        )


def _by_source(losses: Mapping[str, float | None]) -> str:
    shown = ", ".join(f"{name} {_shown(loss)}" for name, loss in losses.items())
    return f" ({shown})" if len(losses) > 1 else ""


def _seconds(records: Sequence[StepRecord]) -> float:
    """Seconds that the recorded steps of a part took."""
    return records[-1].started_s + records[-1].seconds if records else 0.0


def _result(engine: Engine, folder: Path, part: Part, parts: Sequence[Sequence[StepRecord]]) -> dict[str, Any]:
    """Of all parts together; groups and metrics are those of the first plan."""

    def plan_of(number: int) -> Plan:  # one at a time: there may be a thousand
        return part.plan if number == part.number else read_plan(part_folder(folder, number) / "plan")

    each, first = [_part_result(plan_of(number), own) for number, own in enumerate(parts)], plan_of(0)
    records = [record for own in parts for record in own]
    seconds, timed = sum(record.seconds for record in records), sum(part["timed_tokens"] for part in each)
    learnt = [(record.loss, record.loss_tokens) for record in records if record.loss is not None]
    info = first.info
    return {
        "strategy": info.strategy,
        "world_size": part.plan.info.world_size,
        "device": device_name(engine.device),
        "samples": len(first.sample_ids),
        "dropped": len(info.dropped),
        "epochs": engine.config.train.epochs,
        "tokens": sum(record.tokens for record in records),
        "steps": len(records),
        "seconds": seconds,
        "tokens_per_s": timed / seconds if seconds else None,
        "predicted_s": sum(own["predicted_s"] for own in each),
        "final_train_loss": _mean(learnt[-max(1, len(learnt) // 10) :]),
        "peak_bytes": part.peak_bytes,
        "groups": [dataclasses.asdict(group) for group in info.groups],
        "metrics": dict(info.metrics),
        "parts": each,
        "by_group": by_group(records),
    }


def _mean(losses: Sequence[tuple[float, int]]) -> float | None:
    """Of losses over so many loss tokens each, over all of these; None if there are none."""
    if not losses or not sum(tokens for _, tokens in losses):
        return None
    return float(np.average([loss for loss, _ in losses], weights=[tokens for _, tokens in losses]))


def _part_result(plan: Plan, records: Sequence[StepRecord]) -> dict[str, Any]:
    """What was done of one part's plan, and the seconds that were predicted for as much of it."""
    return {
        "world_size": plan.info.world_size,
        "steps": len(records),
        "tokens": sum(record.tokens for record in records),
        "timed_tokens": sum(record.tokens for record in records if not record.lost),
        "seconds": sum(record.seconds for record in records),
        "predicted_s": float(step_seconds(plan)[: len(records)].sum()),
    }

"""A whole run: data → store → live profile → plan → training → baseline → report. What `hbp train` does.

Every rank runs :func:`run_job` from top to bottom; rank 0 prepares what is shared on disk while the others wait. The
training half is handed a plan and knows nothing of how it was made; the planning half runs on rank 0 alone, without
torch.

A run is a row of parts, each following one plan (:mod:`hbp.run.resume`): an epoch is one, or as many as the pieces of a
stream that the user planned. Where `run_dir` holds an unfinished run of the same configuration, its last whole
checkpoint is gone on with. One run at a time owns the folder (:mod:`hbp.run.start.lock`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hbp.config import Config
from hbp.cost.cluster import load_cluster
from hbp.disk import write_whole
from hbp.errors import HbpError
from hbp.plan import read_info, read_plan
from hbp.planning.planner import STRATEGIES
from hbp.progress import say
from hbp.run import resume
from hbp.run.baseline import train_baseline
from hbp.run.data import check_model, choose, prepare, say_summary
from hbp.run.engine import Engine, make_engine, profile_cluster
from hbp.run.fit_memory import (
    as_planned,
    check_plans,
    counts_on_more,
    evaluation_plans,
    global_batch_tokens,
    own_plan,
    own_plans,
    plan_within_memory,
    with_less_memory,
)
from hbp.run.identity import RUN, replans, write_record
from hbp.run.resume import SUMMARY, Found, Part, decide, part_folder, read_summary
from hbp.run.start.lock import owning
from hbp.run.steps.less_memory import MEMORY
from hbp.run.steps.odd import FOLDER as ODD
from hbp.run.training import train_strategy
from hbp.run_log import EvalRecord, StepRecord, read_log
from hbp.train.check.compare import require_checked
from hbp.train.checkpoint import Position
from hbp.train.hub import check_hub
from hbp.train.launch import rank_zero_first
from hbp.train.logs import check_writers
from hbp.train.model import CausalLMWithLoss, read_config
from hbp.train.watch import watch_others
from hbp.train.weights.nf4 import shards_integers

RESERVED = ("store", "data", "trace", "aside", ".", "..")
"""Folders of a run that are no strategy's."""


def run_job(config: Config, device: torch.device) -> dict[str, Any]:
    """Run everything on this rank; returns the summary (the same on every rank).

    Raises:
        Stopped: a signal ended it; the state is saved.
    """
    run = Path(config.run_dir)
    with watch_others(), ExitStack() as stack:
        with rank_zero_first() as first:  # before data are prepared; the other nodes may lack what only rank 0 needs
            if first:
                stack.enter_context(owning(run, launcher=False))
                check_ready(config)
        ours = check_strategies(config)
        engine = make_engine(config, device)
        if dist.get_rank() == 0:
            say_summary(config, engine.samples.store)
        found = resume.find(config, folder_name(ours), engine.samples.store.fingerprint)
        summary = read_summary(run) if found.kind == "finished" else None
        if summary is None:
            summary = _train(engine, run, found)
        elif config.plan.baseline in (None, *(r["strategy"] for r in summary["results"])):
            say(f"{run} holds this run, finished; set train.resume=never to run it again")
        folder = run / found.record.folder
        if found.kind == "finished" and (last := resume.last_position(folder)) is not None:
            _mend_plans(last, engine, folder, _planned_with(config))  # the page and the baseline read them
        return _with_baseline(engine, run, folder, summary)


def _train(engine: Engine, run: Path, found: Found) -> dict[str, Any]:
    """The strategy itself, from the start or from a checkpoint; the summary without a baseline."""
    config, folder = engine.config, run / found.record.folder
    if dist.get_rank() == 0:
        _clear(run, config, folder)
        if found.checkpoint is None and (unsaved := len(read_log(folder, StepRecord))):
            where = folder / resume.CHECKPOINTS
            say(f"no checkpoint in {where}: {unsaved} steps that were logged are lost; starts anew")
        resume.write_array(run / "lengths.npy", engine.samples.lengths)  # a checkpoint may come from another folder
        write_record(run, found.record)
    dist.barrier()
    engine = with_less_memory(engine, folder)
    part = _first_part(engine, folder) if found.checkpoint is None else _part_of(found, engine, folder)
    engine = as_planned(engine, part.plan)
    result = train_strategy(
        engine,
        folder,
        part,
        lambda last, model: _next_part(last, engine, folder, model),
        evaluation_plans(engine),
        _tokens_total(config, found, part),
        checkpoint=found.checkpoint,
        keeps_state=True,
    )
    summary = {"memory_budget_bytes": engine.cost.cluster.memory_bytes, "results": [result]}
    _write_summary(run, summary)
    if dist.get_rank() == 0:
        write_record(run, dataclasses.replace(found.record, trained=True))
    return summary


def _tokens_total(config: Config, found: Found, part: Part) -> int:
    """Tokens that the whole run is to see."""
    if found.checkpoint is None:
        tokens = sum(read_info(plan).n_tokens for plan in own_plans(config)) or part.plan.info.n_tokens
        return tokens * config.train.epochs
    before, now = found.changed.get("train.epochs", (1, 1))
    return int(found.checkpoint.position.tokens_total * now // before)


def _first_part(engine: Engine, folder: Path) -> Part:
    """Start anew, with the user's own plan or one that is made here."""
    own = own_plans(engine.config)
    if own:
        with rank_zero_first() as first:
            if first:
                check_plans([read_plan(each) for each in own], engine.samples.lengths, engine.cost.world_size)
        asked = read_plan(own[0])
        if counts_on_more(asked, engine) and not asked.info.is_piece:
            everything = Part(0, 0, engine.samples, asked, folder)
            return _planned_part(engine, everything, (0, 0), folder, run_step=0, changed=True, number=0)
        plan, peak_bytes = own_plan(engine, own[0], folder)
    else:
        plan, peak_bytes = plan_within_memory(_profiled(engine, folder), engine.config.plan.strategy, folder)
    if dist.get_rank() == 0 and engine.device.type == "cuda":
        model = engine.config.model.path
        say(f"seen beforehand on one device, whether a plan fits: hbp rehearse {folder}/plan --model {model} --memory")
    return Part(0, 0, engine.samples, plan, folder, peak_bytes)


def _profiled(engine: Engine, folder: Path) -> Engine:
    """With the cluster as it is measured, if that is wanted."""
    if not engine.config.cluster.profile:
        return engine
    cluster = profile_cluster(engine, folder.parent / "profile.json")
    return dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster))


def _part_of(found: Found, engine: Engine, folder: Path) -> Part:
    """The checkpoint's own part, or a new one of the samples that are left of it where its plan fits no longer.

    It does not fit another number of ranks, another cluster, less memory (also as a step that ran out of it has shown),
    or another strategy.
    """
    assert found.checkpoint is not None
    position, seed = found.checkpoint.position, _planned_with(engine.config)
    _mend_plans(position, engine, folder, seed)
    part = resume.read_part(folder, position, engine.samples, seed)
    if part.epoch >= engine.config.train.epochs:
        raise HbpError(
            f"train.epochs={engine.config.train.epochs} but the run in {folder} is in epoch {part.epoch + 1}; give "
            "that or more, or another run_dir"
        )
    too_full = counts_on_more(part.plan, engine)
    if part.plan.info.world_size == engine.cost.world_size and not replans(found.changed) and not too_full:
        resume.say_where(found, part)
        return part
    left = resume.remaining(part, position.step)
    resume.say_where(found, part, len(left.ids))
    if len(left.ids):
        engine = dataclasses.replace(_profiled(engine, folder), samples=left)
        return _planned_part(engine, part, part.turn, folder, run_step=position.run_step, changed=True)
    if _turn_after(part, engine.config) is None:
        return part
    return _next_part(part, _profiled(engine, folder), folder, changed=True) or part


def _mend_plans(position: Position, engine: Engine, folder: Path, seed: int | None) -> None:
    """Make a run's damaged plans again: they follow from data, options and seed, and are known by a hash. A collective.

    Raises:
        HbpError: what is made is another plan; the damaged one is back in its place.
    """
    for number in range(position.part + 1):
        here, damage = part_folder(folder, number) / "plan", list[Any]([None])
        with rank_zero_first() as first:
            if first:
                resume.put_back_damaged(here)  # where a kill came between
                kept = position.plan if number == position.part else resume.kept_plan(here.parent)
                damage = [(resume.damage_of_plan(here), kept)]
        dist.broadcast_object_list(damage)
        what, wanted = damage[0]
        if what is not None and wanted is not None:
            _mend_plan(number, what, wanted, position, engine, folder, seed)


def _mend_plan(
    number: int, what: str, wanted: str, position: Position, engine: Engine, folder: Path, seed: int | None
) -> None:
    """One part's, which has to be the plan of the fingerprint `wanted`; `what` is wrong with the one there."""
    here, first = part_folder(folder, number) / "plan", dist.get_rank() == 0
    aside, what = resume.damaged_name(here), what.partition(";")[0]
    say(f"{what}; the plan is made again")
    if first and here.exists():
        here.rename(aside)
    dist.barrier()
    try:
        part = _made_again(number, position, _as_profiled(engine, folder), folder, seed)
    except HbpError as error:
        part, why = None, f"it cannot be made again ({error})"
    else:
        why = "what is made now is another one"
    made = part is not None and resume.fingerprint(part.plan) == wanted
    dist.barrier()  # until all have read what is made
    if first and made:
        shutil.rmtree(aside, ignore_errors=True)
    elif first:
        shutil.rmtree(here, ignore_errors=True)
        resume.put_back_damaged(here)
    if made:
        return
    ranks = f"the {position.world_size} ranks" if number == position.part else "ranks"  # of an earlier part not known
    raise HbpError(
        f"{what}, and {why}; put a copy back, or run once with the options and {ranks} that it was planned for, or use "
        "train.resume=never to start anew"
    )


def _made_again(number: int, position: Position, engine: Engine, folder: Path, seed: int | None) -> Part | None:
    """A part as it is planned where nothing was changed."""
    if number == 0:
        return _first_part(engine, folder)
    plans = [read_plan(part_folder(folder, before) / "plan") for before in range(number)]
    last, run_step = plans[-1], position.run_step - position.step
    if number < position.part:
        run_step = sum(plan.n_steps for plan in plans)
    at = Position(number - 1, last.n_steps, run_step, 0, 0, resume.fingerprint(last), last.info.world_size)
    return _next_part(resume.read_part(folder, at, engine.samples, seed), as_planned(engine, last), folder)


def _as_profiled(engine: Engine, folder: Path) -> Engine:
    """With the cluster as it was measured for the run: measured again it would never come out the same."""
    config = engine.config
    if not config.cluster.profile:
        return engine
    cluster = load_cluster(str(folder.parent / "profile.json"))
    still = config.model_copy(update={"cluster": config.cluster.model_copy(update={"profile": False})})
    return dataclasses.replace(engine, config=still, cost=dataclasses.replace(engine.cost, cluster=cluster))


def _planned_with(config: Config) -> int | None:
    """The seed of a run's plans; None where they are the user's own."""
    return None if own_plans(config) else config.seed


def _turn_after(last: Part, config: Config) -> tuple[int, int] | None:
    """Epoch and piece of the part that follows; None after the last."""
    pieces = max(1, len(own_plans(config)))
    if last.piece + 1 < pieces:
        return last.epoch, last.piece + 1
    return (last.epoch + 1, 0) if last.epoch + 1 < config.train.epochs else None


def _next_part(
    last: Part, engine: Engine, folder: Path, model: CausalLMWithLoss | None = None, *, changed: bool = False
) -> Part | None:
    """The next piece of the user's own plans as it is; else all samples again, planned with another seed.

    A piece that was made for another number of ranks is planned again. What was learnt of memory before is in the
    cluster of the last plan.
    """
    turn, own = _turn_after(last, engine.config), own_plans(engine.config)
    run_step = last.run_step + last.plan.n_steps
    if turn is None:
        return None
    if not own:
        return _planned_part(engine, last, turn, folder, model, run_step=run_step, changed=changed)
    epoch, piece = turn
    here = part_folder(folder, last.number + 1)
    asked = read_plan(own[piece])
    if asked.info.world_size != engine.cost.world_size or counts_on_more(asked, engine):
        as_it_was = Part(last.number + 1, epoch, engine.samples, asked, here)
        engine = dataclasses.replace(engine, samples=resume.remaining(as_it_was, 0))
        return _planned_part(engine, last, turn, folder, model, run_step=run_step, changed=changed)
    plan, peak_bytes = own_plan(engine, own[piece], here, model)
    return Part(last.number + 1, epoch, engine.samples, plan, here, max(peak_bytes, last.peak_bytes), piece, run_step)


def _planned_part(
    engine: Engine,
    last: Part,
    turn: tuple[int, int],
    folder: Path,
    model: CausalLMWithLoss | None = None,
    *,
    run_step: int,
    changed: bool,
    number: int | None = None,
) -> Part:
    """The engine's samples, planned as the last part was, whoever planned that, or `changed`: as is configured now.

    The curriculum is the run's: what is left of its short steps after `run_step` steps comes first.
    """
    number = last.number + 1 if number is None else number
    info, config, here = last.plan.info, engine.config, part_folder(folder, number)
    own = bool(own_plans(config))
    if info.world_size == engine.cost.world_size and not changed:
        engine = as_planned(engine, last.plan)
    planned_here = own and info.strategy in STRATEGIES
    epoch, piece = turn
    first = read_info(folder / "plan") if number else info
    short_steps = first.settings.get("short_steps") or 0
    plan, peak_bytes = plan_within_memory(
        engine,
        info.strategy if planned_here else config.plan.strategy,
        here,
        model,
        seed=config.seed + epoch,
        global_batch_tokens=global_batch_tokens(last.plan, config),
        short_steps=max(0, int(short_steps) - run_step),
    )
    peak_bytes = max(peak_bytes, last.peak_bytes)
    return Part(number, epoch, engine.samples, plan, here, peak_bytes, piece, run_step)


def _with_baseline(engine: Engine, run: Path, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Train the baseline, if one is wanted and not there yet, and compare it with what ran on as many ranks."""
    baseline, results = engine.config.plan.baseline, summary["results"]
    tried_in = folder.name.rpartition("-sp")[0] if _is_trial(folder.name) else folder.name
    if baseline is not None and baseline in (tried_in, results[0]["strategy"]):
        say(f"no baseline: {folder} is of the run itself, which began with {results[0]['strategy']}; name another")
        return summary
    if baseline is None or any(result["strategy"] == baseline for result in results):
        return summary
    parts = results[0].get("parts") or [results[0]]  # of an earlier version
    alike = [part for part in parts if part["world_size"] == engine.cost.world_size and part["seconds"]]
    if not alike:
        say(f"no baseline: this run was trained on other numbers of ranks than {engine.cost.world_size}")
        return summary
    plan = read_plan(part_folder(folder, parts.index(alike[-1])) / "plan")
    engine = as_planned(engine, plan)
    result, trials = train_baseline(engine, baseline, plan, evaluation_plans(engine), run)
    timed = sum(part.get("timed_tokens", part["tokens"]) for part in alike)
    summary |= {
        "results": [results[0], result],
        "baseline_trials": trials,
        "speedup": timed / sum(part["seconds"] for part in alike) / result["tokens_per_s"],
    }
    _write_summary(run, summary)
    return summary


def check_strategies(config: Config) -> str:
    """Refuse unknown strategies, and a baseline that is what it is compared with, before anything is run.

    Returns:
        The strategy that is trained.
    """
    ours, own = config.plan.strategy, own_plans(config)
    if own:
        ours = read_info(own[0]).strategy
    elif ours not in STRATEGIES:
        raise HbpError(f"plan.strategy: no strategy {ours!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline is not None and config.plan.baseline not in STRATEGIES:
        raise HbpError(f"plan.baseline: no strategy {config.plan.baseline!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline == ours:
        raise HbpError(f"plan.baseline is {ours}, which is what it would be compared with; name another")
    return ours


def check_ready(config: Config, *, logs: bool = True) -> None:
    """Refuse a model that cannot be trained, packages that are missing and writers that nobody is logged in to.

    A family that is not proven has to pass the comparison with transformers first.

    Args:
        config: of the run.
        logs: the run writes logs.

    Raises:
        HbpError: says what is missing.
    """
    model = read_config(config.model.path)
    require_checked(config.model.path, model, Path(config.run_dir) / "model-check.json")
    if config.lora.rank and find_spec("peft") is None:
        raise HbpError("lora.rank needs peft; install with `pip install 'hierarchical-balance-packing[lora]'`")
    if config.model.hub_kernels and find_spec("kernels") is None:
        raise HbpError("model.hub_kernels needs the package kernels; install with `pip install kernels`")
    if config.model.hub_kernels and not torch.cuda.is_available():
        raise HbpError("model.hub_kernels is for GPUs, and torch finds none here; set it to false")
    if config.model.quantize != "none" and (not config.lora.rank or config.lora.dora):
        why = "DoRA needs the norms of dense weights" if config.lora.rank else "what is trained is not packed"
        raise HbpError(f"model.quantize={config.model.quantize} takes lora.rank over 0 and lora.dora false: {why}")
    if config.model.quantize != "none" and not shards_integers():
        raise HbpError(f"model.quantize={config.model.quantize} needs torch 2.13 or newer; this is {torch.__version__}")
    if logs:
        check_writers(config.log)
        check_hub(config)


def check_before_launch(config: Config, *, logs: bool = True) -> None:
    """Find what can be wrong with the input before any process is started; prepares the data.

    Args:
        config: of the run.
        logs: the run writes logs.

    Raises:
        HbpError: says what is wrong, and how to mend it.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < config.cluster.processes:
        raise HbpError(f"cluster.processes is {config.cluster.processes} but this machine has {gpus} GPUs; lower it")
    check_strategies(config)
    check_ready(config, logs=logs)
    store = prepare(config)
    samples, held_out = choose(config, store)
    check_model(config, store, (samples, held_out))
    own = own_plans(config)
    found = decide(config, folder_name(check_strategies(config)), store.fingerprint) if logs else None
    if own and (found is None or found.kind == "new"):
        check_plans([read_plan(plan) for plan in own], samples.lengths, config.cluster.processes)


def folder_name(strategy: str) -> str:
    """The folder of a strategy in `run_dir`: its name where that is a plain one, else what is plain of it.

    Another program's plan may call itself anything, also by a path out of `run_dir` or a name that a run uses itself.
    """
    plain = re.sub(r"[^A-Za-z0-9._+=-]+", "-", strategy).strip("-.")[:80] or "unnamed"
    taken = plain in RESERVED or plain.startswith("before-") or (plain in STRATEGIES and plain != strategy)
    return f"plan-{plain}" if taken or _is_trial(plain) else plain


def _is_trial(folder: str) -> bool:
    """Whether a folder's name is one that a static setting of a baseline is tried in."""
    name, _, degree = folder.rpartition("-sp")
    return name in STRATEGIES and degree.isdecimal()


def _clear(run: Path, config: Config, folder: Path) -> None:
    """With `train.resume=never`, remove an earlier run's plans, logs and checkpoints, so that no page mixes two runs.

    Data and the plan that is to be run stay. Trials of a baseline that was not finished go in any case: they are no
    result, and no page could show them beside one.
    """
    for trial in run.glob("*-sp*/plan"):
        if _is_trial(trial.parent.name) and trial.parent != folder:
            shutil.rmtree(trial.parent, ignore_errors=True)
    if config.train.resume != "never":
        return
    for name in (SUMMARY, "profile.json", RUN):
        (run / name).unlink(missing_ok=True)
    for plan in run.glob("*/plan"):
        if plan.parent.name not in (*STRATEGIES, folder.name):  # not ours to remove
            continue
        more = (plan.parent / name for name in (resume.CHECKPOINTS, ODD))
        for stale in (*plan.parent.glob("part-*"), *more, plan):
            if config.plan.path is None or not Path(config.plan.path).resolve().is_relative_to(stale.resolve()):
                shutil.rmtree(stale, ignore_errors=True)
        for name in (StepRecord.FILE, EvalRecord.FILE, MEMORY):
            (plan.parent / name).unlink(missing_ok=True)


def _write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    if dist.get_rank() == 0:
        write_whole(run / SUMMARY, json.dumps(summary, indent=1) + "\n")

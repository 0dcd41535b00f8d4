"""A whole run: data → store → live profile → plan → training → baseline → report. What `hbp train` does.

Every rank runs this from top to bottom; rank 0 prepares what is shared on disk while the others wait. The training half
is handed a plan and knows nothing of how it was made; the planning half runs on rank 0 alone, without torch.

Where `run_dir` holds an unfinished run of the same configuration, its last whole checkpoint is gone on with
(:mod:`hbp.run.resume`).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hbp.config import Config
from hbp.errors import HbpError
from hbp.plan import read_info, read_plan
from hbp.planning.planner import STRATEGIES
from hbp.progress import say
from hbp.run import resume
from hbp.run.baseline import train_baseline
from hbp.run.engine import Engine, make_engine
from hbp.run.fit_memory import as_planned, evaluation_plan, global_batch_tokens, plan_to_run, plan_within_memory
from hbp.run.preflight import check_ready
from hbp.run.profile import profile_cluster
from hbp.run.resume import Part, Point, part_folder
from hbp.run.training import train_strategy
from hbp.train.launch import rank_zero_first
from hbp.train.model import CausalLMWithLoss
from hbp.train.watch import watch_others


def run_job(config: Config, device: torch.device) -> dict[str, Any]:
    """Run everything on this rank; returns the summary (the same on every rank).

    Raises:
        Stopped: a signal ended it; the state is saved.
    """
    with watch_others():
        with rank_zero_first() as first:  # before data are prepared; the other nodes may lack what only rank 0 needs
            if first:
                check_ready(config)
        return _run(config, device)


def _run(config: Config, device: torch.device) -> dict[str, Any]:
    ours = check_strategies(config)
    run, engine = Path(config.run_dir), make_engine(config, device)
    fingerprint = engine.samples.store.fingerprint
    found = resume.find(config, ours, fingerprint)
    summary = _summary(run) if found.trained else None
    dist.barrier()  # every rank has read what was there
    if summary is None:
        if found.point is None:
            part = _first_part(engine, run, ours, fingerprint)
        else:
            if dist.get_rank() == 0:  # the checkpoint may come from another folder
                np.save(run / "lengths.npy", engine.samples.lengths)
                resume.write_run(config, fingerprint, trained=False)
            part = _next_part_of(found.point, engine, run / ours)
        engine = as_planned(engine, part.plan)
        result = train_strategy(
            engine,
            run / ours,
            part,
            lambda last, model: _next_epoch(last, engine, run / ours, model),
            evaluation_plan(engine),
            point=found.point,
            keeps_state=True,
        )
        summary = {"memory_budget_bytes": engine.cost.cluster.memory_bytes, "results": [result]}
        _write_summary(run, summary)
        if dist.get_rank() == 0:
            resume.write_run(config, fingerprint, trained=True)
    elif config.plan.baseline in (None, *(r["strategy"] for r in summary["results"])):
        say(f"{run} holds this run, finished; set train.resume=never to run it again")
    return _with_baseline(engine, run, ours, summary)


def _first_part(engine: Engine, run: Path, ours: str, fingerprint: str) -> Part:
    """Start anew: profile, plan."""
    config = engine.config
    if dist.get_rank() == 0:
        _clear(run, config.plan.path)
        np.save(run / "lengths.npy", engine.samples.lengths)
        resume.write_run(config, fingerprint, trained=False)
    if config.plan.path is None and config.cluster.profile:
        engine = _profiled(engine, run)
    plan, peak_bytes = plan_to_run(engine, run / ours)
    return Part(0, 0, engine.samples, plan, run / ours, peak_bytes)


def _profiled(engine: Engine, run: Path) -> Engine:
    cluster = profile_cluster(engine, run / "profile.json")
    return dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster))


def _next_part_of(point: Point, engine: Engine, folder: Path) -> Part:
    """The checkpoint's own part; with another number of ranks, a new one of the samples that are left of it."""
    part = resume.read_part(folder, point.position, engine.samples)
    if part.plan.info.world_size == engine.cost.world_size:
        resume.say_where(point, part, 0)
        return part
    left = resume.remaining(part, point.position.step)
    resume.say_where(point, part, len(left.ids))
    if not len(left.ids) and part.epoch + 1 >= engine.config.train.epochs:
        return part
    if engine.config.cluster.profile:
        engine = _profiled(engine, folder.parent)
    if not len(left.ids):
        return _next_epoch(part, engine, folder)
    return _planned_part(dataclasses.replace(engine, samples=left), part, part.epoch, folder)


def _next_epoch(last: Part, engine: Engine, folder: Path, model: CausalLMWithLoss | None = None) -> Part:
    """All samples again, planned with another seed; a plan of the user's own is run again as it is.

    What was learnt of memory in the last epoch is in the cluster of its plan.
    """
    own = engine.config.plan.path
    if own is None or read_info(Path(own)).world_size != engine.cost.world_size:
        return _planned_part(engine, last, last.epoch + 1, folder, model)
    here = part_folder(folder, last.number + 1)
    plan, peak_bytes = plan_to_run(engine, here, model)
    return Part(last.number + 1, last.epoch + 1, engine.samples, plan, here, max(peak_bytes, last.peak_bytes))


def _planned_part(engine: Engine, last: Part, epoch: int, folder: Path, model: CausalLMWithLoss | None = None) -> Part:
    """The engine's samples, planned as the last part was, whoever planned that."""
    info, config, here = last.plan.info, engine.config, part_folder(folder, last.number + 1)
    if info.world_size == engine.cost.world_size:
        engine = as_planned(engine, last.plan)
    plan, peak_bytes = plan_within_memory(
        engine,
        info.strategy if info.strategy in STRATEGIES else config.plan.strategy,
        here,
        model,
        seed=config.seed + epoch,
        global_batch_tokens=global_batch_tokens(last.plan, config),
    )
    return Part(last.number + 1, epoch, engine.samples, plan, here, max(peak_bytes, last.peak_bytes))


def _with_baseline(engine: Engine, run: Path, ours: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Train the baseline, if one is wanted and not there yet, and compare it with what ran on as many ranks."""
    baseline, results = engine.config.plan.baseline, summary["results"]
    if baseline is None or any(result["strategy"] == baseline for result in results):
        return summary
    parts = results[0].get("parts") or [results[0]]  # of an earlier version
    alike = [part for part in parts if part["world_size"] == engine.cost.world_size and part["steps"]]
    if not alike:
        say(f"no baseline: this run was trained on other numbers of ranks than {engine.cost.world_size}")
        return summary
    plan = read_plan(part_folder(run / ours, parts.index(alike[-1])) / "plan")
    engine = as_planned(engine, plan)
    result, trials = train_baseline(engine, baseline, plan, evaluation_plan(engine), run)
    summary |= {
        "results": [results[0], result],
        "baseline_trials": trials,
        "speedup": sum(p["tokens"] for p in alike) / sum(p["seconds"] for p in alike) / result["tokens_per_s"],
    }
    _write_summary(run, summary)
    return summary


def check_strategies(config: Config) -> str:
    """Refuse unknown strategies, and a baseline that is what it is compared with, before anything is run.

    Returns:
        The strategy that is trained.
    """
    ours = config.plan.strategy
    if config.plan.path is not None:
        ours = read_info(Path(config.plan.path)).strategy
    elif ours not in STRATEGIES:
        raise HbpError(f"plan.strategy: no strategy {ours!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline is not None and config.plan.baseline not in STRATEGIES:
        raise HbpError(f"plan.baseline: no strategy {config.plan.baseline!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline == ours:
        raise HbpError(f"plan.baseline is {ours}, which is what it would be compared with; name another")
    return ours


def _clear(run: Path, kept: str | None) -> None:
    """Remove an earlier run's plans, logs and checkpoints, so that no page mixes two runs; data and `kept` stay."""
    for name in ("summary.json", "profile.json", resume.RUN):
        (run / name).unlink(missing_ok=True)
    for plan in run.glob("*/plan"):
        if plan.parent.name not in STRATEGIES:  # not ours to remove
            continue
        for stale in (*plan.parent.glob("part-*"), plan.parent / resume.CHECKPOINTS, plan):
            if kept is None or not Path(kept).resolve().is_relative_to(stale.resolve()):
                shutil.rmtree(stale, ignore_errors=True)
        for name in ("steps.jsonl", "eval.jsonl"):
            (plan.parent / name).unlink(missing_ok=True)


def _summary(run: Path) -> dict[str, Any] | None:
    try:
        summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
        return summary if summary["results"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    if dist.get_rank() == 0:
        (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

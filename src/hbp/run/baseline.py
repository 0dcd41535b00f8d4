"""What HBP is measured against: the fastest static setting of a strategy that users have today.

The baseline is given every chance: on the same samples, model seed, memory budget, attention and loss, its one static
setting is the fastest of all that fit. Which one that is a short probe finds, the first steps of each (the very first,
in which kernels are compiled, aside), and the fastest is trained whole; ``plan.baseline_full`` trains every one whole.
The probe may take a setting for the fastest that is so by no more than the noise of a few steps.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hbp.cost.cluster import GIB
from hbp.errors import HbpError
from hbp.plan import Group, Plan
from hbp.progress import say
from hbp.run.engine import Engine
from hbp.run.fit_memory import global_batch_tokens, peak_bytes, write_and_read
from hbp.run.resume import Part, part_folder
from hbp.run.training import EvalPlans, train_strategy
from hbp.train.launch import free_memory
from hbp.train.loop import Learner, train
from hbp.train.model import CausalLMWithLoss

PROBE_STEPS = 6
"""That a static setting is judged by, after one to warm up."""


def train_baseline(
    engine: Engine, strategy: str, ours: Plan, eval_plans: EvalPlans, run: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Try the baseline at every degree, with the fewest recomputed layers that fit, and train the fastest whole.

    Args:
        engine: as for the plan that it is compared with.
        strategy: of the baseline.
        ours: the plan that it is compared with: its longest packing length and global batch are taken over.
        eval_plans: of the held-out samples, by source.
        run: the run's folder.

    Returns:
        The result, and one entry for every setting that was tried.

    Raises:
        HbpError: no setting fits the memory budget.
    """
    budget = engine.cost.cluster.memory_bytes
    longest = max(group.capacity for group in ours.groups_of_rows()[0])
    global_batch = global_batch_tokens(ours, engine.config)
    trials: list[dict[str, Any]] = []
    settings: list[tuple[float, Path, list[Part]]] = []
    results: dict[Path, dict[str, Any]] = {}
    full = engine.config.plan.baseline_full
    for degree in engine.cost.degrees():
        folder = run / f"{strategy}-sp{degree}"
        epochs = _fewest_gc_layers(engine, strategy, folder, longest, degree, global_batch, trials)
        free_memory()  # training makes its own model
        if epochs is None:
            continue
        if full:
            results[folder] = _train_whole(engine, folder, epochs, eval_plans)
            trials[-1]["tokens_per_s"] = results[folder]["tokens_per_s"]
        else:
            trials[-1] |= {"tokens_per_s": probe(engine, epochs[0]), "probe_steps": PROBE_STEPS}
            say(f"baseline {strategy} SP{degree}: {trials[-1]['tokens_per_s']:,.0f} tok/s in its first steps")
        settings.append((trials[-1]["tokens_per_s"], folder, epochs))
    if not settings:
        raise HbpError(f"no static setting of {strategy} fits {budget / GIB:.3f} GiB; raise cluster.memory_gib")
    _, folder, epochs = max(settings, key=lambda setting: setting[0])
    best = results[folder] if full else _train_whole(engine, folder, epochs, eval_plans)
    _replace_folder(folder, run / strategy)
    for degree in engine.cost.degrees():
        _replace_folder(run / f"{strategy}-sp{degree}", None)
    return best, trials


def _train_whole(engine: Engine, folder: Path, epochs: Sequence[Part], eval_plans: EvalPlans) -> dict[str, Any]:
    """The result of one setting, trained from its first epoch to its last."""

    def next_epoch(last: Part, _: object) -> Part | None:
        return epochs[last.epoch + 1] if last.epoch + 1 < len(epochs) else None

    tokens = sum(epoch.plan.info.n_tokens for epoch in epochs)
    return train_strategy(engine, folder, epochs[0], next_epoch, eval_plans, tokens)


def probe(engine: Engine, part: Part) -> float:
    """Tokens a second of the first steps of a part but the very first, on a fresh model; as on every rank.

    Of a part with one step alone, that step's.
    """
    model = engine.fresh_model()
    learner = Learner.of(model, engine.mesh, engine.config.train, engine.device)
    records = train(learner, part.plan, part.samples, lambda record: record.step == PROBE_STEPS)
    del model, learner
    free_memory()
    timed = records[1:] or records
    return sum(record.tokens for record in timed) / sum(record.seconds for record in timed)


def _fewest_gc_layers(
    engine: Engine,
    strategy: str,
    folder: Path,
    longest: int,
    degree: int,
    global_batch: int,
    trials: list[dict[str, Any]],
) -> list[Part] | None:
    """The epochs with the fewest recomputed layers that keep within the budget at this degree; None if none do.

    Every setting that was tried is added to `trials`.
    """
    budget, n_layers = engine.cost.cluster.memory_bytes, engine.cost.model.n_layers
    model, predicted = engine.fresh_model(), engine.cost.fewest_gc_layers(longest, degree)
    # The model errs on the safe side, so look one layer below what it asks for.
    for k in range(max(0, (n_layers if predicted is None else predicted) - 1), n_layers + 1):
        epochs = _epochs(engine, strategy, folder, Group(longest, degree, k), global_batch, model)
        peak = epochs[-1].peak_bytes
        shown = "more than the device has" if math.isinf(peak) else f"{peak / GIB:.3f} GiB"
        say(f"baseline {strategy} SP{degree} GC{k}: {shown} of {budget / GIB:.3f} GiB")
        trial = {"sp_degree": degree, "gc_layers": k, "fits": peak <= budget}
        trials.append(trial | {"peak_bytes": None if math.isinf(peak) else peak})
        if trial["fits"]:
            return epochs
    return None


def _epochs(
    engine: Engine, strategy: str, folder: Path, static: Group, global_batch: int, model: CausalLMWithLoss
) -> list[Part]:
    """All epochs, planned before any is trained, since a setting fits only if the packs of each do."""
    parts: list[Part] = []
    peak = 0.0
    for epoch in range(engine.config.train.epochs):
        here, seed = part_folder(folder, epoch), engine.config.seed + epoch
        plan = write_and_read(engine, strategy, here, seed=seed, global_batch_tokens=global_batch, static=static)
        peak = max(peak, peak_bytes(engine, plan, model))
        parts.append(Part(epoch, epoch, engine.samples, plan, here, peak))
    return parts


def _replace_folder(source: Path, target: Path | None) -> None:
    """Rank 0 moves a folder over another one, or away, when the others have read what they need of it."""
    dist.barrier()
    if dist.get_rank() == 0:
        if target is None:
            shutil.rmtree(source, ignore_errors=True)
        else:
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
    dist.barrier()

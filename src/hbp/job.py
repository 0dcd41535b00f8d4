"""A whole run: data → store → live profile → plan → training → baseline → report. What `hbp train` does.

Every rank runs this from top to bottom; rank 0 prepares what is shared on disk while the others wait. The training half
is handed a plan and knows nothing of how it was made; the planning half runs on rank 0 alone, without torch.

The baseline is given every chance: on the same samples, model seed, memory budget, attention and loss, its one static
setting is the fastest of all that fit, each trained whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hbp.config import Config, DataConfig
from hbp.cost.cluster import GIB, load_cluster
from hbp.cost.fit import Fit, Point, fit_cluster, grid
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.data.stdlib_sft import train_tokenizer, write_dataset
from hbp.data.store import TokenStore, open_store
from hbp.data.tokenize import prepare_store
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.plan import Group, Plan, hash_lengths, read_info, read_plan, write_plan
from hbp.planning.planner import STRATEGIES, make_plan
from hbp.progress import Progress, say
from hbp.train.checkpoint import export_model
from hbp.train.launch import device_name, rank_zero_first
from hbp.train.loop import StepRecord, evaluate, train
from hbp.train.model import CausalLMWithLoss, is_configuration_alone, load_sharded, read_config
from hbp.train.profile import measure_point, measure_rows

MEMORY_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a token store, numbered from 0: what a plan's sample ids mean."""

    store: TokenStore
    ids: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each."""
        return self.store.lengths[self.ids]

    @property
    def loss_tokens(self) -> npt.NDArray[np.int32]:
        """Targets of each."""
        return self.store.loss_tokens[self.ids]

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and loss mask."""
        return self.store.sample(int(self.ids[index]))


@dataclass(frozen=True)
class Engine:
    """What every strategy of a run shares on this rank."""

    config: Config
    device: torch.device
    mesh: ParallelMesh
    samples: Samples
    held_out: Samples
    cost: CostModel

    def fresh_model(self) -> CausalLMWithLoss:
        """The model at its starting point, sharded; the same bits every time."""
        config = self.config.model
        model = load_sharded(
            config.path,
            self.mesh.world,
            self.device,
            vocab_size=self.samples.store.vocab_size,
            seed=self.config.seed,
            by_layer=self.cost.model.sharded_by_layer,
            compute_dtype=getattr(torch, config.compute_dtype),
            attention=config.attention,
            compiled=config.compile,
        )
        model.offload_activations = config.offload_activations
        return model


def prepare(config: Config) -> TokenStore:
    """Make the token store (and for the embedded data set its files and tokenizer), or open it if it is up to date."""
    source, tokenizer = config.data.source, config.data.tokenizer or config.model.path
    if source == "stdlib":
        source, tokenizer = _prepare_stdlib(config.data, Path(config.run_dir) / "data", config.seed)
    return prepare_store(
        source,
        tokenizer,
        Path(config.run_dir) / "store",
        split=config.data.split,
        subset=config.data.subset,
        processes=config.data.processes,
    )


def _prepare_stdlib(data: DataConfig, folder: Path, seed: int) -> tuple[str, str]:
    jsonl, tokenizer, made = folder / "stdlib.jsonl", folder / "tokenizer", folder / "made.json"
    wanted = json.dumps({**data.model_dump(), "seed": seed}, sort_keys=True)
    if not (made.is_file() and made.read_text() == wanted):
        say("making the embedded data set and its tokenizer from this Python's standard library")
        folder.mkdir(parents=True, exist_ok=True)
        write_dataset(
            jsonl,
            seed=seed,
            short_samples=data.short_samples,
            long_samples=data.long_samples,
            longest_chars=data.longest_chars,
        )
        train_tokenizer(jsonl, tokenizer, vocab_size=data.vocab_size)
        made.write_text(wanted)
    return str(jsonl), data.tokenizer or str(tokenizer)


def make_engine(config: Config, device: torch.device) -> Engine:
    """Prepare data (rank 0), split it, describe model and cluster, make the process groups. A collective."""
    run, world_size = Path(config.run_dir), dist.get_world_size()
    if device.type == "cuda" and config.model.compute_dtype == "float32":
        raise HbpError("attention on CUDA needs half precision; set model.compute_dtype to bfloat16")
    with rank_zero_first() as first:
        if first:
            prepare(config)
    store = open_store(run / "store")
    train_ids, eval_ids = split_samples(store.lengths, config)
    samples, held_out = Samples(store, train_ids), Samples(store, eval_ids)
    cluster = load_cluster(config.cluster.name)
    if config.cluster.memory_gib is not None:
        cluster = dataclasses.replace(cluster, memory_bytes=config.cluster.memory_gib * GIB)
    if is_configuration_alone(config.model.path):
        say(f"{config.model.path} holds no weights: the model starts from a fresh initialisation")
    spec = spec_from_config(read_config(config.model.path, store.vocab_size).to_dict())
    cost = CostModel(spec, cluster, world_size)
    degrees = set(cost.degrees())
    if config.plan.path is not None:
        degrees |= set(read_plan(Path(config.plan.path)).sp_degree.tolist())
    mesh = make_mesh(world_size, degrees, device.type, spec.heads)
    return Engine(config, device, mesh, samples, held_out, cost)


def run_job(config: Config, device: torch.device) -> dict[str, Any]:
    """Run everything on this rank; returns the summary (the same on every rank)."""
    check_strategies(config)
    run, engine = Path(config.run_dir), make_engine(config, device)
    if dist.get_rank() == 0:
        _clear(run, config.plan.path)
        np.save(run / "lengths.npy", engine.samples.lengths)
    if config.plan.path is None and config.cluster.profile:
        fit, _ = live_profile(engine, run / "profile.json")
        engine = dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=fit.cluster))

    plan, engine = _plan(engine, run)
    eval_plan = _eval_plan(engine)
    results = [_train_one(engine, plan, eval_plan, run / plan.info.strategy)]
    summary: dict[str, Any] = {"memory_budget_bytes": engine.cost.cluster.memory_bytes, "results": results}
    _write_summary(run, summary)
    if config.plan.baseline:
        baseline, summary["baseline_trials"] = _train_baseline(engine, config.plan.baseline, plan, eval_plan, run)
        results.append(baseline)
        summary["speedup"] = results[0]["tokens_per_s"] / results[1]["tokens_per_s"]
        _write_summary(run, summary)
    return summary


def check_strategies(config: Config) -> None:
    """Refuse unknown strategies, and a baseline that is what it is compared with, before anything is run."""
    ours = config.plan.strategy
    if config.plan.path is not None:
        ours = read_info(Path(config.plan.path)).strategy
    elif ours not in STRATEGIES:
        raise HbpError(f"plan.strategy: no strategy {ours!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline is not None and config.plan.baseline not in STRATEGIES:
        raise HbpError(f"plan.baseline: no strategy {config.plan.baseline!r}: give one of {', '.join(STRATEGIES)}")
    if config.plan.baseline == ours:
        raise HbpError(f"plan.baseline is {ours}, which is what it would be compared with; name another")


def _clear(run: Path, kept: str | None) -> None:
    """Remove an earlier run's plans and logs, so that no page mixes two runs; data, models and `kept` stay."""
    for name in ("summary.json", "profile.json"):
        (run / name).unlink(missing_ok=True)
    for plan in run.glob("*/plan"):
        if kept is None or plan.resolve() != Path(kept).resolve():
            shutil.rmtree(plan)
        (plan.parent / "steps.jsonl").unlink(missing_ok=True)


def _write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    if dist.get_rank() == 0:
        (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def split_samples(
    lengths: npt.NDArray[np.int32], config: Config
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids of the samples to train on and of those held out, drawn among those short enough to be trained on."""
    n = len(lengths)
    held = config.data.eval_samples
    if held >= n:
        raise HbpError(f"data.eval_samples={held} leaves none of the {n} samples to train on; lower it")
    order = np.random.default_rng(config.seed).permutation(n)
    fits = lengths[order] <= (config.data.max_length or lengths.max())
    eval_ids = order[fits][:held]
    return np.setdiff1d(np.arange(n), eval_ids), np.sort(eval_ids)


def live_profile(engine: Engine, out: Path | None) -> tuple[Fit, list[Point]]:
    """Measure micro-batches of this data on this engine and fit the cost model to them; rank 0 writes the file."""
    lengths = engine.samples.lengths
    longest = min(engine.config.data.max_length or int(lengths.max()), int(lengths.max()))
    rng = np.random.default_rng(engine.config.seed)
    wanted = grid(engine.cost, lengths, longest, rng)
    model = engine.fresh_model()
    points = []
    # The largest first, once and unrecorded: later points then find a warm allocator, as training does.
    warm = wanted[-1]
    measure_point(model, engine.mesh, warm[0], warm[1], warm[2], device=engine.device, repeats=0)
    with Progress("profile", len(wanted)) as progress:
        for pack, degree, gc_layers in wanted:
            points.append(measure_point(model, engine.mesh, pack, degree, gc_layers, device=engine.device))
            last = points[-1]
            progress.advance(f"{sum(pack)} tokens SP{degree} GC{gc_layers}: {last.seconds:.2f} s")
    fit = fit_cluster(
        engine.cost.cluster, engine.cost.model, engine.cost.world_size, points, device_name(engine.device)
    )
    say(f"cost model fitted to {len(points)} micro-batches; held-out median error {fit.held_out_error:.1%}")
    if out is not None and dist.get_rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(profile_json(fit, points), indent=1) + "\n")
    return fit, points


def profile_json(fit: Fit, points: list[Point]) -> dict[str, Any]:
    """A profile file: the fitted cluster (usable as `--cluster FILE`) and the raw points."""
    return {
        "device": fit.cluster.device,
        "cluster": fit.cluster.to_json(),
        "median_error": fit.held_out_error,
        "points": [
            {**dataclasses.asdict(point), "predicted_s": seconds, "predicted_bytes": size}
            for point, seconds, size in zip(points, fit.predicted_s, fit.predicted_bytes, strict=True)
        ],
    }


def _plan(engine: Engine, run: Path) -> tuple[Plan, Engine]:
    """The plan to run: the user's, or one made here whose packs are then seen to fit the memory budget."""
    config = engine.config
    if config.plan.path is not None:
        plan = read_plan(Path(config.plan.path))
        check_plan(plan, engine.samples.lengths, engine.cost.world_size)
        if dist.get_rank() == 0:
            write_plan(plan, run / plan.info.strategy / "plan")
        return plan, engine
    budget = engine.cost.cluster.memory_bytes
    for _ in range(MEMORY_ROUNDS):
        plan = _write_and_read(engine, config.plan.strategy, run / config.plan.strategy)
        model = engine.fresh_model()
        peaks = measure_rows(model, plan, engine.samples, engine.mesh, engine.device)
        worst = max(peaks.values())
        if worst <= budget:
            return plan, engine
        say(f"a pack took {worst / GIB:.3f} GiB, over the budget of {budget / GIB:.3f}: planning again with that known")
        cluster = engine.cost.cluster
        cluster = dataclasses.replace(cluster, fixed_bytes=cluster.fixed_bytes + worst - budget)
        engine = dataclasses.replace(engine, cost=dataclasses.replace(engine.cost, cluster=cluster))
    raise HbpError(
        f"no plan keeps within {budget / GIB:.3f} GiB a process (the last needed {worst / GIB:.3f}); "
        "raise cluster.memory_gib or lower data.max_length"
    )


def check_plan(plan: Plan, lengths: npt.NDArray[np.int32], world_size: int) -> None:
    """Refuse a plan that was made for another world size or other data."""
    if plan.info.world_size != world_size:
        raise HbpError(
            f"the plan was made for {plan.info.world_size} ranks but {world_size} are running; "
            f"make one with `hbp plan --gpus {world_size}`"
        )
    same = plan.info.lengths_sha256 == hash_lengths(lengths)
    if not same or not np.array_equal(plan.lengths, lengths[plan.sample_ids]):
        raise HbpError(
            f"the plan was made for other data ({plan.info.n_samples} samples) than this ({len(lengths)} samples): "
            "lengths differ; make it again with `hbp plan`"
        )


def _write_and_read(
    engine: Engine, strategy: str, folder: Path, static: Group | None = None, like: Plan | None = None
) -> Plan:
    """Rank 0 plans into ``folder/plan``, with the global batch of `like`; every rank reads the same file."""
    config = engine.config
    global_batch = int(like.info.settings["global_batch_tokens"]) if like else config.plan.global_batch_tokens
    with rank_zero_first() as first:
        if first:
            plan = make_plan(
                engine.samples.lengths,
                engine.cost,
                strategy=strategy,
                seed=config.seed,
                max_length=config.data.max_length,
                global_batch_tokens=global_batch,
                short_steps=config.plan.short_steps,
                static=static,
            )
            write_plan(plan, folder / "plan")
    return read_plan(folder / "plan")


def _eval_plan(engine: Engine) -> Plan | None:
    """Best-fit packs of the held-out samples, for forward passes only."""
    if not len(engine.held_out.ids):
        return None
    with_room = dataclasses.replace(engine.cost.cluster, memory_bytes=1e18)
    return make_plan(engine.held_out.lengths, dataclasses.replace(engine.cost, cluster=with_room), strategy="bfd")


def _train_baseline(
    engine: Engine, strategy: str, ours: Plan, eval_plan: Plan | None, run: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train the baseline at every degree, with the fewest recomputed layers that fit; keep the fastest whole run."""
    budget, n_layers = engine.cost.cluster.memory_bytes, engine.cost.model.n_layers
    longest = max(group.capacity for group in ours.info.groups)
    trials: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    model = engine.fresh_model()
    for degree in engine.cost.degrees():
        gc_layers = engine.cost.fewest_gc_layers(longest, degree)
        # The model errs on the safe side, so look one layer below what it asks for.
        for k in range(max(0, (n_layers if gc_layers is None else gc_layers) - 1), n_layers + 1):
            folder = run / f"{strategy}-sp{degree}"
            plan = _write_and_read(engine, strategy, folder, Group(longest, degree, k), ours)
            peak = max(measure_rows(model, plan, engine.samples, engine.mesh, engine.device).values())
            trial = {"sp_degree": degree, "gc_layers": k, "peak_bytes": peak, "fits": peak <= budget}
            trials.append(trial)
            say(f"baseline {strategy} SP{degree} GC{k}: {peak / GIB:.3f} GiB of {budget / GIB:.3f}")
            if not trial["fits"]:
                continue
            result = _train_one(engine, plan, eval_plan, folder)
            trial["tokens_per_s"] = result["tokens_per_s"]
            if best is None or result["tokens_per_s"] > best["tokens_per_s"]:
                best = result
                _replace_folder(folder, run / strategy)
            break
    if best is None:
        raise HbpError(f"no static setting of {strategy} fits {budget / GIB:.3f} GiB; raise cluster.memory_gib")
    for degree in engine.cost.degrees():
        _replace_folder(run / f"{strategy}-sp{degree}", None)
    return best, trials


def _replace_folder(source: Path, target: Path | None) -> None:
    """Rank 0 moves a folder over another one, or away; the others wait."""
    if dist.get_rank() == 0:
        if target is None:
            shutil.rmtree(source, ignore_errors=True)
        else:
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
    dist.barrier()


def _train_one(engine: Engine, plan: Plan, eval_plan: Plan | None, folder: Path) -> dict[str, Any]:
    """Train a fresh model by a plan; writes its steps and model to the strategy's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model = engine.fresh_model()
    peaks = measure_rows(model, plan, engine.samples, engine.mesh, engine.device)
    total = plan.info.n_tokens
    rank = dist.get_rank()
    with (
        (folder / "steps.jsonl").open("w") if rank == 0 else Path(os.devnull).open("w") as log,
        Progress(plan.info.strategy, total) as progress,
    ):

        def on_step(record: StepRecord) -> None:
            log.write(json.dumps(dataclasses.asdict(record)) + "\n")
            log.flush()
            progress.advance(
                f"step {record.step + 1}/{plan.n_steps} {record.group} loss {record.loss:.3f} "
                f"{record.tokens_per_s:,.0f} tok/s",
                record.tokens,
            )

        records = train(
            model,
            plan,
            engine.samples,
            engine.samples.loss_tokens,
            engine.mesh,
            engine.config.train,
            engine.device,
            on_step,
        )
    eval_loss = None
    if eval_plan is not None:
        eval_loss = evaluate(model, eval_plan, engine.held_out, engine.held_out.loss_tokens, engine.mesh, engine.device)
    if engine.config.train.export:
        export_model(model, folder / "model", engine.samples.store.tokenizer)
    return _result(engine, plan, records, eval_loss, max(peaks.values()))


def _result(
    engine: Engine, plan: Plan, records: list[StepRecord], eval_loss: float | None, peak_bytes: float
) -> dict[str, Any]:
    seconds = sum(record.seconds for record in records)
    tail = records[-max(1, len(records) // 10) :]
    groups: list[Mapping[str, int]] = [dataclasses.asdict(group) for group in plan.info.groups]
    return {
        "strategy": plan.info.strategy,
        "world_size": plan.info.world_size,
        "device": device_name(engine.device),
        "samples": len(plan.sample_ids),
        "dropped": len(plan.info.dropped),
        "tokens": plan.info.n_tokens,
        "steps": plan.n_steps,
        "seconds": seconds,
        "tokens_per_s": plan.info.n_tokens / seconds,
        "predicted_s": plan.info.metrics["predicted_s"],
        "final_train_loss": float(np.average([r.loss for r in tail], weights=[r.loss_tokens for r in tail])),
        "eval_loss": eval_loss,
        "peak_bytes": peak_bytes,
        "groups": groups,
        "metrics": dict(plan.info.metrics),
    }

"""Rehearse a plan for any cluster on the one device at hand: measured seconds and bytes of its ranks, rank after rank.

In a world that moves nothing (:mod:`hbp.train.measure.fake_world`) the engine that trains runs chosen micro-steps as
each of their ranks would: FSDP shards of the true size, the rank's own slice of its pack at its SP degree, its
recomputed layers, its documents. Tokens are random, since only lengths matter. What the network would take is not
measured but predicted, and kept apart: a micro-step is its slowest rank's measured compute plus the communication that
the cost model predicts for the pack that takes longest.

A sample of micro-steps stands for the run. They are drawn evenly over the micro-steps in order of predicted seconds,
and the run's compute is its predicted compute times the ratio of measured to predicted in the sample (a ratio
estimator; W. G. Cochran, *Sampling Techniques*, chapter 6); the interval is Student's, at 95 %. Several plans are
rehearsed in turn, micro-step by micro-step, so that what disturbs the machine disturbs them alike.

Each pack is run once to warm up, which is when its memory is measured, and then `repeats` times of which the fastest
counts. Repeats are rounds over everything that is rehearsed: what disturbs the machine lasts for seconds, so that two
runs of a pack in a row would both be slow, and a pack runs after others as it does in training. On a CPU seconds are
processor time on one thread, which other programs disturb less than wall time; on CUDA wall time between
synchronizations. The noise that is left is stated: how far the repeats of a pack are apart. It does not make ranks look
unequal: which is the slowest and how long that takes are read off different repeats (:func:`slowest_seconds`).
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from hbp.cost.guess import GUESSED_WITHIN
from hbp.errors import HbpError
from hbp.parallel.mesh import ParallelMesh, make_mesh
from hbp.plan import Plan
from hbp.progress import Progress
from hbp.simulator import plan_cost_model, simulate, split_packs
from hbp.train.batch import IDLE, MicroBatch, make_micro_batch
from hbp.train.loop import forward_backward
from hbp.train.measure.fake_world import drawn_model, fake_world
from hbp.train.measure.micro_batch import hold_gradients, peak_bytes_of, start_over
from hbp.train.model import CausalLMWithLoss, local_parameter_bytes

Float = npt.NDArray[np.float64]
COMMUNICATION = ("alltoall", "fsdp")
"""The parts of a pack's predicted seconds that are not computed on the device."""
CONFIDENCE = 0.95
MOMENTS = 2  # of AdamW, each as large as the gradients


@dataclass(frozen=True)
class RehearsedRank:
    """One rank in one micro-step."""

    step: int
    micro_step: int
    rank: int
    measured_s: float
    """Of compute."""
    predicted_s: float
    """Of compute."""
    communication_s: float
    """Predicted, on top of either."""
    peak_bytes: float
    """Measured, with parameters, gradients and AdamW's moments; infinite where the device has not the memory."""
    predicted_bytes: float
    halves_s: tuple[float, float]
    """The fastest of every other repeat, and of those between them; the same twice where there was one run."""

    @property
    def noise(self) -> float:
        """How far the slower half is above the faster, as a share of it."""
        return max(self.halves_s) / min(self.halves_s) - 1 if math.isfinite(max(self.halves_s)) else 0.0


@dataclass(frozen=True)
class Rehearsal:
    """What was measured of a plan."""

    world_size: int
    device: str
    rows: tuple[RehearsedRank, ...]
    micro_steps: int
    """Rehearsed."""
    of_micro_steps: int
    """In the plan."""
    all_ranks: bool
    step_s: float
    """Of an optimizer step, the mean over the run: measured compute, predicted communication and optimizer."""
    step_s_interval: tuple[float, float]
    """At 95 %; the value twice where every micro-step was rehearsed."""
    communication_step_s: float
    """The predicted part of `step_s`: communication and the optimizer."""
    predicted_step_s: float
    """All of it predicted."""
    idle_share: float
    """Of the rehearsed ranks' compute time in which they wait for the slowest; of the sampled ranks alone."""
    predicted_idle_share: float
    peak_bytes: float
    noise: float
    """Median of the ranks'."""
    memory_budget_bytes: float
    """Of a rank, that the plan was made for."""
    plan_fingerprint: str
    """Of the plan, by which a report knows that this is of it."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is infinite (a pack that did not fit, the interval of one micro-step) is null."""
        data = dataclasses.asdict(self)
        data["step_s_interval"] = [bound if math.isfinite(bound) else None for bound in self.step_s_interval]
        for row in data["rows"]:
            del row["halves_s"]
            for name in ("peak_bytes", "measured_s"):
                row[name] = row[name] if math.isfinite(row[name]) else None
        return {name: None if value == math.inf else value for name, value in data.items()}


@dataclass(frozen=True)
class RandomTokens:
    """Samples of a plan's lengths whose tokens are drawn anew each time they are asked for."""

    lengths: dict[int, int]
    vocab_size: int

    @classmethod
    def of(cls, plan: Plan, vocab_size: int) -> RandomTokens:
        """For all samples of a plan."""
        return cls(dict(zip(plan.sample_ids.tolist(), plan.lengths.tolist(), strict=True)), vocab_size)

    def sample(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Token ids and loss mask; every token but the first is learnt."""
        n = self.lengths[index]
        ids = np.random.default_rng(index).integers(0, self.vocab_size, n).astype(np.int32)
        return ids, np.ones(n, np.uint8)


@dataclass(frozen=True)
class Prediction:
    """What the cost model says of a plan's packs ``[P]`` and micro-steps ``[M]``."""

    compute_s: Float  # [P]
    communication_s: Float  # [P]
    bytes: Float  # [P]
    idle_bytes: float
    """Of a rank without a pack, which runs a token without loss beside the others."""
    micro_of_row: npt.NDArray[np.int64]  # [P]
    micro_compute_s: Float  # [M] of the pack that computes longest
    micro_communication_s: Float  # [M] what the slowest pack takes on top of that

    @classmethod
    def of(cls, plan: Plan) -> Prediction:
        """Raises HbpError where the plan carries no cost model to compare with."""
        cost = plan_cost_model(plan)
        if cost is None:
            raise HbpError("the plan carries no cost model to compare with; make one with `hbp plan`")
        parts, micro = split_packs(plan), plan.micro_step_index().astype(np.int64)
        total = plan.predicted_s.astype(np.float64)
        communication = np.minimum(sum(parts[name] for name in COMMUNICATION), total)
        compute, n = total - communication, int(micro[-1]) + 1
        longest, slowest = np.zeros(n), np.zeros(n)
        np.maximum.at(longest, micro, compute)
        np.maximum.at(slowest, micro, total)
        groups, of_row = plan.groups_of_rows()
        tokens = plan.tokens()
        bytes_ = np.array(
            [
                float(cost.bytes(int(t), g.sp_degree, g.gc_layers))
                for t, g in zip(tokens, (groups[i] for i in of_row), strict=True)
            ]
        )
        idle = float(cost.bytes(1, 1, 0))
        return cls(compute, communication, bytes_, idle, micro, longest, np.maximum(0.0, slowest - longest))


@dataclass
class _Measured:
    """A plan under rehearsal."""

    plan: Plan
    prediction: Prediction
    chosen: npt.NDArray[np.int64]
    """Micro-steps, counted over the plan."""
    samples: RandomTokens
    peaks: dict[tuple[int, int], float] = field(default_factory=dict)
    """Bytes of each rank (micro-step, rank) over the states."""
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """One a round."""


def rehearse(
    plans: Sequence[Plan],
    model: str,
    device: torch.device,
    *,
    micro_steps: int | None = 8,
    ranks: int | None = None,
    repeats: int = 2,
    compute_dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    compiled: bool = False,
    offload_activations: bool = False,
    seed: int = 0,
) -> list[Rehearsal]:
    """Run sampled micro-steps of plans as their ranks would, one rank after another on this device.

    Args:
        plans: of one world size, rehearsed in turn.
        model: a Hugging Face folder, or a folder or file with a configuration alone; weights are not read.
        device: this process's.
        micro_steps: of each plan to run; None: all.
        ranks: of each micro-step to run, the one with the longest predicted compute among them; None: all.
        repeats: timed rounds over everything; of a pack's runs the fastest counts.
        compute_dtype: of activations and gathered parameters.
        attention: kernel, as ``model.attention`` of a run.
        compiled: layers are compiled, as ``model.compile`` of a run.
        offload_activations: as in a run.
        seed: of the sample of micro-steps.

    Raises:
        HbpError: no plans, plans of different worlds, a plan without a cost model, or counts below 1.
    """
    worlds = {plan.info.world_size for plan in plans}
    if len(worlds) != 1:
        raise HbpError(
            f"plans for {' and '.join(map(str, sorted(worlds))) or 'no'} ranks; give plans of one world size"
        )
    for name, value in (("micro-steps", micro_steps), ("ranks", ranks), ("repeats", repeats)):
        if value is not None and value < 1:
            raise HbpError(f"{value} {name}; give at least 1")
    predictions = [Prediction.of(plan) for plan in plans]
    if device.type == "cpu":
        torch.set_num_threads(1)
    with fake_world(worlds.pop()):
        own = rehearsed_model(model, plans, device, compute_dtype, attention, compiled)
        lm, mesh = own
        lm.offload_activations = offload_activations
        state_bytes = local_parameter_bytes(lm) + (1 + MOMENTS) * hold_gradients(lm)
        vocab = int(lm.lm.config.vocab_size)
        works = [
            _Measured(plan, prediction, _sample(prediction, micro_steps, seed), RandomTokens.of(plan, vocab))
            for plan, prediction in zip(plans, predictions, strict=True)
        ]
        rounds = 1 + repeats  # the first to warm up
        with Progress("rehearse", rounds * sum(len(work.chosen) for work in works)) as progress:
            for number in range(rounds):
                for work, micro in _in_turn(works):
                    _run_micro_step(work, micro, ranks, lm, mesh, device, timed=number > 0)
                    count = len(work.prediction.micro_compute_s)
                    progress.advance(f"round {number + 1} of {rounds}, micro-step {micro + 1} of {count}")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        del own, lm
        gc.collect()
    return [_result(work, ranks, name, state_bytes) for work in works]


def rehearsed_model(
    model: str, plans: Sequence[Plan], device: torch.device, dtype: torch.dtype, attention: str, compiled: bool
) -> tuple[CausalLMWithLoss, ParallelMesh]:
    """The plans' model as a rank of their world holds it, and its groups; in a world that moves nothing.

    Raises:
        HbpError: the plan carries no cost model, or was made for another model.
    """
    cost = plan_cost_model(plans[0])
    if cost is None:
        raise HbpError("the plan carries no cost model to compare with; make one with `hbp plan`")
    mesh = make_mesh(plans[0].info.world_size, [], device.type, cost.model.heads)
    for plan in plans:
        mesh.prepare(np.unique(plan.sp_degree).tolist())
    mesh.prepare([1])  # ranks that a micro-step leaves idle
    lm = drawn_model(
        model, mesh.world, device, by_layer=cost.model.sharded_by_layer, compute_dtype=dtype, attention=attention,
        compiled=compiled,
    )  # fmt: skip
    config, spec = lm.lm.config, cost.model
    found = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    planned, there = spec.parameters(), sum(p.numel() for p in lm.parameters())
    alike = abs(there - planned) <= GUESSED_WITHIN * planned  # a family that is not known is guessed no better
    if found != (spec.n_layers, spec.hidden, spec.vocab) or not alike:
        wanted = _dimensions(spec.n_layers, spec.hidden, spec.vocab, planned)
        raise HbpError(
            f"the plan was made for a model of {wanted}, but {model} has {_dimensions(*found, there)}; give the plan's "
            "model"
        )
    lm.train()
    return lm, mesh


def _dimensions(layers: int, hidden: int, vocab: int, parameters: int) -> str:
    return f"{layers} layers of {hidden}, a vocabulary of {vocab:,} and {parameters:,} parameters"


def _sample(prediction: Prediction, count: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Micro-steps at even distances in order of predicted seconds, from a random start."""
    n = len(prediction.micro_compute_s)
    if count is None or count >= n:
        return np.arange(n)
    order = np.argsort(prediction.micro_compute_s, kind="stable")
    at = (np.arange(count) + np.random.default_rng(seed).random()) * n / count
    return np.sort(order[at.astype(np.int64)])


def _in_turn(works: Sequence[_Measured]) -> Iterator[tuple[_Measured, int]]:
    """The first micro-step of each plan, the second of each, …"""
    for number in range(max(len(work.chosen) for work in works)):
        for work in works:
            if number < len(work.chosen):
                yield work, int(work.chosen[number])


def _run_micro_step(
    work: _Measured,
    micro: int,
    ranks: int | None,
    lm: CausalLMWithLoss,
    mesh: ParallelMesh,
    device: torch.device,
    timed: bool,
) -> None:
    """Every chosen rank of a micro-step, or those with most to compute: its memory, or once that is known its time."""
    row_of = _rows_of_ranks(work, micro)
    for rank in _ranks_to_run(row_of, work.prediction.compute_s, ranks):
        batch = make_micro_batch(work.plan, int(row_of[rank]), work.samples, mesh, rank, device)
        if not timed:
            work.peaks[micro, rank] = run_once(lm, batch, device)
        elif math.isfinite(work.peaks[micro, rank]):
            work.seconds.setdefault((micro, rank), []).append(_seconds(lm, batch, device))


def _rows_of_ranks(work: _Measured, micro: int) -> npt.NDArray[np.int64]:
    """The row of the plan that each rank runs in a micro-step ``[world]``, or IDLE."""
    plan, row_of = work.plan, np.full(work.plan.info.world_size, IDLE)
    for row in np.flatnonzero(work.prediction.micro_of_row == micro).tolist():
        row_of[plan.rank_start[row] : plan.rank_start[row] + plan.sp_degree[row]] = row
    return row_of


def _rows(work: _Measured, state_bytes: int) -> Iterator[RehearsedRank]:
    """What was measured, beside what was predicted."""
    plan, predicted = work.plan, work.prediction
    for micro, rank in work.peaks:
        row = int(_rows_of_ranks(work, micro)[rank])
        at = int(np.flatnonzero(predicted.micro_of_row == micro)[0])
        seconds = work.seconds.get((micro, rank), [math.inf])
        yield RehearsedRank(
            step=int(plan.step[at]),
            micro_step=int(plan.micro_step[at]),
            rank=rank,
            measured_s=min(seconds),
            predicted_s=0.0 if row == IDLE else float(predicted.compute_s[row]),
            communication_s=0.0 if row == IDLE else float(predicted.communication_s[row]),
            peak_bytes=work.peaks[micro, rank] + state_bytes,
            predicted_bytes=predicted.idle_bytes if row == IDLE else float(predicted.bytes[row]),
            halves_s=(min(seconds[::2]), min(seconds[1::2] or seconds)),
        )


def _ranks_to_run(row_of: npt.NDArray[np.int64], compute_s: Float, ranks: int | None) -> list[int]:
    """All ranks; or so many at even distances in order of falling predicted compute, so the first is the slowest."""
    n = len(row_of)
    if ranks is None or ranks >= n:
        return list(range(n))
    busy = np.where(row_of == IDLE, 0.0, compute_s[row_of])
    order = np.argsort(-busy, kind="stable")
    return sorted(order[np.arange(ranks) * n // ranks].tolist())


def run_once(lm: CausalLMWithLoss, batch: MicroBatch, device: torch.device) -> float:
    """Run a micro-batch; its peak bytes over the states, infinite where memory runs out."""
    try:
        return peak_bytes_of(lambda: forward_backward(lm, batch), device)
    except torch.OutOfMemoryError:
        start_over(lm)
        lm.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        hold_gradients(lm)
        return math.inf


def _seconds(lm: CausalLMWithLoss, batch: MicroBatch, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        forward_backward(lm, batch)
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    forward_backward(lm, batch)
    return time.process_time() - start


def _result(work: _Measured, ranks: int | None, device: str, state_bytes: int) -> Rehearsal:
    plan, predicted, rows = work.plan, work.prediction, list(_rows(work, state_bytes))
    key = np.array([(row.step, row.micro_step) for row in rows])
    _, of = np.unique(key, axis=0, return_inverse=True)
    of, n = of.ravel(), len(work.chosen)
    compute = np.array([row.predicted_s for row in rows])
    halves = np.array([row.halves_s for row in rows])
    slowest, measured = slowest_seconds(halves, of, n), halves.mean(axis=1)
    ratio, spread = ratio_estimate(slowest, predicted.micro_compute_s[work.chosen], len(predicted.micro_compute_s))
    simulation = simulate(plan)
    steps, total = plan.n_steps, float(predicted.micro_compute_s.sum())
    on_top = simulation.seconds - total  # communication and the optimizer
    counts = np.bincount(of, minlength=n)
    longest = np.zeros(n)
    np.maximum.at(longest, of, compute)
    seconds = [(total * r + on_top) / steps for r in (ratio, ratio - spread, ratio + spread)]
    return Rehearsal(
        world_size=plan.info.world_size,
        device=device,
        rows=tuple(rows),
        micro_steps=n,
        of_micro_steps=len(predicted.micro_compute_s),
        all_ranks=ranks is None or ranks >= plan.info.world_size,
        step_s=seconds[0],
        step_s_interval=(seconds[1], seconds[2]),
        communication_step_s=on_top / steps,
        predicted_step_s=simulation.seconds / steps,
        idle_share=float(1 - measured.sum() / max(float((slowest * counts).sum()), 1e-300)),
        predicted_idle_share=float(1 - compute.sum() / max(float((longest * counts).sum()), 1e-300)),
        peak_bytes=max(row.peak_bytes for row in rows),
        noise=float(np.median([row.noise for row in rows])),
        memory_budget_bytes=float(plan.info.cluster["memory_bytes"]),
        plan_fingerprint=plan.fingerprint(),
    )


def slowest_seconds(halves: Float, of: npt.NDArray[np.int64], n: int) -> Float:
    """Seconds of the slowest rank of each micro-step, ``[n]``.

    The largest of noisy values is too large, the more so the more there are. So one half of the runs says which rank is
    slowest, and the other how long that takes; both ways round, and their mean.

    Args:
        halves: seconds of each rank in each micro-step, measured twice ``[R, 2]``.
        of: the micro-step of each ``[R]``.
        n: micro-steps.
    """
    slowest = np.empty(n)
    for micro in range(n):
        mine = halves[of == micro]
        first, second = mine.argmax(axis=0)
        slowest[micro] = (mine[first, 1] + mine[second, 0]) / 2
    return slowest


def ratio_estimate(measured: Float, predicted: Float, population: int) -> tuple[float, float]:
    """Measured over predicted of a whole from a sample of its members, and half the width of its interval.

    Args:
        measured: of each member of the sample ``[n]``.
        predicted: of the same.
        population: members of the whole.

    Returns:
        The ratio; and half its interval at 95 %, infinite for a sample of one, 0 where the sample is the whole.
    """
    n, ratio = len(measured), float(measured.sum() / predicted.sum())
    if n >= population:
        return ratio, 0.0
    if n == 1:
        return ratio, math.inf
    residual = float(((measured - ratio * predicted) ** 2).sum()) / (n - 1)
    error = math.sqrt((1 - n / population) * residual / n) / float(predicted.mean())
    return ratio, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error

"""One process trains what a plan gives to many ranks, and grades what was learnt.

A step's gradient does not depend on how many ranks it was computed on: each rank's micro-batches are made as the engine
makes them, with the weights that the loss gives their tokens there (for `token-mean` those of the plan's ranks), and
their gradients are summed. All micro-batches of a step go through the model side by side, as documents that do not see
each other. `tests/benchmarks/test_quality.py` holds this to the engine itself on two processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from quality_tasks import Samples
from torch import Tensor

from hbp.config import TrainConfig
from hbp.parallel.mesh import ParallelMesh, SequenceGroups
from hbp.parallel.ulysses import PackLayout, Sealed
from hbp.parallel.varlen import make_documents
from hbp.plan import Plan
from hbp.train.batch import MicroBatch, make_micro_batch, micro_batch_of
from hbp.train.loop import forward_backward, learning_rate, make_optimizer
from hbp.train.loss import IGNORE, global_batches
from hbp.train.model import CausalLMWithLoss, load_model

CPU = torch.device("cpu")
AT_ONCE = 16384
"""Tokens that go through the model side by side."""
Gradient = Tensor
"""Of all parameters, float32 ``[parameters]``."""


def new_model(config: dict[str, Any], seed: int) -> CausalLMWithLoss:
    """A freshly initialised model of a transformers configuration."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load_model(folder, seed=seed)


def ranks_side_by_side(degrees: Sequence[int]) -> ParallelMesh:
    """A mesh on which one process holds the whole pack of each group, whatever its degree."""
    return ParallelMesh(None, made={degree: SequenceGroups() for degree in {1, *degrees}})  # type: ignore[arg-type]


def together(batches: Sequence[MicroBatch]) -> MicroBatch:
    """Micro-batches of whole packs as one of all their documents."""
    lengths = tuple(length for batch in batches for length in batch.layout.documents.lengths)
    weights = [batch.weights for batch in batches if batch.weights is not None]
    return replace(
        batches[0],
        input_ids=torch.cat([batch.input_ids for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids for batch in batches], 1),
        labels=torch.cat([batch.labels for batch in batches]),
        weights=torch.cat(weights) if weights else None,
        layout=PackLayout(make_documents(lengths, CPU)),
        gc_layers=0,
    )


def batches_of_step(plan: Plan, samples: Samples, loss: str) -> Iterator[list[MicroBatch]]:
    """What all ranks together run in each optimizer step, at most :data:`AT_ONCE` tokens (or one pack) a batch."""
    mesh, batches = ranks_side_by_side(plan.sp_degree.tolist()), global_batches(plan, samples.loss_tokens, loss)
    tokens, bounds = plan.tokens(), np.searchsorted(plan.step, np.arange(plan.n_steps + 1))
    for step, batch in enumerate(batches):
        found, open_, filled = list[MicroBatch](), list[MicroBatch](), 0
        for row in range(bounds[step], bounds[step + 1]):
            if open_ and filled + tokens[row] > AT_ONCE:
                found.append(together(open_))
                open_, filled = [], 0
            first = int(plan.rank_start[row])
            open_.append(make_micro_batch(plan, row, samples, mesh, first, CPU, batch))
            filled += int(tokens[row])
        yield [*found, together(open_)]


@dataclass
class Trace:
    """What training left, step by step."""

    tokens: list[int] = field(default_factory=list)
    """Seen after each step."""
    loss_tokens: list[int] = field(default_factory=list)
    """Of each step."""
    loss: list[float] = field(default_factory=list)
    """Mean cross entropy of the step's loss tokens, whatever was learnt from."""
    norm: list[float] = field(default_factory=list)
    """Of the gradient, before clipping."""


def train(
    model: CausalLMWithLoss,
    plan: Plan,
    samples: Samples,
    config: TrainConfig,
    *,
    rate_by: str = "tokens",
    after: Callable[[int, Trace], None] = lambda step, trace: None,
) -> Trace:
    """Train a plan; `after` is called after each step with its number, from 0.

    Args:
        model: trained in place.
        plan: of any number of ranks.
        samples: by the plan's sample ids.
        config: loss, rate, clipping and decay.
        rate_by: what the schedule follows, ``tokens`` or ``steps``.
        after: sees the model between steps.
    """
    optimizer, trace, step_tokens = make_optimizer(model, config), Trace(), np.bincount(plan.step, plan.tokens())
    done, total = 0, int(step_tokens.sum())
    for step, batches in enumerate(batches_of_step(plan, samples, config.loss)):
        tokens = int(step_tokens[step])
        place = (step, 1, plan.n_steps) if rate_by == "steps" else (done, tokens, total)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, *place)
        summed, loss_tokens = 0.0, 0
        for batch in batches:
            summed += _plain_loss(model, batch)
            loss_tokens += int((batch.labels != IGNORE).sum())
        trace.norm.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += tokens
        trace.tokens.append(done)
        trace.loss_tokens.append(loss_tokens)
        trace.loss.append(summed / max(loss_tokens, 1))
        after(step, trace)
    return trace


def _plain_loss(model: CausalLMWithLoss, batch: MicroBatch) -> float:
    """Gradients of the batch's weighted loss in the parameters; returns its summed cross entropy without weights."""
    seen: list[Tensor] = []
    last = model.lm.get_decoder().norm
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    forward_backward(model, batch)
    hook.remove()
    with torch.no_grad():
        counted = batch.labels != IGNORE
        logits = seen[0][0][counted] @ model.lm.get_output_embeddings().weight.T
        return float(torch.nn.functional.cross_entropy(logits.float(), batch.labels[counted], reduction="sum"))


def gradient(model: CausalLMWithLoss, batches: Sequence[MicroBatch]) -> Gradient:
    """Of a step's loss, at the model as it is."""
    for batch in batches:
        forward_backward(model, batch)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return flat


@dataclass(frozen=True)
class Grade:
    """How well a model does on some samples."""

    loss: float
    """Mean cross entropy over answer tokens."""
    accuracy: float
    """Share of answer tokens that are the most likely one, each after the right answers before it."""
    samples_right: float
    """Share of samples with every answer token right."""


def grade(model: CausalLMWithLoss, samples: Samples) -> dict[str, Grade]:
    """Of each kind of sample."""
    losses, right = np.zeros(len(samples.documents)), np.zeros(len(samples.documents))
    mesh, open_, filled = ranks_side_by_side([1]), list[int](), 0
    for i, length in enumerate([*samples.lengths.tolist(), AT_ONCE + 1]):
        if open_ and filled + length > AT_ONCE:
            losses[open_], right[open_] = _grade_pack(model, samples.take(np.array(open_)), mesh)
            open_, filled = [], 0
        open_.append(i)
        filled += length
    counts, kinds = samples.loss_tokens, np.array(samples.kind)
    grades = {}
    for kind in dict.fromkeys(samples.kind):
        here = kinds == kind
        total = counts[here].sum()
        grades[kind] = Grade(
            float(losses[here].sum() / total),
            float(right[here].sum() / total),
            float((right[here] == counts[here]).mean()),
        )
    return grades


def _grade_pack(
    model: CausalLMWithLoss, samples: Samples, mesh: ParallelMesh
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Summed cross entropy of each sample's answer tokens, and how many of them are the most likely ones."""
    batch = micro_batch_of(samples.documents, 0, 1, 0, 0, mesh, CPU)
    document = np.repeat(np.arange(len(samples.documents)), samples.lengths)
    with torch.no_grad():
        counted = (batch.labels != IGNORE).nonzero()[:, 0]
        hidden = model.lm.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, hbp_layout=Sealed(batch.layout)
        ).last_hidden_state[0, counted]
        logits, labels = (hidden @ model.lm.get_output_embeddings().weight.T).float(), batch.labels[counted]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double().numpy()
        right = (logits.argmax(1) == labels).numpy()
    of, n = document[counted.numpy()], len(samples.documents)
    return np.bincount(of, losses, n), np.bincount(of, right, n)


def mean_of(grades: dict[str, Grade], kinds: Sequence[str], what: str) -> float:
    """Mean of a figure over kinds of samples, each kind alike."""
    return float(np.mean([getattr(grades[kind], what) for kind in kinds if kind in grades]))

"""One run of `quality.py`: samples, base model, plan, training, grades; and gradients at a model that stands still."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from quality_plans import (
    DEFAULT_ORDER,
    Setting,
    cost_model,
    plan_setting,
    seconds_of_steps,
    settings,
    what_it_is,
)
from quality_tasks import LONG, SHORT, VOCAB, Mix, Samples, load, make_mix, make_stdlib, save
from quality_train import Grade, Trace, batches_of_step, grade, gradient, mean_of, new_model, train

from hbp.config import TrainConfig
from hbp.train.launch import device_name
from hbp.train.model import CausalLMWithLoss

Row = dict[str, Any]
HELD_OUT = 1_000_000
"""Added to a seed for samples that nothing is trained on."""
GRADED = 5
"""Times that a model is graded on a few samples on its way."""


@dataclass(frozen=True)
class Form:
    """What a set of runs have in common: the model, the samples and the recipe."""

    set: str
    """``mix`` or ``stdlib``."""
    model: tuple[tuple[str, Any], ...]
    """Of its transformers configuration."""
    train: Mix
    held_out: Mix
    on_the_way: Mix
    """Held-out samples that the curves are drawn from."""
    batch: int
    """Tokens of an optimizer step."""
    rate: float
    """Peak learning rate."""
    base: Mix | None = None
    """What the base model has learnt, a sample a micro-batch; None: training starts from nothing."""
    base_rate: float = 2e-3
    half: bool = True
    """Compute in bfloat16, as such runs do."""

    @property
    def digest(self) -> str:
        """Of all that the results depend on besides setting and seed."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def precision(self) -> AbstractContextManager[Any]:
        """In which the model computes. Without autocast's cache, which would keep weights from before a step."""
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if self.half else nullcontext()


def llama(hidden: int, layers: int, heads: int, vocab: int) -> tuple[tuple[str, Any], ...]:
    """A small Llama's configuration."""
    return tuple(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": hidden * 7 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": vocab,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }.items()
    )


STDLIB_VOCAB = 512
FORMS = {
    "mix": Form(
        "mix",
        llama(192, 3, 6, VOCAB),
        train=Mix(3300, 110),
        held_out=Mix(400, 60),
        on_the_way=Mix(80, 9),
        batch=8192,
        rate=1e-3,
        base=Mix(10_000, 200, (16, 64), (64, 512), ("copy", "recall"), ("needle", "several")),
    ),
    "stdlib": Form(
        "stdlib",
        llama(192, 3, 6, STDLIB_VOCAB),
        train=Mix(700, 36),
        held_out=Mix(100, 6),
        on_the_way=Mix(20, 2),
        batch=8192,
        rate=2e-3,
    ),
}
QUICK = {
    "mix": Form(
        "mix",
        llama(32, 2, 2, VOCAB),
        train=Mix(320, 12, long_lengths=(256, 1024)),
        held_out=Mix(40, 6, long_lengths=(256, 1024)),
        on_the_way=Mix(16, 3, long_lengths=(256, 1024)),
        batch=2048,
        rate=3e-3,
        half=False,
    )
}


def save_whole(what: Any, file: Path) -> None:
    """As torch saves it, but whole or not at all: another run may want the file at the same time."""
    beside = file.with_suffix(f".{os.getpid()}")
    torch.save(what, beside)
    beside.replace(file)


def prepared(form: Form, folder: Path) -> Path | None:
    """The file that all runs of a form begin with, of :func:`prepare`; None where they need none."""
    if form.set == "stdlib":
        return folder / f"stdlib-{form.digest}.npz"
    return folder / f"base-{form.digest}.pt" if form.base else None


def prepare(form: Form, folder: Path) -> None:
    """Make the base model, or the text's tokens, once."""
    file = prepared(form, folder)
    if file is None or file.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if form.base is None:
        count = form.train.short + form.held_out.short, form.train.long + form.held_out.long
        with TemporaryDirectory() as scratch:
            save(make_stdlib(Path(scratch), *count, longest=4096, vocab=STDLIB_VOCAB), file)
        return
    model, samples = new_model(dict(form.model), seed=0), make_mix(form.base, 2 * HELD_OUT)
    plan = plan_setting(Setting("", "concat"), samples.lengths, form.batch // 2, 0, cost_model())
    with form.precision():
        train(model, plan, samples, recipe(form, "ave-token").model_copy(update={"lr": form.base_rate}))
    save_whole(model.state_dict(), file)


@cache
def stdlib(form: Form, folder: Path) -> Samples:
    """All samples of the set."""
    prepare(form, folder)
    file = prepared(form, folder)
    assert file is not None
    return load(file)


def samples_of(form: Form, seed: int, folder: Path, mix: Mix | None = None) -> Samples:
    """The training samples of a seed; with `mix` held-out ones of that mix, the same for all seeds."""
    if form.set == "mix":
        return make_mix(form.train, seed) if mix is None else make_mix(mix, HELD_OUT)
    every = stdlib(form, folder)
    kinds = np.array(every.kind)
    functions, modules = (np.flatnonzero(kinds == kind) for kind in ("function", "module"))
    cut = [len(ids) * 6 // 7 for ids in (functions, modules)]
    if mix is None:
        own = np.concatenate([functions[: cut[0]], modules[: cut[1]]])
        return every.take(np.random.default_rng(seed).permutation(own))
    return every.take(np.concatenate([functions[cut[0] :][: mix.short], modules[cut[1] :][: mix.long]]))


def kinds_of(form: Form) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the short kinds of samples, and of the long ones."""
    return (tuple(SHORT), tuple(LONG)) if form.set == "mix" else (("function",), ("module",))


def recipe(form: Form, loss: str) -> TrainConfig:
    """The library's defaults but for the rate: such models need a higher one."""
    return TrainConfig(loss=loss, lr=form.rate, warmup=0.1)


def base_model(form: Form, folder: Path) -> CausalLMWithLoss:
    """Where every run of a form starts: a model that has learnt the simplest tasks in short, or a fresh one."""
    model = new_model(dict(form.model), seed=0)
    if form.base is not None:
        prepare(form, folder)
        model.load_state_dict(torch.load(folder / f"base-{form.digest}.pt"))
    return model


def share_of(form: Form, setting: Setting, samples: Samples, seed: int) -> Samples:
    """The samples that a setting may use: all, or as many as another's predicted seconds allow, of each kind alike."""
    if setting.seconds_of is None:
        return samples
    whole = dataclasses.replace(setting, seconds_of=None)
    other = next(s for s in settings() if s.name == setting.seconds_of)
    cost = cost_model()
    mine, theirs = (
        float(seconds_of_steps(plan_setting(s, samples.lengths, form.batch, seed, cost), cost).sum())
        for s in (whole, other)
    )
    share = min(1.0, theirs / mine)
    kinds, rng, taken = np.array(samples.kind), np.random.default_rng(seed), []
    for kind in dict.fromkeys(samples.kind):
        ids = rng.permutation(np.flatnonzero(kinds == kind))
        taken.append(ids[: max(1, round(share * len(ids)))])
    return samples.take(rng.permutation(np.concatenate(taken)))


def run(form: Form, setting: Setting, seed: int, folder: Path) -> Row:
    """Train one setting from the base model on a seed's samples and plan, and grade it."""
    began, cost = time.process_time(), cost_model()
    samples = share_of(form, setting, samples_of(form, seed, folder), seed)
    plan = plan_setting(setting, samples.lengths, form.batch, seed, cost)
    seconds = np.cumsum(seconds_of_steps(plan, cost))
    model, few, curve = base_model(form, folder), samples_of(form, seed, folder, form.on_the_way), list[Row]()
    marks = set(np.linspace(0, plan.n_steps, GRADED + 1).round().astype(int).tolist()[1:-1])
    short, long = kinds_of(form)

    def figures(grades: dict[str, Grade]) -> Row:
        return {
            f"{size}_{what}": round(mean_of(grades, kinds, what), 5)
            for size, kinds in (("short", short), ("long", long))
            for what in ("accuracy", "loss")
        }

    def after(step: int, trace: Trace) -> None:
        if step + 1 in marks:
            place = {"step": step + 1, "tokens": trace.tokens[-1], "seconds": round(float(seconds[step]), 3)}
            curve.append(place | figures(grade(model, few)))

    with form.precision():
        curve.append({"step": 0, "tokens": 0, "seconds": 0.0} | figures(grade(model, few)))
        trace = train(model, plan, samples, recipe(form, setting.loss), rate_by=setting.rate_by, after=after)
        held_out = samples_of(form, seed, folder, form.held_out)
        grades = grade(model, held_out)
        end = {"step": plan.n_steps, "tokens": trace.tokens[-1], "seconds": round(float(seconds[-1]), 3)}
        curve.append(end | figures(grade(model, few)))
    norms = np.array(trace.norm)
    return {
        "set": form.set,
        "setting": setting.name,
        "seed": seed,
        "form": form.digest,
        "question": setting.question,
        "order": setting.order or DEFAULT_ORDER if setting.strategy == "hbp-mixed" else None,
        "loss": setting.loss,
        "strategy": setting.strategy,
        "steps": plan.n_steps,
        "tokens": int(plan.info.n_tokens),
        "seconds": round(float(seconds[-1]), 3),
        **figures(grades),
        "tasks": {kind: {k: round(v, 5) for k, v in dataclasses.asdict(g).items()} for kind, g in grades.items()},
        "gradient_norms": {
            "median": float(np.median(norms)),
            "p90": float(np.quantile(norms, 0.9)),
            "largest": float(norms.max()),
            "clipped": float((norms > recipe(form, setting.loss).max_grad_norm).mean()),
        },
        "plan": {**what_it_is(plan), **spread(trace.loss_tokens)},
        "curve": curve,
        "trace": {
            "norm": [float(f"{x:.4g}") for x in trace.norm],
            "loss": [round(x, 4) for x in trace.loss],
            "loss_tokens": trace.loss_tokens,
            "tokens": trace.tokens,
        },
        "processor_s": round(time.process_time() - began, 1),
        "date": datetime.date.today().isoformat(),
        "device": device_name(torch.device("cpu")),
    }


def spread(loss_tokens: Sequence[int]) -> Row:
    """How unlike steps are in loss tokens."""
    n = np.maximum(np.array(loss_tokens, float), 1)
    return {
        "loss_tokens_least": int(n.min()),
        "loss_tokens_median": float(np.median(n)),
        "loss_tokens_most": int(n.max()),
        "noise_factor": float(n.mean() * (1 / n).mean()),
    }


def gradients(form: Form, setting: Setting, seed: int, folder: Path, every: int = 1) -> Row:
    """Gradients of a setting's steps at the base model, held against that of the whole set.

    Args:
        form: of the runs.
        setting: whose plan's steps are looked at.
        seed: of samples and plan.
        folder: of the base model.
        every: how many steps apart those are that are looked at.
    """
    began, cost = time.process_time(), cost_model()
    samples = samples_of(form, seed, folder)
    plan = plan_setting(setting, samples.lengths, form.batch, seed, cost)
    model = base_model(form, folder)
    counts = np.bincount(np.repeat(plan.step, np.diff(plan.sample_offsets)), samples.loss_tokens[plan.sample_ids])
    found, kept = [], []
    with form.precision():
        whole = whole_gradient(form, samples, seed, folder)
        for step, batches in enumerate(batches_of_step(plan, samples, "ave-token")):
            if step % every == 0:
                found.append(gradient(model, batches))
                kept.append(step)
    return {
        "set": form.set,
        "setting": setting.name,
        "seed": seed,
        "form": form.digest,
        "steps": plan.n_steps,
        "looked_at": len(kept),
        **against_whole(torch.stack(found), counts[kept], float(counts.mean()), whole),
        "processor_s": round(time.process_time() - began, 1),
    }


def whole_gradient(form: Form, samples: Samples, seed: int, folder: Path) -> torch.Tensor:
    """Of the mean cross entropy over all loss tokens of a seed's samples, at the base model; kept in the folder."""
    file = folder / f"gradient-{form.digest}-{seed}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        plan = plan_setting(Setting("", "concat"), samples.lengths, form.batch, seed, cost_model())
        model, total = base_model(form, folder), torch.zeros(())
        for batches in batches_of_step(plan, samples, "run-token"):
            total = total + gradient(model, batches) / plan.n_steps
        save_whole(total, file)
    return torch.load(file)


def against_whole(steps: torch.Tensor, loss_tokens: np.ndarray, mean_loss_tokens: float, whole: torch.Tensor) -> Row:
    """Cosine of each step's gradient with the whole set's, and the noise of steps under two losses.

    Args:
        steps: gradients of the mean over each step's loss tokens ``[S, parameters]``.
        loss_tokens: of each step ``[S]``.
        mean_loss_tokens: of a step of the plan.
        whole: gradient of the mean over all loss tokens ``[parameters]``.

    Returns:
        ``cosine``: mean, and least; ``noise``: mean squared distance of a step's gradient from the whole set's, over
        the latter's square, where each step counts the same (`ave-token`) and where each token does (`run-token`).
    """
    cosines = torch.nn.functional.cosine_similarity(steps, whole[None]).numpy()
    weight = torch.tensor(loss_tokens / mean_loss_tokens, dtype=steps.dtype)[:, None]

    def noise(scaled: torch.Tensor) -> float:
        return float(((scaled - whole) ** 2).sum(1).mean() / (whole**2).sum())

    return {
        "cosine": float(cosines.mean()),
        "cosine_least": float(cosines.min()),
        "cosine_by_tokens": float((cosines * loss_tokens).sum() / loss_tokens.sum()),
        "noise_ave_token": noise(steps),
        "noise_run_token": noise(steps * weight),
        "cosines": [round(float(c), 4) for c in cosines],
    }


def kept_rows(file: Path) -> list[Row]:
    """Results in a file, one a line; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.is_file() else []

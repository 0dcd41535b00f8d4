"""Every supported combination trains as `hbp train`'s own engine does: same losses, norms, rates and weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from integrations.following import LLAMA, Case, run_cases
from workers import run_ranks, write_model

pytest.importorskip("accelerate")
trl = pytest.importorskip("trl")
pytest.importorskip("peft")

LOSS, NORM, WEIGHTS, ROUNDING = 1e-6, 2e-5, 2e-5, 1.5
"""Largest difference of an epoch's losses and of norms (relative) and of weights, which training moves by 1e-2. In
bfloat16: how much farther from the engine in float32 than the plain model in bfloat16 is, each document alone."""

TWO = {
    "ddp": Case(),
    "ddp, sample-mean": Case(loss="sample-mean"),
    "ddp, run-token": Case(loss="run-token"),
    "ddp, lora": Case(lora=True),
    "ddp, bfloat16": Case(bf16=True),
    "ddp, by tokens": Case(lr_by="tokens"),
    "ddp, a plan an epoch": Case(epochs=3, plans=2, lr_by="tokens"),
    "plugin": Case(wrapping="plugin"),
    "plugin, token-mean": Case(wrapping="plugin", loss="token-mean"),
    "plugin, lora": Case(wrapping="plugin", lora=True),
    "plugin, bfloat16": Case(wrapping="plugin", bf16=True),
    "config": Case(wrapping="config"),
    "config, lora": Case(wrapping="config", lora=True),
    "sft, ddp": Case("sft"),
    "sft, plugin, sum": Case("sft", "plugin", loss="sum"),
    "sft, config": Case("sft", "config"),
    "sft, ddp, lora": Case("sft", lora=True),
}
FOUR = {
    "ddp": Case(),
    "plugin, by tokens": Case(wrapping="plugin", lr_by="tokens"),
    "config, sample-mean": Case(wrapping="config", loss="sample-mean"),
    "sft, ddp, lora": Case("sft", lora=True),
    "sft, plugin": Case("sft", "plugin"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Any]:
    root = tmp_path_factory.mktemp("trainers")
    folder = write_model(root / "model", LLAMA)
    found = {}
    for world, cases in ((2, TWO), (4, FOUR)):
        ranks = run_ranks(run_cases, world, folder, str(root / str(world)), cases)
        found |= {(world, name): [each[name] for each in ranks] for name in cases}
    return found


def of_losses(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.subtract(a["losses"], b["losses"])))


def of_first_norm(a: Any, b: Any) -> float:
    """Later ones are those of other weights."""
    return abs(a["norms"][0] - b["norms"][0])


def of_weights(a: Any, b: Any) -> float:
    return sum(float((a["weights"][n] - x).square().sum()) for n, x in b["weights"].items()) ** 0.5


@pytest.mark.parametrize(("world", "name"), [(2, name) for name in TWO] + [(4, name) for name in FOUR])
def test_a_trainer_trains_as_the_engine(runs: Any, world: int, name: str) -> None:
    case = (TWO if world == 2 else FOUR)[name]
    for rank in runs[world, name]:
        got, want = rank["got"], rank["want"]
        if case.bf16:
            for distance in (of_losses, of_first_norm, of_weights):
                assert 0 < distance(got, want) <= ROUNDING * distance(rank["unpacked"], want), distance.__name__
        else:
            assert got["losses"] == pytest.approx(want["losses"], rel=LOSS * case.epochs)
            assert got["norms"] == pytest.approx(want["norms"], rel=NORM)
        assert got["rates"] == pytest.approx(want["rates"], rel=1e-6)
        trained = [n for n in want["weights"] if not case.lora or "lora_" in n]
        assert len(trained) == len([n for n in got["weights"] if not case.lora or "lora_" in n])
        moved = max(float((want["weights"][n] - want["first"][n]).abs().max()) for n in trained)
        assert moved > 1e-2
        if not case.bf16:
            apart = max(float((got["weights"][n] - want["weights"][n]).abs().max()) for n in trained)
            assert apart < WEIGHTS

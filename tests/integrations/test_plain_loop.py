"""The example of a loop of one's own, started as its docstring says, trains as `hbp train`'s engine does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integrations.following import LLAMA, SAMPLES, plan
from workers import CPU, run_ranks, write_model

from hbp.config import TrainConfig
from hbp.data.record import Encoded
from hbp.data.store import write_store
from hbp.parallel.mesh import make_mesh
from hbp.train.loop import Learner, train
from hbp.train.model import load_sharded

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def by_our_engine(rank: int, world: int, folder: str) -> tuple[list[float], list[float]]:
    mesh = make_mesh(world, [], "cpu", LLAMA["num_attention_heads"])
    model = load_sharded(folder, mesh.world, CPU)
    config = TrainConfig(lr=1e-3, warmup=0, final_lr=1.0, decay_all=True)
    records = train(Learner.of(model, mesh, config, CPU), plan(world), SAMPLES)
    return [record.loss for record in records], [record.grad_norm for record in records]


def test_the_example_trains_as_the_engine(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    plan(2).save(tmp_path / "plan")
    encoded = [Encoded(ids, mask) for ids, mask in SAMPLES.documents]
    write_store(tmp_path / "store", encoded, fingerprint="", tokenizer="", vocab_size=LLAMA["vocab_size"])
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE), "plan", "store", "model", "out"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    shown = np.array(re.findall(r"^step \d+ loss (\S+) norm (\S+)$", run.stdout, re.MULTILINE), float)
    losses, norms = run_ranks(by_our_engine, 2, folder)[0]
    assert shown[:, 0].tolist() == pytest.approx(losses, rel=1e-6)
    assert shown[:, 1].tolist() == pytest.approx(norms, rel=1e-5)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_loop_is_short() -> None:
    text = EXAMPLE.read_text()
    loop = text[text.index("    optimizer = ") : text.index("    weights = ")]
    assert len(loop.splitlines()) < 40

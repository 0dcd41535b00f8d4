"""`accelerate launch` starts a script that follows a plan; the losses are those of the same steps on one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integrations.following import SAMPLES, Case, arguments, forget_accelerate, plan, rows_of_samples
from plans import Row, plan_of
from workers import LLAMA, write_model

pytest.importorskip("accelerate")

SCRIPT = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, TrainingArguments
from hbp.integrations.transformers import HBPTrainer

model, plan, rows, options, out = map(Path, sys.argv[1:])
trainer = HBPTrainer(
    AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
    TrainingArguments(**json.loads(options.read_text())),
    plan=plan,
    train_dataset=json.loads(rows.read_text()),
)
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    out.write_text(json.dumps({"losses": losses, "processes": trainer.args.world_size}))
"""


def losses_on_one_process(folder: str, out: str) -> list[float]:
    """The same samples in the same steps, packed otherwise."""
    from transformers import AutoModelForCausalLM

    from hbp.integrations.transformers import HBPTrainer

    two = plan(2)
    step_of_sample = np.repeat(two.step, np.diff(two.sample_offsets))
    rows: list[Row] = [(s, 0, 0, 1, 0, two.sample_ids[step_of_sample == s].tolist()) for s in range(two.n_steps)]
    one = plan_of(rows, SAMPLES.lengths, 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    trainer = HBPTrainer(
        model, arguments(Case(options={"ddp_backend": None}), out), plan=one, train_dataset=rows_of_samples()
    )
    trainer.train()
    forget_accelerate()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accelerate_launch(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", LLAMA)
    plan(2).save(tmp_path / "plan")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "rows.json").write_text(json.dumps(rows_of_samples()))
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "ddp_backend": "gloo", "learning_rate": 1e-2}
    options |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.95, "logging_steps": 1}
    options |= {"num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    (tmp_path / "options.json").write_text(json.dumps(options))
    given = [str(tmp_path / name) for name in ("script.py", "model", "plan", "rows.json", "options.json", "found.json")]
    # "multi_gpu" is what has it start processes by torchrun; the script says that they are on CPUs
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *launch, *given], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["processes"] == 2
    assert found["losses"] == pytest.approx(losses_on_one_process(folder, str(tmp_path / "one")), rel=1e-5)

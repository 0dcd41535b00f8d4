"""A step that runs out of memory: plans count on less, what is left is planned again, each sample once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from jobs import config_of, hbp_here, run_here, steps_of, write_job
from torch.multiprocessing.spawn import ProcessRaisedException
from workers import run_ranks

from hbp.config import Config
from hbp.errors import OutOfMemory, RankFailed, Stopped, report_to_parent
from hbp.plan import read_plan
from hbp.run.audit import audit_run
from hbp.run.steps.less_memory import LOWERED, MEMORY, count_on_less, ran_out, read_less
from hbp.simulator import plan_cost_model
from hbp.train import launch, loop

HOLDS = 1.33e6
"""Bytes that the device of these tests can keep for a backward pass: less than the fullest pack wants to."""


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_job(tmp_path_factory.mktemp("memory"), samples=70, train={"export": False, "save_steps": 1})


def on_a_device(rank: int, world: int, config: Config, holds_bytes: float) -> Any:
    """:func:`run_here` where a step may keep only so many bytes for its backward pass, as a GPU of that size would."""
    plain = loop.forward_backward  # trials of memory have their own

    def forward_backward(model: Any, batch: Any, scale: float = 1.0) -> Any:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            if sum(kept.values()) > holds_bytes:
                raise torch.OutOfMemoryError(f"tried to keep {sum(kept.values())} bytes")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return plain(model, batch, scale)

    with mock.patch.object(loop, "forward_backward", forward_backward):
        return run_here(rank, world, config)


def test_what_is_left_is_planned_for_less_and_every_sample_is_trained_on_once(job: Path) -> None:
    """Two ranks, started again as their launcher does until it fits."""
    run, times, said = job / "replanned", 0, ""
    config = config_of(job, f"run_dir={run}")
    while "evaluation after" not in said:
        try:
            ((_, said), _) = run_ranks(on_a_device, 2, config, HOLDS)
        except ProcessRaisedException as ended:
            assert "hbp.errors.OutOfMemory: rank " in str(ended)
            assert "what is left is planned again for 0.00" in str(ended)
            times += 1
        assert times <= launch.REPLANS
    parts = [run / "hbp", *sorted(run.glob("hbp/part-*"))]
    done = [len(steps_of(part)) for part in parts]
    assert times > 0 and len(parts) == times + 1 and all(done)
    plans = [read_plan(part / "plan") for part in parts]
    assert done[0] < plans[0].n_steps
    budgets = [cost.cluster.memory_bytes for plan in plans if (cost := plan_cost_model(plan))]
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) == times + 1
    assert plans[-1].gc_layers.max() > plans[0].gc_layers.max() or plans[-1].sp_degree.max() > plans[0].sp_degree.max()
    assert "plans count on 0.00" in said and "are planned again, each once" in said
    assert [(epoch.holds, epoch.under_way, epoch.twice) for epoch in audit_run(run)] == [(True, False, 0)]
    assert json.loads(hbp_here("audit", str(run), "--json").stdout)["holds"]


def test_it_may_end_the_run_instead(job: Path) -> None:
    run = job / "ends"
    with pytest.raises(ProcessRaisedException, match=r"RankFailed: rank \d failed in step") as ended:
        run_ranks(on_a_device, 2, config_of(job, f"run_dir={run}", "train.on_oom=stop"), HOLDS)
    assert "planned again" not in str(ended.value)
    assert not (run / "hbp" / MEMORY).exists()


def test_what_says_that_there_is_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as allocator:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (
        allocator.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ):
        assert ran_out(error)
    for error in (None, RuntimeError("Connection closed by peer"), ValueError("out of memory")):
        assert not ran_out(error)


def test_less_is_a_tenth_of_what_was_taken_until_another_budget_is_configured(job: Path, tmp_path: Path) -> None:
    config = config_of(job, "cluster.memory_gib=2")
    assert read_less(tmp_path, config) is None
    for peak, most in ((0.0, 2e9), (1.5e9, 1.5e9), (3e9, 2e9)):
        assert count_on_less(tmp_path, config, 2e9, peak, "why").budget_bytes == LOWERED * most
    assert read_less(tmp_path, config) is not None
    assert read_less(tmp_path, config_of(job, "cluster.memory_gib=1.9")) is None


def starting(*ends: Exception | None) -> tuple[list[str], Any]:
    """A launch whose ranks report these one after another, and the folders that it was given."""
    folders: list[str] = []

    def launch(folder: str) -> None:
        folders.append(folder)
        if (end := ends[len(folders) - 1]) is not None:
            report_to_parent(end)

    return folders, launch


def test_the_launcher_starts_the_ranks_again_but_not_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    full = OutOfMemory("rank 1 failed in step 3")
    folders, launch_ranks = starting(full, full, None)
    launch.again_with_less_memory(launch_ranks)
    assert len(folders) == len(set(folders)) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"hbp: rank 1 failed in step 3; starting the ranks again ({n} of 3 times in this job)" for n in (1, 2)
    ]
    folders, launch_ranks = starting(*[full] * 9)
    with pytest.raises(RankFailed, match=r"tried 3 times in this job: lower cluster\.memory_gib"):
        launch.again_with_less_memory(launch_ranks)
    assert len(folders) == 1 + launch.REPLANS
    folders, launch_ranks = starting(full, Stopped("SIGTERM: stopped after step 5"))
    with pytest.raises(Stopped):
        launch.again_with_less_memory(launch_ranks)
    folders, launch_ranks = starting(RankFailed("something else"))
    with pytest.raises(RankFailed, match="something else"):
        launch.again_with_less_memory(launch_ranks)
    assert len(folders) == 1

"""Tasks of srun as ranks: the variables that Slurm documents for a job step, told as torch's."""

from __future__ import annotations

import pytest

from hbp.errors import HbpError
from hbp.run.start.slurm import FIRST_PORT, first_node, understand_srun

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}


def test_a_task_of_several_is_a_rank() -> None:
    environment = dict(STEP)
    assert understand_srun(environment)
    told = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    port = str(FIRST_PORT + (123456 + 2) % 10_000)  # the same for all tasks, another for another job
    assert told == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu007", "MASTER_PORT": port
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "16", "SLURM_PROCID": "0"},  # a batch script, outside of srun
        {"SLURM_STEP_NUM_TASKS": "1"},  # one task a job: it starts its own processes
        {"RANK": "0", "WORLD_SIZE": "4"},  # torchrun under srun
    ],
)
def test_what_is_no_task_of_several(changes: dict[str, str | None]) -> None:
    environment = {name: value for name, value in {**STEP, **changes}.items() if value is not None}
    before = dict(environment)
    assert not understand_srun(environment)
    assert environment == before


def test_a_task_that_cannot_tell_which_it_is() -> None:
    environment = {name: value for name, value in STEP.items() if name != "SLURM_PROCID"}
    with pytest.raises(HbpError, match="srun started 16 tasks but SLURM_PROCID is not set"):
        understand_srun(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu007", "gpu007"),
        ("gpu[007-012,20]", "gpu007"),
        ("gpu[7,9-10],login1", "gpu7"),
        ("a1,b[2-3]", "a1"),
        ("rack-2-node[15-18].cluster", "rack-2-node15.cluster"),
    ],
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_no_list_of_nodes() -> None:
    with pytest.raises(HbpError, match="is no list of hosts; set MASTER_ADDR"):
        first_node("[1-2]")

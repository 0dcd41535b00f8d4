"""Ranks that ``srun`` starts without torchrun: Slurm's variables told as torch's.

``srun`` starts every task as a process of its own and numbers it; taken for a run alone, each would start ranks of its
own in one folder. In a batch script itself, outside of ``srun``, the step's variables are absent and nothing changes.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from hbp.errors import HbpError

FIRST_PORT, PORTS = 20_000, 10_000
NEEDED = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")


def understand_srun(environment: MutableMapping[str, str]) -> bool:
    """Set torch's variables where this process is one of several tasks of a job step.

    Args:
        environment: of the process; changed in place.

    Returns:
        Whether it is.

    Raises:
        HbpError: it is, and Slurm does not say which one; or one of torch's variables says something else.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if not tasks.isdecimal() or int(tasks) < 2 or "RANK" in environment:
        return False
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise HbpError(
            f"srun started {tasks} tasks but {missing[0]} is not set, so this one cannot tell which it is; start one "
            "task a node with torchrun, or one task in all"
        )
    job, step = environment["SLURM_JOB_ID"], environment.get("SLURM_STEP_ID", "0")
    number = sum(int(x) for x in (job, step) if x.isdecimal())
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + number % PORTS))
    return True


def first_node(nodes: str) -> str:
    """The first host of Slurm's list, such as ``gpu[007-012,20],login`` → ``gpu007``.

    Raises:
        HbpError: not such a list.
    """
    found = re.match(r"([^\[\],]+)(?:\[(\d+)[^\]]*\]([^\[\],]*))?(?:,|$)", nodes)
    if not found:
        raise HbpError(f"SLURM_STEP_NODELIST {nodes!r} is no list of hosts; set MASTER_ADDR to the first of them")
    return "".join(part or "" for part in found.groups())

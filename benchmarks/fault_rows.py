"""What `faults.py` finds of each run, the file that keeps it, and sums by mode; without torch, for `doc_tables.py`."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODES = ("full", "lora", "elastic", "slow-disk", "full-disk", "torn-files", "read-errors")


@dataclass
class Row:
    """What became of one run."""

    mode: str
    number: int
    seed: int
    world: str
    """Ranks."""
    kills: int = 0
    attempts: int = 0
    by: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    """In which the kills were meant to come."""
    codes: Counter[str] = field(default_factory=Counter)
    """That the ranks of an attempt ended with."""
    injected: int = 0
    hangs: int = 0
    slowest_end_s: float = 0.0
    seconds: float = 0.0
    bad: list[str] = field(default_factory=list)


class Kept:
    """The rows of a file that several of these may add to; without a file, of this process alone."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.own = path, list[dict[str, Any]]()

    def rows(self) -> list[dict[str, Any]]:
        """All that there are."""
        if self.path is None:
            return list(self.own)
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"]
        return rows

    def add(self, row: Row) -> None:
        """One more."""
        self.own.append({**vars(row), **{name: dict(vars(row)[name]) for name in ("by", "phases", "codes")}})
        if self.path is None:
            return
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [*self.rows(), self.own[-1]]
            rows.sort(key=lambda r: (MODES.index(r["mode"]), r["seed"], r["number"]))
            lines = ",\n".join(json.dumps(r) for r in rows)
            head = json.dumps({**about(), "command": "python benchmarks/faults.py"})
            partial = self.path.with_suffix(".partial")
            partial.write_text(f'{head[:-1]}, "rows": [\n{lines}\n]}}\n')
            partial.replace(self.path)


def about() -> dict[str, str]:
    """Of the machine and the day."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = f"{os.cpu_count()} cores of {models[0].split(':')[1].strip()}" if models else f"{os.cpu_count()} cores"
    return {"date": datetime.date.today().isoformat(), "device": device, "torch": version("torch")}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each mode."""
    of_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in MODES}
    numbers = ("kills", "attempts", "injected", "hangs")
    return [
        {
            "mode": mode,
            "runs": len(own),
            **{name: sum(row[name] for row in own) for name in numbers},
            "wrong": sum(len(row["bad"]) for row in own),
            "slowest_end_s": max(row["slowest_end_s"] for row in own),
            **{name: dict(sum((Counter(row[name]) for row in own), Counter())) for name in ("by", "phases", "codes")},
        }
        for mode, own in of_mode.items()
        if own
    ]

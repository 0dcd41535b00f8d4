"""The rooms of the house: what a module must not import. `cli.py`, `job.py` and its steps alone know both halves."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "hbp"
HEAVY = ("torch", "transformers")
MUST_NOT_KNOW = {
    "plan.py": ("hbp.data", "hbp.cost", "hbp.planning", "hbp.train", "hbp.parallel", "hbp.report", *HEAVY),
    "config.py": ("hbp.data", "hbp.cost", "hbp.planning", "hbp.train", "hbp.parallel", "hbp.report", *HEAVY),
    "simulator.py": ("hbp.data", "hbp.planning", "hbp.train", "hbp.parallel", "hbp.report", *HEAVY),
    "data": ("hbp.cost", "hbp.plan", "hbp.planning", "hbp.train", "hbp.parallel", "hbp.report", "torch"),
    "cost": ("hbp.data", "hbp.plan", "hbp.planning", "hbp.train", "hbp.parallel", "hbp.report", *HEAVY),
    "parallel": ("hbp.data", "hbp.cost", "hbp.plan", "hbp.planning", "hbp.train", "hbp.report"),
    "planning": ("hbp.data", "hbp.train", "hbp.parallel", "hbp.report", *HEAVY),
    "train": ("hbp.planning", "hbp.data", "hbp.report"),
    "report": ("hbp.data", "hbp.planning", "hbp.train", "hbp.parallel", *HEAVY),
}


def imports(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", MUST_NOT_KNOW)
def test_room_knows_only_its_floor_and_below(room: str) -> None:
    files = [SOURCE / room] if room.endswith(".py") else sorted((SOURCE / room).glob("*.py"))
    assert files
    for file in files:
        for module in imports(file):
            for forbidden in MUST_NOT_KNOW[room]:
                assert module != forbidden and not module.startswith(forbidden + "."), f"{file.name} imports {module}"

"""The floors of the house: no module imports one above it, nor a room that it must not know; no circle of imports."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "hbp"
FLOORS = (
    ("errors", "progress", "disk"),
    ("plan_info", "plan", "run_log", "config", "cost", "data", "parallel"),
    ("planning", "train", "simulator"),
    ("run", "report", "integrations"),
    ("cli",),
)
"""From the ground up; what stands on one floor."""
HEAVY = ("torch", "transformers")
MUST_NOT_KNOW = {
    "plan_info": ("plan", "run_log", "config", "cost", "data", "parallel", *HEAVY),
    "plan": ("config", "cost", "data", "parallel", *HEAVY),
    "run_log": ("plan", "config", "cost", "data", "parallel", *HEAVY),
    "config": ("plan", "cost", "data", "parallel", *HEAVY),
    "cost": ("plan", "config", "data", "parallel", *HEAVY),
    "data": ("plan", "config", "cost", "parallel", "torch"),
    "parallel": ("plan", "config", "cost", "data"),
    "planning": ("config", "data", "parallel", "train", *HEAVY),
    "train": ("data", "planning", "simulator"),
    "simulator": ("config", "data", "parallel", "planning", "train", *HEAVY),
    "report": ("config", "data", "parallel", "planning", "train", "run", *HEAVY),
    "integrations": ("planning", "run", "report"),
    "run": ("report", "integrations"),
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_FILES = 500, 80, 12


def files_of(room: str) -> list[Path]:
    return [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").is_file() else sorted((SOURCE / room).rglob("*.py"))


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


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_room_knows_only_its_floor_and_below(room: str) -> None:
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    forbidden = {f"hbp.{above}" for rooms in FLOORS[floor + 1 :] for above in rooms}
    forbidden |= {name if name in HEAVY else f"hbp.{name}" for name in MUST_NOT_KNOW.get(room, ())}
    for file in files_of(room):
        for module in imports(file):
            for name in forbidden:
                assert module != name and not module.startswith(name + "."), f"{file.name} imports {module}"


def test_nothing_is_fetched_through_the_library() -> None:
    """Whose names are of all floors, fetched when they are asked for: a way around the floors."""
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert "hbp" not in [alias.name for alias in node.names], file
            elif isinstance(node, ast.ImportFrom) and node.module == "hbp":
                assert {alias.name for alias in node.names} <= {"__version__"}, file


def test_every_module_stands_on_a_floor() -> None:
    known = {"__init__", "__main__", *(room for floor in FLOORS for room in floor)}
    assert {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} <= known


def test_no_circle_of_imports() -> None:
    name_of = {file: "hbp." + ".".join(file.relative_to(SOURCE).with_suffix("").parts) for file in SOURCE.rglob("*.py")}
    graph = {name: imports(file) & set(name_of.values()) for file, name in name_of.items()}
    while graph:
        leaves = [name for name, needs in graph.items() if not needs & graph.keys() - {name}]
        assert leaves, f"these import each other: {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_files_folders_and_functions_are_short() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= MOST_LINES, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MOST_LINES_OF_A_FUNCTION, f"{file.name}: {node.name} has {lines} lines"
    for folder in {file.parent for file in SOURCE.rglob("*.py")}:
        files = [file for file in folder.glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder.name} has {len(files)} files"

"""Every Python example of the documents runs, each page from top to bottom in an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hbp

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def example(page: Path) -> str:
    """All blocks of a page, at the lines where they stand, so that a traceback names the page's line."""
    text, lines = page.read_text(), []
    for found in BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        lines += [""] * (first - len(lines))
        lines += found[1].splitlines()
    return "\n".join(lines)


def test_every_name_of_the_library_has_an_example() -> None:
    shown = example(ROOT / "docs" / "library.md") + (ROOT / "examples" / "plain_loop.py").read_text()
    assert [name for name in hbp.__all__ if f"hbp.{name}" not in shown and name != "HbpError"] == []


@pytest.mark.parametrize("page", [page for page in PAGES if example(page)], ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / page.name).write_text(example(page))
    run = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", page.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr

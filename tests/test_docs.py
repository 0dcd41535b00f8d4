"""Every Python example of the documents runs, each page from top to bottom in an empty folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hbp
from hbp.cli.main import main, make_parser

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


SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_how_tos_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in blocks of `bash`, from top to bottom in one folder, on lengths like those of a mix of short and long."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "lengths.npy", np.append(rng.integers(100, 4000, 300), rng.integers(8000, 30000, 10)))
    monkeypatch.chdir(tmp_path)
    commands = [
        line for block in SHELL.findall((ROOT / "docs" / "how-to.md").read_text()) for line in block.split("\n")
    ]
    ran = [shlex.split(line)[1:] for line in commands if line]
    assert {words[0] for words in ran} >= {"plan", "compare", "simulate", "report"}
    for words in ran:
        assert main(words) == 0, words
    assert (tmp_path / "plan.html").read_text().rstrip().endswith("</html>")


def test_commands_that_pages_name_are_there() -> None:
    known = {*make_parser()[1], "best", "even"}  # the tables of packers name ours `hbp best fit` and `hbp even fit`
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"`hbp ([a-z]+)[ `]", text)) - known == set()

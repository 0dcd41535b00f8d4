"""The embedded data set: real text of the library, as many samples as asked, the same for the same seed."""

from __future__ import annotations

import ast
import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbp.data import stdlib_sft
from hbp.data.files import parsed, pieces_of, records_of
from hbp.data.stdlib_sft import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer, write_dataset
from hbp.errors import HbpError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the real library, since parsing all of it takes seconds, and files that must be left out."""
    root = tmp_path_factory.mktemp("library")
    for path in LIBRARY.glob("[a-c]*.py"):
        shutil.copy(path, root)
    (root / "test").mkdir()
    (root / "test" / "skipped.py").write_text((root / "ast.py").read_text())
    (root / "xbroken.py").write_text("def f(:\n" * 2000)
    (root / "xlatin.py").write_bytes(b"# \xff\n" + (root / "ast.py").read_bytes())
    return root


@pytest.fixture(autouse=True)
def small_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})


def make(path: Path, **changed: Any) -> list[tuple[str, str]]:
    """User and assistant texts of a data set."""
    options = {"seed": 0, "short_samples": 60, "long_samples": 8, "longest_chars": 28_000, **changed}
    n = write_dataset(path / "deep" / "a.jsonl", **options)
    pieces = pieces_of(path / "deep" / "a.jsonl")
    talks = [parsed(raw)["messages"] for piece in pieces for _, raw in records_of(piece)]
    assert n == len(talks)
    assert all([m["role"] for m in talk] == ["user", "assistant"] for talk in talks)
    return [(talk[0]["content"], talk[1]["content"]) for talk in talks]


def is_long(sample: tuple[str, str]) -> bool:
    return sample[0].startswith(("What is this module for?", "Continue the module "))


def test_starts_from_this_pythons_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    module = next(stdlib_sft._modules())
    assert (LIBRARY / module.name).read_text() == module.source


def test_as_many_samples_as_asked_without_repeats(tmp_path: Path) -> None:
    samples = make(tmp_path)
    assert len(set(samples)) == 68
    assert sum(map(is_long, samples)) == 8
    assert not any(map(is_long, make(tmp_path, long_samples=0)))
    most = make(tmp_path, short_samples=10**6, long_samples=10**6)
    assert 500 < len(most) < 10**5
    continued = [user.partition("\n")[0] for user, _ in most if user.startswith("Continue")]
    assert len(set(continued)) == len(continued) > 5
    assert not [s for s in most if not s[0].strip() or not s[1].strip()]
    assert not [s for s in most if any(name in s[0] for name in ("skipped.py", "xbroken.py", "xlatin.py"))]


def test_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    make(tmp_path / "c", seed=1)
    a, b, c = ((tmp_path / name / "deep" / "a.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def squeezed(text: str) -> str:
    """Lines without their indentation, which short samples lose."""
    return "\n".join(line.strip() for line in text.splitlines())


def all_docstrings(source: str) -> list[str | None]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, functions)]


def test_samples_are_the_librarys_text(library: Path, tmp_path: Path) -> None:
    sources = {path.name: path.read_text() for path in library.glob("[a-c]*.py")}
    flat = {name: squeezed(source) for name, source in sources.items()}
    docstrings = {name: set(all_docstrings(source)) for name, source in sources.items()}
    of_modules = {ast.get_docstring(ast.parse(source)) for source in sources.values()}
    kinds = set()
    for user, assistant in make(tmp_path, short_samples=300, long_samples=25, longest_chars=10**6):
        task, _, given = user.partition("\n")
        kinds.add(task.split(" from ")[0].split(" the module ")[0])
        name = task.rstrip(":").split(" ")[-1]
        if task.startswith("Continue"):
            assert given + assistant == sources[name]
        elif task.startswith("What"):
            assert assistant in of_modules
        elif "Write the body" in task:
            assert squeezed(given + assistant) in flat[name]
        else:
            assert assistant in docstrings[name]
            assert squeezed(given) in flat[name]
    assert len(kinds) == 4


class Zero:
    """In place of a generator: takes the first choice."""

    def random(self) -> float:
        return 0.0


def test_answer_is_not_in_the_question() -> None:
    """Also where a docstring's clean form differs from how the source writes it, as in ast.py."""
    documented = [m for m in stdlib_sft._modules() if ast.get_docstring(m.tree)]
    pairs = [stdlib_sft._module_pair(m, Zero()) for m in documented]  # type: ignore[arg-type]
    assert len(pairs) > 20
    assert not [answer for question, answer in pairs if squeezed(answer) in squeezed(question)]


@pytest.mark.parametrize("longest", [12_000, 40_000, None])
def test_longest_chars(library: Path, tmp_path: Path, longest: int | None) -> None:
    sizes = [len(p.read_text()) for p in library.glob("*.py") if p.stem not in ("xbroken", "xlatin")]
    fitting = [size for size in sizes if stdlib_sft.SHORT_MOST_CHARS < size <= (longest or size)]
    samples = make(tmp_path, short_samples=200, long_samples=9, longest_chars=longest)
    texts = [(is_long(s), len(s[0].partition("\n")[2]) + len(s[1])) for s in samples]
    assert max(size for long, size in texts if not long) <= stdlib_sft.SHORT_MOST_CHARS
    long = sorted(size for long, size in texts if long)
    assert long[-1] <= max(fitting)
    assert long[-1] > 0.5 * max(fitting)  # drawn over the whole range
    assert long[0] < 2 * min(fitting)


def test_library_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(HbpError, match="no standard library sources"):
        make(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("tokenizer")
    text = (LIBRARY / "argparse.py").read_text()
    (root / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n")
    train_tokenizer(root / "a.jsonl", root / "folder", vocab_size=600)
    return transformers.AutoTokenizer.from_pretrained(root / "folder")


@given(st.text(max_size=60) | st.sampled_from(["  def f( x ) :\n\t return x ,y .", "don 't , \r\n\0"]))
@settings(max_examples=80, deadline=None)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_ready_for_chat(tokenizer: Any) -> None:
    assert len(tokenizer) == 600
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.pad_token, tokenizer.eos_token) == (SPECIAL_TOKENS[0], SPECIAL_TOKENS[2])
    for token in SPECIAL_TOKENS:
        assert len(tokenizer(token)["input_ids"]) == 1
    source = (LIBRARY / "argparse.py").read_text()
    assert len(tokenizer(source)["input_ids"]) < 0.5 * len(source)  # trained on it, not bytes alone

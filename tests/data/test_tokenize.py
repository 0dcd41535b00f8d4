"""Source → store: the same whatever the number of processes, made once, and again when something changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hbp.errors import HbpError

pytest.importorskip("transformers")

from hbp.data import tokenize
from hbp.data.chat import encode
from hbp.data.sources import read_conversations
from hbp.data.stdlib_sft import train_tokenizer
from hbp.data.store import TokenStore, open_store
from hbp.data.tokenize import prepare_store


def write_source(path: Path, n: int) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": f"{i} is " + "very " * (i % 7) + "odd"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("tokenize")
    (root / "a.jsonl").write_text(json.dumps({"messages": [{"content": "What is very odd?"}]}) + "\n")
    train_tokenizer(root / "a.jsonl", root / "tokenizer", vocab_size=300)
    return str(root / "tokenizer")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source.jsonl", 45)


def contents(store: TokenStore) -> list[Any]:
    return [[part.tolist() for part in store.sample(i)] for i in range(len(store))]


def test_same_store_for_any_number_of_processes(
    source: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "CHUNK", 4)  # so that 45 samples are several windows, the last one ragged
    one = prepare_store(str(source), tokenizer, tmp_path / "one")
    two = prepare_store(str(source), tokenizer, tmp_path / "two", processes=2)
    loaded = tokenize.load_tokenizer(tokenizer)
    wanted = [encode(loaded, talk) for talk in read_conversations(str(source))]
    assert contents(one) == contents(two) == [[e.input_ids.tolist(), e.loss_mask.tolist()] for e in wanted]
    assert one.fingerprint == two.fingerprint
    assert (one.tokenizer, one.vocab_size) == (tokenizer, len(loaded))
    for name in ("tokens.arrow", "index.parquet", "store.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_made_once_and_again_when_something_changed(
    source: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []

    def counting(*args: Any) -> Any:
        encoded.append(args)
        return encode(*args)

    def prepare(**options: Any) -> tuple[TokenStore, int]:
        encoded.clear()
        return prepare_store(str(source), tokenizer, tmp_path / "store", **options), len(encoded)

    monkeypatch.setattr(tokenize, "encode", counting)
    first, n = prepare()
    assert n == len(first) == 45
    again, n = prepare(processes=2)
    assert n == 0 and contents(again) == contents(first)
    assert prepare(split="other")[1] == 45
    write_source(source, 46)
    assert len(prepare()[0]) == 46
    (Path(tokenizer) / "note.txt").write_text("another tokenizer now")
    assert prepare()[1] == 46
    (tmp_path / "store" / "store.json").write_text("{")
    assert prepare()[1] == 46
    assert prepare()[1] == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_broken_source_leaves_the_old_store(source: Path, tokenizer: str, tmp_path: Path, processes: int) -> None:
    folder = tmp_path / "store"
    before = contents(prepare_store(str(source), tokenizer, folder))
    source.write_text(source.read_text() + "{\n")
    with pytest.raises(HbpError, match="line 46 is not JSON"):
        prepare_store(str(source), tokenizer, folder, processes=processes)
    assert contents(open_store(folder)) == before


def test_refusal_in_a_worker_is_the_same_error(source: Path, tokenizer: str, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tokenizer, bare, ignore=shutil.ignore_patterns("chat_template*"))
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    with pytest.raises(HbpError, match="the tokenizer has no chat template") as caught:
        prepare_store(str(source), str(bare), tmp_path / "store", processes=2)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()

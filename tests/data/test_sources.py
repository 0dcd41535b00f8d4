"""Every kind of source gives the same conversations; every wrong one is refused in one line that names its place."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbp.data.sources import read_conversations, source_fingerprint, to_conversation
from hbp.errors import HbpError

Record = dict[str, Any]


def talk(name: str = "you") -> list[dict[str, str]]:
    return [{"role": "user", "content": "Hi\n"}, {"role": "assistant", "content": f"Grüße, {name} 😀"}]


RECORDS: list[Record] = [{"messages": talk(str(i))} for i in range(5)]
TALKS = [record["messages"] for record in RECORDS]


def lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write_jsonl(path: Path, records: list[Any]) -> None:
    path.write_bytes(lines(records))


def write_gzip(path: Path, records: list[Any]) -> None:
    path.write_bytes(gzip.compress(lines(records)))


def write_parquet(path: Path, records: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


WRITERS: dict[str, Callable[[Path, list[Any]], None]] = {
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.parquet": write_parquet,
}


def read(source: Path, **options: Any) -> list[Any]:
    return list(read_conversations(str(source), **options))


def refusal(source: Path | str, **options: Any) -> str:
    with pytest.raises(HbpError) as caught:
        list(read_conversations(str(source), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": talk(), "id": 3},
        {"messages": None, "prompt": "Hi\n", "completion": talk()[1]["content"]},
        {"prompt": "Hi\n", "completion": talk()[1]["content"]},
        {"prompt": talk()[:1], "completion": talk()[1:]},
        {"prompt": talk()[:1], "completion": talk()[1]["content"]},
        {"conversations": [{"from": "human", "value": "Hi\n"}, {"from": "gpt", "value": talk()[1]["content"]}]},
        {"conversations": talk()},
    ],
)
def test_every_shape_of_record_is_the_same_conversation(record: Record) -> None:
    assert to_conversation(record, "here") == talk()


def test_unknown_sharegpt_roles_stay() -> None:
    record = {"conversations": [{"from": "system", "value": "s"}, {"from": "tool", "value": "t"}]}
    assert [m["role"] for m in to_conversation(record, "here")] == ["system", "tool"]


@pytest.mark.parametrize("name", WRITERS)
def test_files(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, RECORDS)
    assert read(tmp_path / name) == TALKS


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", RECORDS[3:])
    write_jsonl(tmp_path / "a.jsonl", RECORDS[:2])
    write_gzip(tmp_path / "b.jsonl.gz", RECORDS[2:3])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "d.jsonl").mkdir()
    assert read(tmp_path) == TALKS


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n" + lines(RECORDS[:1]) + b" \n" + lines(RECORDS[1:]))
    assert read(file) == TALKS
    file.write_bytes(b"\n" + lines(RECORDS[:1]) + b" \n{")
    assert f"{file} line 4 is not JSON" in refusal(file)


def test_files_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(RECORDS[:2]) + b"{")
    stream = read_conversations(str(tmp_path / "a.jsonl"))
    assert [next(stream), next(stream)] == TALKS[:2]
    with pytest.raises(HbpError):
        next(stream)


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one") == TALKS
    both = datasets.DatasetDict({"train": whole.select([0, 1]), "test": whole.select([2])})
    both.save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "two") == TALKS[:2]
    assert read(tmp_path / "two", split="test") == TALKS[2:3]
    assert "no split 'dev'; it has train, test" in refusal(tmp_path / "two", split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot load the saved data set" in refusal(tmp_path / "one")
    (tmp_path / "two" / "dataset_dict.json").write_text("{}")
    assert "cannot load the saved data set" in refusal(tmp_path / "two")


def test_hub_name_split_and_subset_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: Any, **options: Any) -> list[Record]:
        assert (args, options) == (("owner/set", "math"), {"split": "dev"})
        return [*RECORDS, {"text": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = read_conversations("owner/set", split="dev", subset="math")
    assert [next(stream) for _ in RECORDS] == TALKS
    with pytest.raises(HbpError, match="owner/set row 5 has fields text"):
        next(stream)


def test_hub_name_without_network() -> None:
    pytest.importorskip("datasets")
    code = (
        "import hbp.data.sources as s\nfrom hbp.errors import HbpError\n"
        "try: list(s.read_conversations('nobody/nothing'))\nexcept HbpError as e: print(e)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("no file or folder 'nobody/nothing', and no hub data set by that name could be loaded: ")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    assert f"no file or folder {tmp_path / name}" in refusal(tmp_path / name)


def test_missing_relative_file_is_not_looked_up_on_the_hub() -> None:
    assert "no file or folder data/none.jsonl" in refusal("data/none.jsonl")


def test_folder_without_data(tmp_path: Path) -> None:
    assert f"{tmp_path} has no .jsonl" in refusal(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_source_without_records(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, [])
    assert "holds no records" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "is not an object"),
        ("text", "is not an object"),
        ({}, "has fields none"),
        ({"text": "a", "label": 1}, "has fields text, label; it needs `messages`, or `prompt` and `completion`"),
        ({"prompt": "a"}, "has fields prompt"),
        ({"messages": "a"}, "has fields messages"),
        ({"messages": []}, "has no messages"),
        ({"prompt": [], "completion": []}, "has no messages"),
        ({"messages": [{"role": "user"}]}, "has a message without a text `role` and `content`"),
        ({"messages": [{"role": "user", "content": None}]}, "without a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image\n"}]}]}, "without a text"),
        ({"messages": [{"role": 3, "content": "a"}]}, "without a text"),
        ({"messages": ["a"]}, "without a text"),
        ({"conversations": [{"from": "human"}]}, "without a text"),
        ({"conversations": ["a"]}, "without a text"),
        ({"prompt": 1, "completion": "a"}, "without a text"),
    ],
)
def test_record_that_is_no_conversation_is_named_by_its_line(record: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [*RECORDS[:2], record, *RECORDS])
    assert refusal(file).startswith(f"{file} line 3 ")
    assert message in refusal(file)


def test_parquet_rows_are_counted_across_batches(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, [{"prompt": "a", "completion": "b"}] * 1500 + [{"prompt": "a", "completion": None}])
    assert f"{file} row 1500 has a message without" in refusal(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(RECORDS[:1]) + b"{'a': 1}\n", "line 2 is not JSON"),
        ("a.jsonl", lines(RECORDS[:1]) + b"\xff\xfe\n", "cannot be read"),
        ("a.jsonl", lines([RECORDS])[:-3], "line 1 is not JSON"),
        ("a.jsonl.gz", b"plain text", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-12], "cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:40] + b"\0" * 99, "cannot be read"),
        ("a.parquet", b"", "as Parquet"),
        ("a.parquet", b"PAR1" * 9, "as Parquet"),
    ],
)
def test_damaged_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}" in refusal(tmp_path / name)
    assert message in refusal(tmp_path / name)


def test_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write_jsonl(file, RECORDS)
    for source in (str(file), str(tmp_path)):
        write_jsonl(file, RECORDS)
        before = source_fingerprint(source)
        assert source_fingerprint(source) == before
        assert source_fingerprint(source, "test") != before
        assert source_fingerprint(source, "train", "math") != before
        write_jsonl(file, RECORDS[1:])
        assert source_fingerprint(source) != before
    before = source_fingerprint(str(tmp_path))
    write_jsonl(tmp_path / "b.jsonl", RECORDS)
    assert source_fingerprint(str(tmp_path)) != before
    assert source_fingerprint("owner/a") != source_fingerprint("owner/b")

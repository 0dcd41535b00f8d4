"""Sources are found before anything starts; what is missing is said to be missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hbp.data.files import parsed, records_of
from hbp.data.sources import Source, check_sources, files_of, pieces_of_source
from hbp.errors import HbpError

RECORDS: list[Any] = [{"text": f"Grüße {i}"} for i in range(5)]


def write(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def read(source: Source) -> list[Any]:
    return [parsed(raw) for piece in pieces_of_source(source) for _, raw in records_of(piece)]


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(HbpError) as caught:
        read(Source(str(path), **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sharded_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS[3:]), tmp_path / "c.parquet")
    write(tmp_path / "a.jsonl", RECORDS[:2])
    write(tmp_path / "b" / "x.json", RECORDS[2:3])
    write(tmp_path / ".cache" / "x.jsonl", RECORDS)
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "d.jsonl").mkdir()
    assert read(Source(str(tmp_path))) == RECORDS


def test_files_that_are_left_out_of_a_folder_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "README.md").write_text("not data")
    assert read(Source(str(tmp_path))) == RECORDS
    assert "left out" not in capsys.readouterr().err
    for name in ("more.jsonlines", "b.csv", "deep/c.jsonl.zip"):
        write(tmp_path / name, RECORDS)
    assert read(Source(str(tmp_path))) == RECORDS
    assert "left out: 3 files that hold no records by their names, the first: b.csv" in capsys.readouterr().err


def test_a_folder_with_files_of_several_splits_gives_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, own in (("train-00000-of-00002", RECORDS[:1]), ("train-00001-of-00002", RECORDS[1:2]), ("test", RECORDS)):
        write(tmp_path / "data" / f"{name}.jsonl", own)
    assert read(Source(str(tmp_path))) == RECORDS[:2]
    assert "2 files of the split 'train'; left out: those of test" in capsys.readouterr().err
    assert read(Source(str(tmp_path), split="test")) == RECORDS
    assert "no files of the split 'dev'; it has test, train" in refusal(tmp_path, split="dev")
    write(tmp_path / "mixed" / "train.jsonl", RECORDS[:1])
    write(tmp_path / "mixed" / "test.jsonl", RECORDS[1:2])
    write(tmp_path / "mixed" / "own.jsonl", RECORDS[2:3])
    assert len(read(Source(str(tmp_path / "mixed")))) == 3
    assert "all 3 files are read, test and train alike, since some name no split" in capsys.readouterr().err
    for folder, own in (("train", RECORDS[:1]), ("validation", RECORDS[1:])):
        write(tmp_path / "folders" / folder / "0.jsonl", own)
    assert read(Source(str(tmp_path / "folders"), split="validation")) == RECORDS[1:]
    write(tmp_path / "one" / "test.jsonl", RECORDS)  # nothing else is there, so it is what is meant
    assert read(Source(str(tmp_path / "one"))) == RECORDS


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(RECORDS)
    whole.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert read(Source(str(tmp_path / "one"))) == RECORDS
    both = datasets.DatasetDict({"train": whole.select([0, 3]), "test": whole.select([2])})
    both.save_to_disk(str(tmp_path / "two"))
    assert read(Source(str(tmp_path / "two"))) == [RECORDS[0], RECORDS[3]]
    assert read(Source(str(tmp_path / "two"), split="test")) == RECORDS[2:3]
    assert "no split 'dev'; it has train, test" in refusal(tmp_path / "two", split="dev")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    assert "is missing" in refusal(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot load the saved data set" in refusal(tmp_path / "one")
    (tmp_path / "two" / "dataset_dict.json").write_text("{}")
    assert "cannot load the saved data set" in refusal(tmp_path / "two")


def test_hub_name_split_subset_and_streaming_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **options: Any) -> list[Any]:
        asked.append((args, options))
        return [*RECORDS, {"text": object()}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("owner/set", "hub:owner/set"):
        assert "row 5 holds what is not text" in refusal(path, split="dev", subset="math", streaming=True)
    assert asked == 2 * [(("owner/set", "math"), {"split": "dev", "streaming": True})]
    stream = pieces_of_source(Source("hub:set"), 1)
    assert [parsed(raw) for _ in RECORDS for _, raw in records_of(next(stream))] == RECORDS


def test_hub_name_without_network() -> None:
    pytest.importorskip("datasets")
    code = (
        "from hbp.data.sources import *\nfrom hbp.errors import HbpError\n"
        "try: list(pieces_of_source(Source('nobody/nothing')))\nexcept HbpError as e: print(e)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.startswith("no file or folder 'nobody/nothing', and no hub data set by that name could be loaded: ")
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "none"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    assert f"no file or folder {tmp_path / name}" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["data/none.jsonl", "none", "./none/none", "there/none", "a/b/c", "x/y.jsonl.gz"])
def test_missing_relative_path_is_not_looked_up_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal(name).startswith(f"no file or folder {name};")


def test_other_files_and_empty_folders(tmp_path: Path) -> None:
    assert f"{tmp_path} has no .jsonl" in refusal(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    assert f"{tmp_path / 'a.csv'} is none of .jsonl" in refusal(tmp_path / "a.csv")


def test_sources_that_say_two_things(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", RECORDS)
    path = str(tmp_path / "a.jsonl")
    assert files_of(Source(path)) == [Path(path)]
    for sources, said in (
        ([Source(path, "a"), Source(path, "a")], "two sources are named a"),
        ([Source(path, "a", weight=1.0, repeat=2.0)], "a has both weight and repeat"),
        ([Source(path, "a", weight=1.0), Source(path, "b")], "b has no weight while others have"),
        ([Source(path, "a"), Source(path, "b", repeat=3.0, held_out=True)], "b has a weight or repeat"),
        ([Source(path, "a"), Source(path, "b", weight=1.0, held_out=True)], "b has a weight or repeat"),
        ([Source(path, "a"), Source(path + "x", "b")], f"no file or folder {path}x"),
    ):
        with pytest.raises(HbpError, match=said):
            check_sources(sources)
    check_sources([Source(path, "a", weight=1.0), Source(path, "b", held_out=True)])


def test_what_datasets_says_of_a_folder_is_no_data(tmp_path: Path) -> None:
    for name in ("a.jsonl", "B.JSONL", "dataset_infos.json", "sub/dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, RECORDS)
    files = files_of(Source(str(tmp_path)))
    assert [path.name for path in files or ()] == ["B.JSONL", "a.jsonl"]

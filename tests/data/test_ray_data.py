"""A real Ray, started here: its shards are those of a single process, and its errors too."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hbp.data.build import build_store, recipe_of
from hbp.data.sources import Source
from hbp.data.stdlib_sft import train_tokenizer
from hbp.errors import HbpError

ray = pytest.importorskip("ray")
pytest.importorskip("transformers")

from hbp.data.ray_data import pieces_on  # noqa: E402


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import os

    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


def test_ray_makes_the_shards_that_one_process_makes(cluster: None, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"What is {i}?", "completion": f"{i} is " + "very " * (i % 7)} for i in range(60)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [{"content": text}]}) + "\n")
    train_tokenizer(tmp_path / "t.jsonl", tmp_path / "tokenizer", vocab_size=300)
    recipe = recipe_of(str(tmp_path / "tokenizer"))
    sources = [Source(str(tmp_path / "a.jsonl"), "a"), Source(str(tmp_path / "b.jsonl.gz"), "b")]
    one = build_store(tmp_path / "one", sources, recipe, piece_bytes=700)
    many = build_store(tmp_path / "many", sources, recipe, piece_bytes=700, map_pieces=pieces_on("local"))
    assert len(one.shards) > 10 and many.fingerprint == one.fingerprint
    assert [many.sample(i)[0].tolist() for i in range(120)] == [one.sample(i)[0].tolist() for i in range(120)]
    with (tmp_path / "a.jsonl").open("a") as out:
        out.write("{\n")
    with pytest.raises(HbpError, match=r"a\.jsonl line 61 is not JSON"):
        build_store(tmp_path / "many", sources, recipe, piece_bytes=700, map_pieces=pieces_on("local"))

"""Sources → store: the same for any number of processes, nothing made twice, what cannot be used named or counted."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbp.disk import versions_of
from hbp.errors import HbpError

pytest.importorskip("transformers")

from hbp.data import build
from hbp.data.build import Recipe, build_store, make_shard, recipe_of
from hbp.data.record import encode_records, load_tokenizer
from hbp.data.sources import Source
from hbp.data.stdlib_sft import train_tokenizer
from hbp.data.store import CHOSEN, PARTIAL, REJECTED, SHARDS, TokenStore, open_store


def records(n: int) -> list[Any]:
    turns = [("user", "What is {}?"), ("assistant", "{} is {}odd")]
    return [
        {"messages": [{"role": role, "content": text.format(i, "very " * (i % 7))} for role, text in turns]}
        for i in range(n)
    ]


def write(path: Path, rows: list[Any], old: bool = True) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if old:  # so that its time can be trusted
        os.utime(path, (time.time() - 60, time.time() - 60))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("build")
    write(root / "a.jsonl", [{"messages": [{"content": "What is very odd?"}]}])
    train_tokenizer(root / "a.jsonl", root / "tokenizer", vocab_size=300)
    return str(root / "tokenizer")


@pytest.fixture(scope="module")
def recipe(tokenizer: str) -> Recipe:
    return recipe_of(tokenizer)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.jsonl", records(45))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is encoded, record by record."""
    encoded: list[Any] = []

    def counting(rows: list[Any], *args: Any) -> Any:
        encoded.extend(rows)
        return encode_records(rows, *args)

    monkeypatch.setattr(build, "encode_records", counting)
    return encoded


def contents(store: TokenStore) -> list[Any]:
    return [[part.tolist() for part in store.sample(i)] for i in range(len(store))]


def test_same_store_for_any_number_of_processes_and_pieces(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    one = build_store(tmp_path / "one", [Source(str(source))], recipe)
    two = build_store(tmp_path / "two", [Source(str(source))], recipe, processes=2, piece_bytes=500)
    outcomes = encode_records(records(45), load_tokenizer(recipe.tokenizer))
    wanted = [[s.input_ids.tolist(), s.loss_mask.tolist()] for o in outcomes for s in o.samples]
    assert contents(one) == contents(two) == wanted
    assert len(one.shards) == 1 and len(two.shards) > 8
    assert one.line.tolist() == two.line.tolist() == list(range(1, 46))
    assert one.place(44) == f"{source} line 45"
    assert (one.tokenizer, one.vocab_size) == (recipe.tokenizer, recipe.vocab_size)
    assert max(max(ids) for ids, _ in wanted) == one.sources[0].highest_id
    alone = build_store(tmp_path / "alone", [Source(str(source))], recipe, piece_bytes=500)
    assert alone.fingerprint == two.fingerprint
    for name in ("index.parquet", *(f"{SHARDS}/{entry.name}" for entry in two.shards)):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_nothing_is_made_twice(source: Path, recipe: Recipe, tmp_path: Path, made: list[Any]) -> None:
    def prepare(**options: Any) -> tuple[TokenStore, int]:
        made.clear()
        store = build_store(tmp_path / "store", [Source(str(source))], recipe, piece_bytes=500, **options)
        return store, len(made)

    first, n = prepare()
    assert n == len(first) == 45
    again, n = prepare(skip_bad=True)
    assert n == 0 and contents(again) == contents(first) and again.fingerprint == first.fingerprint
    os.utime(source)  # another time, the same content
    assert prepare()[1] == 0
    write(source, records(46))  # grown: only its last piece is another
    grown, n = prepare()
    assert len(grown) == 46 and 0 < n < 10 and contents(grown)[:45] == contents(first)
    changed = [{"messages": records(3)[2]["messages"]}, *records(46)[1:]]
    write(source, changed)  # as long as before, and as old
    assert prepare()[1] > 0
    stale = {file.name for file in (tmp_path / "store" / SHARDS).iterdir()}
    assert stale == {entry.name for entry in open_store(tmp_path / "store").shards}
    (tmp_path / "store" / "store.json").write_text("{")
    assert prepare()[1] == 0
    next((tmp_path / "store" / SHARDS).iterdir()).write_bytes(b"damaged")
    (tmp_path / "store" / "store.json").unlink()
    assert 0 < prepare()[1] < 10


def test_a_store_says_what_made_it(source: Path, recipe: Recipe, tmp_path: Path, made: list[Any]) -> None:
    """And is used as it is by other versions: what decides tokens is in the recipe."""
    build_store(tmp_path / "store", [Source(str(source))], recipe)
    path = tmp_path / "store" / "store.json"
    kept = json.loads(path.read_text())
    assert kept["versions"] == versions_of("tokenizers", "transformers", "pyarrow", "datasets")
    assert kept["versions"].keys() >= {"hbp", "python", "tokenizers", "transformers", "pyarrow"}
    path.write_text(json.dumps(kept | {"versions": {"hbp": "0.0.1"}}))
    made.clear()
    build_store(tmp_path / "store", [Source(str(source))], recipe)
    assert not made


def test_an_interrupted_build_goes_on(
    source: Path, recipe: Recipe, tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return make_shard(*args)

    folder, sources = tmp_path / "store", [Source(str(source))]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, "make_shard", interrupted)
        build_store(folder, sources, recipe, piece_bytes=500)
    done = len(made)
    (folder / SHARDS / f"x.arrow{PARTIAL}nowhere-1").touch()
    os.utime(folder / SHARDS / f"x.arrow{PARTIAL}nowhere-1", (0, 0))  # left by a machine that is no more
    assert len(build_store(folder, sources, recipe, piece_bytes=500)) == 45
    assert done > 10 and len(made) == 45
    assert not list(folder.rglob(f"*{PARTIAL}*"))


def test_another_tokenizer_template_or_way_of_reading_is_another_recipe(
    tokenizer: str, recipe: Recipe, tmp_path: Path
) -> None:
    import shutil

    from hbp.data.record import Reading

    shutil.copytree(tokenizer, tmp_path / "same")
    assert recipe_of(str(tmp_path / "same")).identity == recipe.identity  # its place does not matter
    template = tmp_path / "same" / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    assert recipe_of(str(tmp_path / "same"), str(template)).identity != recipe.identity
    assert recipe_of(tokenizer, None, Reading(ignore=("id",))).identity != recipe.identity
    assert recipe.vocab_size == max(load_tokenizer(tokenizer).get_vocab().values()) + 1


BAD = [
    ("{\n", "line 46 is not JSON: what it begins goes on over more lines; write one record a line"),
    ('{"messages": }\n', "line 46 is not JSON (Expecting value"),
    (
        '{"messages": [{"role": "user", "content": "cat \\ud83d"}, {"role": "assistant", "content": "mat"}]}\n',
        r"\ud83d",
    ),
    ('{"nothing": "known"}\n', "line 46: "),
    ('{"messages": []}\n', "line 46: "),
    ("[1]\n", "line 46: "),
]


@pytest.mark.parametrize(("line", "said"), BAD)
@pytest.mark.parametrize("packed", [False, True])
def test_a_record_that_cannot_be_used_is_named_or_skipped_and_counted(
    line: str, said: str, packed: bool, source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    text = source.read_text() + line + source.read_text()
    if packed:
        source = source.with_name("source.jsonl.gz")
    source.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    sources, folder = [Source(str(source))], tmp_path / "store"
    for size in (None, 500):
        with pytest.raises(HbpError) as caught:
            build_store(folder, sources, recipe, piece_bytes=size)
        assert str(caught.value).startswith(f"{source} line 46") and said in str(caught.value)
        assert "\n" not in str(caught.value)
        store = build_store(folder, sources, recipe, piece_bytes=size, skip_bad=True)
        assert len(store) == 90 and store.sources[0].bad == 1
        assert store.sources[0].bad_first[0].startswith(f"{source} line 46")
        assert store.line.tolist() == [*range(1, 46), *range(47, 92)]
        with pytest.raises(HbpError, match="line 46"):  # also where the shard is there already
            build_store(folder, sources, recipe, piece_bytes=size)


def test_an_error_in_another_process_is_the_same_and_leaves_the_old_store(
    source: Path, recipe: Recipe, tmp_path: Path
) -> None:
    folder, sources = tmp_path / "store", [Source(str(source))]
    before = contents(build_store(folder, sources, recipe, piece_bytes=500))
    source.write_text(source.read_text() + "{\n")
    with pytest.raises(HbpError, match=r"source\.jsonl line 46 is not JSON"):
        build_store(folder, sources, recipe, piece_bytes=500, processes=2)
    assert contents(open_store(folder)) == before


def test_sources_that_hold_nothing(recipe: Recipe, tmp_path: Path) -> None:
    for text, said in (
        ("\n \n", "holds no records;"),
        ("{\n", r"that can be used \(1 cannot: .*empty.jsonl line 1 is"),
    ):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(HbpError, match=said):
            build_store(tmp_path / "store", [Source(str(tmp_path / "empty.jsonl"))], recipe, skip_bad=True)


def test_several_sources_and_how_much_of_each(source: Path, recipe: Recipe, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", records(9)[4:])
    sources = [
        Source(str(source), "first", repeat=2.0, max_samples=20),
        Source(str(other), "second"),
        Source(str(other), "third", held_out=True, max_samples=2),
    ]
    for size in (None, 300):
        store = build_store(tmp_path / "store", sources, recipe, piece_bytes=size)
        assert store.source.tolist() == [0] * 20 + [1] * 5 + [2] * 2
        assert [(s.name, s.times, s.held_out) for s in store.sources] == [
            ("first", 2.0, False),
            ("second", 1.0, False),
            ("third", 1.0, True),
        ]
        assert contents(store)[20:25] == contents(store)[4:9] and contents(store)[25:] == contents(store)[20:22]


def test_pairs_stay_whole(recipe: Recipe, tmp_path: Path) -> None:
    def said(text: str) -> list[Any]:
        return [{"role": "assistant", "content": text}]

    asked = records(1)[0]["messages"][:1]
    rows = [{"prompt": asked, "chosen": said("yes " * (i + 1)), "rejected": said("no")} for i in range(6)]
    path = write(tmp_path / "pairs.jsonl", [*records(1), *rows])
    store = build_store(tmp_path / "store", [Source(str(path))], recipe)
    assert store.part.tolist() == [0, *[CHOSEN, REJECTED] * 6]
    assert store.line.tolist() == [1, *np.repeat(np.arange(2, 8), 2).tolist()]
    for most, kept in ((4, 3), (5, 5), (1, 1)):
        some = build_store(tmp_path / "store", [Source(str(path), max_samples=most)], recipe)
        assert len(some) == kept


def test_shards_are_shared_through_the_cache(source: Path, recipe: Recipe, tmp_path: Path, made: list[Any]) -> None:
    cache, sources = tmp_path / "cache", [Source(str(source))]
    first = build_store(tmp_path / "one", sources, recipe, cache=cache, piece_bytes=500)
    made.clear()
    second = build_store(tmp_path / "two", sources, recipe, cache=cache, piece_bytes=500)
    assert not made and contents(second) == contents(first)
    name = first.shards[0].name
    assert (tmp_path / "two" / SHARDS / name).samefile(cache / SHARDS / name)
    third = build_store(tmp_path / "three", sources, recipe, cache=cache, cache_bytes=0, piece_bytes=500)
    assert not list((cache / SHARDS).iterdir()) and contents(third) == contents(first)  # what leaves is not missed
    (tmp_path / "file").touch()
    build_store(tmp_path / "four", sources, recipe, cache=tmp_path / "file" / "cache")  # cannot be written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_the_whole_process_group_ends_workers_without_a_word(number: signal.Signals) -> None:
    """They had the handler of the process that forked them, and wrote a traceback each."""

    def own(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, own)
    try:
        child = os.fork()
        if not child:
            build._start_worker()
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == number
    finally:
        signal.signal(number, before)

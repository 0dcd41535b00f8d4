"""The plan file: an independent reading of it keeps every invariant, and no damaged one is taken for a plan."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import can_fit, hand_plan, tiny_cost, write_by_hand

from hbp.errors import HbpError
from hbp.plan import (
    JSON_NAME,
    PARQUET_NAME,
    SCALAR_COLUMNS,
    SCHEMA,
    Group,
    Plan,
    completed,
    hash_lengths,
    read_info,
    read_plan,
    validate,
    write_plan,
)
from hbp.planning.planner import STRATEGIES, make_plan

Rows = list[dict[str, Any]]
FILES = (PARQUET_NAME, JSON_NAME)
METRICS = {"pr", "dbr", "abr", "cr", "ave_tokens", "efficiency", "predicted_s"}


def load(folder: Path) -> tuple[Rows, dict[str, Any]]:
    """The two files, by nothing of ours."""
    return pq.read_table(folder / PARQUET_NAME).to_pylist(), json.loads((folder / JSON_NAME).read_text())


def check(rows: Rows, info: dict[str, Any], lengths: list[int], world: int) -> None:
    """Every invariant of the contract, in plain Python."""
    packed = [sample for row in rows for sample in row["sample_ids"]]
    dropped = [entry["sample_id"] for entry in info["dropped"]]
    assert sorted(packed + dropped) == list(range(len(lengths)))
    assert all(entry["reason"] for entry in info["dropped"])
    assert (info["n_samples"], info["world_size"]) == (len(lengths), world)
    assert info["n_tokens"] == sum(lengths[sample] for sample in packed)
    taken: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        assert row["sample_ids"]
        assert row["lengths"] == [lengths[sample] for sample in row["sample_ids"]]
        assert sum(row["lengths"]) <= row["capacity"]
        start, degree = row["rank_start"], row["sp_degree"]
        assert start % degree == 0
        ranks = set(range(start, start + degree))
        assert ranks <= set(range(world))
        used = taken.setdefault((row["step"], row["micro_step"]), set())
        assert not used & ranks
        used |= ranks
    micro_steps: dict[int, set[int]] = {}
    for step, micro in taken:
        micro_steps.setdefault(step, set()).add(micro)
    assert sorted(micro_steps) == list(range(len(micro_steps)))
    for micros in micro_steps.values():
        assert sorted(micros) == list(range(len(micros)))
    places = [(row["step"], row["micro_step"], row["rank_start"]) for row in rows]
    assert places == sorted(places)


def same(a: Plan, b: Plan) -> bool:
    """Equal in every column (dtypes too) and, as JSON, in everything else."""
    arrays = [f.name for f in dataclasses.fields(Plan) if f.name != "info"]
    info_a, info_b = (json.dumps(dataclasses.asdict(p.info), sort_keys=True) for p in (a, b))
    return info_a == info_b and all(
        np.array_equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in arrays
    )


SAMPLES = st.lists(
    st.integers(1, 60) | st.integers(1, 1200) | st.sampled_from([64, 256, 1024]), min_size=1, max_size=60
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    lengths=SAMPLES,
    dtype=st.sampled_from([np.int32, np.int64, np.uint16]),
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    memory_tokens=st.sampled_from([None, 100, 300, 1000]),
    max_length=st.none() | st.integers(1, 1500),
    batch=st.none() | st.integers(1, 5000),
    short_steps=st.none() | st.integers(0, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_strategy_keeps_the_contract(
    strategy: str,
    lengths: list[int],
    dtype: type,
    world: int,
    memory_tokens: int | None,
    max_length: int | None,
    batch: int | None,
    short_steps: int | None,
    seed: int,
) -> None:
    cost = tiny_cost(world, memory_tokens)

    def plan() -> Plan:
        array = np.array(lengths, dtype)
        options = {"max_length": max_length, "global_batch_tokens": batch, "short_steps": short_steps}
        return make_plan(array, cost, strategy=strategy, seed=seed, **options)

    longest = max_length or max(lengths)
    kept = [length for length in lengths if length <= longest]
    if not kept or not can_fit(cost, max(kept)):
        with pytest.raises(HbpError, match="GiB" if kept else "every sample is longer"):
            plan()
        return
    with TemporaryDirectory() as name:
        folders = [Path(name) / "a", Path(name) / "b"]
        for folder in folders:
            write_plan(plan(), folder)
        assert [(folders[0] / f).read_bytes() for f in FILES] == [(folders[1] / f).read_bytes() for f in FILES]
        assert same(read_plan(folders[0]), plan())
        rows, info = load(folders[0])
    check(rows, info, lengths, world)
    too_long = [i for i, length in enumerate(lengths) if length > longest]
    assert [entry["sample_id"] for entry in info["dropped"]] == too_long
    assert all(f"{lengths[e['sample_id']]} tokens" in e["reason"] for e in info["dropped"])
    groups = [tuple(g[k] for k in ("capacity", "sp_degree", "gc_layers")) for g in info["groups"]]
    assert max_length is None or max(group[0] for group in groups) <= max_length
    assert {(r["capacity"], r["sp_degree"], r["gc_layers"]) for r in rows} <= set(groups)
    for group in groups:
        assert cost.bytes(*group) <= cost.cluster.memory_bytes * (1 + 1e-9)
    check_metrics(info["metrics"], rows, world)


def check_metrics(metrics: dict[str, float], rows: Rows, world: int) -> None:
    assert set(metrics) == METRICS
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(0 <= metrics[name] + 1e-12 < 1 + 1e-9 for name in ("pr", "dbr", "abr"))
    assert 0 <= metrics["cr"] <= 1
    assert 0 < metrics["efficiency"] <= 1 + 1e-9
    slowest: dict[tuple[int, int], float] = {}
    for row in rows:
        place = (row["step"], row["micro_step"])
        slowest[place] = max(slowest.get(place, 0.0), row["predicted_s"])
    steps = rows[-1]["step"] + 1
    overhead = steps * tiny_cost(world).cluster.step_overhead_s
    assert metrics["predicted_s"] == pytest.approx(sum(slowest.values()) + overhead, rel=1e-9)
    assert metrics["ave_tokens"] == pytest.approx(sum(sum(r["lengths"]) for r in rows) / steps)


# Damage


def sound() -> Plan:
    """Two steps on four ranks: (SP 2, 1, 1), (SP 4), then (1, 1)."""
    plan = hand_plan(
        [
            (0, 0, 0, 2, 100, 1.0, [60, 30]),
            (0, 0, 2, 1, 50, 1.0, [40, 10]),
            (0, 0, 3, 1, 50, 1.0, [45]),
            (0, 1, 0, 4, 200, 2.0, [150, 20]),
            (1, 0, 0, 1, 50, 1.0, [50]),
            (1, 0, 1, 1, 50, 1.0, [25, 5, 7]),
        ],
        world=4,
    )
    return completed(plan)


def put(row: int, **values: Any) -> Callable[[Rows, dict[str, Any]], None]:
    return lambda rows, info: rows[row].update(values)


def note(**values: Any) -> Callable[[Rows, dict[str, Any]], None]:
    return lambda rows, info: info.update(values)


def without(rows: Rows, info: dict[str, Any], samples: int) -> None:
    """The last sample of row 0 goes, with its tokens."""
    del rows[0]["sample_ids"][-1], rows[0]["lengths"][-1]
    info["n_tokens"] -= 30
    info["n_samples"] += samples


DAMAGE: dict[str, tuple[Callable[[Rows, dict[str, Any]], None], str]] = {
    "a sample twice": (put(5, sample_ids=[8, 8, 10]), "holds sample 8 2 times"),
    "a sample missing": (lambda rows, info: without(rows, info, 0), "holds sample 1 0 times"),
    "an unknown sample": (put(4, sample_ids=[99]), "names sample 99"),
    "a negative sample": (put(4, sample_ids=[-1]), "names sample -1"),
    "packed and dropped": (note(dropped=[{"sample_id": 3, "reason": "x"}]), "holds sample 3 2 times"),
    "fewer samples than told": (note(n_samples=12), "holds sample 11 0 times"),
    "absurdly many samples": (note(n_samples=10**18), "holds sample 11 0 times"),
    "more samples than told": (note(n_samples=10), "names sample 10"),
    "negative count": (note(n_samples=-1), "n_samples is not a whole number"),
    "over capacity": (put(0, capacity=89), "holds 90 tokens, over its capacity of 89"),
    "two lengths swapped": (put(0, lengths=[30, 60]), "not those of its data set"),
    "no tokens": (put(1, lengths=[50, 0]), "a sample has no tokens"),
    "negative tokens": (put(1, lengths=[51, -1]), "a sample has no tokens"),
    "a length too few": (put(1, lengths=[50]), "more sample ids than lengths"),
    "token count": (note(n_tokens=1), "plan.json counts 1 tokens"),
    "an empty row": (put(4, sample_ids=[], lengths=[]), "holds no samples"),
    "overlap": (put(1, rank_start=1), "overlap or are out of order: both reach rank 1"),
    "one rank twice": (put(2, rank_start=2), "both reach rank 2"),
    "not aligned": (put(3, rank_start=1, sp_degree=2), "does not lie aligned"),
    "outside the world": (put(2, rank_start=4), "inside a world of 4 ranks"),
    "wider than the world": (put(3, sp_degree=8), "inside a world of 4 ranks"),
    "negative rank": (put(3, rank_start=-4), "does not lie aligned"),
    "degree zero": (put(3, sp_degree=0), "does not lie aligned"),
    "smaller world": (note(world_size=2), "inside a world of 2 ranks"),
    "step gap": (lambda rows, info: [r.update(step=2) for r in rows[4:]], "skips a step"),
    "first step 1": (lambda rows, info: [r.update(step=r["step"] + 1) for r in rows], "skips a step"),
    "first step -1": (lambda rows, info: [r.update(step=r["step"] - 1) for r in rows], "skips a step"),
    "micro-step gap": (put(3, micro_step=2), "skips a step or a micro-step"),
    "first micro-step 1": (lambda rows, info: [r.update(micro_step=1) for r in rows[4:]], "skips a step or a micro"),
    "negative micro-step": (put(0, micro_step=-1), "skips a step or a micro"),
    "steps not sorted": (lambda rows, info: rows.reverse(), "not sorted"),
    "micro-steps not sorted": (put(0, micro_step=1), "not sorted"),
    "schema version": (note(schema_version=2), "has schema version 2, this hbp reads 1"),
    "no version": (lambda rows, info: info.pop("schema_version"), "has schema version None"),
    "no world": (lambda rows, info: info.pop("world_size"), "lacks world_size; add the number of ranks"),
    "a batch of no number": (note(settings={"global_batch_tokens": "all"}), "global_batch_tokens is not a whole"),
    "asked for no number": (note(settings={"asked": {"windows": 1.5}}), "windows is not a whole number"),
    "an optimizer of no time": (note(cluster={"step_overhead_s": "long"}), "step_overhead_s is not a number"),
    "an optimizer before time": (note(cluster={"step_overhead_s": -1}), "step_overhead_s is -1"),
    "metrics null": (note(metrics=None), "metrics is not an object"),
    "a boolean world": (note(world_size=True), "world_size is not a whole number"),
    "dropped of no shape": (note(dropped=[3]), "is damaged (TypeError"),
    "dropped far out": (note(dropped=[{"sample_id": 10**30, "reason": "x"}]), "sample_id is not a whole number"),
    "dropped infinite": (note(dropped=[{"sample_id": math.inf, "reason": "x"}]), "sample_id is not a whole number"),
    "half a layer": (note(groups=[{"capacity": 9, "sp_degree": 1, "gc_layers": 0.5}]), "gc_layers is not a whole"),
    "a metric of no number": (note(metrics={"pr": "low"}), "pr is not a number"),
    "a strategy of no text": (note(strategy=3), "strategy is not a text"),
    "fewer layers than none": (put(2, gc_layers=-1), "plan row 2 has -1 recomputed layers"),
    "no time": (put(1, predicted_s=math.nan), "nan predicted seconds"),
    "endless time": (put(1, predicted_s=math.inf), "inf predicted seconds"),
    "time before time": (put(1, predicted_s=-1.0), "-1.0 predicted seconds"),
    "no rows": (lambda rows, info: rows.clear(), "holds sample 0 0 times"),
}


def refusal(folder: Path) -> str:
    with pytest.raises(HbpError) as caught:
        read_plan(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_plan_is_refused(
    damage: Callable[[Rows, dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    write_plan(sound(), tmp_path)
    rows, info = load(tmp_path)
    check(rows, info, sound().lengths.tolist(), 4)
    damage(rows, info)
    del info["checksum"]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / PARQUET_NAME)
    (tmp_path / JSON_NAME).write_text(json.dumps(info))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_offsets": np.array([0, 2, 4, 5, 7, 8])}, "do not line up"),
        ({"sample_offsets": np.array([0, 2, 4, 5, 7, 8, 10])}, "do not line up"),
        ({"sample_offsets": np.array([1, 2, 4, 5, 7, 8, 11])}, "do not line up"),
        ({"sample_offsets": np.array([0, 4, 2, 5, 7, 8, 11])}, "holds no samples"),
        ({"lengths": np.ones(10, np.int32)}, "11 sample ids but 10 lengths"),
        ({name: np.zeros(0, np.int32) for name in SCALAR_COLUMNS}, "do not line up"),
    ],
)
def test_validate_refuses_arrays_that_do_not_line_up(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    damaged = dataclasses.replace(sound(), **change)
    for refuse in (lambda: validate(damaged), lambda: write_plan(damaged, tmp_path / "plan")):
        with pytest.raises(HbpError, match=message):
            refuse()
    assert not (tmp_path / "plan").exists()


METRICS_BY_HAND = {
    "pr": 1 - 442 / 500,
    # a micro-step of [45, 45, 50, 45], one of four alike, one of [50, 37, 0, 0]
    "dbr": ((5 + 5 + 0 + 5) / (50 * 4) + 0 + (0 + 13 + 50 + 50) / (50 * 4)) / 3,
    # ((60² + 30²) / 2, twice, 40² + 10², 45²); alike; (50², 25² + 5² + 7², 0, 0)
    "abr": (2 * (2250 - 2250) + 550 + 225) / (2250 * 4) / 3 + ((2500 - 699) + 2 * 2500) / (2500 * 4) / 3,
    "cr": (90 + 170) / 442,
    "ave_tokens": 442 / 2,
    "predicted_s": 4.0,
}


def test_a_plan_that_says_only_its_world_is_completed_from_its_rows(tmp_path: Path) -> None:
    plan = read_plan(write_by_hand(tmp_path))
    info = plan.info
    assert (info.strategy, info.seed, info.dropped, info.n_samples, info.n_tokens) == ("unnamed", 0, (), 11, 442)
    assert info.lengths_sha256 == hash_lengths(np.array([60, 30, 40, 10, 45, 150, 20, 50, 25, 5, 7]))
    assert set(info.groups) == {Group(50, 1, 0), Group(100, 2, 0), Group(200, 4, 0)}
    assert dict(info.metrics) == pytest.approx(METRICS_BY_HAND)
    assert read_info(tmp_path) == info
    write_plan(plan, tmp_path / "again")
    assert same(read_plan(tmp_path / "again"), plan)


def test_what_a_plan_says_itself_is_kept(tmp_path: Path) -> None:
    """With the fixed keys of the contract; a group that it does not list is added, a metric that it has is its own."""
    groups = [{"capacity": 200, "sp_degree": 4, "gc_layers": 0}]
    own = {"groups": groups, "metrics": {"pr": 0.5}, "dropped": [{"sample_id": 11, "reason": "too long"}]}
    info = read_plan(write_by_hand(tmp_path, **own, strategy="theirs", settings={"colour": "red"})).info
    assert info.groups[0] == Group(200, 4, 0) and len(info.groups) == 3
    assert dict(info.metrics) == pytest.approx({**METRICS_BY_HAND, "pr": 0.5})
    assert (info.strategy, info.n_samples, info.settings) == ("theirs", 12, {"colour": "red"})
    assert info.lengths_sha256 == "", "lengths of dropped samples are not known"


def test_a_step_overhead_counts(tmp_path: Path) -> None:
    plan = read_plan(write_by_hand(tmp_path, cluster={"step_overhead_s": 0.25, "what": "ours"}))
    assert plan.info.metrics["predicted_s"] == 4.5


def test_lengths_of_a_plan_with_dropped_samples_need_not_hash(tmp_path: Path) -> None:
    plan = make_plan(np.array([5, 900, 7]), tiny_cost(1), max_length=64)
    write_plan(plan, tmp_path)
    assert plan.info.lengths_sha256 == hash_lengths(np.array([5, 900, 7]))
    assert read_plan(tmp_path).info.dropped == ((1, "900 tokens, longer than the longest group (64)"),)


def test_a_plan_of_several_row_groups_is_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sound()
    monkeypatch.setattr("hbp.plan.PACKS_AT_A_TIME", 4)
    write_plan(sound(), tmp_path)
    assert pq.ParquetFile(tmp_path / PARQUET_NAME).num_row_groups == 2
    assert same(read_plan(tmp_path), whole)
    assert load(tmp_path)[0][5]["lengths"] == [25, 5, 7]
    assert sound().tokens().tolist() == [90, 50, 45, 170, 50, 37]


def test_files_that_are_missing_or_foreign(tmp_path: Path) -> None:
    assert "plan.json is missing" in refusal(tmp_path)
    write_plan(sound(), tmp_path)
    (tmp_path / PARQUET_NAME).unlink()
    assert f"no {PARQUET_NAME}" in refusal(tmp_path)
    pq.write_table(pa.table({"step": [1]}), tmp_path / PARQUET_NAME)
    assert "lacks the columns capacity, gc_layers" in refusal(tmp_path)
    columns = {name: ["x"] for name in SCHEMA.names}
    pq.write_table(pa.table(columns), tmp_path / PARQUET_NAME)
    assert "does not fit the plan's schema" in refusal(tmp_path)
    nulls = {field.name: pa.array([None], field.type) for field in SCHEMA}
    pq.write_table(pa.table(nulls), tmp_path / PARQUET_NAME)
    refusal(tmp_path)
    for content in (b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"schema_version": ' + b"1" * 5000 + b"}"):
        (tmp_path / JSON_NAME).write_bytes(content)
        refusal(tmp_path)
        with pytest.raises(HbpError):
            read_info(tmp_path)


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_random_damage_is_refused_or_harmless(file: str, data: st.DataObject) -> None:
    plan = sound()
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_plan(plan, folder)
        content = bytearray((folder / file).read_bytes())
        if data.draw(st.booleans(), "truncate"):
            content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
        else:
            place = st.integers(0, len(content) - 1)
            flips = data.draw(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=6), "flips")
            for at, bits in flips:
                content[at] ^= bits
        (folder / file).write_bytes(content)
        try:
            read = read_plan(folder)
        except HbpError as error:
            assert "\n" not in str(error)
            return
        assert same(read, plan)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [place for key in keys for place in [(data, key), *places(data[key])]]


MADE = make_plan(np.array([5, 900, 7, 30, 60]), tiny_cost(2), max_length=64)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_json_in_place_of_any_is_refused(data: st.DataObject) -> None:
    """Without its checksum, as another tool writes it, it may be well-formed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_plan(MADE, folder)
        info = json.loads((folder / JSON_NAME).read_text())
        container, key = data.draw(st.sampled_from(places(info)), "place")
        container[key] = data.draw(ANYTHING, "value")
        read = MADE.info
        for checksum in (True, False):
            if not checksum:
                info.pop("checksum")
            (folder / JSON_NAME).write_text(json.dumps(info))
            try:
                plan = read_plan(folder)
            except HbpError as error:
                assert "\n" not in str(error)
            else:
                assert same(plan, MADE) or not checksum
                read = plan.info
    whole = [read.seed, read.world_size, read.n_samples, read.n_tokens, *(i for i, _ in read.dropped)]
    whole += [value for group in read.groups for value in dataclasses.astuple(group)]
    assert all(type(value) is int and value >= 0 for value in whole)
    assert all(isinstance(value, int | float) for value in [*read.metrics.values(), *read.details.values()])
    assert isinstance(read.strategy, str)


OTHER_TYPES = (pa.string(), pa.int64(), pa.float64(), pa.list_(pa.int64()), pa.list_(pa.string()))


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_column_missing_doubled_null_or_of_another_type_is_refused_or_harmless(column: str, tmp_path: Path) -> None:
    plan = sound()
    write_plan(plan, tmp_path)
    table = pq.read_table(tmp_path / PARQUET_NAME)
    at, own = table.column_names.index(column), table.column(column)
    empty = {kind: pa.array([[] if pa.types.is_list(kind) else None] * plan.n_packs, kind) for kind in OTHER_TYPES}
    damaged = [table.drop_columns([column]), table.append_column(column, own)]
    damaged += [table.set_column(at, column, values) for values in empty.values()]
    damaged += [table.set_column(at, column, pa.array([*own.to_pylist()[:-1], None]))]
    for kind in OTHER_TYPES:
        try:
            damaged.append(table.set_column(at, column, own.cast(kind)))
        except pa.ArrowException:
            continue
    for wrong in damaged:
        pq.write_table(wrong, tmp_path / PARQUET_NAME)
        try:
            assert same(read_plan(tmp_path), plan)
        except HbpError as error:
            assert "\n" not in str(error)


def test_no_flipped_byte_of_the_table_goes_unseen(tmp_path: Path) -> None:
    """Pages have checksums; the footer has not, but it has names and types."""
    plan = sound()
    write_plan(plan, tmp_path)
    content = (tmp_path / PARQUET_NAME).read_bytes()
    for at in range(0, len(content), 9):
        flipped = bytearray(content)
        flipped[at] ^= 0x80
        (tmp_path / PARQUET_NAME).write_bytes(flipped)
        try:
            assert same(read_plan(tmp_path), plan)
        except HbpError as error:
            assert "\n" not in str(error)

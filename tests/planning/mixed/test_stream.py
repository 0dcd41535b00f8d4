"""A stream planned in pieces: together they are a plan, and a restored planner goes on as the first one would have."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from plans import tiny_cost

from hbp.errors import HbpError
from hbp.plan import Group, Plan, hash_lengths, validate
from hbp.planning.mixed.stream import StreamPlanner

MOST = 1000
GROUPS = (Group(200, 1, 0), Group(MOST, 2, 4))  # given, since the search is tested elsewhere and takes longer


def pieces_of(planner: StreamPlanner, lengths: np.ndarray, chunk: int) -> list[Plan]:
    pieces = []
    for at in range(0, len(lengths), chunk):
        pieces += planner.add(lengths[at : at + chunk])
        assert len(planner.ids) < planner.buffer_samples
    last = planner.finish()
    return pieces + ([last] if last else [])


def joined(pieces: list[Plan], lengths: np.ndarray, dropped: list[tuple[int, str]]) -> Plan:
    """All rows as one plan of the whole stream."""
    info = replace(
        pieces[0].info,
        n_samples=len(lengths),
        n_tokens=sum(piece.info.n_tokens for piece in pieces),
        lengths_sha256=hash_lengths(lengths),
        dropped=tuple(dropped),
        settings={},
    )
    columns = ("micro_step", "rank_start", "sp_degree", "gc_layers", "capacity", "predicted_s")
    sizes = np.concatenate([np.diff(piece.sample_offsets) for piece in pieces])
    return Plan(
        info,
        **{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in columns},
        step=np.concatenate([piece.step + piece.info.settings["stream"]["first_step"] for piece in pieces]),
        sample_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        sample_ids=np.concatenate([piece.sample_ids for piece in pieces]),
        lengths=np.concatenate([piece.lengths for piece in pieces]),
    )


def rows(pieces: list[Plan]) -> list[tuple[list[int], ...]]:
    return [
        (piece.step.tolist(), piece.rank_start.tolist(), piece.sample_offsets.tolist(), piece.sample_ids.tolist())
        for piece in pieces
    ]


@given(
    st.lists(st.integers(1, 1100), min_size=1, max_size=300),
    st.integers(1, 120),
    st.integers(1, 50),
    st.sampled_from([2, 8]),
)
@cases(40)
def test_pieces_together_are_a_plan(found: list[int], buffer: int, chunk: int, world: int) -> None:
    lengths = np.array(found, np.int32)
    planner = StreamPlanner(tiny_cost(world, MOST), buffer, MOST, groups=GROUPS)
    pieces = pieces_of(planner, lengths, chunk)
    dropped = [entry for piece in pieces for entry in piece.info.dropped]
    named = [sample for sample, _ in dropped] + [sample for sample, _ in planner.too_long]
    assert sorted(named) == np.flatnonzero(lengths > MOST).tolist()
    assert all(f"longer than the longest group ({MOST})" in reason for _, reason in dropped)
    if pieces:
        left = [(sample, "too long, after the last rows") for sample, _ in planner.too_long]
        validate(joined(pieces, lengths, dropped + left))


@given(st.lists(st.integers(1, 1100), min_size=50, max_size=200), st.integers(5, 60), st.integers(0, 150))
@cases(15)
def test_a_restored_planner_goes_on_as_the_first_would_have(found: list[int], buffer: int, cut: int) -> None:
    lengths, cost = np.array(found, np.int32), tiny_cost(4, MOST)
    first = StreamPlanner(cost, buffer, MOST, groups=GROUPS, seed=3, global_batch_tokens=5000)
    before = list(first.add(lengths[:cut]))
    second = StreamPlanner.restore(cost, json.loads(json.dumps(first.state())))
    assert rows(pieces_of(first, lengths[cut:], 7)) == rows(pieces_of(second, lengths[cut:], 7))
    whole = StreamPlanner(cost, buffer, MOST, groups=GROUPS, seed=3, global_batch_tokens=5000)
    assert rows(before) == rows(list(whole.add(lengths[:cut])))


def test_a_larger_buffer_balances_better() -> None:
    lengths = np.random.default_rng(0).integers(1, MOST, 4000).astype(np.int32)
    seconds = {}
    for buffer in (50, 1000):
        pieces = pieces_of(StreamPlanner(tiny_cost(8, MOST), buffer, MOST), lengths, 500)
        seconds[buffer] = sum(float(piece.micro_step_seconds().sum()) for piece in pieces)
    assert seconds[1000] < 0.95 * seconds[50]


def test_wrong_input_is_one_line() -> None:
    cost = tiny_cost(2, MOST)
    planner = StreamPlanner(cost, 10, MOST)
    assert planner.finish() is None
    cases = (
        (lambda: list(planner.add(np.array([3, 0]))), "sample 1 has 0 tokens"),
        (lambda: StreamPlanner(cost, 0, MOST), "a buffer of 0 samples"),
        (lambda: StreamPlanner(cost, 10, 10**6), "a pack of 1000000 tokens needs"),
        (lambda: StreamPlanner.restore(cost, {"groups": None}), "the stream's state is damaged"),
    )
    for call, message in cases:
        with pytest.raises(HbpError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), r"groups of \[\] tokens are not in order"),
        ((Group(MOST, 2, 4), Group(200, 1, 0)), r"groups of \[1000, 200\] tokens are not in order"),
        ((Group(200, 1, 0), Group(200, 2, 0), Group(MOST, 2, 4)), "not in order"),
        ((Group(0, 1, 0), Group(MOST, 2, 4)), "not in order"),
        ((Group(200, 1, 0), Group(MOST - 1, 2, 4)), "the last group holds 999 tokens, but samples may have 1000"),
        ((Group(MOST, 3, 4),), "6 ranks have no groups of SP degree 3 .* give one of 1, 2"),
        ((Group(MOST, 0, 4),), "no groups of SP degree 0"),
        ((Group(MOST, 2, 5),), "give 3 to 4 recomputed layers"),
        ((Group(MOST, 2, 1),), "give 3 to 4 recomputed layers"),
        ((Group(3 * MOST, 1, 4),), "give a shorter group or a higher degree"),
    ],
)
def test_groups_that_cannot_run_are_refused(groups: tuple[Group, ...], message: str) -> None:
    cost = tiny_cost(6, MOST)
    assert cost.fewest_gc_layers(MOST, 2) == 3
    StreamPlanner(cost, 10, MOST, groups=GROUPS)
    state = StreamPlanner(cost, 10, MOST).state()
    for call in (
        lambda: StreamPlanner(cost, 10, MOST, groups=groups),
        lambda: StreamPlanner.restore(cost, {**state, "groups": [dataclasses.astuple(group) for group in groups]}),
    ):
        with pytest.raises(HbpError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_pieces_are_plan_folders(tmp_path: Path) -> None:
    lengths = np.random.default_rng(1).integers(1, 1100, 400).astype(np.int32)
    pieces = pieces_of(StreamPlanner(tiny_cost(2, MOST), 100, MOST, groups=GROUPS), lengths, 64)
    assert len(pieces) > 2
    first_step = 0
    for number, piece in enumerate(pieces):
        piece.save(tmp_path / str(number))
        again = Plan.load(tmp_path / str(number))
        assert again.info.dropped == piece.info.dropped and rows([again]) == rows([piece])
        assert again.info.settings["stream"] == {"piece": number, "first_step": first_step}
        assert np.array_equal(again.lengths, lengths[again.sample_ids])
        first_step += again.n_steps


def test_a_damaged_piece_is_refused() -> None:
    lengths = np.random.default_rng(1).integers(1, MOST, 100).astype(np.int32)
    piece = pieces_of(StreamPlanner(tiny_cost(2, MOST), 50, MOST, groups=GROUPS), lengths, 64)[0]
    twice = piece.sample_ids.copy()
    twice[0] = twice[1]
    with pytest.raises(HbpError, match=f"plan holds sample {twice[0]} 2 times"):
        validate(replace(piece, sample_ids=twice))
    swapped = piece.sample_ids.copy()
    low, high = int(piece.lengths.argmin()), int(piece.lengths.argmax())
    swapped[[low, high]] = swapped[[high, low]]
    with pytest.raises(HbpError, match="lengths are not those of its samples"):
        validate(replace(piece, sample_ids=swapped))

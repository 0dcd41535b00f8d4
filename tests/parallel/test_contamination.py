"""A marker planted in a neighbour document changes no logit, at every SP degree and on each attention path of a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from workers import CPU, LLAMA, MISTRAL, run_ranks, write_config

from hbp.parallel.gather_kv import tokens_of_rank
from hbp.parallel.mesh import make_mesh
from hbp.parallel.varlen import document_attention, make_documents
from hbp.train.batch import micro_batch_of
from hbp.train.model import load_model
from tests.parallel.test_varlen import qkv

WORLD, MARKER, PLANTED = 4, 63, 1
LENGTHS = (9, 14, 1, 22, 11)
"""The marker is planted in the second: a document lies before it, and three behind it, to the last rank."""
FEW_HEADS = {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1}  # degree 4 gathers keys and values
PATHS = {
    "sdpa": (LLAMA, "sdpa"),
    "eager": (LLAMA, "eager"),
    "window": (MISTRAL, "sdpa"),
    "eager window": (MISTRAL, "eager"),
    "gathered": (FEW_HEADS, "sdpa"),
    "eager gathered": (FEW_HEADS, "eager"),
}
DEGREES = (1, 2, 4)
CASES = [(path, degree) for path in PATHS for degree in DEGREES]


def documents(marked: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = [rng.integers(0, MARKER, n).astype(np.int32) for n in LENGTHS]
    if marked:
        made[PLANTED][:] = MARKER
    return [(ids, np.ones(len(ids), np.uint8)) for ids in made]


def logits_of(rank: int, world: int, folders: dict[str, str]) -> dict[tuple[str, int], Any]:
    """By path and degree: the place of each token of this rank, its position, its logits without and with marker."""
    found = {}
    for path, (config, kernel) in PATHS.items():
        mesh = make_mesh(world, DEGREES, "cpu", config["num_attention_heads"])
        lm = load_model(folders[path], seed=5, attention=kernel).lm
        for degree in DEGREES:
            groups, both = mesh.groups(degree), []
            for marked in (False, True):
                batch = micro_batch_of(documents(marked), 0, degree, rank % degree, 0, mesh, CPU)
                inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "hbp_layout": batch.layout}
                with torch.no_grad():
                    hidden = lm.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]
                    both.append(lm.get_output_embeddings()(hidden))
            lengths = batch.layout.documents.lengths
            total = sum(lengths)
            place = np.concatenate([np.arange(total)[run] for run in tokens_of_rank(lengths, groups, rank % degree)])
            found[path, degree] = place, batch.position_ids[0].numpy(), *(each.numpy() for each in both)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Any]]:
    root = tmp_path_factory.mktemp("models")
    return run_ranks(logits_of, WORLD, {path: write_config(root / path, config) for path, (config, _) in PATHS.items()})


def pack(runs: list[dict[tuple[str, int], Any]], path: str, degree: int) -> tuple[np.ndarray, ...]:
    """Positions and both logits of the pack's tokens in their order, from the ranks of its group."""
    ranks = [run[path, degree] for run in runs[:degree]]
    place, *columns = (np.concatenate(parts) for parts in zip(*ranks, strict=True))
    order = np.argsort(place)[: sum(LENGTHS)]  # what rounds the pack up comes last
    return tuple(column[order] for column in columns)


@pytest.mark.parametrize(("path", "degree"), CASES)
def test_a_marker_in_a_neighbour_changes_no_logit(runs: Any, path: str, degree: int) -> None:
    _, without, marked = pack(runs, path, degree)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    np.testing.assert_array_equal(without[document != PLANTED], marked[document != PLANTED])  # to the last bit
    changed = np.abs(without - marked).max(axis=1)[document == PLANTED]
    assert (changed > 1e-3).all()  # the marker is seen where it is


@pytest.mark.parametrize(("path", "degree"), CASES)
def test_positions_restart_in_each_document(runs: Any, path: str, degree: int) -> None:
    positions, _, _ = pack(runs, path, degree)
    assert positions.tolist() == [i for length in LENGTHS for i in range(length)]


@pytest.mark.parametrize(("path", "degree"), [case for case in CASES if case[1] > 1])
def test_every_degree_gives_the_same_logits(runs: Any, path: str, degree: int) -> None:
    """So that no degree passes by seeing nothing."""
    np.testing.assert_allclose(pack(runs, path, degree)[2], pack(runs, path, 1)[2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # no compiler here
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "eager"])
def test_attention_alone_sees_no_neighbour(kernel: str, window: int | None) -> None:
    """FlexAttention has no backward on a CPU, so no model trains with it there, but its masks are the same."""
    layout, document = make_documents(LENGTHS, CPU), np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    inputs, there = [x.detach().clone() for x in qkv(sum(LENGTHS), 2)], torch.from_numpy(document == PLANTED)
    plain = document_attention(*inputs, layout, sliding_window=window, kernel=kernel)
    for x in inputs:
        x[there] = 100.0
    marked = document_attention(*inputs, layout, sliding_window=window, kernel=kernel)
    assert torch.equal(plain[~there], marked[~there])
    assert not torch.isclose(plain[there], marked[there]).any()

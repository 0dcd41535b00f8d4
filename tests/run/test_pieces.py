"""A plan in pieces, as a stream is planned: the parts of an epoch, one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jobs import config_of, run_here, steps_of, write_job
from plans import plan_of, tiny_cost
from workers import run_ranks

from hbp.config import Config
from hbp.errors import HbpError
from hbp.plan import Plan, read_plan, write_plan
from hbp.planning.mixed.stream import StreamPlanner
from hbp.run.fit_memory import check_plan, check_plans, own_plans
from hbp.train.loop import learning_rate

LENGTHS = np.array([5, 7, 3, 9], np.int32)


def stream(lengths: np.ndarray, buffer: int) -> list[Plan]:
    """The pieces of these samples, for two ranks."""
    planner = StreamPlanner(tiny_cost(2), buffer, int(lengths.max()), global_batch_tokens=150)
    last = [*planner.add(lengths), planner.finish()]
    return [piece for piece in last if piece is not None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, dict, dict]:
    """One left alone; one that is stopped in its first piece and goes on alone. Their summaries."""
    job = write_job(tmp_path_factory.mktemp("pieces"), samples=46, train={"export": False, "save_steps": None})
    run_ranks(run_here, 1, config_of(job, f"run_dir={job / 'lengths'}"), 1)
    pieces = stream(np.load(job / "lengths" / "lengths.npy"), 25)
    assert len(pieces) == 2
    for number, plan in enumerate(pieces):
        write_plan(plan, job / "stream" / f"piece-{number:05d}")
    path = f"plan.path={job / 'stream'}"
    whole, stopped = (config_of(job, f"run_dir={job / name}", path) for name in ("whole", "stopped"))
    (summary, _), _ = run_ranks(run_here, 2, whole)
    run_ranks(run_here, 2, stopped, 2)
    ((again, _),) = run_ranks(run_here, 1, stopped)
    return job, whole, summary, again


def test_pieces_are_followed_one_after_another(runs: tuple[Path, Config, dict, dict]) -> None:
    job, config, summary, _ = runs
    pieces = [read_plan(job / "stream" / f"piece-0000{number}") for number in (0, 1)]
    records = [steps_of(job / "whole" / "hbp-mixed"), steps_of(job / "whole" / "hbp-mixed" / "part-1")]
    assert [[record["tokens"] for record in part] for part in records] == [
        np.bincount(piece.step, piece.tokens()).tolist() for piece in pieces
    ]
    done, total = 0, sum(piece.info.n_tokens for piece in pieces)
    for record in (*records[0], *records[1]):  # one learning-rate schedule over both
        assert record["lr"] == learning_rate(config.train, done, record["tokens"], total)
        done += record["tokens"]
    (result,) = summary["results"]
    assert result["tokens"] == total
    assert [part["steps"] for part in result["parts"]] == [piece.n_steps for piece in pieces]


def test_pieces_for_other_ranks_are_planned_again(runs: tuple[Path, Config, dict, dict]) -> None:
    """What is left of the first, and the second; every sample is trained on once."""
    job, _, summary, again = runs
    folder = job / "stopped" / "hbp-mixed"
    plans = [read_plan(folder / part / "plan") for part in ("", "part-1", "part-2")]
    assert [plan.info.world_size for plan in plans] == [2, 1, 1]
    before = plans[0].sample_ids[: plans[0].sample_offsets[np.searchsorted(plans[0].step, 2)]]
    trained = [np.load(folder / "samples.npy")[before]]
    for part, plan in zip(("part-1", "part-2"), plans[1:], strict=True):
        trained.append(np.load(folder / part / "samples.npy")[plan.sample_ids])
    assert sorted(np.concatenate(trained).tolist()) == sorted(np.load(folder / "samples.npy").tolist())
    assert again["results"][0]["tokens"] == summary["results"][0]["tokens"]


def test_a_plan_of_fewer_samples_is_refused_unless_it_is_a_piece() -> None:
    plan = plan_of([(0, 0, 0, 1, 0, [0, 1, 2, 3])], LENGTHS, 1)
    check_plan(plan, LENGTHS, 1)
    for lengths in (np.append(LENGTHS, np.int32(4)), LENGTHS[:3], LENGTHS[::-1]):
        with pytest.raises(HbpError, match="made for other data"):
            check_plan(plan, lengths, 1)


def test_pieces_hold_every_sample_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 90).astype(np.int32)
    pieces = stream(lengths, 30)
    assert len(pieces) > 2
    check_plans(pieces, lengths, 2)
    for some, times in ((pieces[1:], 0), (pieces[:-1], 0), ([*pieces, pieces[0]], 2)):
        with pytest.raises(HbpError, match=f"hold sample [0-9]+ {times} times, of 90"):
            check_plans(some, lengths, 2)
    with pytest.raises(HbpError, match="made for other data"):
        check_plans(pieces, lengths[:60], 2)
    with pytest.raises(HbpError, match="made for 2 ranks but 4"):
        check_plans(pieces, lengths, 4)


def test_a_folder_of_one_plan_is_that_plan(tmp_path: Path) -> None:
    write_plan(plan_of([(0, 0, 0, 1, 0, [0, 1, 2, 3])], LENGTHS, 1), tmp_path)
    config = Config.model_validate({"model": {"path": "none"}, "plan": {"path": str(tmp_path)}})
    assert own_plans(config) == [tmp_path]
    assert own_plans(Config.model_validate({"model": {"path": "none"}})) == []

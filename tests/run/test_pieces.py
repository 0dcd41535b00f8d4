"""A plan in pieces, as a stream is planned: the parts of an epoch, one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jobs import config_of, run_here, steps_of, write_job
from plans import Row, plan_of
from workers import run_ranks

from hbp.config import Config
from hbp.errors import HbpError
from hbp.plan import Plan, read_plan, write_plan
from hbp.run.fit_memory import check_plan, own_plans
from hbp.train.loop import learning_rate

LENGTHS = np.array([5, 7, 3, 9], np.int32)


def halves(lengths: np.ndarray) -> list[Plan]:
    """Two plans for two ranks of four samples a step, each of half of the samples; the other half is dropped there."""
    plans = []
    for ids in np.array_split(np.arange(len(lengths)), 2):
        steps = [ids[i : i + 4].tolist() for i in range(0, len(ids), 4)]
        rows: list[Row] = [
            (step, 0, rank, 1, 0, four[rank::2]) for step, four in enumerate(steps) for rank in (0, 1) if four[rank:]
        ]
        plans.append(plan_of(rows, lengths, 2))
    return plans


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config, dict, dict]:
    """One left alone; one that is stopped in its first piece and goes on alone. Their summaries."""
    job = write_job(tmp_path_factory.mktemp("pieces"), samples=38, train={"export": False, "save_steps": None})
    one_step = config_of(job, f"run_dir={job / 'lengths'}")
    run_ranks(run_here, 1, one_step, 1)
    for number, plan in enumerate(halves(np.load(job / "lengths" / "lengths.npy"))):
        write_plan(plan, job / "stream" / f"piece-{number:05d}")
    whole, stopped = (
        config_of(job, f"run_dir={job / name}", f"plan.path={job / 'stream'}") for name in ("whole", "stopped")
    )
    (summary, _), _ = run_ranks(run_here, 2, whole)
    run_ranks(run_here, 2, stopped, 2)
    ((again, _),) = run_ranks(run_here, 1, stopped)
    return job, whole, summary, again


def test_pieces_are_followed_one_after_another(runs: tuple[Path, Config, dict, dict]) -> None:
    job, config, summary, _ = runs
    pieces = [read_plan(job / "stream" / f"piece-0000{number}") for number in (0, 1)]
    records = [steps_of(job / "whole" / "hand"), steps_of(job / "whole" / "hand" / "part-1")]
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
    folder = job / "stopped" / "hand"
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


def test_a_folder_of_one_plan_is_that_plan(tmp_path: Path) -> None:
    write_plan(plan_of([(0, 0, 0, 1, 0, [0, 1, 2, 3])], LENGTHS, 1), tmp_path)
    config = Config.model_validate({"model": {"path": "none"}, "plan": {"path": str(tmp_path)}})
    assert own_plans(config) == [tmp_path]
    assert own_plans(Config.model_validate({"model": {"path": "none"}})) == []

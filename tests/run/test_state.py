"""State that a folder holds is used, set aside whole, or refused in one line; nothing else happens to it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from jobs import config_of, hbp_here, run_here, steps_of, write_job
from workers import run_ranks

from hbp.config import Config
from hbp.errors import HbpError, RankFailed
from hbp.plan import read_info
from hbp.run.audit import audit_run
from hbp.run.identity import read_record
from hbp.run.job import _clear, _with_baseline, folder_name
from hbp.run.resume import set_aside_run
from hbp.train import checkpoint as checkpoints_module
from hbp.train.checkpoint import list_checkpoints, newest_checkpoint


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("state"), 60, train={"keep_checkpoints": 5, "export": False})


@pytest.fixture(scope="module")
def finished_once(job: Path) -> Path:
    train(job, "finished")
    return job / "finished"


@pytest.fixture(scope="module")
def stopped_once(job: Path) -> Path:
    """Stopped after five steps, each of them saved."""
    train(job, "stopped", "train.save_steps=1", stop=5)
    return job / "stopped"


@pytest.fixture
def finished(finished_once: Path, job: Path) -> Path:
    return Path(shutil.copytree(finished_once, fresh(job)))


@pytest.fixture
def stopped(stopped_once: Path, job: Path) -> Path:
    return Path(shutil.copytree(stopped_once, fresh(job)))


def fresh(job: Path) -> Path:
    return job / f"run-{len(list(job.iterdir()))}"


def train(job: Path, run: str, *overrides: str, stop: int | None = None, ranks: int = 1) -> tuple[Any, str]:
    """The summary or what was said when it was stopped or refused, and standard error."""
    return run_ranks(run_here, ranks, config_of(job, f"run_dir={job / run}", *overrides), stop)[0]


def contents(run: Path) -> dict[str, tuple[int, int]]:
    """Everything that decides a run, by what a rewrite would change."""
    kept = [path for path in run.rglob("*") if path.is_file() and path.name not in ("contents.json", "lengths.npy")]
    stats = {str(path.relative_to(run)): path.stat() for path in kept if ".owner" not in path.name}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items() if not name.startswith("store")}


def steps(run: Path) -> list[int]:
    return [record["step"] for record in steps_of(run / "hbp")]


# A run that is finished


def test_a_finished_run_is_used_as_it_is_wherever_its_files_were_moved(job: Path, finished: Path) -> None:
    before = contents(finished)
    os.utime(job / "data.jsonl")
    os.utime(job / "model" / "config.json")
    moved = job / f"moved-{finished.name}"
    for name in ("model", "tokenizer"):
        shutil.copytree(job / name, moved / name)
        (moved / name / "README.md").write_text("not what it is")
    shutil.copyfile(job / "data.jsonl", moved / "other.jsonl")
    paths = (f"model.path={moved / 'model'}", f"data.tokenizer={moved / 'tokenizer'}")
    paths = (*paths, f"data.source={moved / 'other.jsonl'}", "data.processes=2")
    summary, said = train(job, finished.name, *paths, "train.save_steps=3", "log.wandb_mode=offline")
    assert summary == json.loads((finished / "summary.json").read_text())
    assert "holds this run, finished" in said
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.lr=1e-3", "nothing is left that train.lr (was 0.01, now 0.001) could change"),
        ("cluster.memory_gib=0.5", "nothing is left that cluster.memory_gib"),
        ("plan.strategy=bfd", "nothing is left that plan.strategy (was 'hbp', now 'bfd') could change"),
        ("seed=3", "is of another run: seed was 0, now 3"),
        ("plan.global_batch_tokens=99", "is of another run: plan.global_batch_tokens was 150, now 99"),
    ],
)
def test_a_finished_run_is_never_trained_anew_for_a_changed_option(
    job: Path, finished: Path, change: str, said: str
) -> None:
    """Refused before any rank is started."""
    before = contents(finished)
    refused = hbp_here("train", str(job / "cfg.yaml"), f"run_dir={finished}", change)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if "error" in line]) == 1
    assert contents(finished) == before


def test_a_changed_model_is_another_run(job: Path, finished: Path) -> None:
    other = json.loads((job / "model" / "config.json").read_text()) | {"rms_norm_eps": 1e-4}
    (job / "other").mkdir(exist_ok=True)
    (job / "other" / "config.json").write_text(json.dumps(other))
    refused = hbp_here("train", str(job / "cfg.yaml"), f"run_dir={finished}", f"model.path={job / 'other'}")
    assert "is of another run: the model in model.path has changed" in refused.stderr


def test_more_epochs_go_on_where_the_run_ended(job: Path, finished: Path) -> None:
    first = steps_of(finished / "hbp")
    summary, said = train(job, finished.name, "train.epochs=2")
    assert "train.epochs was 1, now 2: that many in all" in said
    assert steps_of(finished / "hbp") == first
    (result,) = summary["results"]
    assert [part["steps"] for part in result["parts"]] == [len(first), len(steps_of(finished / "hbp" / "part-1"))]
    assert all(epoch.holds and not epoch.under_way for epoch in audit_run(finished))
    assert len(audit_run(finished)) == 2
    later = steps_of(finished / "hbp" / "part-1")
    assert 0.5e-2 < later[0]["lr"] < 0.6e-2  # the cosine's middle, of two epochs
    refused, _ = train(job, finished.name)
    assert "finished after 2 epochs, now 1" in refused


@pytest.mark.parametrize("name", ["summary.json", "run.json"])
def test_a_file_that_was_cut_short_is_made_again_from_the_last_checkpoint(job: Path, finished: Path, name: str) -> None:
    was, before = json.loads((finished / "summary.json").read_text()), contents(finished)
    (finished / name).write_text("{")
    summary, _ = train(job, finished.name)
    assert summary["results"][0]["steps"] == was["results"][0]["steps"]
    assert summary["results"][0]["final_train_loss"] == was["results"][0]["final_train_loss"]
    record = read_record(finished / "run.json")
    assert record is not None and record.trained
    for path in [path for path in before if "/checkpoints/" in path]:
        assert contents(finished)[path] == before[path]


def test_a_finished_run_without_what_could_make_its_summary_is_refused(job: Path, finished: Path) -> None:
    shutil.rmtree(finished / "hbp" / "checkpoints")
    (finished / "summary.json").unlink()
    before = contents(finished)
    refused, _ = train(job, finished.name)
    assert "finished, but no checkpoint to go on from (its summary.json is missing or damaged)" in refused
    assert contents(finished) == before


# A run that is not finished


def test_an_emptied_run_json_is_told_by_the_newest_checkpoint(job: Path, stopped: Path) -> None:
    whose = read_record(stopped / "run.json")
    (stopped / "run.json").write_text("")
    _, said = train(job, stopped.name)
    assert "resuming from" in said and "step 5, " in said
    again = read_record(stopped / "run.json")
    assert again is not None and whose is not None and again.id == whose.id


def cut_short(path: Path, *, gone: bool = False) -> None:
    path.unlink() if gone else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["plan/plan.json", "plan/plan.parquet", "samples.npy", "part.json"])
def test_what_follows_from_data_options_and_seed_is_made_again(
    job: Path, stopped: Path, finished_once: Path, name: str
) -> None:
    """They were refused with advice (make the plan again) that nobody with a run could follow."""
    plan = stopped / "hbp" / "plan" / "plan.parquet"
    was = plan.read_bytes()
    cut_short(stopped / "hbp" / name, gone=name == "samples.npy")
    summary, said = train(job, stopped.name)
    assert "step 5, " in said and (plan.read_bytes() == was)
    assert not (stopped / "hbp" / "plan.damaged").exists()
    whole = json.loads((finished_once / "summary.json").read_text())["results"][0]
    assert summary["results"][0]["final_train_loss"] == whole["final_train_loss"]
    assert summary["results"][0]["steps"] == whole["steps"]


def test_the_plan_of_a_later_epoch_is_made_again(job: Path, finished: Path) -> None:
    train(job, finished.name, "train.epochs=2", "train.save_steps=1")
    plan = finished / "hbp" / "part-1" / "plan" / "plan.parquet"
    was = plan.read_bytes()
    for name in ("plan/plan.json", "samples.npy", "part.json"):
        cut_short(finished / "hbp" / "part-1" / name)
    summary, said = train(job, finished.name, "train.epochs=3")
    assert "by its plan's seed the part is of epoch 2" in said and plan.read_bytes() == was
    assert len(summary["results"][0]["parts"]) == 3


def test_plans_of_a_finished_run_and_of_epochs_that_are_done_are_made_again(job: Path, finished: Path) -> None:
    plan = finished / "hbp" / "plan" / "plan.parquet"
    was = plan.read_bytes()
    cut_short(plan)
    _, said = train(job, finished.name)
    assert "holds this run, finished" in said and "the plan is made again" in said and plan.read_bytes() == was
    train(job, finished.name, "train.epochs=2")
    cut_short(finished / "hbp" / "plan" / "plan.json")
    _, said = train(job, finished.name, "train.epochs=3")
    assert "the plan is made again" in said and plan.read_bytes() == was


def test_a_plan_of_a_part_that_is_done_is_made_again_by_the_options_of_then(job: Path, stopped: Path) -> None:
    change = "plan.strategy=bfd"
    train(job, stopped.name, change, "train.save_steps=1", stop=2)
    path = stopped / "hbp" / "plan" / "plan.json"
    was = path.read_bytes()
    cut_short(path)
    refused, _ = train(job, stopped.name, change)
    assert "run once with the options and ranks that it was planned for" in refused and path.read_bytes() != was
    train(job, stopped.name, "train.save_steps=1", stop=1)  # as it advises
    assert path.read_bytes() == was
    summary, _ = train(job, stopped.name, change)
    assert len(summary["results"][0]["parts"]) == 4 and [epoch.holds for epoch in audit_run(stopped)] == [True]


def test_a_finished_run_needs_no_checkpoint(job: Path, finished: Path) -> None:
    for saved in list_checkpoints(finished / "hbp" / "checkpoints"):
        (saved / "position.json").write_text("{")
    summary, said = train(job, finished.name)
    assert "holds this run, finished" in said
    assert summary == json.loads((finished / "summary.json").read_text())


def test_a_plan_that_cannot_be_made_again_is_refused_and_stays(job: Path, stopped: Path) -> None:
    path = stopped / "hbp" / "plan" / "plan.json"
    cut_short(path)
    was = contents(stopped)
    refused, _ = train(job, stopped.name, "plan.strategy=bfd")
    assert "make the plan again" not in refused and "what is made now is another one" in refused
    assert "run once with the options and the 1 ranks that it was planned for" in refused
    assert {name: contents(stopped)[name] for name in was if name != "run.json"} == {
        name: was[name] for name in was if name != "run.json"
    }
    _, said = train(job, stopped.name)  # as it advises
    assert "step 5, " in said and json.loads(path.read_text())


def test_a_missing_plan_that_cannot_be_made_again_is_missing_still(job: Path, stopped: Path) -> None:
    """What was made in vain stayed there, and then the options of before, as advised, were refused: it had changed."""
    plan = stopped / "hbp" / "plan"
    was = (plan / "plan.parquet").read_bytes()
    shutil.rmtree(plan)
    refused, _ = train(job, stopped.name, "plan.strategy=bfd")
    assert "what is made now is another one" in refused and not plan.exists()
    _, said = train(job, stopped.name)
    assert "step 5, " in said and (plan / "plan.parquet").read_bytes() == was


def test_a_kill_while_a_plan_is_made_again_leaves_it_damaged(job: Path, stopped: Path) -> None:
    plan = stopped / "hbp" / "plan"
    was = (plan / "plan.parquet").read_bytes()
    other = job / f"other-of-{stopped.name}"
    train(job, other.name, "plan.strategy=bfd", "train.save_steps=null", stop=1)
    cut_short(plan / "plan.parquet")
    plan.rename(stopped / "hbp" / "plan.damaged")
    shutil.copytree(other / "bfd" / "plan", plan)
    _, said = train(job, stopped.name)
    assert "the plan is made again" in said and (plan / "plan.parquet").read_bytes() == was
    assert not (stopped / "hbp" / "plan.damaged").exists()


@pytest.mark.parametrize(
    ("change", "said", "strategy"),
    [
        ("cluster.memory_gib=0.9", "cluster.memory_gib was None, now 0.9: what is left is planned again", "hbp"),
        ("plan.strategy=bfd", "plan.strategy was 'hbp', now 'bfd': what is left is planned again", "bfd"),
        ("plan.order=random", "plan.order was 'balanced', now 'random': what is left is planned again", "hbp"),
    ],
)
def test_what_is_left_is_planned_again_for_less_memory_or_another_strategy(
    job: Path, stopped: Path, change: str, said: str, strategy: str
) -> None:
    """Then a run that was killed before the next save is planned again too, and one that was not keeps its plan."""
    done = steps_of(stopped / "hbp")
    summary, told = train(job, stopped.name, change, "train.save_steps=null", stop=2)
    assert said in told and "are planned again, each once" in told
    summary, told = train(job, stopped.name, change)
    assert "planned again" not in told and "step 7, " in told
    assert steps_of(stopped / "hbp") == done
    assert read_info(stopped / "hbp" / "part-1" / "plan").strategy == strategy
    assert [epoch.holds for epoch in audit_run(stopped)] == [True]
    assert len(summary["results"][0]["parts"]) == 2
    if "memory" in change:
        memory = read_info(stopped / "hbp" / "part-1" / "plan").cluster["memory_bytes"]
        assert memory == 0.9 * 2**30


def test_data_that_were_edited_are_refused_until_they_are_as_they_were(job: Path, stopped: Path) -> None:
    copy = job / f"data-of-{stopped.name}.jsonl"
    lines = (job / "data.jsonl").read_text().splitlines(keepends=True)
    copy.write_text("".join([*lines, lines[0]]))
    before = contents(stopped)
    refused = hbp_here("train", str(job / "cfg.yaml"), f"run_dir={stopped}", f"data.source={copy}")
    assert (refused.returncode, "its data or tokenizer has changed" in refused.stderr) == (2, True)
    assert contents(stopped) == before
    copy.write_text("".join(lines))
    ended, said = train(job, stopped.name, f"data.source={copy}", "train.max_minutes=1e-4")
    assert "step 5, " in said
    assert ended.startswith("train.max_minutes=0.0001: stopped after step 6, ")  # after the step that it was over in
    assert list_checkpoints(stopped / "hbp" / "checkpoints")[0].name == "step-00000006"


def test_another_learning_rate_holds_from_there_on(job: Path, stopped: Path) -> None:
    _, said = train(job, stopped.name, "train.lr=5e-3")
    assert "train.lr was 0.01, now 0.005: holds from there on" in said
    log = steps_of(stopped / "hbp")
    assert log[4]["lr"] > 0.5e-2 > log[5]["lr"] > 0.2e-2


def test_another_run_in_the_folder_is_set_aside_whole_if_it_has_saved_nothing(job: Path) -> None:
    run = fresh(job)
    train(job, run.name, "train.save_steps=null", stop=None, ranks=1)
    shutil.rmtree(run / "hbp" / "checkpoints")
    whose = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(whose | {"trained": False}))
    log = (run / "hbp" / "steps.jsonl").read_text()
    _, said = train(job, run.name, "seed=5", stop=2)
    assert f"is now in {run / 'before-1'}" in said
    assert (run / "before-1" / "hbp" / "steps.jsonl").read_text() == log
    assert json.loads((run / "before-1" / "run.json").read_text()) == whose | {"trained": False}


def test_never_and_only_never_deletes(job: Path, finished: Path) -> None:
    summary, _ = train(job, finished.name, "train.resume=never", "seed=5", stop=None)
    assert not list(finished.glob("before-*"))
    assert summary["results"][0]["steps"] == len(steps(finished))


def test_trials_of_a_baseline_that_was_killed_stop_nothing(job: Path, stopped: Path) -> None:
    shutil.copytree(stopped / "hbp", stopped / "concat-sp1")
    shutil.copytree(stopped / "hbp", stopped / "mine-sp1")  # not ours
    train(job, stopped.name)
    assert not (stopped / "concat-sp1").exists()
    assert (stopped / "mine-sp1").exists()


# train.resume=DIR


def harmed(rank: int, world: int, folder: Path) -> Any:
    try:
        return newest_checkpoint(folder)
    except (HbpError, RankFailed) as error:
        return type(error).__name__, str(error)


def unreadable(rank: int, world: int, folder: Path) -> Any:
    """:func:`harmed`, with a disk that fails on one rank."""
    if rank == 1:
        broken = mock.Mock(side_effect=OSError(errno.EIO, "Input/output error", str(folder / "shard")))
        with mock.patch.object(checkpoints_module, "_crc32", broken), mock.patch("hbp.disk.PAUSE_S", 0.0):
            return harmed(rank, world, folder)
    return harmed(rank, world, folder)


def test_an_error_of_one_ranks_disk_is_no_damage(stopped: Path) -> None:
    folder = stopped / "hbp" / "checkpoints"
    before = contents(stopped)
    for kind, said in run_ranks(unreadable, 2, folder):
        assert kind == "RankFailed"
        assert said.startswith("rank 1 cannot read") and "Input/output error" in said
    assert contents(stopped) == before


def test_damage_of_every_checkpoint_is_refused_and_a_second_damaged_copy_has_a_name(stopped: Path) -> None:
    folder = stopped / "hbp" / "checkpoints"
    newest, *others = list_checkpoints(folder)
    shutil.copytree(newest, newest.with_suffix(".damaged"))
    (newest / "__0_0.distcp").unlink()
    ((found, position),) = run_ranks(harmed, 1, folder)
    assert (found, position.run_step) == (others[0], 4)
    assert sorted(path.name for path in folder.glob("*.damaged*")) == [f"{newest.name}.damaged{n}" for n in ("", "-2")]
    for other in others:
        (other / "__0_0.distcp").write_bytes(b"")
    before = contents(stopped)
    ((kind, said),) = run_ranks(harmed, 1, folder)
    assert (kind, "no checkpoint in" in said) == ("HbpError", True)
    assert contents(stopped) == before


@pytest.mark.parametrize("harm", ["flip", "remove", "metadata"])
def test_a_damaged_checkpoint_that_is_named_is_refused_and_all_stays(job: Path, stopped: Path, harm: str) -> None:
    given = list_checkpoints(stopped / "hbp" / "checkpoints")[-1]
    shard = given / "__0_0.distcp"
    if harm == "flip":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(bytes(data))
    elif harm == "remove":
        shard.unlink()
    else:
        (given / ".metadata").write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    before = contents(stopped)
    refused, _ = train(job, stopped.name, f"train.resume={given}")
    assert f"{given} is damaged" in refused
    assert "\n" not in refused
    assert contents(stopped) == before


def test_an_older_checkpoint_forks_the_run_and_what_was_there_is_a_run_of_its_own(job: Path, stopped: Path) -> None:
    given = list_checkpoints(stopped / "hbp" / "checkpoints")[-1]
    assert given.name == "step-00000001"
    was = steps_of(stopped / "hbp")
    _, said = train(job, stopped.name, f"train.resume={given}", "train.save_steps=null", stop=2)
    assert "step 1, " in said
    aside = stopped / "before-1"
    assert steps_of(aside / "hbp") == was
    assert [path.name[-1] for path in list_checkpoints(aside / "hbp" / "checkpoints")] == ["5", "4", "3", "2", "1"]
    # The same command again goes on with the fork: it is in the queue of a scheduler.
    _, said = train(job, stopped.name, f"train.resume={given}", stop=1)
    assert "step 3, " in said
    assert not (stopped / "before-2").exists()
    _, said = train(job, f"{stopped.name}/before-1")
    assert "step 5, " in said


class Killed(Exception):
    """Stands for a kill."""


def killed_in_adoption(rank: int, world: int, config: Config, where: str) -> str:
    with mock.patch(f"hbp.run.resume.{where}", side_effect=Killed), pytest.raises(Killed):
        run_here(rank, world, config)
    return where


@pytest.mark.parametrize("where", ["write_record", "set_aside_run", "write_part"])
def test_a_kill_in_the_midst_of_adoption_loses_nothing(job: Path, stopped: Path, where: str) -> None:
    """Neither before the copy is whole, nor before what was there is set aside, nor before the first save."""
    source = Path(shutil.copytree(stopped, fresh(job)))
    given = list_checkpoints(source / "hbp" / "checkpoints")[1]
    before = list_checkpoints(stopped / "hbp" / "checkpoints")
    config = config_of(job, f"run_dir={stopped}", f"train.resume={given}")
    if where == "write_part":
        train(job, stopped.name, f"train.resume={given}", "train.save_steps=null", stop=1)
        shutil.rmtree(list_checkpoints(stopped / "hbp" / "checkpoints")[0])  # what the signal saved
    else:
        run_ranks(killed_in_adoption, 1, config, where)
        assert list_checkpoints(stopped / "hbp" / "checkpoints") == before
    _, said = train(job, stopped.name, *([] if where == "write_part" else [f"train.resume={given}"]), stop=1)
    assert "step 4, " in said
    assert [path.name for path in list_checkpoints(stopped / "before-1" / "hbp" / "checkpoints")] == [
        path.name for path in before
    ]


# What belongs to the run


def test_the_curriculum_belongs_to_the_run(job: Path) -> None:
    """Three short steps in all: one is left for the part after two steps, none for the next epoch."""
    run, options = fresh(job), ("train.epochs=2", "plan.short_steps=3")
    train(job, run.name, *options, stop=2)
    train(job, run.name, *options, ranks=2)
    parts = [run / "hbp" / part for part in ("", "part-1", "part-2")]
    assert [read_info(part / "plan").settings["short_steps"] for part in parts] == [3, 1, 0]
    assert [read_info(part / "plan").world_size for part in parts] == [1, 2, 2]
    assert [epoch.holds for epoch in audit_run(run)] == [True, True]


def test_the_cadence_of_evaluation_survives_a_resume(job: Path) -> None:
    run, options = fresh(job), ("train.eval_steps=5", "train.save_steps=2")
    for _ in range(3):  # none of which takes five steps; and a signal saves without evaluating
        train(job, run.name, *options, stop=2)
    log = [json.loads(line) for line in (run / "hbp" / "eval.jsonl").read_text().splitlines()]
    assert [record["run_step"] for record in log] == [5]


# Trust


@pytest.mark.parametrize(
    ("strategy", "folder"),
    [
        ("hbp-mixed", "hbp-mixed"),
        ("mine.v2", "mine.v2"),
        ("../../outside", "outside"),
        ("/absolute/path", "absolute-path"),
        ("mine/v2", "mine-v2"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("store", "plan-store"),
        ("before-1", "plan-before-1"),
        ("concat-sp2", "plan-concat-sp2"),  # where a baseline's setting is tried
        ("concat ", "plan-concat"),  # where the fastest of them goes
        ("mine-sp2", "mine-sp2"),
        ("a\nb\0c", "a-b-c"),
        ("x" * 300, "x" * 80),
    ],
)
def test_a_strategy_of_any_name_stays_in_the_folder(strategy: str, folder: str) -> None:
    assert folder_name(strategy) == folder
    assert Path("run", folder).resolve().parent == Path("run").resolve()


@pytest.mark.parametrize(("began", "folder"), [("concat", "concat"), ("concat-sp2", "concat-sp2"), ("c", "concat")])
def test_no_baseline_is_trained_over_the_run_itself(
    job: Path, tmp_path: Path, began: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may have begun with what is now named as its baseline, or by an earlier version in such a folder."""
    config = config_of(job, "plan.baseline=concat")
    summary = {"results": [{"strategy": began}]}
    with mock.patch("hbp.run.job.train_baseline") as train:
        run = tmp_path / "run"
        assert _with_baseline(SimpleNamespace(config=config), run, run / folder, summary) == summary
    assert not train.called
    assert "no baseline" in capsys.readouterr().err


def test_what_lies_where_a_baseline_is_tried_is_not_cleared_if_it_is_the_run(job: Path, tmp_path: Path) -> None:
    for name in ("concat-sp1", "concat-sp2"):
        (tmp_path / name / "plan").mkdir(parents=True)
    _clear(tmp_path, config_of(job), tmp_path / "concat-sp2")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["concat-sp2"]


def test_a_plan_whose_strategy_is_a_path_writes_and_deletes_in_the_folder_alone(job: Path, finished: Path) -> None:
    own = job / "own"
    shutil.copytree(finished / "hbp" / "plan", own)
    data = json.loads((own / "plan.json").read_text())
    del data["checksum"]
    (own / "plan.json").write_text(json.dumps(data | {"strategy": "../../outside"}))
    victim = job.parent / "outside" / "model"
    victim.mkdir(parents=True)
    (victim / "precious.txt").write_text("x")
    run = fresh(job)
    config = (f"plan.path={own}", "train.export=true", "train.resume=never")
    summary, _ = train(job, run.name, *config)
    assert summary["results"][0]["strategy"] == "../../outside"
    assert (run / "outside" / "model" / "config.json").is_file()
    assert [path.name for path in victim.parent.rglob("*")] == ["model", "precious.txt"]


def test_setting_aside_takes_no_plan_that_is_to_be_run(job: Path, stopped: Path) -> None:
    config = config_of(job, f"run_dir={stopped}", f"plan.path={stopped / 'hbp' / 'plan'}")
    before = contents(stopped)
    with pytest.raises(HbpError, match="lies in another run's folder; copy it out"):
        set_aside_run(stopped, config)
    assert contents(stopped) == before


def test_a_folder_of_other_things_is_no_run(tmp_path: Path) -> None:
    """What a user keeps in `run_dir` (a model, a plan) is neither taken for a run nor moved."""
    (tmp_path / "base" / "model").mkdir(parents=True)
    (tmp_path / "hbp" / "plan").mkdir(parents=True)
    (tmp_path / "hbp" / "plan" / "plan.json").write_text("{}")
    aside = set_aside_run(tmp_path)
    assert not list(aside.iterdir())
    assert (tmp_path / "base" / "model").is_dir() and (tmp_path / "hbp" / "plan").is_dir()


def test_a_run_whose_log_is_gone_goes_on_and_is_counted_whole(job: Path, stopped: Path, finished: Path) -> None:
    log = stopped / "hbp" / "steps.jsonl"
    log.unlink()
    summary, said = train(job, stopped.name)
    assert f"{log} has no line of 5 of the 5 steps" in said
    assert steps(stopped) == steps(finished)
    assert all(epoch.holds and epoch.unlogged for epoch in audit_run(stopped))
    known = json.loads((finished / "summary.json").read_text())["results"][0]
    assert [summary["results"][0][name] for name in ("tokens", "steps")] == [known["tokens"], known["steps"]]


def test_steps_that_no_checkpoint_holds_are_not_lost_silently(job: Path, stopped: Path) -> None:
    shutil.rmtree(stopped / "hbp" / "checkpoints")
    assert "5 steps that were logged are lost; starts anew" in train(job, stopped.name)[1]

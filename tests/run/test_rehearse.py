"""A rehearsal against what is known: the estimate's arithmetic, every rank of a mixed plan, real ranks' memory."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import hbp
from plans import hand_plan
from workers import CPU, LLAMA, QWEN3_MOE, run_ranks, write_config

from hbp.cli.main import main
from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import spec_from_config
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan, write_plan
from hbp.planning.planner import make_plan
from hbp.report.rehearsal import find_rehearsals, rehearsal_lanes
from hbp.run.rehearse import ratio_estimate, rehearse, slowest_seconds
from hbp.train.measure.micro_batch import measure_point
from hbp.train.model import load_sharded

SPEC = spec_from_config(LLAMA)
LENGTHS = np.array([300, 280, 40, 33, 20, 64, 64, 12, 90, 7, 150, 16] * 3, np.int32)


def planned(world: int, strategy: str = "hbp-mixed") -> Plan:
    return make_plan(LENGTHS, CostModel(SPEC, CLUSTERS["cpu-local"], world), strategy=strategy)


def test_a_ratio_that_holds_everywhere_leaves_no_doubt() -> None:
    predicted = np.array([1.0, 2.0, 5.0])
    assert ratio_estimate(1.6 * predicted, predicted, 100) == (pytest.approx(1.6), pytest.approx(0.0, abs=1e-12))
    assert ratio_estimate(np.array([3.0]), np.array([2.0]), 9) == (1.5, math.inf)
    assert ratio_estimate(np.array([3.0, 1.0]), np.array([2.0, 2.0]), 2) == (1.0, 0.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng, held = np.random.default_rng(0), 0
    predicted = rng.uniform(1, 4, 200)
    measured = predicted * rng.normal(1.5, 0.2, 200)
    truth = measured.sum() / predicted.sum()
    for _ in range(400):
        some = rng.choice(200, 12, replace=False)
        ratio, half = ratio_estimate(measured[some], predicted[some], 200)
        held += abs(ratio - truth) <= half
    assert 0.9 <= held / 400 <= 0.99


def test_noise_alone_makes_no_rank_slow() -> None:
    """32 equal ranks, 3 % of noise: the largest of all would be 6 % over."""
    rng, of = np.random.default_rng(0), np.repeat(np.arange(200), 32)
    noisy = rng.normal(1.0, 0.03, (len(of), 2))
    assert slowest_seconds(noisy, of, 200).mean() == pytest.approx(1.0, abs=0.003)
    assert noisy.mean(axis=1).reshape(200, 32).max(axis=1).mean() > 1.04
    truly = np.where(np.arange(len(of)) % 32 == 7, 1.3, 1.0)
    assert slowest_seconds(noisy * truly[:, None], of, 200).mean() == pytest.approx(1.3, abs=0.003)


def test_every_rank_of_every_micro_step_at_the_true_world_size(tmp_path: Path) -> None:
    plans = [planned(8), planned(8, "concat")]
    ours, naive = rehearse(plans, write_config(tmp_path, LLAMA), CPU, micro_steps=2, repeats=1)
    for plan, found in ((plans[0], ours), (plans[1], naive)):
        assert len(found.rows) == 8 * found.micro_steps
        assert found.micro_steps == min(2, found.of_micro_steps)
        assert found.all_ranks
        assert all(row.measured_s > 0 for row in found.rows)
        assert found.step_s_interval[0] <= found.step_s <= found.step_s_interval[1]
        assert found.predicted_step_s == pytest.approx(plan.info.metrics["predicted_s"] / plan.n_steps, rel=1e-5)
        states = 4 * 4 * SPEC.parameters() / 8  # parameters, gradients, two moments in float32, an eighth of each
        assert all(states <= row.peak_bytes < states + 3e7 for row in found.rows)


def test_what_disturbs_the_machine_for_a_while_makes_no_pack_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's repeats lie as far apart as a round over everything."""
    clock = iter([2.0] * 4 + [1.0] * 8)
    monkeypatch.setattr("hbp.run.rehearse._seconds", lambda *_: next(clock))
    found = rehearse([planned(4)], write_config(tmp_path, LLAMA), CPU, micro_steps=1, repeats=3)[0]
    assert [row.measured_s for row in found.rows] == [1.0] * 4


def test_chosen_ranks_hold_the_one_with_most_to_compute(tmp_path: Path) -> None:
    plan = planned(8)
    model = write_config(tmp_path, LLAMA)
    few = rehearse([plan], model, CPU, micro_steps=None, ranks=2, repeats=1)[0]
    every = rehearse([plan], model, CPU, micro_steps=None, repeats=1)[0]
    assert len(few.rows) == 2 * few.micro_steps
    for step, micro in {(row.step, row.micro_step) for row in few.rows}:
        most = max(row.predicted_s for row in every.rows if (row.step, row.micro_step) == (step, micro))
        assert most in [row.predicted_s for row in few.rows if (row.step, row.micro_step) == (step, micro)]


def peaks_of_rank(rank: int, world: int, model: str, packs: list[tuple[list[int], int, int]]) -> list[float]:
    """Of real processes, over all ranks."""
    mesh = make_mesh(world, [1, 2], "cpu", SPEC.heads)
    lm = load_sharded(model, mesh.world, CPU)
    return [measure_point(lm, mesh, *pack, device=CPU, repeats=0).peak_bytes for pack in packs]


def test_memory_is_that_of_two_real_processes(tmp_path: Path) -> None:
    plan, model = planned(2), write_config(tmp_path, LLAMA)
    found = rehearse([plan], model, CPU, micro_steps=None, repeats=1)[0]
    packs = [(plan.samples(r)[1].tolist(), int(plan.sp_degree[r]), int(plan.gc_layers[r])) for r in range(plan.n_packs)]
    real = run_ranks(peaks_of_rank, 2, model, packs)[0]
    for row, peak in enumerate(real):
        at = (int(plan.step[row]), int(plan.micro_step[row]))
        ranks = range(int(plan.rank_start[row]), int(plan.rank_start[row] + plan.sp_degree[row]))
        own = [r.peak_bytes for r in found.rows if (r.step, r.micro_step) == at and r.rank in ranks]
        assert max(own) == pytest.approx(peak, rel=0.02)


def test_command_prints_the_numbers_and_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(planned(4), tmp_path / "plan")
    model = write_config(tmp_path / "model", LLAMA)
    given = ["rehearse", str(tmp_path / "plan"), "--model", model, "--micro-steps", "1", "--repeats", "1"]
    assert main([*given, "--json", "--out", str(tmp_path / "kept.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "kept.json").read_text())
    wanted = {"step", "micro_step", "rank", "measured_s", "predicted_s", "peak_bytes", "predicted_bytes"}
    assert {"step_s", "predicted_step_s"} <= printed.keys()
    assert all(wanted <= row.keys() for row in printed["rows"])
    assert [row["rank"] for row in printed["rows"]] == [0, 1, 2, 3]
    assert "Infinity" not in (tmp_path / "kept.json").read_text()


def test_a_rank_without_work_is_predicted_as_it_runs(tmp_path: Path) -> None:
    """One pack on 64 ranks: the others run a token without loss beside it, and gather the layers as it does."""
    plan = make_plan(np.array([300], np.int32), CostModel(SPEC, CLUSTERS["cpu-local"], 64), strategy="hbp")
    found = rehearse([plan], write_config(tmp_path, LLAMA), CPU, ranks=3, repeats=1)[0]
    idle = [row for row in found.rows if not row.predicted_s]
    assert len(idle) == 2
    assert all(0.5 < row.predicted_bytes / row.peak_bytes < 2 for row in idle)


@pytest.mark.parametrize("other", [{**LLAMA, "vocab_size": 96}, {**LLAMA, "intermediate_size": 480}, QWEN3_MOE])
def test_another_model_than_the_plans_is_refused(
    tmp_path: Path, other: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one of as many layers of the same width."""
    write_plan(planned(4), tmp_path / "plan")
    model = write_config(tmp_path / "model", other)
    for more in (["--micro-steps", "1"], ["--memory"]):
        assert main(["rehearse", str(tmp_path / "plan"), "--model", model, *more]) == 2
        assert "the plan was made for a model of 3 layers of 32, a vocabulary of 64" in capsys.readouterr().err


def test_nothing_of_torchs_own_is_said(tmp_path: Path) -> None:
    write_plan(planned(4), tmp_path / "plan")
    given = ["rehearse", str(tmp_path / "plan"), "--model", write_config(tmp_path / "model", LLAMA)]
    done = hbp(*given, "--micro-steps", "1", "--ranks", "1", "--repeats", "1")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not line.startswith("hbp: rehearse")] == []


def test_its_numbers_are_on_the_plans_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept beside the plan, shown with it; another plan's are not, and are refused where they are named."""
    for name, world in (("plan", 4), ("other", 8)):
        write_plan(planned(world), tmp_path / name)
    model = write_config(tmp_path / "model", LLAMA)
    assert main(["rehearse", str(tmp_path / "plan"), "--model", model, "--micro-steps", "2", "--repeats", "1"]) == 0
    kept = tmp_path / "plan" / "rehearsal.json"
    assert main(["report", str(tmp_path / "plan")]) == 0
    page, numbers = (tmp_path / "plan" / f"report.{end}" for end in ("html", "json"))
    (found,) = json.loads(numbers.read_text())["rehearsals"]
    data = json.loads(kept.read_text())
    assert {name: data[name] for name in ("step_s", "idle_share", "peak_bytes")}.items() <= found.items()
    assert found["fits"]
    assert "Rehearsed: measured on one device" in page.read_text()
    assert f"{data['peak_bytes'] / 2**30:.3f}" in page.read_text()

    (tmp_path / "other" / "rehearsal.json").write_text(kept.read_text())  # as of a plan that was there before
    assert main(["report", str(tmp_path / "other")]) == 0
    assert "Rehearsed" not in (tmp_path / "other" / "report.html").read_text()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "other"), "--rehearsal", str(kept)]) == 2
    assert "holds no rehearsal of this plan" in capsys.readouterr().err


def test_drawn_lanes_are_the_measured_seconds(tmp_path: Path) -> None:
    plan = planned(4)
    found = rehearse([plan], write_config(tmp_path, LLAMA), CPU, micro_steps=2, ranks=2, repeats=1)[0]
    (read,) = find_rehearsals([(tmp_path, plan)], _written(tmp_path / "kept.json", found.to_json()))
    measured, predicted = rehearsal_lanes(read, plan.groups_of_rows()[0])
    assert (measured.wall_s > 0).sum() == len(found.rows) == 2 * found.micro_steps
    for lane, name in ((measured, "measured_s"), (predicted, "predicted_s")):
        assert lane.busy_s.sum() == pytest.approx(sum(getattr(row, name) for row in found.rows))
        assert (lane.busy_s <= lane.wall_s).all()
    micro = sorted({(row.step, row.micro_step) for row in found.rows})
    for row in found.rows:
        at = row.rank, micro.index((row.step, row.micro_step))
        assert measured.busy_s[at] == pytest.approx(row.measured_s)
        assert (measured.group[at] == -1) == (row.predicted_s == 0)


def _written(path: Path, data: dict) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_plan_that_fits_and_one_that_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fullest pack of each group, as many bytes as in the rehearsal of all."""
    plan, model = planned(4), write_config(tmp_path / "model", LLAMA)
    write_plan(plan, tmp_path / "plan")
    given = ["rehearse", str(tmp_path / "plan"), "--model", model]
    assert main([*given, "--memory", "--json"]) == 0
    check = json.loads(capsys.readouterr().out)
    assert check["fits"] and check["budget_bytes"] == CLUSTERS["cpu-local"].memory_bytes
    groups = {(g["capacity"], g["sp_degree"], g["gc_layers"]): g for g in check["groups"]}
    assert set(groups) == {dataclasses.astuple(plan.groups_of_rows()[0][i]) for i in set(plan.groups_of_rows()[1])}
    every = rehearse([plan], model, CPU, micro_steps=None, repeats=1)[0]
    assert check["peak_bytes"] == pytest.approx(every.peak_bytes, rel=0.02)
    assert not (tmp_path / "plan" / "rehearsal.json").exists()

    tight = dataclasses.replace(plan.info, cluster={**plan.info.cluster, "memory_bytes": 0.9 * check["peak_bytes"]})
    write_plan(dataclasses.replace(plan, info=tight), tmp_path / "tight")
    assert main(["rehearse", str(tmp_path / "tight"), "--model", model, "--memory"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 ranks, seen on one device (cpu)" in printed
    assert "does not fit, by" in printed


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    model, other = write_config(tmp_path / "a", LLAMA), write_config(tmp_path / "b", {**LLAMA, "num_hidden_layers": 2})
    with pytest.raises(HbpError, match="2 and 4 ranks; give plans of one world size"):
        rehearse([planned(2), planned(4)], model, CPU)
    with pytest.raises(HbpError, match="carries no cost model"):
        rehearse([hand_plan([(0, 0, 0, 1, 8, 1.0, [8])], 1)], model, CPU)
    with pytest.raises(HbpError, match=r"3 layers of 32, .* but .* has 2 layers of 32, "):
        rehearse([planned(2)], other, CPU)
    with pytest.raises(HbpError, match="0 micro-steps; give at least 1"):
        rehearse([planned(2)], model, CPU, micro_steps=0)
    assert not torch.distributed.is_initialized()

"""The page is complete, self-contained, and looks right in a browser at two widths."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from hbp.cost.cluster import CLUSTERS, GIB
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Plan, write_plan
from hbp.planning.planner import make_plan
from hbp.report.page import write_report
from hbp.simulator import step_seconds

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
]
WORLD = 4


def _steps(plan: Plan, slower: float) -> list[dict[str, object]]:
    """A made-up log of a run that took `slower` times what was predicted, rank 1 idling half the time."""
    lines, began = [], 0.0
    micro = plan.micro_step_index()
    walls = plan.micro_step_seconds() * slower
    for step in range(plan.n_steps):
        wall = walls[np.unique(micro[plan.step == step])]
        busy = np.tile(wall, (WORLD, 1)) * np.array([1.0, 0.5, 1.0, 1.0])[:, None]
        seconds = float(wall.sum())
        lines.append(
            {
                "step": step,
                "loss": 8 / (step + 1),
                "tokens": int(plan.tokens()[plan.step == step].sum()),
                "started_s": began,
                "seconds": seconds,
                "mean_wall_s": seconds,
                "mean_busy_s": float(busy.sum(axis=1).mean()),
                # The last steps are beyond what is logged rank by rank.
                "rank_wall_s": np.tile(wall, (WORLD, 1)).tolist() if step < plan.n_steps - 2 else [],
                "rank_busy_s": busy.tolist() if step < plan.n_steps - 2 else [],
            }
        )
        began += seconds
    return lines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    lengths = np.random.default_rng(0).integers(50, 2000, 300).astype(np.int32)
    cluster = dataclasses.replace(CLUSTERS["cpu-local"], memory_bytes=0.35 * GIB)
    cost = CostModel(load_model_spec("examples/quickstart-model"), cluster, WORLD)
    results = []
    for strategy, slower in (("hbp", 1.0), ("concat", 1.1)):
        plan = make_plan(lengths, cost, strategy=strategy, max_length=1900, global_batch_tokens=8000)
        write_plan(plan, folder / strategy / "plan")
        steps = _steps(plan, slower)
        (folder / strategy / "steps.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
        seconds = sum(float(s["seconds"]) for s in steps)  # type: ignore[arg-type]
        results.append(
            {
                "strategy": strategy,
                "seconds": seconds,
                "tokens_per_s": plan.info.n_tokens / seconds,
                "final_train_loss": 1.0,
                "eval_loss": 1.25,
                "peak_bytes": 1e8,
            }
        )
    speedup = results[0]["tokens_per_s"] / results[1]["tokens_per_s"]  # type: ignore[operator]
    trial = {"sp_degree": 1, "gc_layers": 2, "tokens_per_s": 10.0, "peak_bytes": 1e8, "fits": True}
    summary = {"memory_budget_bytes": 0.35 * GIB, "results": results, "speedup": speedup, "baseline_trials": [trial]}
    (folder / "summary.json").write_text(json.dumps(summary))
    point = {"lengths": [10, 20], "sp_degree": 1, "gc_layers": 0, "seconds": 0.5, "peak_bytes": 1e8}
    point |= {"predicted_s": 0.6, "predicted_bytes": 1.1e8}
    profile = {"device": "a test device", "cluster": {}, "median_error": 0.2, "points": [point, point]}
    (folder / "profile.json").write_text(json.dumps(profile))
    np.save(folder / "lengths.npy", lengths)
    return folder


def test_page_of_a_run_shows_measurements_and_needs_nothing_else(run: Path) -> None:
    report = write_report(run)
    page = report.html.read_text()
    for picture in ("timelines", "parts", "lengths", "loss", "time", "peak memory"):
        assert f'class="{picture}"' in page, picture
    for text in ("against concat, measured", "a test device", "Dropped samples", "longer than the longest group"):
        assert text in page, text
    for metric in ("PR", "DBR", "ABR", "CR", "Ave-T", "tokens/s"):
        assert f">{metric}<" in page, metric
    assert not re.search(r'(?:src|href)="(?!#)', page), "the page loads something from outside"
    numbers = json.loads((run / "report.json").read_text())
    assert numbers == json.loads(json.dumps(report.numbers))
    assert numbers["speedup"] > 1
    assert [s["strategy"] for s in numbers["strategies"]] == ["hbp", "concat"]
    assert numbers["strategies"][0]["busy"] == pytest.approx(7 / 8)
    assert sum(g["tokens"] for g in numbers["strategies"][0]["groups"]) == numbers["tokens"]


def test_page_of_a_run_under_way_and_of_a_plan(run: Path, tmp_path: Path) -> None:
    half = tmp_path / "run"
    shutil.copytree(run / "hbp", half / "hbp")
    log = half / "hbp" / "steps.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[:2]) + '\n{"step": 2, "lo')
    report = write_report(half)
    assert report.numbers["strategies"][0]["steps_done"] == 2
    assert "2 of" in report.html.read_text()
    alone = write_report(run / "hbp" / "plan", tmp_path / "plan.html")
    assert "predicted on 4 ranks" in alone.html.read_text()
    assert (tmp_path / "timelines.svg").read_text().count("var(--") == 0


def test_page_of_a_run_of_several_parts(run: Path, tmp_path: Path) -> None:
    """Cut short on four ranks, the rest of its samples on two, then a second epoch; the baseline is on two too."""
    lengths = np.load(run / "lengths.npy")
    costs = [
        CostModel(load_model_spec("examples/quickstart-model"), CLUSTERS["cpu-local"], world) for world in (WORLD, 2)
    ]
    wanted = [("hbp", "", costs[0], lengths, 3), ("hbp", "part-1", costs[1], lengths[100:], None)]
    wanted += [("hbp", "part-2", costs[1], lengths, None), ("concat", "", costs[1], lengths, 2)]
    plans, logs = [], []
    for epoch, (strategy, part, cost, own, done) in enumerate(wanted):
        folder = tmp_path / strategy / part
        plans.append(make_plan(own, cost, strategy=strategy, max_length=1900, global_batch_tokens=8000))
        write_plan(plans[-1], folder / "plan")
        logs.append(_steps(plans[-1], 2.0)[:done])
        (folder / "steps.jsonl").write_text("".join(json.dumps(s) + "\n" for s in logs[-1]))
        (folder / "part.json").write_text(json.dumps({"epoch": max(0, epoch - 1)}))
    report = write_report(tmp_path)
    concat, hbp = report.numbers["strategies"]
    assert report.numbers["world_size"] == 2
    assert [p["world_size"] for p in hbp["stretches"]] == [WORLD, 2, 2]
    assert [p["epoch"] for p in hbp["stretches"]] == [0, 0, 1]
    assert [p["steps_done"] for p in hbp["stretches"]] == [len(log) for log in logs[:3]]
    assert hbp["steps_done"] == sum(len(log) for log in logs[:3])
    assert hbp["tokens_done"] == sum(s["tokens"] for log in logs[:3] for s in log)
    assert concat["tokens_done"] == sum(s["tokens"] for s in logs[3])
    predicted = [step_seconds(plan) for plan in plans]
    assert hbp["predicted_s"] == pytest.approx(predicted[0][:3].sum() + predicted[1].sum() + predicted[2].sum())
    assert concat["predicted_s"] == pytest.approx(predicted[3].sum())  # of a run under way: all that it is to do
    page = report.html.read_text()
    assert "Part after part" in page
    assert "hbp, measured, first of 3 parts" in page
    assert "Part after part" not in write_report(run).html.read_text()


def test_refuses_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(HbpError, match="neither a run nor a plan"):
        write_report(tmp_path)
    with pytest.raises(HbpError, match="no folder"):
        write_report(tmp_path / "nowhere")


def test_refuses_to_compare_plans_for_different_data(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "hbp", tmp_path / "hbp")
    cost = CostModel(load_model_spec("examples/quickstart-model"), CLUSTERS["cpu-local"], WORLD)
    write_plan(make_plan(np.arange(1, 300), cost, strategy="concat"), tmp_path / "concat" / "plan")
    with pytest.raises(HbpError, match="different data or world sizes"):
        write_report(tmp_path)


def _browse(page: Path, width: int, scratch: Path, *action: str) -> str:
    assert BROWSER
    flags = [*FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--window-size={width},3000", *action]
    done = subprocess.run([BROWSER, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; `make test` installs one where it may")
@pytest.mark.parametrize("width", [1280, 520])
def test_looks_right_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    measure = """<script>
      const box = s => document.querySelector(s).getBoundingClientRect();
      const small = [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 60).length;
      document.title = JSON.stringify({overflow: document.documentElement.scrollWidth - innerWidth, small,
        svgs: document.querySelectorAll('svg').length, bar: box('svg.timelines path').width,
        ink: getComputedStyle(document.querySelector('svg text')).fill, explorer: explore()});
      function explore() {
        const canvas = document.querySelector('#explorer canvas'), at = canvas.getBoundingClientRect();
        const inked = () => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data
          .reduce((sum, value, i) => sum + (i % 4 == 3 ? 0 : value * (1 + i % 97)), 0);
        const whole = inked();
        canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: at.left + 90, clientY: at.top + 32}));
        const tip = document.querySelector('#explorer .tip').textContent;
        document.querySelector('#explorer [data-act=in]').click();
        const zoomed = inked();
        document.querySelector('#explorer select').value = 'groups';
        document.querySelector('#explorer select').dispatchEvent(new Event('change'));
        const groups = inked();
        document.querySelector('#explorer [data-act=all]').click();
        return {tip, drawn: whole > 0, zooms: zoomed != whole, recolours: groups != zoomed,
          keys: document.querySelectorAll('#explorer .legend span').length};
      }
    </script></body>"""
    page.write_text(write_report(run).html.read_text().replace("</body>", measure))
    title = re.search(r"<title>(\{.*?\})</title>", _browse(page, width, tmp_path, "--dump-dom"))
    assert title
    seen = json.loads(title[1])
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    assert seen["svgs"] == 6
    assert seen["small"] == 0, "a picture collapsed"
    assert seen["bar"] > 0
    assert seen["ink"].startswith("rgb"), "pictures take their ink from the page"
    explorer = seen["explorer"]
    assert explorer["drawn"] and explorer["zooms"] and explorer["recolours"]
    assert explorer["keys"] >= 3
    assert re.search(r"rank 0 · step \d+ · micro-step \d+", explorer["tip"]), "pointing at a bar tells its numbers"
    assert "tokens in" in explorer["tip"] and "waiting" in explorer["tip"]

    from PIL import Image

    shot = tmp_path / "page.png"
    _browse(page, width, tmp_path, f"--screenshot={shot}")
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    shares = {colour: count for count, colour in colours}
    for colour in ((0x2F, 0x7F, 0xC1), (0xF3, 0xC6, 0xBF)):  # a group's work, waiting
        assert shares.get(colour, 0) > 500, f"no area of colour {colour} on the page"

"""The page is complete, self-contained, and looks right in a browser at two widths."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plans import write_by_hand

from hbp.cost.cluster import CLUSTERS, GIB
from hbp.cost.model_spec import load_model_spec
from hbp.cost.predict import CostModel
from hbp.errors import HbpError
from hbp.plan import Plan, write_plan
from hbp.planning.planner import make_plan
from hbp.report.page import asked_and_used, write_report
from hbp.run_log import EvalRecord, StepRecord, append_record
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
        tokens, logged = int(plan.tokens()[plan.step == step].sum()), step < plan.n_steps - 2
        record = StepRecord(
            step=step,
            loss=8 / (step + 1),
            grad_norm=1.0,
            lr=1e-3 / (step + 1),
            tokens=tokens,
            loss_tokens=tokens,
            started_s=began,
            seconds=seconds,
            tokens_per_s=tokens / seconds,
            group="2048/SP1/GC0",
            skew=0.5,
            slowest_rank=0,
            mean_wall_s=seconds,
            mean_busy_s=float(busy.sum(axis=1).mean()),
            # The last steps are beyond what is logged rank by rank.
            rank_wall_s=np.tile(wall, (WORLD, 1)).tolist() if logged else [],
            rank_busy_s=busy.tolist() if logged else [],
        )
        lines.append(dataclasses.asdict(record))
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
        for i in (1, 2):
            append_record(folder / strategy, EvalRecord(run_step=i, tokens=900 * i, eval_loss=9.0 - i))
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
    for picture in ("timelines wide", "timelines narrow", "parts wide", "parts narrow", "lengths", "loss", "rate"):
        assert f'class="{picture}"' in page, picture
    assert 'class="seconds"' in page and 'class="memory"' in page
    for text in ("against concat, measured", "a test device", "Dropped samples", "longer than the longest group"):
        assert text in page, text
    for metric in ("PR", "DBR", "ABR", "CR", "Ave-T", "tokens/s"):
        assert f">{metric}<" in page, metric
    assert f"<td>{report.numbers['strategies'][0]['steps_done']}</td>" in page, "the number of optimizer steps"
    assert "hbp, held out" in page, "the curve of evaluations"
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
    page = alone.html.read_text()
    assert "predicted on 4 ranks" in page
    assert " tokens · SP 1 · GC " in page and "{'" not in page and "{&#39;" not in page, "no dictionaries of Python's"
    assert "(8,000 asked for)" in page
    assert (tmp_path / "timelines.svg").read_text().count("var(--") == 0


def test_a_disturbed_measurement_has_no_headline(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "concat" / "steps.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    for step in steps:
        step["rank_busy_s"] = [[0.8 * s for s in rank] for rank in step["rank_busy_s"]]  # a fifth of it nobody works
    log.write_text("".join(json.dumps(s) + "\n" for s in steps))
    report = write_report(tmp_path / "run")
    hbp, concat = report.numbers["strategies"]
    assert (hbp["shared_waiting"], hbp["disturbed"]) == (0, False)
    assert (concat["shared_waiting"], concat["disturbed"]) == (pytest.approx(0.2), True)
    page = report.html.read_text()
    assert "the measurement was disturbed" in page and "20 % of the time" in page
    assert "measured on the same tokens" not in page


NAMES = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "$x^$",
    "_",
    "'\"><b>",
    "{{ 7*7 }}",
    "&lt;",
]


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, in order, those in pictures only once; and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.drawn: set[tuple[str, ...]] = set()
        self.text, self.picture = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.picture |= tag == "svg"
        found = (tag, *(name for name, _ in attrs))
        if self.picture:
            self.drawn.add(found)
        else:
            self.found.append(found)

    def handle_endtag(self, tag: str) -> None:
        self.picture &= tag != "svg"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_strategy_is_text(name: str, tmp_path: Path) -> None:
    def page(word: str, folder: Path) -> str:
        said = {"strategy": word, "settings": {word: {word: word}}, "cluster": {"device": word}}
        return write_report(write_by_hand(folder, **said)).html.read_text()

    tags, plain = Tags(page(name, tmp_path)), Tags(page("plain", tmp_path / "plain"))
    assert (tags.found, tags.drawn) == (plain.found, plain.drawn), "no name makes or closes an element"
    assert tags.text.count(name) >= 5
    assert ET.fromstring((tmp_path / "timelines.svg").read_text()).tag.endswith("svg")


def test_page_of_another_programs_plan(tmp_path: Path) -> None:
    report = write_report(write_by_hand(tmp_path))
    page = report.html.read_text()
    [strategy] = report.numbers["strategies"]
    assert strategy["predicted"]["seconds"] == 4.0
    assert [g["tokens"] for g in strategy["groups"]] == [45 + 50 + 50 + 37, 90, 170]
    assert "unnamed: 110 tokens/s predicted on 4 ranks" in page  # 442 tokens in 4 s
    assert "efficiency" in page and "of the predicted best possible" not in page
    untimed = write_by_hand(tmp_path / "untimed")
    table = pq.read_table(untimed / "plan.parquet")
    zeros = pa.array([0.0] * len(table), pa.float32())
    pq.write_table(
        table.set_column(table.column_names.index("predicted_s"), "predicted_s", zeros), untimed / "plan.parquet"
    )
    assert "the plan predicts no times" in write_report(untimed).html.read_text()


def test_settings_in_words() -> None:
    asked = {"max_length": None, "global_batch_tokens": 8000, "windows": None}
    group = {"capacity": 2048, "sp_degree": 2, "gc_layers": 1}
    settings = {"max_length": 4096, "global_batch_tokens": 8192, "extra_groups": [group], "asked": asked}
    assert asked_and_used(settings) == [
        ("max length", "4,096 (its default)"),
        ("global batch tokens", "8,192 (8,000 asked for)"),
        ("extra groups", "2,048 tokens · SP 2 · GC 1"),
    ]
    assert asked_and_used({"asked": 3, "a": {"b_c": [True, None]}, "d": []}) == [
        ("asked", "3"),
        ("a", "b c yes; none"),
        ("d", "none"),
    ]


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
    """In a frame, since a window is at least 500 pixels wide."""
    assert BROWSER
    frame = scratch / "frame.html"
    frame.write_text(
        f"<body style='margin:0'><iframe src='{page.as_uri()}' style='border:0;width:{width}px;height:5000px'></iframe>"
        "<script>addEventListener('message', event => document.title = event.data)</script></body>"
    )
    flags = [*FLAGS, f"--user-data-dir={scratch / 'profile'}", f"--window-size={max(width, 600)},5000", *action]
    done = subprocess.run([BROWSER, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine; `make test` installs one where it may")
@pytest.mark.parametrize("width", [1280, 390])
def test_looks_right_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    measure = """<script>
      const shown = [...document.querySelectorAll('svg')].filter(s => getComputedStyle(s).display != 'none');
      const box = s => s.getBoundingClientRect();
      const cut = s => box(s).left < 0 || box(s).right > innerWidth || box(s).height < 60;
      const letters = s => Math.min(...[...s.querySelectorAll('text')].map(t => box(t).height));
      parent.postMessage(JSON.stringify({overflow: document.documentElement.scrollWidth - innerWidth,
        cut: shown.filter(cut).length, svgs: shown.map(s => s.classList.value).sort(),
        letters: Math.min(...shown.map(letters)), ink: getComputedStyle(shown[0].querySelector('text')).fill,
        explorer: explore()}), '*');
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
    seen = json.loads(html.unescape(title[1]))
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    form = "narrow" if width < 600 else "wide"
    assert seen["svgs"] == ["lengths", "loss", "memory", f"parts {form}", "rate", "seconds", f"timelines {form}"]
    assert seen["cut"] == 0, "a picture is cut or collapsed"
    assert seen["letters"] >= 9, "pixels of the smallest letters"
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

"""The command line as programs and people meet it: output, exit codes, one-line errors, no torch for planning."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hbp.cli.main import exit_code, main
from hbp.cli.plan import _quick_enough
from hbp.data.length_sets import generate
from hbp.errors import ERROR_FILE, HbpError
from hbp.plan import read_plan
from hbp.planning.planner import STRATEGIES

LENGTHS = np.random.default_rng(0).integers(20, 4000, 400).astype(np.int32)
COMMANDS = ("plan", "compare", "simulate", "report")
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "datasets"):
            raise ImportError(f"the planning half imported {name}")
sys.meta_path.insert(0, Refuse())
from hbp.cli.main import exit_code, main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    np.save(tmp_path / "lengths.npy", LENGTHS)
    return tmp_path / "lengths.npy"


def planning(lengths: Path, *more: str) -> list[str]:
    return ["--lengths", str(lengths), "--model", "llama-3.1-8b", "--gpus", "8", *more]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)  # exactly one JSON object


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Exit code 2 and one line on standard error, which is returned."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_help_has_a_line_for_every_strategy(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = [line.split(None, 1) for line in capsys.readouterr().out.partition("strategies:")[2].splitlines()]
    assert {line[0]: line[1] for line in lines if line} == {s.name: s.summary for s in STRATEGIES.values()}


def test_plan_simulate_report(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan"
    made = output(capsys, "plan", *planning(lengths, "--max-length", "3500", "--out", str(out), "--json"))
    assert made["dropped"] == int((LENGTHS > 3500).sum()) > 0
    assert made["samples"] + made["dropped"] == len(LENGTHS)
    assert set(made["metrics"]) == {"pr", "dbr", "abr", "cr", "ave_tokens", "efficiency", "predicted_s"}
    other = tmp_path / "other"
    naive = planning(lengths, "--max-length", "3500", "--out", str(other), "--strategy", "concat", "--json")
    output(capsys, "plan", *naive)
    played = output(capsys, "simulate", str(out), str(other), "--json")["plans"]
    assert played[0]["seconds"] == pytest.approx(made["metrics"]["predicted_s"])
    assert played[1]["speedup"] < 1
    for plan in played:
        assert sum(plan["parts"].values()) == pytest.approx(plan["seconds"])
    report = output(capsys, "report", str(out), "--json")
    assert Path(report["report"]).read_text().startswith("<!doctype html>")


def test_simulate_prices_and_what_if(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "plan")
    output(capsys, "plan", *planning(lengths, "--out", out, "--json"))
    [priced] = output(capsys, "simulate", out, "--price", "2.5", "--json")["plans"]
    assert priced["cost"] == pytest.approx(priced["device_days"] * 24 * 2.5)
    assert len(priced["ranks"]["waiting"]) == 8
    places = ["--gpus", "1..16", "--cluster", "h100-nvlink", "h100-ethernet"]
    rows = output(capsys, "simulate", out, *places, "--json")["rows"]
    assert [(r["cluster"], r["gpus"]) for r in rows[:2]] == [("h100-nvlink", 1), ("h100-nvlink", 2)]
    assert len(rows) == 10
    assert "memory" in rows[0]["error"], "8 billion parameters do not train on one GPU"
    assert rows[4]["tokens_per_s"] > rows[3]["tokens_per_s"]
    assert main(["simulate", out, *places, "--price", "2"]) == 0
    printed = capsys.readouterr().out
    assert "what if" in printed
    assert "on 1 GPUs" in printed
    assert "--gpus 0" in refused(capsys, "simulate", out, "--gpus", "0")
    timeline = tmp_path / "timeline.parquet"
    piece = ["--timeline", str(timeline), "--steps", "0..1", "--ranks", "2"]
    output(capsys, "simulate", out, *piece, "--json")
    assert set(pq.read_table(timeline)["rank"].to_pylist()) == {2}
    assert set(pq.read_table(timeline)["step"].to_pylist()) == {0, 1}
    assert "--ranks 8..9" in refused(capsys, "simulate", out, *piece, "--ranks", "8..9")
    assert "--ranks 2.." in refused(capsys, "simulate", out, *piece, "--ranks", "2..")
    assert "leave out" in refused(capsys, "simulate", out, *piece, "--gpus", "8")
    assert "--timeline" in refused(capsys, "simulate", out, "--steps", "junk")
    assert "--price" in refused(capsys, "simulate", out, "--price", "-1")
    assert "--price inf" in refused(capsys, "simulate", out, "--price", "inf")
    assert "no cluster" in refused(capsys, "simulate", out, "--cluster", "abacus")


def test_tables_for_people(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *planning(lengths, "--max-length", "3500", "--out", str(tmp_path / "p"))]) == 0
    captured = capsys.readouterr()
    assert "efficiency" in captured.out
    assert "dropped" in captured.err
    assert "sample" in captured.err


def test_a_step_larger_than_asked_for_is_told(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = planning(lengths, "--out", str(tmp_path / "p"), "--json", "--global-batch-tokens")
    output(capsys, "plan", *arguments, "4000", "--strategy", "bfd")
    assert main(["plan", *arguments, "1000", "--strategy", "bfd"]) == 0
    assert "tokens, asked 1,000 (" in capsys.readouterr().err
    assert main(["plan", *arguments, "400000"]) == 0
    assert "asked" not in capsys.readouterr().err


def test_compare_has_a_row_for_every_strategy(lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = output(capsys, "compare", *planning(lengths, "--json"))["rows"]
    assert {row["strategy"] for row in rows} == set(STRATEGIES)
    ours = next(row for row in rows if row["strategy"] == "hbp-mixed")
    assert ours["efficiency"] == max(row["efficiency"] for row in rows)


def test_compare_over_cluster_sizes_with_a_plot(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "compare.svg"
    arguments = ["--gpus", "2..8", "--strategies", "bfd,hbp-mixed", "--plot", str(plot), "--json"]
    rows = output(capsys, "compare", *planning(lengths, *arguments))["rows"]
    assert [(row["gpus"], row["strategy"]) for row in rows] == [
        (gpus, name) for gpus in (2, 4, 8) for name in ("bfd", "hbp-mixed")
    ]
    for gpus in (2, 4, 8):
        first, ours = (row for row in rows if row["gpus"] == gpus)
        assert first["speedup"] == 1
        assert ours["speedup"] == pytest.approx(first["predicted_s"] / ours["predicted_s"])
    picture = plot.read_text()
    assert picture.startswith("<svg")
    assert all(word in picture for word in ("bfd", "hbp-mixed", "speed over bfd"))


def test_compare_goes_on_where_a_size_does_not_fit(lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = planning(lengths, "--gpus", "1,8", "--strategies", "bfd,hbp-mixed")
    rows = output(capsys, "compare", *arguments, "--json")["rows"]
    assert ["error" in row for row in rows] == [True, True, False, False]
    assert rows[2]["speedup"] == 1
    assert main(["compare", *arguments]) == 0
    assert "1 GPUs, bfd, hbp-mixed: " in capsys.readouterr().out
    assert "memory" in refused(capsys, "compare", *planning(lengths, "--gpus", "1", "--strategies", "bfd"))


def test_compare_leaves_slow_strategies_to_those_who_name_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert _quick_enough(1000) == list(STRATEGIES)
    assert "lb" not in _quick_enough(1_000_000)
    assert "lb left out" in capsys.readouterr().err


def test_plan_explains_its_groups(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = planning(lengths, "--out", str(tmp_path / "plan"), "--explain")
    made = output(capsys, "plan", *arguments, "--json")
    assert [reason["group"] for reason in made["explain"]] == made["groups"]
    assert sum(reason["samples"] for reason in made["explain"] if reason["home"]) == made["samples"]
    assert sum(reason["time_share"] for reason in made["explain"]) == pytest.approx(1)
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "home of" in text
    assert "the run with SP" in text


def test_a_plan_of_one_kind_of_steps_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where another order is to be had, and only then."""
    lengths = tmp_path / "lengths.npy"
    np.save(lengths, generate("mix-128k", 1500, 0))
    for batch, order, said in ((2**17, "fastest", True), (2**17, "balanced", False), (2**19, "fastest", False)):
        asked = ["--global-batch-tokens", str(batch), "--order", order, "--short-steps", "0"]
        assert main(["plan", *planning(lengths, *asked, "--out", str(tmp_path / "plan"))]) == 0
        assert ("--order balanced" in capsys.readouterr().err) == said
        if order == "fastest":
            assert (read_plan(tmp_path / "plan").info.details["drift"] > 0.25) == said


@pytest.mark.parametrize("command", ["plan", "compare", "simulate", "report"])
def test_planning_half_runs_without_torch(command: str, lengths: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    out = str(tmp_path / "plan")
    run("plan", *planning(lengths, "--out", out))
    if command == "compare":
        run("compare", *planning(lengths, "--strategies", "hbp,bfd"))
    elif command != "plan":
        run(command, out)


def test_missing_training_half_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    arguments = [
        "--data",
        str(tmp_path / "data.jsonl"),
        "--model",
        "llama-3.1-8b",
        "--gpus",
        "2",
        "--tokenizer",
        "nowhere",
    ]
    code = WITHOUT_TORCH.replace('ImportError(f"the planning half imported {name}")', "ModuleNotFoundError(name=name)")
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *arguments, "--out", str(tmp_path / "plan")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hbp: error: this needs transformers; install with")
    assert "Traceback" not in done.stderr


def test_wrong_input_is_one_line_and_exit_code_2(
    lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "plan")]
    nowhere = tmp_path / "nowhere.npy"
    assert "nowhere.npy" in refused(capsys, "plan", *planning(nowhere, *out))
    np.save(tmp_path / "empty.npy", np.zeros(0, np.int32))
    assert "empty" in refused(capsys, "plan", *planning(tmp_path / "empty.npy", *out))
    assert "memory" in refused(capsys, "plan", *planning(lengths, *out, "--memory-gib", "1"))
    assert "no strategy" in refused(capsys, "plan", *planning(lengths, *out, "--strategy", "magic"))
    assert "no cluster" in refused(capsys, "plan", *planning(lengths, *out, "--cluster", "abacus"))
    assert "--gpus 0" in refused(capsys, "plan", *planning(lengths, *out, "--gpus", "0"))
    assert "--max-length 0" in refused(capsys, "plan", *planning(lengths, *out, "--max-length", "0"))
    assert "longer than 10" in refused(capsys, "plan", *planning(lengths, *out, "--max-length", "10"))
    assert "--seed -1" in refused(capsys, "plan", *planning(lengths, *out, "--seed", "-1"))
    assert "--short-steps -1" in refused(capsys, "plan", *planning(lengths, *out, "--short-steps", "-1"))
    assert "--strategies ," in refused(capsys, "compare", *planning(lengths, "--strategies", ","))
    nothing = ["--data", str(tmp_path / "none"), "--model", "llama-3.1-8b", "--gpus", "8"]  # names are looked at first
    assert "--strategies magic" in refused(capsys, "compare", *nothing, "--strategies", "magic")
    assert "lengths.npy" in refused(capsys, "plan", *planning(lengths, "--out", str(lengths)))
    assert "no plan" in refused(capsys, "simulate", str(tmp_path))
    assert "neither" in refused(capsys, "report", str(tmp_path))
    assert "configuration" in refused(capsys, "train", str(tmp_path / "no.yaml"))
    assert not (tmp_path / "plan").exists(), "nothing half-made is left behind"


def test_data_for_planning_is_tokenized_and_bad_lines_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hbp.data.stdlib_sft import train_tokenizer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data, tokenizer = tmp_path / "data.jsonl", tmp_path / "tokenizer"
    turns = [("user", "Add two and two, please."), ("assistant", "Two and two is four. " * 5)]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(20)))
    train_tokenizer(data, tokenizer, vocab_size=300)
    arguments = ["--data", str(data), "--tokenizer", str(tokenizer), "--model", "llama-3.1-8b", "--gpus", "2"]
    made = output(capsys, "plan", *arguments, "--out", str(tmp_path / "plan"), "--json")
    assert made["samples"] == 20
    with data.open("a") as lines:
        lines.write('{"messages": "broken"\n')
    assert "line 21 is not JSON" in refused(capsys, "plan", *arguments, "--out", str(tmp_path / "plan"))
    data.write_text("")
    assert "no records" in refused(capsys, "plan", *arguments, "--out", str(tmp_path / "plan"))


@pytest.mark.parametrize("gib", ["nan", "-1", "0", "1e9"])
def test_impossible_memory_is_one_line(gib: str, lengths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = planning(lengths, "--memory-gib", gib)
    assert "give a device's memory in GiB" in refused(capsys, "compare", *arguments)


def test_a_plot_into_a_new_folder(lengths: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "new" / "compare.svg"
    output(capsys, "compare", *planning(lengths, "--strategies", "bfd", "--plot", str(plot), "--json"))
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--model", "llama-3.1-8b", "--gpus", "8", "--out", "x"], "--data --lengths is required"),
        (["plan", "--lengths", "x.npy", "--model", "llama-3.1-8b", "--gpus", "many", "--out", "x"], "'many'"),
        (["pack"], "no command 'pack'"),
        (["--completion"], "--completion"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert says in captured.err and "--help" in captured.err


def test_help_of_train_lists_options_however_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert "global_batch_tokens" in capsys.readouterr().out


def test_built_in_model_has_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(tmp_path / "none.jsonl")]
    message = refused(capsys, "plan", *data, "--model", "llama-3.1-8b", "--gpus", "8", "--out", str(tmp_path / "p"))
    assert "--tokenizer" in message


@pytest.mark.parametrize("command", ["", "plan --help", "--version", "plan", "compare", "simulate", "report"])
@pytest.mark.parametrize("json_too", ["", " --json"])
def test_output_that_nobody_reads_any_more_is_no_fault(
    command: str,
    json_too: str,
    lengths: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As of ``| head``: 141, as a shell counts it, or what the command itself ends with; and no traceback."""
    plan = ["plan", *planning(lengths), "--strategy", "bfd", "--out", str(tmp_path / "plan")]
    words = {
        "plan": plan,
        "compare": ["compare", *planning(lengths), "--strategies", "bfd,ffd"],
        "simulate": ["simulate", str(tmp_path / "plan")],
        "report": ["report", str(tmp_path / "plan")],
    }.get(command, command.split())
    if command in ("simulate", "report"):
        assert main(plan) == 0
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        try:
            code = main([*words, *(json_too.split() if command in COMMANDS else [])])
        except SystemExit as end:
            code = int(end.code or 0)
        gone.flush()  # as at the end of the process: it raises nothing
    assert code == (141 if command in COMMANDS or not command else 0)
    assert "Traceback" not in capfd.readouterr().err


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == "hbp: interrupted\n"
    monkeypatch.setenv(ERROR_FILE, "somewhere")  # a rank: whoever started it says so
    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == ""


def test_an_interrupt_that_a_compiler_made_something_else_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """numba raises a SystemError or a RuntimeError of its own, or Python loses it in a callback."""

    class Cleanup:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def compiled(words: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemError("returned a result with an exception set") from None
        return 0

    def lost(words: list[str]) -> int:
        Cleanup()
        time.sleep(60)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started us behind a `&`
    try:
        for command in (compiled, lost):
            monkeypatch.setattr("hbp.cli.main._run", command)
            assert main(["plan"]) == 130
            assert capsys.readouterr().err == "hbp: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ranks_of_torchrun_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun gives each a file to report in; all are refused for the same reason, one for a reason of its own."""

    def refuse(why: str) -> int:
        raise HbpError(why)

    for rank, why in enumerate(["no such option", "no such option", "no such option", "its disk is another"]):
        own = tmp_path / "attempt_0" / str(rank) / "error.json"
        own.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own))
        assert exit_code(functools.partial(refuse, why)) == 2
    assert capsys.readouterr().err.splitlines() == [
        "hbp: error: no such option",
        "hbp: error: its disk is another",
    ]


def test_home_behind_an_equals_sign(lengths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no shell expands: a folder of the name ``~`` was made."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    asked = ("--lengths", str(lengths), "--model", "llama-3.1-8b", "--gpus", "8")
    assert main(["plan", *asked, "--strategy", "ffd", "--out=~/plan"]) == 0
    assert (tmp_path / "me" / "plan" / "plan.json").is_file() and not (tmp_path / "~").exists()


def test_a_fault_of_the_disk_is_no_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it was told as something that cannot be read."""

    def failing() -> int:
        try:
            raise OSError(errno.EIO, "Input/output error", "a.jsonl")
        except OSError as error:
            raise HbpError(f"a.jsonl cannot be read ({error})") from None

    assert exit_code(failing) == 1
    assert capsys.readouterr().err.startswith("hbp: error: a.jsonl cannot be read ([Errno 5] Input/output error")

"""Words of a command line: counts, spans, mistyped names, completion in real shells."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hbp import __version__
from hbp.cli.main import COMMANDS, exit_code, main, make_parser
from hbp.cli.usage import SHELLS, check_out, completion, parse_counts, parse_span
from hbp.errors import HbpError, did_you_mean

SUBCOMMANDS = {"plan", "compare", "train", "profile", "simulate", "report"}


def test_counts() -> None:
    assert parse_counts("8..256") == [8, 16, 32, 64, 128, 256]
    assert parse_counts("3..13") == [3, 6, 12]
    assert parse_counts("8, 24,32") == [8, 24, 32]


@pytest.mark.parametrize("text", ["", "0", "-4..8", "8..", "many", "16..8", "8,-1"])
def test_wrong_counts_are_refused(text: str) -> None:
    with pytest.raises(HbpError, match="--gpus"):
        parse_counts(text)


def test_spans() -> None:
    assert parse_span("--steps", None, 5) == range(5)
    assert parse_span("--steps", "1..3", 5) == range(1, 4)
    assert parse_span("--steps", "4", 5) == range(4, 5)
    for wrong in ("5", "3..1", "..2", "2..", "-1..2", "a"):
        with pytest.raises(HbpError, match=r"--steps .*: give A..B within 0..4"):
            parse_span("--steps", wrong, 5)


def test_did_you_mean_names_the_nearest_or_nothing() -> None:
    assert did_you_mean("hbp-mixd", ["hbp", "hbp-mixed"]) == " (did you mean 'hbp-mixed'?)"
    assert did_you_mean("magic", ["hbp", "hbp-mixed"]) == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simluate", "x"], "no command 'simluate' (did you mean 'simulate'?)"),
        (["plan", "--gpsu", "8"], "no option --gpsu (did you mean '--gpus'?)"),
        (["simulate", "x", "--prise=2"], "no option --prise (did you mean '--price'?)"),
        (["plan", "--lengths", "x", "--model", "y", "--gpus", "1", "--out", "z", "--strategy", "hbp-mixd"],
         "no strategy 'hbp-mixd' (did you mean 'hbp-mixed'?)"),
        (["compare", "--lengths", "x", "--model", "y", "--gpus", "1", "--strategies", "bdf"],
         "--strategies bdf (did you mean 'bfd'?)"),
        (["plan", "--lengths", "x", "--model", "y", "--gpus", "1", "--out", "z", "--cluster", "h100-nvlnk"],
         "no cluster 'h100-nvlnk' (did you mean 'h100-nvlink'?)"),
    ],
)  # fmt: skip
def test_mistyped_words_are_told_with_the_nearest(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert says in captured.err


def test_alone_it_prints_its_help_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SUBCOMMANDS)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hbp {__version__}\n"


def test_every_command_runs_and_has_json() -> None:
    _, commands = make_parser()
    assert set(commands) >= SUBCOMMANDS
    assert len(commands) >= len(COMMANDS)
    for name, parser in commands.items():
        assert "--json" in parser.options(), name
        assert callable(parser.get_default("run")), name


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_in_the_shell_itself(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    script = tmp_path / "script"
    script.write_text(completion(shell, make_parser()[1]))
    assert subprocess.run([shell, "-n", str(script)], capture_output=True, text=True).stderr == ""
    if shell != "bash":
        return

    def completed(*words: str) -> list[str]:
        ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _hbp; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run([shell, "-c", f". {script}; {ask}"], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("hbp", "sim") == ["simulate"]
    assert completed("hbp", "plan", "--gl") == ["--global-batch-tokens"]
    assert completed("hbp", "report", str(script)[:-2]) == [str(script)]


def test_completion_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    assert "complete -o filenames -F _hbp hbp" in capsys.readouterr().out


def test_a_folder_that_holds_something_else_is_not_written_into(tmp_path: Path) -> None:
    check_out(tmp_path / "new", "plan.json")
    check_out(tmp_path, "plan.json")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(HbpError, match=r"holds something else \(thesis.tex\); give a new or empty folder"):
        check_out(tmp_path, "plan.json")
    with pytest.raises(HbpError, match="is a file"):
        check_out(tmp_path / "thesis.tex", "plan.json")
    (tmp_path / "plan.json").write_text("{}")
    check_out(tmp_path, "plan.json")


@pytest.mark.parametrize(
    ("number", "said", "code"),
    [
        (errno.ENOSPC, "run/plan.json: No space left on device; mend that and run again", 1),
        (errno.EIO, "run/plan.json: Input/output error; mend that and run again", 1),
        (errno.EACCES, "run/plan.json: Permission denied; give a folder that can be written", 2),
    ],
)
def test_what_a_disk_does_is_one_line(number: int, said: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise OSError(number, os.strerror(number), "run/plan.json")

    assert exit_code(command) == code
    assert capsys.readouterr().err == f"hbp: error: {said}\n"

"""Progress goes to standard error, as lines where that is no terminal, from rank 0 alone."""

from __future__ import annotations

import io
import re
import sys

import pytest

from hbp import progress
from hbp.progress import Counter, Progress, say


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def count_to_ten(clock: Clock) -> None:
    """One unit every two seconds."""
    say("hello")
    with Progress("training", 10) as bar:
        for i in range(10):
            clock.now += 2
            bar.advance(f"step {i}")
    with Counter("tokenize", "samples") as counter:
        for _ in range(10):
            clock.now += 2
            counter.advance(300)


def test_counter_says_what_is_left_where_the_share_that_is_done_is_known(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Counter("tokenize", "samples") as counter:
        for done in range(1, 5):
            clock.now += 3
            counter.advance(300, done / 4)
    assert capsys.readouterr().err.splitlines() == [
        "hbp: tokenize: 600 samples, 100 a second, 6 s left",
        "hbp: tokenize: 1,200 samples, 100 a second, 0 s left",
    ]


LINES = [
    "hbp: hello",
    "hbp: training  30%  step 2  14 s left",
    "hbp: training  60%  step 5  8 s left",
    "hbp: training  90%  step 8  2 s left",
    "hbp: training 100%  step 9  0 s left",
    "hbp: tokenize: 900 samples, 150 a second",
    "hbp: tokenize: 1,800 samples, 150 a second",
    "hbp: tokenize: 2,700 samples, 150 a second",
]


@pytest.mark.parametrize("rank", [None, "0"])
def test_a_line_every_five_seconds_and_at_the_end(
    clock: Clock, rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    count_to_ten(clock)
    out, err = capsys.readouterr()
    assert out == ""
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d " if rank else ""  # a rank's lines are the log of a run
    assert [re.sub(f"^{stamp}hbp: ", "hbp: ", line) for line in err.splitlines()] == LINES
    assert all(re.match(f"{stamp}hbp: ", line) for line in err.splitlines())


@pytest.mark.parametrize("rank", ["1", "10"])
def test_other_ranks_are_silent(
    clock: Clock, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    count_to_ten(clock)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("rank", ["0", "1"])
def test_bar_on_a_terminal(rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("training", 2) as bar:
        bar.advance("step 0")
        bar.advance("step 1")
    text = terminal.getvalue()
    assert "hbp:" not in text
    assert ("training" in text and "100 %" in text and "step 1" in text) == (rank == "0")
    assert rank == "0" or not text
    assert capsys.readouterr().out == ""

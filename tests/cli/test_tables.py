"""What the last line of a run says."""

from __future__ import annotations

import pytest

from hbp.cli.tables import run_table


def _result(strategy: str, tokens_per_s: float, **metrics: float) -> dict[str, object]:
    counts = {"steps": 3, "seconds": 2.0, "final_train_loss": None, "eval_loss": None, "peak_bytes": 0}
    return counts | {"strategy": strategy, "groups": [], "tokens_per_s": tokens_per_s, "metrics": metrics}


def test_a_gain_stands_beside_what_could_be_gained(capsys: pytest.CaptureFixture[str]) -> None:
    ours = _result("hbp-mixed", 120.0, abr=0.0, cr=0.0, efficiency=0.99)
    theirs = _result("concat", 100.0, abr=0.0, cr=0.0, efficiency=0.8)
    run_table({"results": [ours, theirs], "speedup": 1.2})
    said = capsys.readouterr().out
    assert "hbp-mixed is 1.20× as fast as concat" in said
    assert "no plan could be more than 1.25×" in said  # 1 / .8

    unknown = _result("theirs", 100.0, abr=0.0, cr=0.0)  # a plan that predicts nothing has no efficiency
    run_table({"results": [ours, unknown], "speedup": 1.2})
    assert "no plan" not in capsys.readouterr().out


def test_a_disturbed_run_has_no_gain(capsys: pytest.CaptureFixture[str]) -> None:
    both = [_result(name, 100.0, abr=0.0, cr=0.0, efficiency=0.8) for name in ("hbp-mixed", "concat")]
    run_table({"results": both, "speedup": 1.2}, disturbed=True)
    said = capsys.readouterr().out
    assert "×" not in said and "another program" in said

"""The paper's testbed: seconds of a step by what a GPU holds, sets without their long part, DeepSeek-V2 by parts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from hbp.cost.cluster import CLUSTERS
from hbp.cost.model_spec import load_model_spec

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
TESTBED, PAPER = importlib.import_module("testbed"), importlib.import_module("paper")
DEEPSEEK = importlib.import_module("paper_deepseek")
H100 = CLUSTERS["h100-nvlink"]


def test_a_step_takes_as_long_as_what_a_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TESTBED, "_fit_seconds", lambda model: (2.0, 1.5))
    monkeypatch.setattr(TESTBED, "_fit_memory", lambda model: H100)
    small, large = load_model_spec("llama-3.1-8b"), load_model_spec("deepseek-v2-236b")
    assert TESTBED.testbed(small).step_overhead_s == 1.5, "as it was fitted, to 8B on 32 GPUs"
    assert TESTBED.testbed(small, 64).step_overhead_s == 0.75
    assert TESTBED.testbed(large, 256).step_overhead_s == pytest.approx(1.5 * 235.74 / 8.03 / 8, rel=1e-3)
    assert TESTBED.testbed(large, 256, step_grows=False).step_overhead_s == 1.5
    assert TESTBED.testbed(small).linear_flops_per_s == H100.linear_flops_per_s / 2


@pytest.mark.parametrize(("data", "longest"), [("Tulu3", 32 * 1024), ("OpenHermes", 4 * 1024)])
def test_a_short_set_is_its_mix_without_the_long_samples(data: str, longest: int) -> None:
    lengths, mixed = PAPER.draw(data, 50_000), PAPER.draw(f"{data} + LongCite", 50_000)
    assert lengths.max() <= longest < mixed.max()
    assert (lengths == mixed).mean() > 0.99, "the same short samples"


def test_parts_of_deepseek_add_up_and_parameters_in_place_move_nothing() -> None:
    rows = DEEPSEEK.deepseek_rows(3000, {"h100-nvlink": lambda spec: H100})
    assert [row["side"] for row in rows[:5]] == ["naive, SP4", "naive, SP8", "naive, SP16", "hbp", "hbp-mixed"]
    assert [row["fsdp"] for row in rows] == [True] * 5 + [False] * 5
    for row in rows:
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert ("fsdp" in row["parts"]) == row["fsdp"]
    days = {(row["fsdp"], row["side"]): row["gpu_days_per_billion"] for row in rows}
    for row in rows:
        for degree, speedup in row.get("speedup", {}).items():
            naive = days[row["fsdp"], f"naive, SP{degree}"]
            assert speedup == pytest.approx(naive / row["gpu_days_per_billion"])
    assert days[True, "naive, SP4"] >= days[False, "naive, SP4"], "the slowest of 64 packs may hide all traffic"
    assert days[True, "naive, SP16"] > days[False, "naive, SP16"]

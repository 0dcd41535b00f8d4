"""Plans that another program wrote, by pyarrow and json alone, through every command that reads plans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import config_of, run_here, write_job
from plans import write_by_hand
from workers import run_ranks

from hbp.cli.main import main
from hbp.cli.tables import run_table
from hbp.data.samples import split_samples
from hbp.run.data import prepare

FIXED = {  # the contract's fixed keys, and no more
    "groups": [{"capacity": c, "sp_degree": d, "gc_layers": 0} for c, d in ((50, 1), (100, 2), (200, 4))],
    "metrics": {
        **{"pr": 0.116, "dbr": 0.2133, "abr": 0.312, "cr": 0.588},
        **{"ave_tokens": 221.0, "efficiency": 0.9, "predicted_s": 4.0},
    },
    "dropped": [],
}


@pytest.mark.parametrize("said", [{}, FIXED, {"metrics": {}, "model": {"size": "8B"}, "cluster": {"gpus": 4}}])
def test_simulate_and_report_work_on_it(
    said: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_by_hand(tmp_path, **said))
    assert main(["simulate", folder, "--price", "2", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["plans"]
    assert (row["seconds"], row["tokens_per_s"], row["speedup"]) == (4.0, 442 / 4, 1.0)
    parts = {"unsplit": (4 * 1 + 4 * 2 + 2 * 1) / 4, "waiting": 2 * 1 / 4}  # mean of four ranks, two idle at the end
    assert row["parts"] == pytest.approx(parts)
    for command in ("simulate", "report"):
        assert main([command, folder]) == 0
    assert (" 0.900 " if said is FIXED else " – ") in capsys.readouterr().out, "its efficiency, or that it has none"
    assert main(["simulate", folder, "--gpus", "8"]) == 2
    assert "does not say how to plan it anew" in capsys.readouterr().err


def test_what_it_misses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_by_hand(tmp_path)
    (folder / "plan.json").write_text(json.dumps({"schema_version": 1}))
    for command in ("simulate", "report"):
        assert main([command, str(folder)]) == 2
        assert "lacks world_size; add the number of ranks" in capsys.readouterr().err
    write_by_hand(tmp_path)
    pq.write_table(pq.read_table(folder / "plan.parquet").drop_columns(["predicted_s"]), folder / "plan.parquet")
    for command in ("simulate", "report"):
        assert main([command, str(folder)]) == 2
        assert "lacks the columns predicted_s" in capsys.readouterr().err


def test_train_follows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path / "job", samples=30)
    config = config_of(job)
    store = prepare(config)
    ids, _ = split_samples(store, seed=config.seed, eval_samples=config.data.eval_samples, max_length=None)
    lengths = np.asarray(store.lengths[ids]).tolist()
    rows = [
        {"step": i // 8, "micro_step": i % 8 // 2, "rank_start": i % 2, "sp_degree": 1, "gc_layers": 0}
        | {"capacity": 512, "sample_ids": [i], "lengths": [lengths[i]], "predicted_s": 0.0}
        for i in range(len(lengths))
    ]
    plan = tmp_path / "theirs"
    plan.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), plan / "plan.parquet")
    (plan / "plan.json").write_text('{"schema_version": 1, "world_size": 2}')
    config = config_of(job, f"plan.path={plan}", "train.export=false")
    summary, said = run_ranks(run_here, 2, config)[0]
    assert not isinstance(summary, str), (summary, said)
    [result] = summary["results"]
    assert result["strategy"] == "unnamed"
    assert result["metrics"]["pr"] == pytest.approx(1 - sum(lengths) / 512 / len(lengths))
    assert (result["tokens"], result["steps"]) == (sum(lengths), -(-len(lengths) // 8))
    assert result["metrics"]["ave_tokens"] == pytest.approx(sum(lengths) / result["steps"])
    run_table(summary)
    assert "unnamed" in capsys.readouterr().out
    assert main(["report", str(job / "run")]) == 0

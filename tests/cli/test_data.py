"""`hbp data` shows what the model will see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hbp.cli.main import main

pytest.importorskip("transformers")

from hbp.data.stdlib_sft import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("look")
    said = ("pack", "rank \x1b[31m step", "token " * 30)
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": text}]}
        for i, text in enumerate(said)
    ]
    rows.append({"messages": [{"role": "user", "content": "nothing"}]})
    (root / "data.jsonl").write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer_on(root, rows)
    return root


def train_tokenizer_on(root: Path, rows: list[Any]) -> None:
    (root / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer(root / "text.jsonl", root / "tokenizer", vocab_size=300)
    (root / "text.jsonl").unlink()


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["data", *arguments]) == 0
    return capsys.readouterr().out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, tokenizer = str(folder / "data.jsonl"), str(folder / "tokenizer")
    out = json.loads(show(capsys, path, "--tokenizer", tokenizer, "--json"))
    first = out["samples"][0]
    assert [(s["id"], s["source"], s["line"]) for s in out["samples"]] == [(i, path, i + 2) for i in range(4)]
    assert first["text"] == "<|im_start|>user\nSay 0.<|im_end|>\n<|im_start|>assistant\npack<|im_end|>\n".replace(
        "<|im_end|>\n", "<|im_end|>"
    ) or first["text"].count("pack<|im_end|>")
    assert first["learnt"] == ["pack<|im_end|>"]
    assert len(first["input_ids"]) == len(first["loss_mask"])
    assert out["samples"][3]["learnt"] == []
    tokens = [len(s["input_ids"]) for s in out["samples"]]
    targets = [sum(s["loss_mask"][1:]) for s in out["samples"]]
    assert out["counts"] == {
        "samples": 4, "tokens": sum(tokens), "loss_tokens": sum(targets), "without_loss": 1, "dropped": 0,
        "dropped_tokens": 0, "truncated": 0, "longest": max(tokens), "longest_at": f"{path} line 4",
    }  # fmt: skip
    out = json.loads(show(capsys, path, "--tokenizer", tokenizer, "--json", "--limit", "1", "--max-length", "40"))
    assert len(out["samples"]) == 1
    left = json.loads(show(capsys, path, "--tokenizer", tokenizer, "--json", "--max-length", "40"))["samples"]
    assert [s["id"] for s in left] == [0, 1, 3]  # the one that is left out is not what the model will see
    assert (out["counts"]["dropped"], out["counts"]["dropped_tokens"]) == (1, tokens[2])
    arguments = ["--max-length", "40", "--set", "too_long=truncate"]
    cut = json.loads(show(capsys, path, "--tokenizer", tokenizer, "--json", *arguments))
    assert [len(s["input_ids"]) for s in cut["samples"]] == [min(n, 40) for n in tokens]  # as they are trained on
    out = cut["counts"]
    assert (out["dropped"], out["truncated"], out["dropped_tokens"]) == (0, 1, tokens[2] - 40)
    assert out["tokens"] == sum(tokens) - tokens[2] + 40


def test_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = show(capsys, str(folder / "data.jsonl"), "--tokenizer", str(folder / "tokenizer"))
    assert "data.jsonl line 2: " in out and "⟦pack<|im_end|>⟧" in out
    assert r"⟦rank \x1b[31m step<|im_end|>⟧" in out and "\x1b" not in out  # no text reaches the terminal's controls


def test_learnt_text_is_coloured_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = show(capsys, str(folder / "data.jsonl"), "--tokenizer", str(folder / "tokenizer"), "--limit", "1")
    assert "\x1b[1;32mpack<|im_end|>" in out and "\x1b[2m" in out and "⟦" not in out


def test_the_data_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Relative paths are taken from the file's folder."""
    from workers import LLAMA, write_config

    write_config(folder / "model", {**LLAMA, "vocab_size": 300})
    sources = [{"path": "data.jsonl"}, {"path": "data.jsonl", "name": "again", "max_samples": 2}]
    config = {
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": sources, "tokenizer": "tokenizer"},
        "model": {"path": "model"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    out = json.loads(show(capsys, str(folder / "run.yaml"), "--json", "--limit", "4"))
    assert {name: counts["samples"] for name, counts in out["by_source"].items()} == {"data": 4, "again": 2}
    assert [s["name"] for s in out["samples"]] == ["data", "data", "again", "again"]


def test_what_cannot_be_used_is_refused_or_listed(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "data.jsonl").read_text() + "{\n")
    arguments = [str(bad), "--tokenizer", str(folder / "tokenizer")]
    assert main(["data", *arguments]) == 2
    assert f"{bad} line 6 is not JSON" in capsys.readouterr().err
    assert f"cannot be used: {bad} line 6" in show(capsys, *arguments, "--set", "bad_records=skip", "--limit", "0")
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 99999]}\n')
    assert main(["data", str(tmp_path / "ids.jsonl"), *arguments[1:], "--json"]) == 0
    assert "token ids go up to 99999, the tokenizer's to 2" in capsys.readouterr().err
    for wrong, said in (
        ([str(folder / "none.jsonl"), "--tokenizer", arguments[2]], "no file or folder"),
        ([str(bad)], "needs --tokenizer"),
        ([*arguments, "--limit", "-1"], "give at least 0"),
        ([*arguments, "--set", "too_long=shorten"], "data.too_long"),
    ):
        assert main(["data", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_preference_pairs_are_planned_side_by_side(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from hbp.plan import read_plan

    rows = [{"prompt": "Say.", "chosen": "pack " * (1 + i % 9), "rejected": "rank " * (1 + i % 4)} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    plan = tmp_path / "plan"
    assert main(["plan", *data, "--model", "llama-3.1-8b", "--gpus", "4", "--out", str(plan), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 80
    ids = read_plan(plan).sample_ids.reshape(-1, 2)
    assert (ids[:, 1] == ids[:, 0] + 1).all() and (ids[:, 0] % 2 == 0).all()
    more = ["--model", "llama-3.1-8b", "--gpus", "4", "--max-length", "30", "--out", str(plan) + "2", "--json"]
    assert main(["plan", *data, *more]) == 0
    dropped = {sample for sample, _ in read_plan(Path(str(plan) + "2")).info.dropped}
    capsys.readouterr()
    assert 0 < len(dropped) < 80 and main(["data", *data[1:], "--max-length", "30", "--limit", "80", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)  # a pair goes as a whole here too
    assert {sample["id"] for sample in seen["samples"]} == set(range(80)) - dropped
    assert (seen["counts"]["samples"], seen["counts"]["dropped"]) == (80 - len(dropped), len(dropped))
    assert main(["data", *data[1:], "--max-length", "30", "--set", "too_long=split"]) == 2
    assert "would part preference pairs" in capsys.readouterr().err


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split"])
def test_hbp_plan_cuts_long_samples_as_hbp_train_does(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, too_long: str
) -> None:
    from workers import LLAMA, write_config

    from hbp.config import Config
    from hbp.data.samples import cut_to
    from hbp.data.store import open_store
    from hbp.plan import read_plan
    from hbp.run.data import choose, prepare

    data = {"source": str(folder / "data.jsonl"), "tokenizer": str(folder / "tokenizer"), "eval_samples": 0}
    model = write_config(tmp_path / "model", {**LLAMA, "vocab_size": 300})
    run = {"run_dir": str(tmp_path / "run"), "model": {"path": model}}
    config = Config.model_validate({**run, "data": {**data, "max_length": 40, "too_long": too_long}})
    trained, _ = choose(config, prepare(config))
    arguments = ["--model", model, "--gpus", "1", "--cluster", "cpu-local", "--max-length", "40"]
    source = ["--data", data["source"], "--tokenizer", data["tokenizer"]]
    for given in (source, ["--data", str(tmp_path / "run" / "store")]):
        out = tmp_path / f"plan{len(given)}"
        assert main(["plan", *given, *arguments, "--too-long", too_long, "--out", str(out), "--json"]) == 0
        plan = read_plan(out)
        of_id = dict(zip(plan.sample_ids.tolist(), plan.lengths.tolist(), strict=True))
        assert of_id == {i: n for i, n in enumerate(trained.lengths.tolist()) if n <= 40}
        assert len(plan.info.dropped) == (too_long == "drop")
    longest = int(open_store(trained.store.folder).lengths.max())
    assert longest > 40 and len(trained.lengths) == (3 - -longest // 40 if too_long == "split" else 4)
    if too_long == "drop":
        assert "too_long" not in plan.info.settings
        return
    assert (plan.info.settings["too_long"], plan.info.settings["cut_to"]) == (too_long, 40)
    cut = cut_to(open_store(tmp_path / "run" / "store"), 40, too_long)
    assert cut.lengths.tolist() == trained.lengths.tolist()
    one = [*arguments, "--too-long", too_long, "--sp", "1", "--gc", "0", "--equal-micro-steps"]
    assert main(["plan", *given, *one, "--out", str(tmp_path / "one")]) == 0
    exported = ["export", str(tmp_path / "one"), "--to", "datasets", "--data", str(tmp_path / "run" / "store")]
    assert main([*exported, "--out", str(tmp_path / "exported"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["longest_row"] <= 40


def test_what_cannot_be_cut_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pair = {"prompt": "Say.", "chosen": "pack " * 30, "rejected": "rank"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    np.save(tmp_path / "lengths.npy", np.array([3, 4]))
    arguments = ["--model", "llama-3.1-8b", "--gpus", "1", "--out", str(tmp_path / "plan"), "--too-long", "split"]
    data = ["--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    for given, why in (
        ([*data, "--max-length", "8"], "would part preference pairs"),
        (data, "give both"),
        (["--lengths", str(tmp_path / "lengths.npy"), "--max-length", "8"], "give both"),
    ):
        assert main(["plan", *given, *arguments]) == 2
        assert why in capsys.readouterr().err

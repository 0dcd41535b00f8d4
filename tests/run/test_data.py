"""From the configuration to the samples of a run: what cannot be trained on is refused, with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import config_of, write_job
from workers import LLAMA, write_config

from hbp.config import DataConfig, load_config
from hbp.data.samples import Samples
from hbp.errors import HbpError
from hbp.run.data import check_model, choose, positions, prepare, say_summary, sources_of
from hbp.train.model import read_config


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("data"), samples=40)


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def talk(said: str, role: str = "assistant") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Say."}, {"role": role, "content": said}]}


def chosen(job: Path, *overrides: str) -> tuple[Samples, Samples]:
    config = config_of(job, *overrides)
    samples = choose(config, store := prepare(config))
    check_model(config, store, samples)
    return samples


def refusal(job: Path, *overrides: str) -> str:
    with pytest.raises(HbpError) as caught:
        chosen(job, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def source(path: str, job: Path, name: str = "run2") -> list[str]:
    return [f"data.source={path}", f"run_dir={job / name}", "data.eval_samples=2"]


def test_data_in_which_nothing_is_learnt_are_refused(job: Path, tmp_path: Path) -> None:
    """Case data-no-loss-token: it used to train to a loss of 0.000 and exit code 0."""
    silent = lines(tmp_path / "silent.jsonl", [talk("pack", "user") for _ in range(9)])
    assert "no sample to train on has a token to learn (7 samples, the first: " in (
        said := refusal(job, *source(silent, job))
    )
    assert f"{silent} line" in said and "hbp data" in said
    learnt = lines(tmp_path / "learnt.jsonl", [talk("pack") for _ in range(9)])
    said = refusal(job, *source(learnt, job), f"data.eval_source={silent}")
    assert f"no sample to evaluate with has a token to learn (9 samples, the first: {silent} line 1)" in said
    both = lines(tmp_path / "both.jsonl", [talk("pack " * 60), *[talk("", "user")] * 9])
    config = ["data.max_length=40", "data.eval_samples=0"]  # the one that is learnt from is too long
    assert "no sample to train on" in refusal(job, *source(both, job), *config)


def test_a_token_id_beyond_the_models_vocabulary_is_refused_before_anything_is_tokenized(
    job: Path, tmp_path: Path
) -> None:
    """Case data-vocabulary-hole: a tokenizer of 320 tokens, one of which has the id 330."""
    import shutil

    shutil.copytree(job / "tokenizer", tmp_path / "hole")
    path = tmp_path / "hole" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 330
    path.write_text(json.dumps(content))
    model = write_model(tmp_path / "model")
    config = [f"model.path={model}", f"data.tokenizer={tmp_path / 'hole'}", f"run_dir={tmp_path / 'run'}"]
    said = refusal(job, *config)
    assert "ids go up to 330" in said and "embeds 320" in said
    assert not (tmp_path / "run").exists()


def write_model(folder: Path, **options: Any) -> str:
    """With weights, so that its vocabulary is what it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = write_config(folder, {**LLAMA, "vocab_size": 320, **options})
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    return path


def test_tokenized_data_with_an_id_beyond_the_vocabulary_are_refused_by_line(job: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]} for _ in range(9)]
    rows[6] = {"input_ids": [5, 999, 7], "labels": [-100, 999, 7]}
    path = lines(tmp_path / "tokens.jsonl", rows)
    assert f"{path} line 7 has token id 999 but" in refusal(job, *source(path, job))


def test_a_sample_beyond_the_models_positions_is_refused_by_line(job: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "long.jsonl", [*[talk("pack rank")] * 8, talk("pack " * 90)])
    model = write_config(tmp_path / "short", {**LLAMA, "vocab_size": 320, "max_position_embeddings": 64})
    options = [*source(path, job), f"model.path={model}"]
    said = refusal(job, *options)
    assert f"{path} line 9 has " in said and "has positions for 64" in said
    for fits in (["data.max_length=64"], ["data.max_length=64", "data.too_long=truncate"]):
        samples, _ = chosen(job, *options, *fits)
        assert len(samples.ids) == 7


def test_rope_scaling_adds_positions(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    for rope, limit in ((None, 64), (yarn, 256), ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 128)):
        own = {**LLAMA, "max_position_embeddings": 64, **({"rope_parameters": rope} if rope else {})}
        assert positions(read_config(write_config(tmp_path / str(limit), own))) == limit


def test_preference_pairs_are_for_planning(job: Path, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Say."}]
    sides = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    path = lines(tmp_path / "pairs.jsonl", [talk("a"), {"prompt": asked, **sides}])
    assert f"{path} line 2 is a preference pair" in refusal(job, *source(path, job))


def test_too_long(job: Path) -> None:
    whole, _ = chosen(job, "data.eval_samples=0")
    assert whole.lengths.max() > 60
    long = int((whole.lengths > 60).sum())
    dropped, _ = chosen(job, "data.eval_samples=0", "data.max_length=60")
    assert len(dropped.ids) == 40  # the planner drops them by name
    cut, _ = chosen(job, "data.eval_samples=0", "data.max_length=60", "data.too_long=truncate")
    assert len(cut.ids) == 40 and (cut.lengths == 60).sum() >= long
    split, _ = chosen(job, "data.eval_samples=0", "data.max_length=60", "data.too_long=split")
    assert split.lengths.sum() == whole.lengths.sum() and split.lengths.max() == 60


def test_several_sources_and_one_for_evaluation(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [lines(tmp_path / f"{n}.jsonl", [talk(f"pack {n}")] * k) for n, k in (("a", 6), ("b", 4), ("c", 3))]
    sources = f"data.sources=[{{path: {paths[0]}, repeat: 2}}, {{path: {paths[1]}, name: bee, max_samples: 2}}]"
    with pytest.raises(HbpError, match=r"data.source and data.sources are both given"):
        prepare(config_of(job, sources))
    config = load_config_without_source(job, sources, f"data.eval_source={paths[2]}", f"run_dir={tmp_path / 'run'}")
    store = prepare(config)
    samples, held_out = choose(config, store)
    assert [store.sources[n].name for n in samples.sources] == ["a"] * 12 + ["bee"] * 2
    assert [store.sources[n].name for n in held_out.sources] == ["evaluation"] * 3
    say_summary(config, store)
    said = capsys.readouterr().err
    assert "data: 11 samples, " in said and "data: bee: 2 samples, " in said and "data: evaluation: 3 samples" in said


def load_config_without_source(job: Path, *overrides: str) -> Any:
    import yaml

    raw = yaml.safe_load((job / "cfg.yaml").read_text())
    del raw["data"]["source"]
    (job / "several.yaml").write_text(yaml.safe_dump(raw))
    return load_config(job / "several.yaml", overrides)


def test_summary_says_what_is_left_out(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "some.jsonl", [talk("pack"), talk("pack " * 50), talk("x", "user"), ["no record"]])
    config = config_of(job, *source(path, job), "data.bad_records=skip", "data.max_length=30")
    say_summary(config, prepare(config))
    said = capsys.readouterr().err
    assert ", 1 samples without any; longest 19 tokens" in said or ", 1 samples without any; longest " in said
    assert "data: left out: 2 samples, " in said and "% of the tokens" in said
    assert f"1 records cannot be used, the first: {path} line 4" in said


def test_every_option_that_decides_what_is_read_goes_to_the_source() -> None:
    data = DataConfig(source="hub:a", split="dev", subset="x", streaming=True)
    (own,) = sources_of(data)
    assert (own.split, own.subset, own.streaming) == ("dev", "x", True)


def test_no_cache_as_yaml_reads_it(tmp_path: Path) -> None:
    """``off`` is false in YAML; it used to be refused."""
    from hbp.run.data import _cache

    (tmp_path / "run.yaml").write_text("data: {cache: off}\nmodel: {path: x}\n")
    assert _cache(load_config(tmp_path / "run.yaml", []).data) is None
    assert _cache(load_config(tmp_path / "run.yaml", ["data.cache=here"]).data) == Path("here")
    assert _cache(DataConfig(cache="off")) is None


def test_no_cache_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from hbp.run.data import _cache

    monkeypatch.setenv("HBP_CACHE", "off")
    assert _cache(DataConfig()) is None
    assert _cache(DataConfig(cache="here")) == Path("here")  # a run's own word goes before

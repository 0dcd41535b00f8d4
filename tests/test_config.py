"""One configuration: defaults, a file, overrides; everything else is refused in one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hbp.config import Config, describe, load_config
from hbp.errors import HbpError

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: some/model}\ntrain:\n  lr: 0.5\n")
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(HbpError) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.train.lr == 0.5
    file.write_text("model: {path: some/model}\n")
    config = load_config(file)
    assert config == Config.model_validate({"model": {"path": "some/model"}})
    assert (config.run_dir, config.seed) == ("runs/hbp", 0)
    assert (config.data.source, config.data.max_length, config.data.processes) == ("stdlib", None, 1)
    assert (config.model.compute_dtype, config.cluster.name, config.plan.strategy) == (
        "float32",
        "cpu-local",
        "hbp-mixed",
    )
    # The paper's recipe.
    assert (config.train.lr, config.train.betas, config.train.weight_decay) == (1e-5, (0.9, 0.95), 0.01)


def test_quickstart_is_a_configuration() -> None:
    load_config(QUICKSTART)


def test_overrides_win_over_the_file_and_the_last_over_the_others(file: Path) -> None:
    overrides = ["train.lr=1", "train.lr=2e-5", "data.source=a=b.jsonl", "plan.baseline=concat", "seed=7"]
    overrides += ["train.betas=[0.8, 0.9]", "train.export=false", "cluster.memory_gib=1.5", "model.path=other"]
    config = load_config(file, overrides)
    assert config.train.lr == 2e-5
    assert config.data.source == "a=b.jsonl"
    assert config.plan.baseline == "concat"
    assert config.seed == 7
    assert config.train.betas == (0.8, 0.9)
    assert config.train.export is False
    assert config.cluster.memory_gib == 1.5
    assert config.model.path == "other"
    assert load_config(file, ["plan.baseline=concat", "plan.baseline=null"]).plan.baseline is None


def test_a_configuration_does_not_change(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.xyzzy=1", "no option train.xyzzy"),
        ("train.warm_up=0.1", "no option train.warm_up (did you mean 'train.warmup'?)"),
        ("model.lr=1", "no option model.lr (did you mean 'train.lr'?)"),
        ("training.lr=1", "no option training (did you mean 'train'?)"),
        ("lr=1", "no option lr (did you mean 'train.lr'?)"),
        ("train.loss=mean", "train.loss: Input should be 'ave-token', 'run-token', 'sample-mean', 'sum' or 'token-"),
        ("train.lr=fast", "train.lr: Input should be a valid number, unable to parse string as a number (got 'fast')"),
        ("train.lr=0", "train.lr: Input should be greater than 0 (got 0)"),
        ("train.lr=.nan", "train.lr: Input should be greater than 0"),
        ("train.warmup=2", "train.warmup: Input should be less than or equal to 1"),
        ("train.betas=[0.9]", "train.betas.1: Field required"),
        ("train.betas=[1, 2, 3]", "train.betas: "),
        ("train.export=perhaps", "train.export: "),
        ("seed=-1", "seed: Input should be greater than or equal to 0 (got -1)"),
        ("seed=1.5", "seed: "),
        ("data.source=12", "data.source: Input should be a valid string (got 12)"),
        ("data.processes=0", "data.processes: "),
        ("model.compute_dtype=float16", "model.compute_dtype: Input should be 'float32' or 'bfloat16' (got 'float16')"),
        ("model=3", "model: "),
        ("plan=", "plan: "),
    ],
)
def test_wrong_key_or_value_is_named(file: Path, override: str, message: str) -> None:
    assert refusal(file, override).startswith(f"{file}: {message}")
    assert refusal(file, override).endswith("see `hbp train --help`")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "'train.lr' is not an override; write section.key=value"),
        ("run_dir.x.y=1", "'run_dir.x.y=1': run_dir is a value, not a section"),
        ("train.lr.x=1", "'train.lr.x=1': lr is a value, not a section"),
        ("train.betas=[1", "'train.betas=[1': the value is not YAML"),
        ("train.betas=!!python/name:os.system", "the value is not YAML"),
    ],
)
def test_override_that_makes_no_sense(file: Path, override: str, message: str) -> None:
    file.write_text("run_dir: here\nmodel: {path: some/model}\ntrain: {lr: 1}\n")
    assert message in refusal(file, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "is not YAML"),
        (b"a:\tb: c", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "is not YAML"),
        (b"", "holds no configuration"),
        (b"- a\n- b\n", "holds no configuration"),
        (b"{}", "model: Field required"),
        (b"model: {}", "model.path: Field required"),
        (b"model: {path: a}\ntrain:\n", "train: "),
        (b"model: {path: a}\n1: 2\n", "1: "),
    ],
)
def test_wrong_file(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    assert message in refusal(file)
    assert str(file) in refusal(file)


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refusal(path) == f"cannot read the configuration {path}; see examples/quickstart.yaml for one"


def options(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """Every option below a section, as (line begin, field)."""
    found: list[tuple[str, Any]] = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += [(f"{name}:", None), *((f"  {key}", option) for key, option in options(section))]
        else:
            found.append((name, field))
    return found


def test_help_describes_every_option_in_its_section() -> None:
    lines = describe().splitlines()
    expected = options(Config)
    assert len(expected) > 35
    assert len(lines) == len(expected)
    for line, (begin, field) in zip(lines, expected, strict=True):
        assert line.startswith(begin) and line[len(begin)] == " "
        if field is None:
            assert len(line.split(":  ")[1]) > 10  # what the section is about
        else:
            assert (field.description or "") in line
            default = "none" if field.default is None else str(field.default)
            assert line.endswith("[required]" if field.is_required() else f"[default {default}]")


def test_relative_paths_are_taken_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on the command line from the working folder, as a shell completes them."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "data", there / "data"):
        folder.mkdir(parents=True)
        (folder / "train.jsonl").touch()
    (here / "only.jsonl").touch()
    monkeypatch.chdir(here)
    sections = {
        "data": {
            "sources": [{"path": "data/train.jsonl"}, {"path": "data/none.jsonl"}, {"path": "owner/set"}],
            "eval_source": "only.jsonl",
            "tokenizer": "./none",
        },
        "model": {"path": str(tmp_path)},
    }
    (there / "run.yaml").write_text(yaml.safe_dump(sections))
    data = load_config(there / "run.yaml").data
    assert [source.path for source in data.sources] == [
        str(there / "data" / "train.jsonl"),
        str(there / "data" / "none.jsonl"),  # missing there, and said to be
        "owner/set",
    ]
    assert data.eval_source == "only.jsonl"  # nothing of that name is there, but here
    assert data.tokenizer == str(there / "none")
    override = load_config(there / "run.yaml", ["data.eval_source=data/train.jsonl"]).data
    assert override.eval_source == "data/train.jsonl"
    monkeypatch.chdir(there)
    assert load_config(Path("run.yaml")).data.sources[0].path == "data/train.jsonl"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sources": [{"name": "a"}]}, "data.sources.0.path"),
        ({"sources": [{"path": "a", "weight": 0}]}, "data.sources.0.weight"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "data.sources.0.wieght"),
        ({"too_long": "shorten"}, "data.too_long"),
        ({"bad_records": "ignore"}, "data.bad_records"),
        ({"eval_source": [{"path": "a", "max_samples": 0}]}, "max_samples"),
    ],
)
def test_wrong_sources_are_named(section: dict[str, object], said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": section, "model": {"path": "m"}}))
    with pytest.raises(HbpError) as caught:
        load_config(tmp_path / "run.yaml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_home_is_meant_wherever_a_path_may_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run_dir: ~/runs` made a folder of the name ``~`` in the working folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    text = "run_dir: ~/runs\nmodel: {path: ~/model}\ndata: {sources: [{path: ~/a.jsonl}], cache: ~/cache}\n"
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml", ["plan.path=~/plan", "train.resume=~/step-1"])
    home = str(tmp_path / "me")
    assert (config.run_dir, config.model.path, config.data.cache) == (f"{home}/runs", f"{home}/model", f"{home}/cache")
    assert config.data.sources[0].path == f"{home}/a.jsonl"
    assert (config.plan.path, config.train.resume) == (f"{home}/plan", f"{home}/step-1")

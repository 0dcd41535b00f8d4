"""The one typed configuration of `hbp train`: every option, its default and what it means.

A YAML file has the sections below; a command line may override single values as ``section.key=value``. Unknown keys
and values of the wrong type are refused by name. :func:`describe` is what `hbp train --help` prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from hbp.disk import at_home
from hbp.errors import HbpError, did_you_mean

Strategy = Literal["concat", "ffd", "bfd", "isf", "sorted", "lb", "dcp", "hbp", "hbp-mixed"]
Loss = Literal["ave-token", "run-token", "sample-mean", "sum", "token-mean"]
Order = Literal["fastest", "balanced", "random"]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]
Kernel = Literal["auto", "varlen", "sdpa", "flex", "flash", "eager"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)
"""Names; what each does is said where it is made (:mod:`hbp.planning.planner`)."""
LOSSES: tuple[str, ...] = get_args(Loss)
KERNELS: tuple[str, ...] = get_args(Kernel)

FREE: JsonDict = {"kind": "free", "shown": "free to change"}
"""Of an option: nothing that is trained depends on it, so a resumed run may have another value."""
CONTENT: JsonDict = {"kind": "content", "shown": "fixed, by content"}
"""Of a path or name: a run knows what it holds by a hash, wherever it lies."""
FIXED: JsonDict = {"kind": "fixed", "shown": "fixed"}
"""Of every option that says nothing else: a resumed run with another value is refused."""


def on_resume(effect: str) -> JsonDict:
    """Of an option that a resumed run may have another value of, with this effect."""
    return {"kind": "resume", "shown": f"on resume: {effect}", "effect": effect}


REPLANNED = on_resume("what is left is planned again")
FROM_THERE = on_resume("holds from there on")


def _free(default: Any, meaning: str, **limits: Any) -> Any:
    """An option that is :data:`FREE`."""
    return Field(default, description=meaning, json_schema_extra=FREE, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Section):
    """One of several sources."""

    path: str = Field(description="as `data.source`")
    name: str | None = Field(None, description="in results by source; none: the file's or folder's")
    weight: float | None = Field(
        None, gt=0, description="share of an epoch's samples, relative to the other sources' weights"
    )
    repeat: float | None = Field(None, gt=0, description="how often each sample is seen in an epoch; none: once")
    max_samples: int | None = Field(None, ge=1, description="samples used, the first ones; none: all")
    split: str = Field("train", description="as `data.split`")
    subset: str | None = Field(None, description="as `data.subset`")
    streaming: bool = Field(False, description="as `data.streaming`")


class DataConfig(_Section):
    """Where the samples come from."""

    source: str = Field(
        "stdlib",
        description="a JSON Lines, JSON or Parquet file, a folder of them, a saved `datasets` folder, a hub set as "
        "OWNER/NAME or hub:NAME, or `stdlib`: the embedded set made from this Python's own sources",
        json_schema_extra=CONTENT,
    )
    sources: tuple[SourceConfig, ...] = Field(
        (),
        description="several, in place of `source`: a list of {path, name, weight or repeat, max_samples, split, "
        "subset, streaming}",
        json_schema_extra=CONTENT,
    )
    eval_source: str | tuple[SourceConfig, ...] | None = Field(
        None,
        description="evaluation samples: one source or a list as `sources`; none: `eval_samples` are held out",
        json_schema_extra=CONTENT,
    )
    split: str = Field(
        "train", description="split of a `datasets` source, or of files named after splits", json_schema_extra=CONTENT
    )
    subset: str | None = Field(None, description="configuration name of a hub data set", json_schema_extra=CONTENT)
    streaming: bool = Field(
        False, description="read a hub set as it is tokenized, without a copy on disk", json_schema_extra=FREE
    )
    tokenizer: str | None = Field(
        None,
        description="Hugging Face tokenizer folder or name; none: the model's (`stdlib` trains its own)",
        json_schema_extra=CONTENT,
    )
    chat_template: str | None = Field(
        None,
        description="a Jinja file; `training`: TRL's training version of the tokenizer's own template; or a template "
        "that TRL ships, such as `qwen3_training`; `own`: the tokenizer's; none: the tokenizer's, but of a stock one "
        "that TRL (where installed) trains conversations with a version of, that version",
        json_schema_extra=CONTENT,
    )
    columns: dict[str, str] = Field(
        {}, description="where a field has another name than ours, as {messages: dialog, answer: response}"
    )
    roles: dict[str, str] = Field({}, description="where a role has a name that is not known, as {bot: assistant}")
    ignore: tuple[str, ...] = Field(
        (), description="fields of records and messages that are left out on purpose; others that nothing reads end it"
    )
    max_length: int | None = Field(
        None, ge=1, description="longest packing length, tokens; none: the longest sample, or longer where it is faster"
    )
    too_long: Literal["drop", "truncate", "split"] = Field(
        "drop", description="samples over `max_length`: left out by name; their start alone; or every piece a sample"
    )
    bad_records: Literal["stop", "skip"] = Field(
        "stop", description="a record that cannot be used ends the run, with its file and line, or is counted and left"
    )
    eval_samples: int = Field(64, ge=0, description="samples held out for the evaluation loss, without `eval_source`")
    processes: int = Field(1, ge=1, description="processes that tokenize", json_schema_extra=FREE)
    ray: str | None = Field(
        None,
        description="tokenize on a Ray cluster: its address, `auto` or `local`; needs `pip install '.[ray]'`",
        json_schema_extra=FREE,
    )
    cache: str | Literal[False] | None = Field(  # YAML reads `off` as false
        None,
        description="folder of tokenized pieces that runs share; none: $HBP_CACHE or ~/.cache/hbp; `off`: none",
        json_schema_extra=FREE,
    )
    cache_gib: float = Field(
        20.0, gt=0, description="what was used longest ago leaves the cache over this size, GiB", json_schema_extra=FREE
    )
    short_samples: int = Field(3000, ge=1, description="`stdlib` only: function-sized samples")
    long_samples: int = Field(24, ge=0, description="`stdlib` only: module-sized samples")
    longest_chars: int = Field(28_000, ge=1000, description="`stdlib` only: longest module used, characters")
    vocab_size: int = Field(4096, ge=300, description="`stdlib` only: size of the tokenizer trained on it")


class ModelConfig(_Section):
    """What is trained."""

    path: str = Field(
        description="folder with weights, or a folder or file with a transformers config alone, or a hub name",
        json_schema_extra=CONTENT,
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="of activations and gathered parameters; states and gradient reduction stay float32"
    )
    quantize: Literal["none", "nf4"] = Field(
        "none", description="hold the frozen layers under `lora` in four bits (QLoRA's NF4), packed as they are read"
    )
    attention: Kernel = Field(
        "auto",
        description="kernel: torch's native one on CUDA and SDPA by document elsewhere; FlexAttention; flash-attn; "
        "written out. auto: of these one that has what the model needs (softcapped scores, attention sinks)",
        json_schema_extra=FROM_THERE,
    )
    hub_kernels: bool = Field(
        False, description="norms and activations by kernels of transformers' hub", json_schema_extra=FROM_THERE
    )
    compile: bool | None = Field(
        None,
        description="torch.compile each layer around its attention; none: on CUDA where Triton and a C compiler are",
        json_schema_extra=FROM_THERE,
    )
    offload_activations: bool = Field(
        False,
        description="keep what waits for backward in host memory; plans count on it, so they recompute less",
        json_schema_extra=FROM_THERE,
    )


class ClusterConfig(_Section):
    """What it is trained on."""

    name: str = Field(
        "cpu-local",
        description="a built-in cluster, or a profile file written by `hbp profile`",
        json_schema_extra=REPLANNED,
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="memory budget of one process or GPU; none: the cluster's own",
        json_schema_extra=REPLANNED,
    )
    processes: int = Field(2, ge=1, description="local processes when not under torchrun", json_schema_extra=FREE)
    profile: bool = Field(
        True, description="measure the cost model's constants here before planning", json_schema_extra=FREE
    )


class PlanConfig(_Section):
    """How the samples are packed."""

    path: str | None = Field(
        None,
        description="run this plan folder instead of making one, or the pieces of a planned stream that are in it",
        json_schema_extra=CONTENT,
    )
    strategy: str = Field("hbp-mixed", description="see `hbp plan --help`", json_schema_extra=REPLANNED)
    baseline: str | None = Field(
        None,
        description="also train this strategy on the same samples and compare, such as `concat`",
        json_schema_extra=FREE,
    )
    baseline_full: bool = Field(
        False,
        description="train every static setting of the baseline whole; no: a few steps of each, then the fastest",
        json_schema_extra=FREE,
    )
    global_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of an optimizer step; none: one pack of the longest group on every SP group",
    )
    short_steps: int | None = Field(
        None,
        ge=0,
        description="curriculum: first steps of the run with short groups only; none: 500 or a tenth of an epoch",
    )
    order: Order = Field(
        "balanced",
        description="of `hbp-mixed`, what a step holds. balanced: the data's mix, as near as 5 % of the speed buys; "
        "fastest: packs of one kind (docs/quality.md: at what cost); random: what a shuffle puts there, at any price",
        json_schema_extra=REPLANNED,
    )


class TrainConfig(_Section):
    """Optimizer and outputs. AdamW with the paper's recipe."""

    loss: Loss = Field(
        "ave-token",
        description="ave-token: every loss token of a step alike; run-token: every one of the plan; sample-mean: every "
        "sample of a step; sum: not divided; token-mean: the mean of each rank's own, which depends on the packing",
    )
    lr: float = Field(1e-5, gt=0, description="peak learning rate", json_schema_extra=FROM_THERE)
    warmup: float = Field(
        0.03, ge=0, le=1, description="share of the tokens over which it rises", json_schema_extra=FROM_THERE
    )
    final_lr: float = Field(
        0.1, ge=0, le=1, description="share of the peak that the cosine ends at", json_schema_extra=FROM_THERE
    )
    weight_decay: float = Field(0.01, ge=0, description="of AdamW, on matrices; norms and biases have none")
    decay_all: bool = Field(False, description="weight decay on norms and biases too, as in earlier versions")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    max_grad_norm: float = Field(
        1.0, gt=0, description="gradients are clipped to this norm", json_schema_extra=FROM_THERE
    )
    max_skipped: int = _free(
        3, "a step whose loss or gradient norm is not finite is skipped; so many in a row end the run", ge=1
    )
    on_oom: Literal["replan", "stop"] = _free(
        "replan", "a step runs out of memory: plan what is left for less, and go on from the last checkpoint; or end"
    )
    max_minutes: float | None = _free(
        None, "save and end this job (exit code 85) after so many minutes; none: no limit", gt=0
    )
    max_steps: int | None = _free(
        None, "save and end (exit code 85) after so many steps of the whole run; none: no limit", ge=1
    )
    export: bool = Field(True, description="write the trained model as a Hugging Face folder", json_schema_extra=FREE)
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="also upload the exported model there, as NAME or OWNER/NAME, private if it is new; needs a token "
        "(`hf auth login` or HF_TOKEN)",
        json_schema_extra=FREE,
    )
    epochs: int = Field(
        1,
        ge=1,
        description="times that every sample is trained on; each epoch has a plan of its own",
        json_schema_extra=on_resume("that many in all; the schedule is stretched or shortened from there on"),
    )
    resume: str = Field(
        "auto",
        description="auto: go on from run_dir's last whole checkpoint; never: start anew; or a checkpoint folder",
        json_schema_extra=FREE,
    )
    save_minutes: float | None = Field(
        30.0, gt=0, description="minutes between checkpoints; none: not by time", json_schema_extra=FREE
    )
    save_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints; none: not by steps", json_schema_extra=FREE
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept", json_schema_extra=FREE)
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations; none: only at the end", json_schema_extra=FREE
    )
    eval_tokens: int | None = Field(
        None, ge=1, description="tokens between evaluations; none: not by tokens", json_schema_extra=FREE
    )
    hang_minutes: float | None = Field(
        8.0,
        gt=0,
        description="end the run when a rank has kept the others waiting for so long at the start or in a step, there "
        "ten times what the slowest step before would have it take; none: only where collectives give up",
        json_schema_extra=FREE,
    )
    trace_steps: tuple[int, int] | None = Field(
        None,
        description="[first, count]: steps to trace with torch's profiler, counted from where the run starts",
        json_schema_extra=FREE,
    )


class LoraConfig(_Section):
    """Low-rank adapters through `peft`, trained and exported in place of the model's own weights."""

    rank: int = Field(0, ge=0, description="of the adapters; 0: train the whole model")
    alpha: float = Field(16.0, gt=0, description="their outputs are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapters' inputs")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="names of the layers (or stacked experts) that get one, or one expression that matches whole "
        "paths; all-linear: every matrix but embedding and head",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="the model's own biases that are trained too: none, all, or of layers with an adapter"
    )
    modules_to_save: tuple[str, ...] = Field((), description="modules that are trained whole, such as lm_head")
    rslora: bool = Field(False, description="scale by alpha / √rank instead")
    dora: bool = Field(False, description="train the norms of adapted weights apart (DoRA)")


class LogConfig(_Section):
    """Where the numbers go besides ``steps.jsonl``."""

    tensorboard: bool = Field(False, description="write TensorBoard event files", json_schema_extra=FREE)
    wandb_project: str | None = Field(
        None, description="log to this project of Weights & Biases", json_schema_extra=FREE
    )
    wandb_name: str | None = Field(None, description="name of the run there", json_schema_extra=FREE)
    wandb_mode: Literal["online", "offline"] = Field(
        "online", description="offline: files to `wandb sync` later", json_schema_extra=FREE
    )
    trackers: tuple[Tracker, ...] = Field(
        (),
        description="others, through Accelerate: aim, clearml, comet_ml, dvclive, mlflow, swanlab, trackio",
        json_schema_extra=FREE,
    )
    project: str = Field(
        "hbp", min_length=1, description="project or experiment of the run in `trackers`", json_schema_extra=FREE
    )


class Config(_Section):
    """A whole run."""

    run_dir: str = Field("runs/hbp", description="folder for everything that the run writes", json_schema_extra=FREE)
    seed: int = Field(0, ge=0, description="of the data split, the plan and a freshly initialised model")
    data: DataConfig = DataConfig()
    model: ModelConfig
    cluster: ClusterConfig = ClusterConfig()
    plan: PlanConfig = PlanConfig()
    train: TrainConfig = TrainConfig()
    lora: LoraConfig = LoraConfig()
    log: LogConfig = LogConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides.

    Relative paths in the file are taken from its folder (or, where nothing is there, from the working folder), those of
    overrides from the working folder.

    Raises:
        HbpError: no such file, not YAML, an unknown key, or a value that does not fit; names the key.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except OSError:
        raise HbpError(f"cannot read the configuration {path}; see examples/quickstart.yaml for one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HbpError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise HbpError(f"{path} holds no configuration; see examples/quickstart.yaml for one")
    _from_folder(data, path.parent)
    return validated(data, overrides, str(path))


def validated(data: dict[str, Any], overrides: Sequence[str], name: str) -> Config:
    """A configuration from its sections and overrides; `name` is what errors call it.

    Raises:
        HbpError: as :func:`load_config`.
    """
    for override in overrides:
        _apply(data, override)
    try:
        return Config.model_validate(at_home(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise HbpError(f"{name}: no option {key}{_nearest(key)}; see `hbp train --help`") from None
        value = "" if first["type"] == "missing" else f" (got {first['input']!r})"
        raise HbpError(f"{name}: {key}: {first['msg']}{value}; see `hbp train --help`") from None


PATHS = (*(("data", key) for key in ("source", "eval_source", "tokenizer", "chat_template")), ("model", "path"))


def _from_folder(data: dict[str, Any], folder: Path) -> None:
    """Take relative paths from the YAML file's folder, in place."""
    for section, key in PATHS:
        own = data.get(section)
        if isinstance(own, dict) and isinstance(own.get(key), str):
            own[key] = _path_from(own[key], folder)
    own = data.get("data")
    for key in ("sources", "eval_source"):
        for source in own.get(key) or () if isinstance(own, dict) and isinstance(own.get(key), list) else ():
            if isinstance(source, dict) and isinstance(source.get("path"), str):
                source["path"] = _path_from(source["path"], folder)


def _path_from(text: str, folder: Path) -> str:
    path = Path(text).expanduser()
    if (there := folder / path).exists():
        return str(there)
    is_path = text.startswith((".", "~")) or (folder / path.parts[0]).is_dir() if path.parts else False
    return str(there) if is_path and not path.exists() else text


def _nearest(key: str) -> str:
    """Which option may have been meant: one of this name in another section, or one that is written alike."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    known = [
        name if option is None else f"{name}.{option}"
        for name, section in sections.items()
        for option in (None, *getattr(section, "model_fields", ()))
    ]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return f" (did you mean {elsewhere[0]!r}?)" if elsewhere else did_you_mean(key, known)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise HbpError(f"{override!r} is not an override; write section.key=value, such as train.lr=2e-5")
    *sections, name = key.split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise HbpError(f"{override!r}: {section} is a value, not a section; see `hbp train --help`")
    try:
        data[name] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise HbpError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}") from None


def kinds() -> dict[str, JsonDict]:
    """The kind of every option by its name: :data:`FREE`, :data:`CONTENT`, :data:`FIXED` or :func:`on_resume`."""
    found: dict[str, JsonDict] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            found |= {f"{name}.{key}": _kind(option) for key, option in section.model_fields.items()}
        else:
            found[name] = _kind(field)
    return found


def _kind(field: Any) -> JsonDict:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else FIXED


def describe() -> str:
    """Every option with its meaning, what it is to a resumed run, and its default, as text."""
    lines = []
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            lines.append(f"{name}:  {(section.__doc__ or '').splitlines()[0]}")
            lines += [_option(f"  {key}", option) for key, option in section.model_fields.items()]
        else:
            lines.append(_option(name, field))
    return "\n".join(lines)


def _option(name: str, field: Any) -> str:
    default = "required" if field.is_required() else f"default {'none' if field.default is None else field.default}"
    meaning = f"{field.description}  " if field.description else ""
    return f"{name:<24}{meaning}({_kind(field)['shown']})  [{default}]"

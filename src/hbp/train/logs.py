"""Where the numbers of a run go: ``steps.jsonl`` always; if asked TensorBoard, Weights & Biases, Accelerate's trackers.

Scalars are numbered by the step of the whole run and named ``train/loss``, ``eval/loss``, ``group/16384-SP1-GC0/mfu``:
speed and memory are kept apart by packing group, since each group is a regime of its own. Only rank 0 writes.

Chosen steps are traced by PyTorch's own profiler, for Perfetto or ``chrome://tracing``: one file a rank.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule

from hbp.config import LogConfig
from hbp.errors import HbpError
from hbp.progress import say
from hbp.run_log import StepRecord

Writer = Callable[[Mapping[str, float], int], None]
"""Takes scalars by name, and the step."""


@contextmanager
def open_writers(
    config: LogConfig, folder: Path, run_config: Mapping[str, Any], run_id: str | None = None, step: int = 0
) -> Iterator[list[Writer]]:
    """The writers that the configuration asks for, closed at the end.

    Args:
        config: section ``log``.
        folder: TensorBoard's files go to ``tensorboard`` in it, W&B's to ``wandb``, a tracker's to its own name's.
        run_config: shown beside the run by W&B and trackers.
        run_id: of W&B's run, which is gone on with if it is there; None: a new one.
        step: of the run, that is done; what TensorBoard has of later ones, from before a kill, is taken back.

    Raises:
        HbpError: a package that is not installed.
    """
    with ExitStack() as stack:
        writers: list[Writer] = []
        if config.tensorboard:
            writers.append(stack.enter_context(_tensorboard(folder / "tensorboard", step)))
        if config.wandb_project is not None:
            writers.append(stack.enter_context(_wandb(config, folder, run_config, run_id)))
        writers += [
            stack.enter_context(_tracker(name, config.project, folder, run_config, run_id)) for name in config.trackers
        ]
        yield writers


@contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Writer]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing("log.tensorboard", "tensorboard") from None
    with SummaryWriter(str(folder), purge_step=step + 1) as writer:

        def write(scalars: Mapping[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)

        yield write


@contextmanager
def _wandb(config: LogConfig, folder: Path, run_config: Mapping[str, Any], run_id: str | None) -> Iterator[Writer]:
    try:
        import wandb
    except ImportError:
        raise _missing("log.wandb_project", "wandb") from None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            mode=_wandb_mode(config),
            config=dict(run_config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise HbpError(f"log.wandb_project: {_one_line(error)}") from None
    try:
        yield lambda scalars, step: run.log(dict(scalars), step=step)
    finally:
        run.finish()


@contextmanager
def _tracker(
    name: str, project: str, folder: Path, run_config: Mapping[str, Any], run_id: str | None
) -> Iterator[Writer]:
    """One of Accelerate's trackers. What fails once the run has begun is told, and ends the tracker, not the training.

    A resumed run begins a new run there, but with Trackio, which goes on with one of the same name.
    """
    try:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError:
        raise _missing(f"log.trackers: {name}", "accelerate", "trackers") from None
    threads = torch.get_num_threads()
    PartialState(cpu=True)  # the trackers' own log lines want it; it joins the processes that there are
    torch.set_num_threads(threads)  # which it may have set
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **_tracker_options(name, folder, run_id))
        tracker.start()
        tracker.store_init_configuration(_flat(run_config))
    except Exception as error:  # each has its own kinds
        raise HbpError(f"log.trackers: {name}: {_one_line(error)}") from None
    works = [True]

    def attempt(what: Callable[[], None]) -> None:
        try:
            if works[0]:
                what()
        except Exception as error:
            works[0] = False
            say(f"log.trackers: {name} fails, and gets no more of this run: {_one_line(error)}")

    # MLflow takes no + in a name, which mixed steps have in that of their group
    yield lambda scalars, step: attempt(
        lambda: tracker.log({key.replace("+", "_"): x for key, x in scalars.items()}, step=step)
    )
    attempt(tracker.finish)


def _tracker_options(name: str, folder: Path, run_id: str | None) -> dict[str, Any]:
    """What the tracker's class takes beside the project: where its files go, and the run's name."""
    match name:
        case "aim":
            return {"logging_dir": str(folder / "aim")}
        case "dvclive":
            return {"dir": str(folder / "dvclive")}
        case "mlflow":
            return {"run_name": run_id}
        case "trackio" if run_id is not None:
            return {"name": run_id, "resume": "allow"}
        case _:
            return {}


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """``{"train.lr": 1e-5, …}``: trackers take no sections; lists become text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _wandb_mode(config: LogConfig) -> Any:
    return os.environ.get("WANDB_MODE") or config.wandb_mode


def _wandb_knows_us() -> bool:
    """Whether there is a key where `wandb` looks for one: the environment, or netrc's entry for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser()
    settings.read(Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb") / "settings")
    server = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="https://api.wandb.ai")
    try:
        return netrc(os.environ.get("NETRC")).authenticators(str(urlsplit(server).hostname)) is not None
    except (OSError, NetrcParseError):
        return False


def check_writers(config: LogConfig) -> None:
    """Find what the writers lack before anything is run.

    Raises:
        HbpError: a package that is not installed, or no key for W&B.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            package = name.replace("_", "-")
            raise HbpError(f"log.trackers: {name} is not installed; `pip install {package}`, or leave it out")
        if find_spec("accelerate") is None:
            raise _missing(f"log.trackers: {name}", "accelerate", "trackers")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise _missing("log.tensorboard", "tensorboard")
    if config.wandb_project is None:
        return
    if find_spec("wandb") is None:
        raise _missing("log.wandb_project", "wandb")
    if _wandb_mode(config) == "online" and not _wandb_knows_us():
        raise HbpError(
            "log.wandb_project needs a key of Weights & Biases: run `wandb login`, set WANDB_API_KEY, or "
            "log.wandb_mode=offline"
        )


def _missing(option: str, package: str, extra: str = "log") -> HbpError:
    return HbpError(f"{option} needs {package}; install with `pip install 'hierarchical-balance-packing[{extra}]'`")


def scalars_of(record: StepRecord) -> dict[str, float]:
    """The scalars of a step."""
    values = {} if record.loss is None else {"train/loss": record.loss}
    values |= {} if record.grad_norm is None else {"train/grad_norm": record.grad_norm}
    values |= {
        "train/lr": record.lr,
        "train/tokens": float(record.tokens),
        "train/tokens_per_s": record.tokens_per_s,
        "train/seconds": record.seconds,
    }
    if record.skipped:
        values["train/skipped"] = 1.0
    group = f"group/{record.group.replace('/', '-').replace(' + ', '+')}"
    values[f"{group}/tokens_per_s"] = record.tokens_per_s
    values[f"{group}/seconds"] = record.seconds
    values[f"{group}/skew"] = record.skew
    values[f"{group}/memory_gib"] = record.memory_bytes / 2**30
    if record.reserved_bytes:
        values[f"{group}/reserved_gib"] = record.reserved_bytes / 2**30
        values["train/alloc_retries"] = float(record.alloc_retries)
    if record.mfu is not None:
        values[f"{group}/mfu"] = record.mfu
    return values


@contextmanager
def trace(folder: Path, first: int, count: int) -> Iterator[Callable[[], None]]:
    """Trace `count` steps from step `first` on; the caller calls what is yielded at the end of every step.

    Args:
        folder: gets ``rank-0.json`` and so on when the last of them is over.
        first: steps to pass before, from where the run stands. One more before it warms the profiler up.
        count: steps in the trace; 0 for no trace.
    """
    if not count:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    warmup = min(1, first)

    def write(profiled: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(folder / f"rank-{dist.get_rank()}.json"))

    plan = schedule(wait=first - warmup, warmup=warmup, active=count, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiled:
        yield profiled.step

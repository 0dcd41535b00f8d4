"""What ``plan.json`` says of a plan: how it was made, for which lengths, model and cluster, its metrics, what it drops.

Other programs write plans too. They need only give ``schema_version`` and ``world_size``: what is absent is taken from
the rows (:func:`hbp.plan.read_plan`) or left empty, here and nowhere else, so that no reader has to ask. Settings of
unknown names are kept as they are; those of known names are checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hbp.disk import let_faults_through, patiently
from hbp.errors import HbpError

SCHEMA_VERSION = 1
JSON_NAME = "plan.json"
UNSAID: Mapping[str, Any] = {
    **{"strategy": "unnamed", "seed": 0, "groups": [], "dropped": []},
    **{name: {} for name in ("model", "cluster", "cost_model", "metrics", "details", "settings")},
}
"""What plan.json is taken to say of what it does not mention."""
TOLD_BY_SAMPLES = frozenset(("n_samples", "n_tokens", "lengths_sha256"))
RATIOS = frozenset(("pr", "dbr", "abr", "cr", "ave_tokens", "predicted_s"))
CLUSTER_NUMBERS = ("step_overhead_s", "memory_bytes")
"""Of a cluster, that are read without its cost model."""
ORDERS = ("fastest", "balanced", "random")
"""How optimizer steps are made up (:mod:`hbp.planning.ordered.orders`)."""
DEFAULT_ORDER: Final = "fastest"
"""Of plans that are made to be looked at; those that `hbp train` makes to train on are `balanced` (docs/quality.md)."""
SETTING_COUNTS = ("global_batch_tokens", "short_steps", "max_length", "windows")


@dataclass(frozen=True, order=True)
class Group:
    """A packing group: how long its packs are and how they are run (paper, Section 4.1)."""

    capacity: int
    """Packing length in tokens."""
    sp_degree: int
    """Ranks that share one pack."""
    gc_layers: int
    """Layers whose activations are recomputed."""

    def __str__(self) -> str:
        return f"{self.capacity} tokens, SP {self.sp_degree}, GC {self.gc_layers}"


@dataclass(frozen=True)
class PlanInfo:
    """Everything about a plan that is not a row: the contents of ``plan.json``."""

    strategy: str
    seed: int
    world_size: int
    groups: tuple[Group, ...]
    n_samples: int
    """Samples in the data set, dropped ones included; of a piece of a stream, those that had come by then."""
    n_tokens: int
    """Tokens in the plan."""
    lengths_sha256: str
    """:func:`hash_lengths` of the data set that the plan was made for; of a piece of a stream, of the samples that it
    packs, in order of their ids."""
    dropped: tuple[tuple[int, str], ...] = ()
    """Pairs of sample id and reason."""
    model: Mapping[str, Any] = field(default_factory=dict)
    cluster: Mapping[str, Any] = field(default_factory=dict)
    cost_model: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, float] = field(default_factory=dict)
    """Further figures: time imbalance, composition drift, travel from random order (docs/plan-format.md)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options that shaped the plan (global batch, curriculum, longest packing length, windows). ``stream`` is there in
    a piece of a stream: its number and the stream's steps before it."""

    @property
    def is_piece(self) -> bool:
        """Whether the plan holds only some samples of a stream, numbered as the stream numbers them."""
        return "stream" in self.settings


def read_json(folder: Path) -> dict[str, Any]:
    """The contents of ``plan.json``.

    Raises:
        HbpError: missing, not JSON, of another schema version, without ``world_size``, or changed since it was written.
    """
    path = folder / JSON_NAME
    try:
        data = json.loads(patiently(path.read_text))
    except FileNotFoundError:
        raise HbpError(f"no plan in {folder} ({JSON_NAME} is missing); make one with `hbp plan`") from None
    except (OSError, ValueError, RecursionError) as error:
        let_faults_through(error)
        raise HbpError(f"cannot read {path} ({one_line(error)}); make the plan again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise HbpError(f"{path} has schema version {version}, this hbp reads {SCHEMA_VERSION}; make the plan again")
    if data.get("checksum", _checksum(data)) != _checksum(data):  # plans of other tools need not have one
        raise HbpError(
            f"{path} is not as it was written; make the plan again, or take `checksum` out if you changed it"
        )
    if "world_size" not in data:
        raise HbpError(f"{path} lacks world_size; add the number of ranks that the plan is for")
    return dict(data)


def info_to_json(info: PlanInfo) -> dict[str, Any]:
    """The contents of ``plan.json``."""
    data: dict[str, Any] = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    data["schema_version"] = SCHEMA_VERSION
    data["groups"] = [dataclasses.asdict(group) for group in info.groups]
    data["dropped"] = [{"sample_id": sample, "reason": reason} for sample, reason in info.dropped]
    data["checksum"] = _checksum(data)
    return data


def _checksum(data: Mapping[str, Any]) -> str:
    """SHA-256 of everything else in plan.json."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def info_from_json(folder: Path, data: Mapping[str, Any]) -> PlanInfo:
    """Of what :func:`read_json` gave, :data:`TOLD_BY_SAMPLES` added where it leaves them out.

    Raises:
        HbpError: a value that does not fit; names it.
    """
    try:
        return _checked_info({**UNSAID, **data})
    except (KeyError, TypeError, ValueError) as error:
        raise HbpError(f"{folder / JSON_NAME} is damaged ({one_line(error)}); make the plan again") from None


def _checked_info(data: Mapping[str, Any]) -> PlanInfo:
    values = {f.name: data[f.name] for f in dataclasses.fields(PlanInfo)}
    for name in ("seed", "world_size", "n_samples", "n_tokens"):
        _whole(data, name)
    for name in ("strategy", "lengths_sha256"):
        if not isinstance(values[name], str):
            raise ValueError(f"{name} is not a text")
    for name in ("model", "cluster", "cost_model", "metrics", "details", "settings"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} is not an object")
    numbers = {name: values["cluster"][name] for name in CLUSTER_NUMBERS if name in values["cluster"]}
    for name, value in [*values["metrics"].items(), *values["details"].items(), *numbers.items()]:
        if type(value) not in (int, float):
            raise ValueError(f"{name} is not a number")
        if name in numbers and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, not a number from 0 up")
    for settings in (values["settings"], values["settings"].get("asked")):
        for name in SETTING_COUNTS if isinstance(settings, dict) else ():
            if settings.get(name) is not None:
                _whole(settings, name)
    values["groups"] = tuple(
        Group(*(_whole(group, name) for name in ("capacity", "sp_degree", "gc_layers"))) for group in data["groups"]
    )
    values["dropped"] = tuple((_whole(entry, "sample_id"), str(entry["reason"])) for entry in data["dropped"])
    return PlanInfo(**values)


def _whole(data: Mapping[str, Any], name: str) -> int:
    if type(data[name]) is not int or not 0 <= data[name] < 2**63:
        raise ValueError(f"{name} is not a whole number from 0 up")
    return int(data[name])


def one_line(error: Exception) -> str:
    """An error as a part of a line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"

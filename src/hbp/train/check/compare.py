"""Check models: their runs on four ranks against plain transformers, a finding for each property.

The bounds: in float32 every gradient and the loss within 1e-5 of its largest entry (for one of which the plain model
keeps too few digits itself, :func:`hbp.train.check.reference.rounded_away`); in bfloat16 all gradients together
no farther from the float32 reference than 1.5 times the unpacked model's, and the loss within 1 %.

About five seconds a model on one core, after ten for four processes to start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hbp.errors import HbpError, not_loaded
from hbp.train.check.families import PROVEN_FAMILIES, check_trainable
from hbp.train.check.properties import (
    NAMES,
    NEIGHBOUR,
    OUTSIDE,
    PROPERTIES,
    WORLD,
    Property,
    RankRun,
    documents,
    put_together,
    run_properties,
)
from hbp.train.check.ranks import run_ranks
from hbp.train.check.reference import Run, alone, distance, draws_at_random, rounded_away, worst
from hbp.train.check.tiny import tiny_config, write_tiny

TOLERANCE = 1e-5
"""Of float32: largest difference over the largest entry"""
BFLOAT16_TOLERANCE = 1.5
"""Of bfloat16: distance from the float32 reference, in multiples of the unpacked model's"""
BFLOAT16_LOSS = 0.01
RANDOM = (
    "in training the family draws random numbers of its own (noise on inputs, sampled experts), so that no two runs of "
    "it are equal and nothing can be shown"
)
TIMEOUT_S = 100.0
"""For the ranks of one model"""


@dataclass(frozen=True)
class Finding:
    """Whether a family has a property."""

    property: str
    holds: bool
    error: float | None
    """As the bound is; None: it did not come to a comparison."""
    bound: float
    where: str = ""
    """The tensor that differs most."""
    why: str = ""
    """What it means if it does not hold, or what was raised."""


def check_configs(configs: Mapping[str, Any]) -> dict[str, list[Finding]]:
    """Findings for some models, all in one start of four processes.

    Args:
        configs: transformers configurations by name.

    Raises:
        HbpError: a family of which no tiny instance can be made.
    """
    if not configs:
        return {}
    with TemporaryDirectory() as root:
        folders = write_pairs(configs, Path(root))
        try:
            ranks = run_ranks(run_properties, WORLD, folders, timeout=TIMEOUT_S * len(folders))
        except TimeoutError:
            why = "ranks waited for each other until the time was over: they do not run the same collectives"
            return {name: [Finding(each, False, None, TOLERANCE, why=why) for each in NAMES] for name in folders}
        return {name: findings(name, pair, ranks) for name, pair in folders.items()}


def write_pairs(configs: Mapping[str, Any], root: Path) -> dict[str, tuple[str, str]]:
    """Folders of tiny models, of each one with many heads and one with few."""
    pairs = {}
    for number, (name, config) in enumerate(configs.items()):
        many, few = (write_tiny(root / f"{number}-{few}", tiny_config(config, few_heads=few)) for few in (False, True))
        pairs[name] = (many, few)
    return pairs


def findings(
    name: str, pair: tuple[str, str], ranks: Sequence[Mapping[tuple[str, str], RankRun | str]]
) -> list[Finding]:
    """What the ranks' runs of a model say.

    Args:
        name: of the model in the runs.
        pair: its folders.
        ranks: what :func:`~hbp.train.check.properties.run_properties` returned on each.
    """
    want = [_alone(name, folder) for folder in pair]

    def of(key: str) -> Run | str:
        runs = [rank[name, key] for rank in ranks]
        raised = [run for run in runs if isinstance(run, str)]
        return raised[0] if raised else put_together([run for run in runs if not isinstance(run, str)])

    found = []
    for each in PROPERTIES:
        run = of(each.name)
        if isinstance(run, str):
            found.append(Finding(each.name, False, None, TOLERANCE, why=_plainly(run)))
        elif each.dtype == torch.bfloat16:
            found.append(_bfloat16(each, run, want[0], alone(pair[0], documents(), torch.bfloat16)))
        else:
            found.append(_compared(each.name, each.why, run, want[each.few_heads], pair[each.few_heads]))
    one, other = (of(f"{NEIGHBOUR} {seed}") for seed in (1, 2))
    if isinstance(one, str) or isinstance(other, str):
        raised = one if isinstance(one, str) else other
        return [*found, Finding(NEIGHBOUR, False, None, TOLERANCE, why=_plainly(str(raised)))]
    return _explained([*found, _compared(NEIGHBOUR, OUTSIDE, one, other)], pair[0])


def _explained(found: Sequence[Finding], folder: str) -> list[Finding]:
    """The same, without reasons that are not theirs: what already differs document by document is no fault of packs."""
    compared = [each for each in found if not each.holds and each.error is not None]
    random = bool(compared) and draws_at_random(folder, documents()[0])
    if not random and found[0] not in compared:
        return list(found)
    first = compared[0]
    follows = [each for each in compared[1:] if random or each.property != NEIGHBOUR]  # which is held to itself
    whys = {each.property: f"{first.property!r} does not hold" for each in follows}
    if random:
        whys[first.property] = RANDOM
    return [replace(each, why=whys.get(each.property, each.why)) for each in found]


def _alone(name: str, folder: str) -> Run:
    try:
        return alone(folder, documents())
    except Exception as error:  # a family's own code raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise HbpError(f"a tiny model like {name} does not run in plain transformers: {reason}") from None


@lru_cache(maxsize=2)
def _rounded_away(folder: str) -> dict[str, float]:
    return rounded_away(folder, documents(), TOLERANCE)


def _plainly(raised: str) -> str:
    """What was raised, as it is understood without our code beside it."""
    if "needs the pack's layout" in raised:
        return "its layers do not hand on to attention what the model is called with, so the pack's layout is lost"
    return raised


def _compared(name: str, why: str, got: Run, want: Run, folder: str | None = None) -> Finding:
    error, where = worst(got, want)
    if error >= TOLERANCE and folder is not None:
        error, where = worst(got, want, _rounded_away(folder))
    holds = error < TOLERANCE
    return Finding(name, holds, error, TOLERANCE, where, "" if holds else why)


def _bfloat16(each: Property, got: Run, want: Run, unpacked: Run) -> Finding:
    ours, theirs = distance(got, want), distance(unpacked, want)
    loss = abs(float(got[0] / want[0]) - 1)
    single = sorted(name for name, gradient in got[1].items() if gradient.dtype != torch.float32)
    holds = ours < BFLOAT16_TOLERANCE * theirs and loss < BFLOAT16_LOSS and not single
    where = single[0] if single else "the loss" if loss >= BFLOAT16_LOSS else "all gradients"
    return Finding(each.name, holds, ours / theirs, BFLOAT16_TOLERANCE, where, "" if holds else each.why)


def model_config(name: str) -> Any:
    """The transformers configuration of a built-in model, a folder, a file, or a hub name.

    Raises:
        HbpError: nothing there that transformers knows.
    """
    from transformers import AutoConfig

    from hbp.cost.known_models import KNOWN_MODELS

    try:
        if name in KNOWN_MODELS:
            given = {key: value for key, value in KNOWN_MODELS[name].items() if key != "model_type"}
            return AutoConfig.for_model(KNOWN_MODELS[name]["model_type"], **given)
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HbpError(f"cannot read the configuration of {name!r}: {not_loaded(name, error)}") from None


def check_models(names: Sequence[str]) -> list[dict[str, Any]]:
    """What ``hbp check`` prints as JSON, of each of some models: its findings and whether all hold.

    Args:
        names: built-in names, folders, files, hub names.

    Raises:
        HbpError: nothing there, or nothing of which a tiny instance can be made.
    """
    import transformers

    configs = {name: model_config(name) for name in names}
    refused = {name: _refusal(config) for name, config in configs.items()}
    found = check_configs({name: config for name, config in configs.items() if not refused[name]})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return [
        {
            "model": name,
            "model_type": config.model_type,
            **versions,
            "holds": not refused[name] and all(finding.holds for finding in found[name]),
            "refused": refused[name],
            "properties": [asdict(finding) for finding in found.get(name, ())],
        }
        for name, config in configs.items()
    ]


def _refusal(config: Any) -> str | None:
    config.quantization_config = None  # of the weights, not of the family
    try:
        check_trainable(config)
    except HbpError as error:
        return str(error)
    return None


def require_checked(name: str, config: Any, record: Path) -> None:
    """Let a family through that is not proven, if it passes; remembered beside the run.

    Args:
        name: of the model.
        config: its transformers configuration.
        record: file of what was found, read again while the configuration and the versions stay.

    Raises:
        HbpError: names the property that does not hold, and why.
    """
    import transformers

    from hbp.progress import say

    if config.model_type in PROVEN_FAMILIES:
        return
    versions = [torch.__version__, transformers.__version__, config.to_dict()]
    key = hashlib.sha256(json.dumps(versions, sort_keys=True, default=str).encode()).hexdigest()
    try:
        result = json.loads(record.read_text())
    except (OSError, ValueError):
        result = {}
    if result.get("key") != key:
        say(
            f"{config.model_type} models are not on the proven list: held against plain transformers in tiny size first"
        )
        result = check_models([name])[0] | {"key": key}
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(result, indent=1) + "\n")
    if result["refused"]:
        raise HbpError(result["refused"])
    failed = [each for each in result["properties"] if not each["holds"]]
    if failed:
        first = failed[0]
        raise HbpError(
            f"{config.model_type} models do not train here as their documents alone do: {first['property']!r} does not "
            f"hold ({first['why']}); `hbp check {name}` shows all"
        )

"""A plan's packs as data that other trainers read: rows in the order in which their ranks take them.

Such a trainer runs one SP degree, one number of recomputed layers and as many micro-steps in every step
(`hbp plan --sp N --gc K --equal-micro-steps`); a plan that asks for more is refused. Row ``(step · M + micro) · G + g``
is the pack of SP group ``g`` of ``G`` in a micro-step of ``M``: what data-parallel rank ``g`` reads when rows are dealt
in turn, not shuffled, one a micro-batch. Where the plan leaves a group idle, and at the end of the last step, a row of
two tokens without loss stands in.

The variants differ only in what a row is called and where the labels stand:

- ``datasets``: ``input_ids``, ``labels`` (before the shift; the first token of each sample has none, so that no sample
  is predicted from another), ``seq_lengths``. TRL's SFTTrainer reads it unchanged, padding-free.
- ``llama-factory``: the same with ``attention_mask`` numbering the samples from 1 and ``position_ids``, and nothing in
  the columns of pictures; a folder for ``tokenized_path``, with ``neat_packing``.
- ``automodel``: ``labels`` after the shift, ``position_ids``, ``seq_lens`` and ``seq_lens_padded`` (NeMo Automodel's
  collater of packed sequences in THD layout).
- ``bridge``: a NumPy file of rows with ``input_ids``, ``loss_mask`` (of the target of each position) and
  ``seq_start_id`` (Megatron-Bridge's packed fine-tuning data).

XTuner is not among them: it pads every pack to one length, so a plan helps it only where all packs are of one length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbp.errors import HbpError
from hbp.integrations.rows import Rows, as_rows, check_made_for
from hbp.plan import Plan
from hbp.train.batch import SampleSource
from hbp.train.loss import IGNORE

Document = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
Row = dict[str, Any]
FILLER: list[Document] = [(np.zeros(2, np.int32), np.zeros(2, np.uint8))]
ONE_SETTING = "`hbp plan --sp N --gc K --equal-micro-steps`"


@dataclass(frozen=True)
class Layout:
    """What the reader of an export has to be set to."""

    to: str
    world_size: int
    sp_degree: int
    recomputed_layers: int
    gradient_accumulation_steps: int
    optimizer_steps: int
    rows: int
    longest_row: int
    """Tokens."""
    settings: Mapping[str, Any]
    """The reader's own names and values."""


def export_plan(plan: Plan, samples: Any, to: str, out: Path) -> Layout:
    """Write a plan's packs for another trainer, with ``layout.json`` beside them.

    Args:
        plan: of one setting, with equal micro-steps.
        samples: what its ids name: a token store, or anything that :func:`~hbp.integrations.rows.as_rows` takes.
        to: a key of :data:`VARIANTS`.
        out: folder to write.

    Raises:
        HbpError: no such variant, a plan that such a trainer cannot follow, or one of other data.
    """
    if to not in VARIANTS:
        raise HbpError(f"--to {to}: give one of {', '.join(VARIANTS)}")
    rows: Rows = as_rows(samples)
    check_made_for(plan, rows.lengths, plan.info.world_size)
    degree, layers, micro_steps = _one_setting(plan, to)
    row_of, write, settings_of = VARIANTS[to]
    count = plan.n_steps * micro_steps * (plan.info.world_size // degree)
    out.mkdir(parents=True, exist_ok=True)
    write(lambda: (row_of(documents) for documents in packs_in_order(plan, rows, micro_steps)), out)
    longest = int(plan.tokens().max())
    layout = Layout(
        to,
        plan.info.world_size,
        degree,
        layers,
        micro_steps,
        plan.n_steps,
        count,
        longest,
        settings_of(micro_steps, longest),
    )
    (out / "layout.json").write_text(json.dumps(vars(layout), indent=1) + "\n")
    return layout


def _one_setting(plan: Plan, to: str) -> tuple[int, int, int]:
    """SP degree, recomputed layers and micro-steps of every pack and step."""
    degrees, layers = np.unique(plan.sp_degree).tolist(), np.unique(plan.gc_layers).tolist()
    if len(degrees) > 1 or len(layers) > 1:
        raise HbpError(
            f"the plan has SP degrees {degrees} and {layers} recomputed layers, but {to} runs one of each; make it "
            f"with {ONE_SETTING}"
        )
    micro_steps = np.zeros(plan.n_steps, np.int64)
    np.maximum.at(micro_steps, plan.step, plan.micro_step.astype(np.int64) + 1)
    most = int(micro_steps.max())
    if (micro_steps[:-1] != most).any():
        raise HbpError(
            f"the plan's steps have {int(micro_steps.min())} to {most} micro-steps, but {to} accumulates the same in "
            f"each; make it with {ONE_SETTING}"
        )
    return int(degrees[0]), int(layers[0]), most


def packs_in_order(plan: Plan, samples: SampleSource, micro_steps: int) -> Iterator[list[Document]]:
    """The documents of each pack, as data-parallel ranks take them in turn; :data:`FILLER` where there is none."""
    degree = int(plan.sp_degree[0])
    groups, place = plan.info.world_size // degree, plan.step.astype(np.int64) * micro_steps + plan.micro_step
    slot = place * groups + plan.rank_start // degree
    row_of = np.full(plan.n_steps * micro_steps * groups, -1, np.int64)
    row_of[slot] = np.arange(plan.n_packs)
    for row in row_of.tolist():
        yield FILLER if row < 0 else [samples.sample(int(i)) for i in plan.samples(row)[0]]


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _ids(documents: list[Document]) -> list[int]:
    return [int(token) for ids, _ in documents for token in ids]


def _labels(documents: list[Document]) -> list[int]:
    """Before the shift; none for the first token of a document."""
    found = []
    for ids, mask in documents:
        learnt = mask.astype(bool)
        learnt[0] = False
        found += np.where(learnt, ids, IGNORE).tolist()
    return found


def _positions(documents: list[Document]) -> list[int]:
    return [position for ids, _ in documents for position in range(len(ids))]


def _shifted(documents: list[Document], nothing: int, value: Callable[[Document], npt.NDArray[Any]]) -> list[int]:
    """What each position's target is, within its document; nothing for the last one."""
    return [x for document in documents for x in [*value(document)[1:].tolist(), nothing]]


def _trl_row(documents: list[Document]) -> Row:
    return {
        "input_ids": _ids(documents),
        "labels": _labels(documents),
        "seq_lengths": [len(ids) for ids, _ in documents],
    }


def _llama_factory_row(documents: list[Document]) -> Row:
    return {
        "input_ids": _ids(documents),
        "attention_mask": [number for number, (ids, _) in enumerate(documents, 1) for _ in ids],
        "position_ids": _positions(documents),
        "labels": _labels(documents),
        "images": None,
        "videos": None,
        "audios": None,
    }


def _automodel_row(documents: list[Document]) -> Row:
    lengths = [len(ids) for ids, _ in documents]
    return {
        "input_ids": _ids(documents),
        "labels": _shifted(documents, IGNORE, lambda d: np.where(d[1] != 0, d[0], IGNORE)),
        "position_ids": _positions(documents),
        "seq_lens": lengths,
        "seq_lens_padded": lengths,
    }


def _bridge_row(documents: list[Document]) -> Row:
    starts = np.cumsum([0, *(len(ids) for ids, _ in documents[:-1])])
    return {
        "input_ids": _ids(documents),
        "loss_mask": _shifted(documents, 0, lambda d: (d[1] != 0).astype(np.int64)),
        "seq_start_id": starts.tolist(),
    }


# ---- Files ----------------------------------------------------------------------------------------------------------

Rewound = Callable[[], Iterator[Row]]


def _save_dataset(rows: Rewound, out: Path) -> None:
    _dataset(rows).save_to_disk(str(out))


def _save_train_split(rows: Rewound, out: Path) -> None:
    from datasets import DatasetDict

    DatasetDict({"train": _dataset(rows)}).save_to_disk(str(out))


def _dataset(rows: Rewound) -> Any:
    from datasets import Dataset, Features, Value
    from datasets import Sequence as Many

    first = next(rows())
    kinds = {name: Value("null") if value is None else Many(Value("int32")) for name, value in first.items()}
    made: list[Row] = []
    parts = []
    for row in rows():
        made.append(row)
        if len(made) == 1000:
            parts.append(Dataset.from_list(made, features=Features(kinds)))
            made = []
    if made:
        parts.append(Dataset.from_list(made, features=Features(kinds)))
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def _save_numpy(rows: Rewound, out: Path) -> None:
    every = list(rows())
    array = np.empty(len(every), object)
    array[:] = every
    np.save(out / "packed.npy", array, allow_pickle=True)
    samples = [len(row["seq_start_id"]) for row in every]
    sizes = [np.diff([*row["seq_start_id"], len(row["input_ids"])]) for row in every]
    metadata = {
        "max_samples_per_bin": max(samples),
        "dataset_max_seqlen": int(max(size.max() for size in sizes)),
        "min_packed_seqlen": min(len(row["input_ids"]) for row in every),
        "packing_factor": round(sum(samples) / len(samples), 2),
    }
    (out / "packed_metadata.json").write_text(json.dumps([metadata]))


VARIANTS: Mapping[
    str, tuple[Callable[[list[Document]], Row], Callable[[Rewound, Path], None], Callable[[int, int], Row]]
] = {
    "datasets": (
        _trl_row,
        _save_dataset,
        lambda micro_steps, longest: {
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "padding_free": True,
            "max_length": None,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": micro_steps,
            "train_sampling_strategy": "sequential",
            "num_train_epochs": 1,
        },
    ),
    "llama-factory": (
        _llama_factory_row,
        _save_train_split,
        lambda micro_steps, longest: {
            "tokenized_path": ".",
            "packing": True,
            "neat_packing": True,
            "cutoff_len": longest,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": micro_steps,
            "disable_shuffling": True,
            "num_train_epochs": 1,
        },
    ),
    "automodel": (
        _automodel_row,
        _save_dataset,
        lambda micro_steps, longest: {
            "dataloader.collate_fn": "nemo_automodel.components.datasets.utils.packed_sequence_thd_collater",
            "dataloader.shuffle": False,
            "step_scheduler.local_batch_size": 1,
            "step_scheduler.grad_acc_steps": micro_steps,
        },
    ),
    "bridge": (
        _bridge_row,
        _save_numpy,
        lambda micro_steps, longest: {
            "packed_train_data_path": "packed.npy",
            "packed_train_metadata_path": "packed_metadata.json",
            "packed_sequence_size": longest,
            "micro_batch_size": 1,
        },
    ),
}
"""Each with its row, its file and its settings, from micro-steps a step and the longest row."""

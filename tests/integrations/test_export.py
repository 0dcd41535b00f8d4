"""Exports hold the plan's packs in the order in which another trainer's ranks take them, as its own reader reads them.

Readers that are not installed are skipped; the rows are held against the plan and the samples in any case.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from integrations.following import LR, forget_accelerate, tokenizer
from plans import plan_of
from workers import CPU, LLAMA, random_samples, run_ranks, write_model

from hbp.config import TrainConfig
from hbp.errors import HbpError
from hbp.integrations.export import VARIANTS, export_plan
from hbp.parallel.mesh import make_mesh
from hbp.plan import Plan
from hbp.train.loop import Learner, train
from hbp.train.model import load_sharded

datasets = pytest.importorskip("datasets")
SAMPLES = random_samples(np.random.default_rng(3).integers(2, 20, 14), LLAMA["vocab_size"])


def plan(world: int = 2, degree: int = 1) -> Plan:
    """Three steps of two micro-steps; a group idles in the second, and the last step is short."""
    groups, ids = world // degree, iter(range(14))

    def take(n: int) -> list[int]:
        return [next(ids) for _ in range(n)]

    rows = [(0, micro, g * degree, degree, 1, take(2)) for micro in (0, 1) for g in range(groups)]
    rows += [(1, 0, 0, degree, 1, take(2)), (1, 1, 0, degree, 1, take(1)), (1, 1, degree, degree, 1, take(1))]
    rows += [(2, 0, g * degree, degree, 1, take(1)) for g in range(groups)]
    return plan_of(rows, SAMPLES.lengths, world)


WANTED = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], None, [10], [11], [12], [13], None, None]
"""Samples of each row, two groups in turn; none where a pack without loss stands in."""


def documents(row: list[int] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    return [SAMPLES.documents[i] for i in row] if row else [(np.zeros(2, np.int32), np.zeros(2, np.uint8))]


@pytest.mark.parametrize(("world", "degree"), [(2, 1), (4, 2)])
def test_rows_stand_as_ranks_take_them(tmp_path: Path, world: int, degree: int) -> None:
    layout = export_plan(plan(world, degree), SAMPLES, "datasets", tmp_path)
    assert (layout.rows, layout.sp_degree, layout.gradient_accumulation_steps) == (12, degree, 2)
    rows = datasets.load_from_disk(str(tmp_path))
    assert len(rows) == 12
    for row, wanted in zip(rows, WANTED, strict=True):
        found = documents(wanted)
        assert row["input_ids"] == [int(t) for ids, _ in found for t in ids]
        assert row["seq_lengths"] == [len(ids) for ids, _ in found]
        labels = [
            int(token) if learnt and place else -100
            for ids, mask in found
            for place, (token, learnt) in enumerate(zip(ids, mask, strict=True))
        ]
        assert row["labels"] == labels
    assert json.loads((tmp_path / "layout.json").read_text())["settings"]["gradient_accumulation_steps"] == 2


def targets(wanted: list[int] | None) -> list[int]:
    """After the shift within each sample: what every reader has to arrive at."""
    return [
        target
        for ids, mask in documents(wanted)
        for target in [*(int(t) if learnt else -100 for t, learnt in zip(ids[1:], mask[1:], strict=True)), -100]
    ]


def test_llama_factory_rows_number_their_samples(tmp_path: Path) -> None:
    export_plan(plan(), SAMPLES, "llama-factory", tmp_path)
    rows = datasets.load_from_disk(str(tmp_path))["train"]
    for row, wanted in zip(rows, WANTED, strict=True):
        lengths = [len(ids) for ids, _ in documents(wanted)]
        assert row["attention_mask"] == np.repeat(np.arange(1, len(lengths) + 1), lengths).tolist()
        assert row["position_ids"] == [p for n in lengths for p in range(n)]
        assert [*row["labels"][1:], -100] == targets(wanted)
        assert row["images"] is row["videos"] is row["audios"] is None


def test_llama_factory_reads_them(tmp_path: Path) -> None:
    collator = pytest.importorskip("llamafactory.data.collator")
    export_plan(plan(), SAMPLES, "llama-factory", tmp_path)
    row = datasets.load_from_disk(str(tmp_path))["train"][0]
    mask = collator.prepare_4d_attention_mask(torch.tensor([row["attention_mask"]]), torch.float32)[0, 0] == 0
    first = len(SAMPLES.documents[0][0])
    total = len(row["input_ids"])
    want = torch.zeros(total, total, dtype=torch.bool)
    want[:first, :first] = torch.ones(first, first).tril() == 1
    want[first:, first:] = torch.ones(total - first, total - first).tril() == 1
    assert torch.equal(mask, want)


def test_automodel_rows_carry_targets(tmp_path: Path) -> None:
    export_plan(plan(), SAMPLES, "automodel", tmp_path)
    for row, wanted in zip(datasets.load_from_disk(str(tmp_path)), WANTED, strict=True):
        assert row["labels"] == targets(wanted)
        assert row["seq_lens"] == row["seq_lens_padded"] == [len(ids) for ids, _ in documents(wanted)]
        assert len(row["position_ids"]) == sum(row["seq_lens"])


def test_automodel_reads_them(tmp_path: Path) -> None:
    utils = pytest.importorskip("nemo_automodel.components.datasets.utils")
    export_plan(plan(), SAMPLES, "automodel", tmp_path)
    batch = utils.packed_sequence_thd_collater([datasets.load_from_disk(str(tmp_path))[0]])
    assert batch["qkv_format"] == "thd"
    assert batch["labels"][0].tolist() == targets(WANTED[0])
    assert batch["seq_lens"][0].tolist() == [len(SAMPLES.documents[i][0]) for i in (0, 1)]


def bridge_batch(item: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens and targets that Megatron-Bridge makes of a row: each sample without its last token, targets one on."""
    bounds = [*item["seq_start_id"], len(item["input_ids"])]
    tokens, wanted = [], []
    for a, b in itertools.pairwise(bounds):
        tokens += item["input_ids"][a : b - 1]
        mask = item["loss_mask"][a : b - 1]
        wanted += [t if m else -100 for t, m in zip(item["input_ids"][a + 1 : b], mask, strict=True)]
    return tokens, wanted


def test_bridge_rows(tmp_path: Path) -> None:
    export_plan(plan(), SAMPLES, "bridge", tmp_path)
    rows = np.load(tmp_path / "packed.npy", allow_pickle=True)
    for item, wanted in zip(rows, WANTED, strict=True):
        assert all(type(item[name]) is list for name in ("input_ids", "loss_mask", "seq_start_id"))
        tokens, found = bridge_batch(item)
        assert tokens == [int(t) for ids, _ in documents(wanted) for t in ids[:-1]]
        assert [t for t in found if t != -100] == [t for t in targets(wanted) if t != -100]
    (metadata,) = json.loads((tmp_path / "packed_metadata.json").read_text())
    assert metadata["max_samples_per_bin"] == 2
    assert metadata["dataset_max_seqlen"] == int(SAMPLES.lengths.max())


def test_bridge_reads_them(tmp_path: Path) -> None:
    safe = pytest.importorskip("megatron.bridge.utils.safe_pickle")
    export_plan(plan(), SAMPLES, "bridge", tmp_path)
    rows = safe.safe_load_npy((tmp_path / "packed.npy").read_bytes())
    assert len(rows) == len(WANTED) and rows[0]["seq_start_id"] == [0, len(SAMPLES.documents[0][0])]


def test_a_plan_of_several_settings_is_refused(tmp_path: Path) -> None:
    ids = iter(range(14))
    degrees = plan_of([(0, 0, 0, 2, 0, [next(ids)]), (1, 0, 0, 1, 0, [next(ids)])], SAMPLES.lengths, 2)
    ids = iter(range(14))
    counts = plan_of(
        [
            (0, 0, 0, 1, 0, [next(ids)]),
            (1, 0, 0, 1, 0, [next(ids)]),
            (1, 1, 0, 1, 0, [next(ids)]),
            (2, 0, 0, 1, 0, [3]),
        ],
        SAMPLES.lengths,
        2,
    )
    for made, message in ((degrees, r"SP degrees \[1, 2\]"), (counts, "1 to 2 micro-steps")):
        with pytest.raises(HbpError, match=message) as caught:
            export_plan(made, SAMPLES, "datasets", tmp_path)
        assert "--equal-micro-steps" in str(caught.value)
    with pytest.raises(HbpError, match=f"--to xtuner: give one of {', '.join(VARIANTS)}"):
        export_plan(plan(), SAMPLES, "xtuner", tmp_path)


# ---- TRL, unchanged -------------------------------------------------------------------------------------------------


def by_trl(rank: int, world: int, folder: str, exported: str, out: str) -> dict[str, list[float]]:
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)):
        os.environ[name] = str(value)
    forget_accelerate()
    settings = json.loads((Path(exported) / "layout.json").read_text())["settings"]
    args = SFTConfig(
        out,
        use_cpu=True,
        ddp_backend="gloo",
        bf16=False,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        **settings,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    trainer = SFTTrainer(model, args, train_dataset=datasets.load_from_disk(exported), processing_class=tokenizer())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    mesh = make_mesh(world, [], "cpu")
    ours = load_sharded(folder, mesh.world, CPU)
    config = TrainConfig(lr=LR, warmup=0, final_lr=1.0, weight_decay=0)
    records = train(Learner.of(ours, mesh, config, CPU), plan(world), SAMPLES)
    return {
        "trl": [entry["loss"] for entry in logs],
        "hbp": [record.loss for record in records],
        "trl norms": [entry["grad_norm"] for entry in logs],
        "hbp norms": [record.grad_norm for record in records],
    }


def test_trl_unchanged_trains_as_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    folder = write_model(tmp_path / "model", LLAMA)
    export_plan(plan(), SAMPLES, "datasets", tmp_path / "exported")
    found = run_ranks(by_trl, 2, folder, str(tmp_path / "exported"), str(tmp_path / "out"))[0]
    assert found["trl"] == pytest.approx(found["hbp"], rel=3e-6)
    assert found["trl norms"] == pytest.approx(found["hbp norms"], rel=1e-4)

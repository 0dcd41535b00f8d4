"""DPO by a plan of pairs: equal to each document alone, written out, and to TRL's own trainer on the same pairs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integrations.following import LORA, LR, Case, forget_accelerate, full_state, tokenizer, trainer_of, with_adapters
from plans import Row, plan_of
from workers import LLAMA, run_ranks, write_model

from hbp.errors import HbpError
from hbp.plan import Plan

pytest.importorskip("accelerate")
pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BETA, EPOCHS = 0.3, 3
CASES = {
    "ddp": Case("dpo", options={"beta": BETA}),
    "plugin": Case("dpo", "plugin", options={"beta": BETA}),
    "ddp, lora": Case("dpo", lora=True, options={"beta": BETA}),
    "plugin, lora": Case("dpo", "plugin", lora=True, options={"beta": BETA}),
    "ddp, bfloat16": Case("dpo", bf16=True, options={"beta": BETA}),
}


def text_rows(count: int = 8) -> list[dict[str, str]]:
    """Pairs as TRL takes them."""
    rng = np.random.default_rng(1)

    def words(least: int, most: int) -> str:
        return "".join(f" w{i}" for i in rng.integers(0, 60, rng.integers(least, most)))

    return [{"prompt": words(1, 9), "chosen": words(1, 20), "rejected": words(1, 20)} for _ in range(count)]


def pair_rows(count: int = 8) -> list[dict[str, list[int]]]:
    """The same in tokens; TRL ends answers with the tokenizer's last one."""
    ids = [{side: [int(word[1:]) for word in text.split()] for side, text in row.items()} for row in text_rows(count)]
    ends = [{"prompt": [], "chosen": [62], "rejected": [62]}] * count
    return [{f"{k}_ids": row[k] + end[k] for k in row} for row, end in zip(ids, ends, strict=True)]


def plan(world: int) -> Plan:
    """Two steps of five and three pairs; on two ranks with degrees mixed, packs of one to three pairs, an idle rank."""
    from hbp.integrations.trl import pair_lengths

    def pairs(*numbers: int) -> list[int]:
        return [side for n in numbers for side in (2 * n, 2 * n + 1)]

    rows: list[Row] = [(0, 0, 0, 1, 0, pairs(6, 1)), (0, 1, 0, 1, 2, pairs(0, 3, 2)), (1, 0, 0, 1, 1, pairs(4, 7, 5))]
    if world == 2:
        rows = [(0, 0, 0, 1, 0, pairs(6)), (0, 0, 1, 1, 3, pairs(1, 0, 3)), (0, 1, 0, 2, 1, pairs(2))]
        rows += [(1, 0, 0, 2, 2, pairs(4, 7)), (1, 1, 1, 1, 0, pairs(5))]
    return plan_of(rows, pair_lengths(pair_rows())[0], world)


def whole_plan(world: int) -> Plan:
    """All pairs in one step, so that a trainer's own order of them does not matter."""
    two = plan(world)
    steps = np.zeros_like(two.step)
    lengths = np.zeros(16, np.int32)
    lengths[two.sample_ids] = two.lengths
    micro = two.micro_step_index()
    names = ("rank_start", "sp_degree", "gc_layers")
    columns = [getattr(two, name).tolist() for name in names]
    ids = [two.samples(row)[0].tolist() for row in range(two.n_packs)]
    rows = zip(steps.tolist(), micro.tolist(), *columns, ids, strict=True)
    return plan_of(list(rows), lengths, world)


def first_adapters(folder: str) -> dict[str, torch.Tensor]:
    """Whose product is not nothing, so that the reference is not the base."""
    import peft
    from transformers import AutoModelForCausalLM

    drawn = torch.Generator().manual_seed(0)
    config = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), config)
    named = [(name.removeprefix("base_model.model."), p) for name, p in model.named_parameters() if "lora_" in name]
    return {name: 0.1 * torch.randn(p.shape, generator=drawn) for name, p in named}


def written_out(folder: str, world: int, lora: bool) -> dict[str, Any]:
    """Each document alone through the stock model: losses, norms, margins and weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if lora:
        model = with_adapters(model, first_adapters(folder))
    reference = copy.deepcopy(model).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, (0.9, 0.95), weight_decay=0.0)
    rows, the_plan = pair_rows(), plan(world)

    def ratio(row: dict[str, list[int]], side: str) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row[side]])
        targets = slice(len(row["prompt_ids"]) - 1, ids.size(1) - 1)
        found = []
        for each in (model, reference):
            logits = each(input_ids=ids).logits[0, targets]
            found.append(-F.cross_entropy(logits, ids[0, targets.start + 1 :], reduction="sum"))
        return found[0] - found[1]

    found: dict[str, Any] = {"losses": [], "norms": [], "margins": []}
    for step in range(the_plan.n_steps):
        of_step = np.repeat(the_plan.step, np.diff(the_plan.sample_offsets)) == step
        pairs = [rows[i // 2] for i in the_plan.sample_ids[of_step].tolist() if i % 2 == 0]
        margins = torch.stack([ratio(row, "chosen_ids") - ratio(row, "rejected_ids") for row in pairs])
        loss = -F.logsigmoid(BETA * margins).mean()
        optimizer.zero_grad()
        loss.backward()
        found["norms"].append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        found["losses"].append(float(loss.detach()))
        found["margins"].append(float(BETA * margins.detach().mean()))
    return {**found, "weights": {n.replace(".default", ""): p for n, p in full_state(model).items()}}


def by_plan(rank: int, world: int, folder: str, out: str, case: Case, **options: Any) -> dict[str, Any]:
    first = first_adapters(folder) if case.lora else None
    options = {"plan": [plan(world)], "train_dataset": pair_rows(), **options}
    with trainer_of(rank, world, folder, out, case, first, **options) as trainer:
        trainer.train()
        return _found(trainer)


def _found(trainer: Any) -> dict[str, Any]:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "margins": [entry["rewards/margins"] for entry in logs],
        "logs": logs,
        "weights": {n.replace(".default", ""): p for n, p in full_state(trainer.model).items() if ".ref." not in n},
    }


def arguments(out: str, pairs_a_rank: int, **options: Any) -> Any:
    """Of TRL's trainer by itself."""
    from trl import DPOConfig

    plain = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    plain |= {"learning_rate": LR, "lr_scheduler_type": "constant", "adam_beta2": 0.95, "bf16": False}
    plain |= {"gradient_checkpointing": False, "max_length": None, "num_train_epochs": EPOCHS, "beta": BETA}
    return DPOConfig(out, per_device_train_batch_size=pairs_a_rank, **plain, **options)


def by_trl(folder: str, out: str, world: int = 1, **options: Any) -> dict[str, Any]:
    """TRL's trainer as it comes, from text."""
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    given = datasets.Dataset.from_list(text_rows())
    args = arguments(out, 8 // world, **options)
    trainer = DPOTrainer(model, args=args, train_dataset=given, processing_class=tokenizer())
    trainer.train()
    forget_accelerate()
    return {**_found(trainer), "rows": trainer.train_dataset}


def run_cases(rank: int, world: int, folder: str, out: str) -> dict[str, Any]:
    """For :func:`workers.run_ranks`."""
    found = {name: by_plan(rank, world, folder, f"{out}/{name}", case) for name, case in CASES.items()}
    whole = Case("dpo", epochs=EPOCHS, options={"beta": BETA})
    found["whole"] = by_plan(rank, world, folder, f"{out}/whole", whole, plan=[whole_plan(world)])
    stock = by_trl(folder, f"{out}/stock", world)
    found["stock"] = {k: v for k, v in stock.items() if k != "rows"}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("dpo") / "model", LLAMA)


@pytest.fixture(scope="module")
def runs(folder: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_cases, 2, folder, str(tmp_path_factory.mktemp("dpo")))


def close(got: dict[str, Any], want: dict[str, Any], bf16: bool = False) -> None:
    assert got["losses"] == pytest.approx(want["losses"], rel=2e-2 if bf16 else 1e-5)
    assert got["norms"] == pytest.approx(want["norms"], rel=0.25 if bf16 else 2e-5)
    assert got["margins"] == pytest.approx(want["margins"], rel=0.2 if bf16 else 1e-6, abs=2e-5)
    assert got["weights"].keys() == want["weights"].keys()
    if not bf16:
        for name, value in want["weights"].items():
            assert float((got["weights"][name] - value).abs().max()) < 1e-4, name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_pairs_as_each_document_alone_does(runs: Any, folder: str, name: str) -> None:
    want = written_out(folder, 2, CASES[name].lora)
    assert len(want["losses"]) == 2 and abs(want["margins"][1]) > 1e-2  # the second step is not where it began
    for rank in runs:
        close(rank[name], want, CASES[name].bf16)


def test_two_ranks_learn_pairs_as_trl_does(runs: Any) -> None:
    for rank in runs:
        close(rank["whole"], rank["stock"])
        got, want = rank["whole"]["logs"], rank["stock"]["logs"]
        names = {k for k in want[0] if k.startswith(("rewards", "logps"))} | {"num_tokens"}
        assert len(names) == 7
        for ours, theirs in zip(got, want, strict=True):
            assert {k: ours[k] for k in names} == pytest.approx({k: theirs[k] for k in names}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("types", "more"),
    [
        (["sigmoid", "hinge", "apo_zero"], {"loss_weights": [1.0, 0.5, 2.0]}),
        (["ipo", "sigmoid_norm", "sppo_hard"], {"loss_weights": [0.1, 1.0, 0.01]}),
        (["robust", "nca_pair", "bco_pair", "apo_down"], {"label_smoothing": 0.2}),
    ],
)
def test_one_process_learns_each_loss_as_trl_does(folder: str, tmp_path: Path, types: Any, more: Any) -> None:
    from transformers import AutoModelForCausalLM

    from hbp.integrations.trl import HBPDPOTrainer

    stock = by_trl(folder, str(tmp_path / "stock"), loss_type=types, **more)
    trainer = HBPDPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=arguments(str(tmp_path / "ours"), 1, loss_type=types, **more),
        train_dataset=stock["rows"],
        processing_class=tokenizer(),
        plan=whole_plan(1),
        eval_dataset=stock["rows"],
    )
    before = trainer.evaluate()
    trainer.train()
    close(_found(trainer), stock)
    assert before["eval_loss"] == pytest.approx(stock["losses"][0], rel=1e-5)  # TRL's own, untouched
    forget_accelerate()


def test_every_loss_of_a_pair_is_compared() -> None:
    from hbp.integrations.preference import LOSSES_OF_A_PAIR

    mark = test_one_process_learns_each_loss_as_trl_does.pytestmark[0]  # type: ignore[attr-defined]
    assert sorted(LOSSES_OF_A_PAIR) == sorted(kind for types, _ in mark.args[1] for kind in types)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"loss_type": "aot"}, {}, "loss_type='aot' is not among"),
        ({"f_divergence_type": "js_divergence"}, {}, "f_divergence_type=js_divergence"),
        ({"ld_alpha": 0.5}, {}, "ld_alpha=0.5"),
        ({"use_weighting": True}, {}, "use_weighting=True"),
        ({"precompute_ref_log_probs": True}, {}, "precompute_ref_log_probs"),
        ({}, {"loss": "sum"}, "args.loss_type says"),
        ({}, {"train_dataset": [{"input_ids": [1, 2]}]}, "columns input_ids and lacks chosen_ids, prompt_ids"),
        ({}, {"train_dataset": pair_rows()[1:]}, "made for other data .16 samples. than this .14 rows"),
        ({}, {"train_dataset": [{**pair_rows()[0], "chosen_ids": []}]}, "row 0 has an answer without tokens"),
        ({}, {"apart": True}, "the plan parts the pair of sample 0"),
        ({}, {"plan": plan(2)}, "made for 2 ranks but 1 are running"),
    ],
)
def test_what_a_plan_of_pairs_cannot_have_is_refused(
    folder: str, tmp_path: Path, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    from transformers import AutoModelForCausalLM

    from hbp.integrations.trl import HBPDPOTrainer, pair_lengths

    if given.pop("apart", False):
        ids = [0, 2, 1, 3, *range(4, 16)]
        given = {"plan": plan_of([(0, 0, 0, 1, 0, ids)], pair_lengths(pair_rows())[0], 1)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    given = {"plan": plan(1), "train_dataset": pair_rows(), **given}
    with pytest.raises(HbpError, match=message) as caught:
        HBPDPOTrainer(model, args=arguments(str(tmp_path), 1, **options), processing_class=tokenizer(), **given)
    assert "\n" not in str(caught.value)


def test_a_store_of_pairs_is_taken_and_one_of_samples_refused() -> None:
    from hbp.integrations.pair_rows import as_pair_rows, check_pairs

    class Store:
        def __init__(self, part: list[int]) -> None:
            self.part = np.array(part, np.int8)
            self.lengths, self.loss_tokens = np.full(4, 3, np.int32), np.full(4, 2, np.int32)

        def __len__(self) -> int:
            return 4

        def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return np.full(3, index, np.int32), np.ones(3, np.uint8)

    rows = as_pair_rows(Store([1, 2, 1, 2]))
    assert rows.sample(2)[0].tolist() == [2, 2, 2]
    check_pairs(plan_of([(0, 0, 0, 1, 0, [2, 3, 0, 1])], rows.lengths, 1), rows)
    with pytest.raises(HbpError, match="sample 1 from its other side"):
        check_pairs(plan_of([(0, 0, 0, 1, 0, [1, 0, 2, 3])], rows.lengths, 1), rows)
    with pytest.raises(HbpError, match="sample 2 is no side of a preference pair"):
        as_pair_rows(Store([1, 2, 0, 0]))

"""Tokens and masks are those that TRL's trainers make of the same records. Needs TRL (`pip install '.[bench]'`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

from chat_families import FAMILIES, byte_level, metaspace, unmarked

from hbp.data.build import recipe_of
from hbp.data.record import encode_records, load_tokenizer, training_version

SHIPPED = Path(pytest.importorskip("trl").__path__[0]) / "chat_templates"
OF_PARTS = {"idefics3_training", "smolvlm_training", "llava_next_training"}
"""These drop plain text, which we hand over as a part."""
TRAINING = sorted({path.stem for path in SHIPPED.glob("*_training.jinja")} - OF_PARTS)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
MESSAGES: list[dict[str, Any]] = [
    {"messages": [user("q1 "), assistant("a1")]},
    {"messages": [{"role": "system", "content": "S"}, user("q1"), assistant("a1"), user("q2"), assistant(" a2\n")]},
    {"messages": [assistant("hi"), user("q"), assistant("a")]},
    {"messages": [user("q1"), assistant("<think>\nr1\n</think>\n\na1"), user("q2"), assistant("a2")]},
    {"messages": [user("q1"), assistant("a1", reasoning_content="r1"), user("q2"), assistant("a2", thinking="r2")]},
    {
        "messages": [user("2+3"), assistant("", tool_calls=[CALL]), {"role": "tool", "name": "add", "content": "5"}],
        "tools": '[{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}]',
    },
    {"messages": [user("q1"), assistant("a1")], "chat_template_kwargs": {"enable_thinking": False}},
]
RAW = [
    {"prompt": "the cat ", "completion": "sat on the mat"},
    {"prompt": "the c", "completion": "at sat"},
    {"prompt": "the cat", "completion": " sat</s>"},
    {"prompt": "", "completion": "the mat 😀"},
    {"prompt": "question\n", "completion": "\nanswer"},
]
CHAT = [
    {"prompt": [user("q1")], "completion": [assistant("a1")]},
    {"prompt": [user("q1"), assistant("a1"), user(" q2 ")], "completion": [assistant(" a2")]},
    {"prompt": [{"role": "system", "content": "S"}, user("q")], "completion": [assistant("<think>\nr\n</think>\n\na")]},
]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
    )


def by_sft(model: Any, tokenizer: Any, records: list[dict[str, Any]], folder: Path, **options: Any) -> list[Any]:
    """Token ids and what is learnt of them, as ``SFTTrainer`` prepares the records."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(str(folder), report_to=[], use_cpu=True, max_length=None, bf16=False, **options)
    trainer = SFTTrainer(model, settings, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    return [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in trainer.train_dataset]


def ours(tokenizer: Any, records: list[dict[str, Any]], reading: Any = None) -> list[Any]:
    outcomes = encode_records(records, tokenizer, reading)
    assert [outcome.error for outcome in outcomes] == [None] * len(records)
    return [(sample.input_ids.tolist(), sample.loss_mask.tolist()) for o in outcomes for sample in o.samples]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "phi3"])
def test_assistant_only_loss(family: str, model: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = FAMILIES[family]
    records = MESSAGES[:4]
    assert ours(tokenizer, records) == by_sft(model, tokenizer, records, tmp_path, assistant_only_loss=True)


@pytest.mark.parametrize("tokenizer", [byte_level, metaspace])
def test_raw_prompt_and_completion(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    assert ours(tokenizer(), RAW) == by_sft(model, tokenizer(), RAW, tmp_path)


@pytest.mark.parametrize("family", ["chatml", "qwen3", "deepseek-r1-distill", "mistral"])
def test_chat_prompt_and_completion(family: str, model: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES[family])
    assert ours(tokenizer, CHAT) == by_sft(model, tokenizer, CHAT, tmp_path)


def test_text(model: Any, tmp_path: Path) -> None:
    records = [{"text": "the cat sat"}, {"text": " on the mat</s>"}]
    assert ours(metaspace(), records) == by_sft(model, metaspace(), records, tmp_path)


def test_pairs(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES["qwen3"])
    chat = [
        {"prompt": [user("q")], "chosen": [assistant("a1")], "rejected": [assistant(" a2 b")]},
        {"prompt": [user("q"), assistant("b"), user("c")], "chosen": [assistant("<think>\nr\n</think>\n\na")],
         "rejected": [assistant("a")]},
    ]  # fmt: skip
    raw = [
        {"prompt": "the c", "chosen": "at sat", "rejected": "ar sat"},
        {"prompt": "q ", "chosen": "a", "rejected": "b"},
    ]
    implicit = [{"chosen": [user("q"), assistant("a1")], "rejected": [user("q"), assistant("a2")]}]
    for records in (chat, raw, implicit):
        settings = DPOConfig(str(tmp_path), report_to=[], use_cpu=True, max_length=None, bf16=False)
        trainer = DPOTrainer(
            model, copy.deepcopy(model), settings, train_dataset=Dataset.from_list(records), processing_class=tokenizer
        )
        rows = [
            (row["prompt_ids"] + row[f"{side}_ids"], [0] * len(row["prompt_ids"]) + [1] * len(row[f"{side}_ids"]))
            for row in trainer.train_dataset
            for side in ("chosen", "rejected")
        ]
        assert ours(tokenizer, records) == rows


@pytest.mark.parametrize("name", TRAINING)
def test_trls_own_templates(name: str) -> None:
    """Marked ones equal ``apply_chat_template`` to the token, the stock ones have its token ids."""
    tokenizer = byte_level()
    taken = 0
    for template in (f"{name.removesuffix('_training')}.jinja", f"{name}.jinja"):
        tokenizer.chat_template = (SHIPPED / template).read_text()
        for record in (one for one in MESSAGES if "tools" not in one):
            (outcome,) = encode_records([record], tokenizer)
            if outcome.error:
                assert "never reads" in outcome.error or "refused by the chat template" in outcome.error
                continue
            variables = record.get("chat_template_kwargs", {})
            wanted = tokenizer.apply_chat_template(
                record["messages"], return_dict=True, return_assistant_tokens_mask=True, **variables
            )
            np.testing.assert_array_equal(outcome.samples[0].input_ids, wanted["input_ids"])
            if template == f"{name}.jinja":
                taken += 1
                np.testing.assert_array_equal(outcome.samples[0].loss_mask, wanted["assistant_masks"])
    assert taken


def test_template_by_name(tmp_path: Path) -> None:
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = byte_level()
    for stock in ("qwen3", "deepseek_r1_distill", "gemma"):
        tokenizer.chat_template = (SHIPPED / f"{stock}.jinja").read_text()
        tokenizer.save_pretrained(tmp_path / stock)
        wanted = get_training_chat_template(tokenizer)
        assert load_tokenizer(str(tmp_path / stock), "training").chat_template == wanted
        assert load_tokenizer(str(tmp_path / stock), f"{stock}_training").chat_template == wanted
        assert load_tokenizer(str(tmp_path / stock)).chat_template == tokenizer.chat_template


def test_every_stock_template_has_the_version_that_trl_takes() -> None:
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = byte_level()
    stock = [SHIPPED / f"{name.removesuffix('_training')}.jinja" for name in TRAINING]
    assert len(stock) > 12
    for path in stock:
        tokenizer.chat_template = path.read_text()
        assert training_version(tokenizer) == (f"{path.stem}_training", get_training_chat_template(tokenizer))


@pytest.mark.parametrize("stock", ["qwen3", "deepseek_r1_distill", "qwen2_5"])
def test_a_stock_template_in_a_run_that_names_none(stock: str, model: Any, tmp_path: Path) -> None:
    """Conversations in TRL's training version, prompts with completions in the stock one: as ``SFTTrainer`` does."""
    tokenizer = byte_level()
    tokenizer.chat_template = (SHIPPED / f"{stock}.jinja").read_text()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of(str(tmp_path / "tokenizer"))
    assert f"TRL's {stock}_training" in recipe.layout and "data.chat_template: own" in recipe.layout
    talks = [MESSAGES[0], MESSAGES[1], MESSAGES[3]]  # what the case data-qwen3-multiturn-refused holds, and more
    loaded = load_tokenizer(recipe.tokenizer)
    assert ours(loaded, talks, recipe.reading) == by_sft(model, tokenizer, talks, tmp_path, assistant_only_loss=True)
    assert ours(loaded, CHAT, recipe.reading) == by_sft(model, tokenizer, CHAT, tmp_path)
    kept = recipe_of(recipe.tokenizer, "own")
    assert kept.reading.conversations is None and kept.identity != recipe.identity
    for record, (ids, _) in zip(talks, ours(loaded, talks, kept.reading), strict=True):
        assert ids == tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
    assert (stock == "qwen3") is ("earlier answers otherwise" in kept.layout)

"""Masks of templates without marks equal those that transformers makes of the same templates with marks."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from chat_families import AFTER_THE_END, FAMILIES, TOKENIZERS, TOOLS, byte_level, unmarked
from transformers import PreTrainedTokenizerBase

from hbp.data.record import Encoded, encode_records

Talk = list[dict[str, Any]]


EXACT = "char_to_token" not in inspect.getsource(PreTrainedTokenizerBase.apply_chat_template)
"""Older transformers lose spans that begin or end where no token does."""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def answer(content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": content}


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
THOUGHTS = ("<think>\nr1\n</think>\n\na1", "<think>\nr2\n</think>\n\na2")
TALKS: dict[str, Talk] = {
    "one": [user("the cat "), assistant("sat")],
    "many": [user("q1"), assistant(" a1\n"), user("q2 "), assistant("a2"), user("\nq3"), assistant("😀 中")],
    "system": [{"role": "system", "content": "Be kind."}, user("q1"), assistant("a1"), user("q2"), assistant("a2")],
    "no thinking": [{"role": "system", "content": "Short. /no_think"}, user("q1"), assistant("a1")],
    "assistant first": [assistant("hi"), user("q"), assistant("a")],
    "user last": [user("q1"), assistant("a1"), user("q2")],
    "two in a row": [user("q1"), assistant("a1"), assistant("a2")],
    "thoughts": [user("q1"), assistant(THOUGHTS[0]), user("q2"), assistant(THOUGHTS[1])],
    "same words": [user("a"), assistant("a"), user("a"), assistant("a"), user("assistant"), assistant("assistant")],
    "empty": [user("q1"), assistant(""), user("q2"), assistant("a2")],
}  # fmt: skip
WITH_TOOLS: dict[str, Talk] = {
    "call": [user("2+3?"), assistant("", tool_calls=[ADD]), answer("5"), assistant("5.")],
    "call, then on": [
        user("2+3?"), assistant("", tool_calls=[ADD]), answer("5"), assistant("5."),
        user("and 4?"), assistant("", tool_calls=[ADD]), answer("6"), assistant("6."),
    ],
}  # fmt: skip
SCHEMA = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]


def encoded(tokenizer: Any, record: dict[str, Any]) -> Encoded | None:
    """None where the record is refused."""
    (outcome,) = encode_records([record], tokenizer)
    return None if outcome.error else outcome.samples[0]


def reference(tokenizer: Any, talk: Talk, **options: Any) -> Any:
    """None where the template refuses the conversation."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True, **options)
    except (jinja2.TemplateError, TypeError):
        return None


def learnt(tokenizer: Any, sample: Encoded) -> list[str]:
    """Texts of the runs of tokens that are learnt."""
    edges = np.flatnonzero(np.diff([0, *sample.loss_mask, 0]))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def compare(family: str, tokenizer: Any, talk: Talk, **fields: Any) -> bool:
    """Marked and unmarked against transformers; whether the family takes the conversation at all."""
    record = {"messages": talk, **fields}
    tokenizer.chat_template = FAMILIES[family]
    wanted = reference(tokenizer, talk, **fields)
    marked = encoded(tokenizer, record)
    tokenizer.chat_template = unmarked(FAMILIES[family])
    plain = encoded(tokenizer, record)
    if wanted is None:
        assert marked is None and plain is None
        return False
    assert marked is not None and plain is not None
    for sample in (marked, plain):
        np.testing.assert_array_equal(sample.input_ids, wanted["input_ids"])
    if EXACT:
        np.testing.assert_array_equal(marked.loss_mask, wanted["assistant_masks"])
    if family not in AFTER_THE_END:
        np.testing.assert_array_equal(plain.loss_mask, marked.loss_mask)
    return True


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_the_marked_templates(family: str, kind: str) -> None:
    taken = [name for name, talk in TALKS.items() if compare(family, TOKENIZERS[kind](), talk)]
    assert {"one", "many", "user last", "thoughts"} <= set(taken)


@pytest.mark.parametrize("family", sorted(TOOLS))
@pytest.mark.parametrize("talk", WITH_TOOLS)
def test_tools_and_calls(family: str, talk: str) -> None:
    tokenizer = byte_level()
    assert compare(family, tokenizer, WITH_TOOLS[talk], tools=SCHEMA)
    sample = encoded(tokenizer, {"messages": WITH_TOOLS[talk], "tools": SCHEMA})
    assert sample is not None
    said = "".join(learnt(tokenizer, sample))
    assert said.count('{"a": 2}') == len([m for m in WITH_TOOLS[talk] if "tool_calls" in m])
    assert (
        "adds" not in said and "tool_response" not in said and "functions.add<" not in said.replace("to=functions", "")
    )


@pytest.mark.parametrize(("family", "field"), [("qwen3", "reasoning_content"), ("harmony", "thinking")])
def test_reasoning_in_a_field_of_its_own(family: str, field: str) -> None:
    talk = [user("q1"), assistant("a1", **{field: "r1"}), user("q2"), assistant("a2", **{field: "r2"})]
    tokenizer = byte_level()
    assert compare(family, tokenizer, talk)
    (outcome,) = encode_records([{"messages": talk}], tokenizer)
    said = learnt(tokenizer, outcome.samples[0])
    assert "r2" in said[1] and "r1" not in said[0]
    assert outcome.notes == (
        "the chat template leaves out reasoning (data.chat_template: training keeps it where TRL knows the template)",
    )


words = st.text("ab c1.,{}<|>é中😀\n ", max_size=12).map(str.strip).filter(bool)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.booleans())
@settings(max_examples=8, deadline=None)
def test_any_words_in_any_family(turns: list[tuple[str, str]], thinking: bool) -> None:
    talk = [
        m
        for asked, said in turns
        for m in (user(asked), assistant(f"<think>\n{asked}\n</think>\n\n{said}" if thinking else said))
    ]
    for family in FAMILIES:
        assert compare(family, byte_level(), talk)


def test_qwen3_over_several_turns() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES["qwen3"])
    talk = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
    sample = encoded(tokenizer, {"messages": talk})
    assert sample is not None
    assert learnt(tokenizer, sample) == ["a1<|im_end|>\n", "<think>\n\n</think>\n\na2<|im_end|>\n"]


def test_generation_prompt_that_opens_a_think_block() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = unmarked(FAMILIES["deepseek-r1-distill"])
    talk = [user("q1"), assistant("a1"), user("q2"), assistant("a2")]
    sample = encoded(tokenizer, {"messages": talk})
    assert sample is not None
    assert learnt(tokenizer, sample) == ["a1<｜end▁of▁sentence｜>", "a2<｜end▁of▁sentence｜>"]


def test_a_first_turns_header_is_not_learnt() -> None:
    tokenizer = byte_level()
    for family in ("chatml", "qwen1.5", "qwen2.5", "llama3", "zephyr"):
        tokenizer.chat_template = unmarked(FAMILIES[family])
        sample = encoded(tokenizer, {"messages": TALKS["assistant first"]})
        assert sample is not None
        assert [text[:2].strip("<") for text in learnt(tokenizer, sample)] == ["hi", "a"]


def test_turns_that_are_not_to_be_learnt() -> None:
    tokenizer = byte_level()
    talk = [
        user("a"),
        assistant("no", weight=0),
        user("b"),
        assistant("yes", weight=1),
        user("c"),
        assistant("no", train=False),
    ]
    for template in (FAMILIES["chatml"], unmarked(FAMILIES["chatml"])):
        tokenizer.chat_template = template
        sample = encoded(tokenizer, {"messages": talk})
        assert sample is not None and learnt(tokenizer, sample) == ["yes<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        # Not message by message, and an end that stands behind the last turn alone.
        ("{{ messages | map(attribute='content') | join('|') }}{{ '|' if add_generation_prompt else '.' }}",
         "cannot be told apart"),
        # The answer of a tool inside the turn of the assistant that called it.
        ("{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}"
         "{% if not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
         "{{ messages[loop.index0 + 1].content }}{% endif %};{% elif m.role == 'user' %}U:{{ m.content }};{% endif %}"
         "{% endfor %}",
         "has message 2 (tool), which the chat template writes into the assistant's turn"),
    ],
)  # fmt: skip
def test_never_a_guess(template: str, why: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    talk = [user("q1"), assistant("a1"), {"role": "tool", "content": "r1"}, assistant("a2")]
    (outcome,) = encode_records([{"messages": talk}], tokenizer)
    assert outcome.error is not None and why in outcome.error


def test_a_template_that_joins_turns_is_taken_where_prefixes_tell() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% set parts = namespace(all='') %}{% for m in messages %}"
        "{% set parts.all = parts.all + m.role + ':' + m.content + ';' %}{% endfor %}{{ parts.all }}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    sample = encoded(tokenizer, {"messages": [user("q1"), assistant("a1"), user("q2"), assistant("a2")]})
    assert sample is not None and learnt(tokenizer, sample) == ["a1;", "a2;"]

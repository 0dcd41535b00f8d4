"""Every field reaches the text, or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("transformers")

from chat_families import FAMILIES, byte_level, unmarked

from hbp.data.record import Outcome, Reading, encode_records

U, A = {"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}
TOOL = {"type": "function", "function": {"name": "get", "description": "gets", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "get", "arguments": {"key": "value"}}}
TALK_WITH_CALL = [U, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "9"}, A]
# In the manner of Qwen2.5's before it knew tools: unknown roles are passed over, calls are written by name.
NAMES_CALLS = (
    "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}{{ '<|im_start|>' + m.role + '\n' + "
    "m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def outcome(template: str, record: Any, **reading: Any) -> Outcome:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    (one,) = encode_records([record], tokenizer, Reading(**reading))
    return one


def text(template: str, record: Any, **reading: Any) -> str:
    one = outcome(template, record, **reading)
    assert one.error is None
    return str(byte_level().decode(one.samples[0].input_ids))


def refusal(template: str, record: Any, **reading: Any) -> str:
    one = outcome(template, record, **reading)
    assert one.error is not None and not one.samples and "\n" not in one.error
    return one.error


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [U, A], "tools": [TOOL]}, "has `tools`, which the chat template never reads"),
        ({"messages": [U, A], "documents": [{"text": "d"}]}, "has `documents`, which the chat template never reads"),
        ({"messages": [U, {**A, "reasoning_content": "sat"}]}, "has `reasoning_content` in message 1, which the chat"),
        ({"messages": [U, {**A, "emotion": "joy"}]}, "has `emotion` in message 1, which the chat template never reads"),
        ({"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}}, "`chat_template_kwargs.enable_"),
        ({"messages": [U, A], "label": False}, "has `label`, which nothing here reads"),
        ({"text": "once", "label": 1}, "has `label`, which nothing here reads"),
        ({"prompt": "a", "completion": "b", "label": False}, "has `label`, which nothing here reads"),
        ({"messages": TALK_WITH_CALL}, "has message 2 (tool), which the chat template leaves out"),
    ],
)  # fmt: skip
def test_what_no_template_reads_is_refused_by_name(record: Any, why: str) -> None:
    message = refusal(NAMES_CALLS, record)
    assert why in message
    assert "data.ignore" in message or "data.chat_template" in message or "remove it" in message


def test_calls_are_not_dropped() -> None:
    assert "has `tool_calls` in message 1, which the chat template never reads" in refusal(
        FAMILIES["chatml"], {"messages": TALK_WITH_CALL}
    )
    r1 = unmarked(FAMILIES["deepseek-r1-distill"]).replace(
        "{% for call in message.tool_calls %}", "{% for call in [] %}"
    )
    r1 += "{# tool_calls #}{% if messages[0].tool_calls %}{% endif %}"
    assert "has `tool_calls` in message 1, which the chat template leaves out" in refusal(
        r1, {"messages": TALK_WITH_CALL}
    )


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "deepseek-r1-distill"])
@pytest.mark.parametrize("arguments", [{"key": "value"}, '{"key": "value"}'])
def test_arguments_of_calls_take_the_form_of_the_template(family: str, arguments: Any) -> None:
    """An object and its JSON text say the same; the text is not written as a text once more."""
    call = {"type": "function", "function": {"name": "get", "arguments": arguments}}
    talk = [U, {**TALK_WITH_CALL[1], "tool_calls": [call]}, TALK_WITH_CALL[2], A]
    said = text(unmarked(FAMILIES[family]), {"messages": talk})
    assert '{"key": "value"}' in said and "\\" not in said and "'key'" not in said


def test_a_tool_that_the_template_leaves_out() -> None:
    first_tool_only = FAMILIES["qwen2.5"].replace("{% for tool in tools %}", "{% for tool in tools[:1] %}")
    other = {"type": "function", "function": {"name": "put", "description": "", "parameters": {}}}
    assert "has the tool 'put', which the chat template leaves out" in refusal(
        first_tool_only, {"messages": [U, A], "tools": [TOOL, other]}
    )


def test_a_system_prompt_that_the_template_leaves_out() -> None:
    """Mistral's writes it into the last message if that is the user's; in training it never is."""
    template = FAMILIES["mistral"].replace("loop.first and system is defined", "loop.last and system is defined")
    talk = [{"role": "system", "content": "Be kind."}, U, A]
    assert "has message 0 (system), which the chat template leaves out" in refusal(template, {"messages": talk})


def test_fields_that_the_template_reads_reach_it() -> None:
    template = (
        "{{ mood }} {{ date_string }}{% for d in documents %}[{{ d.text }}]{% endfor %}"
        "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }} {{ m.feeling }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    record = {
        "messages": [{**U, "name": "Ann", "feeling": "calm"}, A], "documents": '[{"text": "paper"}]',
        "chat_template_kwargs": {"mood": "glad"}, "date_string": "today",
    }  # fmt: skip
    assert text(template, record) == "glad today[paper]user Ann: cat calm\nassistant : mat \n"


def test_a_template_that_writes_messages_out_whole_reads_every_field() -> None:
    template = "{% for message in messages %}{{ message | tojson }}\n{% endfor %}"
    assert '"feeling": "calm"' in text(template, {"messages": [U, {**A, "feeling": "calm"}]})


def test_names_and_scores_are_passed_over_with_a_note() -> None:
    one = outcome(FAMILIES["chatml"], {"id": 7, "score": 0.5, "messages": [{**U, "name": "Ann"}, A]})
    assert one.error is None
    assert one.notes == (
        "passed over: field `id`",
        "passed over: field `score`",
        "the chat template never reads `name` of messages",
    )


def test_ignored_fields_do_not_reach_the_template() -> None:
    record = {"messages": [U, {**A, "reasoning_content": "sat"}], "label": 1, "tools": [TOOL]}
    one = outcome(FAMILIES["chatml"], record, ignore=("label", "tools", "reasoning_content"))
    assert one.error is None and one.notes == ()
    record = {"messages": [U, {**A, "reasoning_content": "sat"}]}
    assert "sat" in text(FAMILIES["qwen3"], record)
    assert "sat" not in text(FAMILIES["qwen3"], record, ignore=("reasoning_content",))


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "harmony"])
def test_parts_of_text_are_text(family: str) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    wanted = text(FAMILIES[family], {"messages": [{"role": "user", "content": "the cat"}, A]})
    assert text(FAMILIES[family], {"messages": [{"role": "user", "content": parts}, A]}) == wanted


def test_what_a_template_in_the_stock_ones_place_refuses_says_so() -> None:
    refuses = "{{ raise_exception('no') }}{% for m in messages %}{% endfor %}"
    said = refusal(FAMILIES["chatml"], {"messages": [U, A]}, conversations=refuses)
    assert said.startswith("is refused by the chat template (no)") and "data.chat_template=own" in said
    assert outcome(FAMILIES["chatml"], {"prompt": [U], "completion": [A]}, conversations=refuses).error is None


def test_a_template_of_parts_gets_parts() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert text(template, {"messages": [U, A]}) == "user:cat;assistant:mat;"
    many = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, A]
    assert text(template, {"messages": many}) == "user:ab;assistant:mat;"


def test_a_stop_that_is_not_learnt_is_noted() -> None:
    note = "the chat template ends turns without a token of their own: no stop is learnt"
    assert outcome(FAMILIES["chatml"], {"messages": [U, A]}).notes == ()
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert outcome(bare, {"messages": [U, A]}).notes == (note,)


def test_an_empty_turn_of_the_assistant_is_noted() -> None:
    """It is one way in which a model comes to say nothing; a call or reasoning beside it is something said."""
    note = "an assistant's turn is empty: to end it at once is learnt (`weight: 0` there: it is not)"
    empty = {**A, "content": " "}
    assert outcome(FAMILIES["chatml"], {"messages": [U, empty, U, A]}).notes == (note,)
    assert outcome(FAMILIES["chatml"], {"messages": [U, {**empty, "weight": 0}, U, A]}).notes == ()
    assert outcome(FAMILIES["qwen2.5"], {"messages": TALK_WITH_CALL}).notes == ()


def test_nulls_of_parquet_are_noted() -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": {"key": "value", "other": None}}}
    talk = [U, {**TALK_WITH_CALL[1], "tool_calls": [call]}, TALK_WITH_CALL[2], A]
    (note,) = outcome(FAMILIES["qwen2.5"], {"messages": talk}).notes
    assert note.startswith("tools or calls hold null")
    assert outcome(FAMILIES["qwen2.5"], {"messages": TALK_WITH_CALL}).notes == ()


def test_tools_as_text_say_the_same() -> None:
    wanted = text(FAMILIES["qwen2.5"], {"messages": [U, A], "tools": [TOOL]})
    assert text(FAMILIES["qwen2.5"], {"messages": [U, A], "tools": json.dumps([TOOL])}) == wanted
    assert '"gets"' in wanted

"""Every field of a conversation reaches the chat template, or is refused by name.

Before rendering: what the template never reads is refused (tools on a template that has no tools), identifiers and
scores are passed over with a note, and two things are put into the form that the template takes, found out by trying:
content, which most templates take as text and a few as parts of text, and a call's arguments, which some take as an
object and write as JSON and others as the JSON text (written once more, the model would learn quotes within quotes).

After rendering: a message, call or tool of which the text holds no trace is refused, reasoning that the template left
out is noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

from hbp.data.record.messages import Chat, Message, text_of
from hbp.data.record.templates import REASONING, Rendering, Span, compile_template, render
from hbp.errors import HbpError

_NAMES = """
    id _id idx index uid uuid row_id sample_id example_id conversation_id conv_id dialog_id dialogue_id prompt_id
    question_id turn_id message_id parent_id tool_call_id name hash md5 sha256 __index_level_0__ dataset
    dataset_name source source_id origin subset split category categories task task_id task_name task_type type
    topic subject domain tag tags label_source lang language locale country license url urls title path file
    filename meta metadata extra_info timestamp time created created_at updated_at date model model_name generator
    annotator author user_id score scores rating ratings quality difficulty reward score_chosen score_rejected
    margin toxicity moderation redacted length num_tokens token_count n_tokens num_turns turns turn
"""
PASSED_OVER = frozenset(_NAMES.split())
"""Fields that name, place or score a record or message and say nothing that could be learnt."""

Arguments = Literal["as given", "object", "text"]


def fit_to_template(
    chat: Chat, text: str, special_tokens: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> tuple[Chat, list[str]]:
    """The conversation in the form that a template takes, and notes on what it passes over.

    Args:
        chat: as the record says it.
        text: source of the template.
        special_tokens: ``tokenizer.special_tokens_map``.
        ignore: fields of messages that are left out on purpose.

    Raises:
        HbpError: the template never reads something that the conversation has; names it.
    """
    template = compile_template(text)
    for key, value in (("tools", chat.tools), ("documents", chat.documents)):
        if value and key not in template.variables:
            raise HbpError(f"has `{key}`, which the chat template never reads; {_mend(key)}")
    if unread := [key for key in chat.variables if key not in template.variables]:
        raise HbpError(f"has `chat_template_kwargs.{unread[0]}`, which the chat template never reads; remove it")
    read = {key: value for key, value in chat.fields.items() if key in template.variables}
    notes = passed_over({key: value for key, value in chat.fields.items() if key not in read})
    keys = {key for message in chat.messages for key in message} - {"role", "content"}
    if any(template.reads(key) for key in REASONING):
        keys -= set(REASONING)
    for key in sorted(keys - set(ignore)):
        if template.reads(key):
            continue
        if key not in PASSED_OVER:
            number = next(i for i, message in enumerate(chat.messages) if key in message)
            raise HbpError(f"has `{key}` in message {number}, which the chat template never reads; {_mend(key)}")
        notes.append(f"the chat template never reads `{key}` of messages")
    if _holds_null(chat.tools) or any(_holds_null(message.get("tool_calls")) for message in chat.messages):
        notes.append("tools or calls hold null, as Parquet has where other records have a field; JSON text has none")
    tokens = tuple(sorted((key, str(value)) for key, value in special_tokens.items()))
    messages = [_fitted(message, text, tokens, ignore) for message in chat.messages]
    return replace(chat, messages=messages, variables={**chat.variables, **read}, fields={}), notes


def _holds_null(value: Any) -> bool:
    """Whether an object somewhere within has a field that is null."""
    if isinstance(value, Mapping):
        return any(one is None or _holds_null(one) for one in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))


def passed_over(fields: Mapping[str, Any]) -> list[str]:
    """Notes on fields of a record that mean nothing for training.

    Raises:
        HbpError: there is one that might; names it.
    """
    for key in fields:
        if key not in PASSED_OVER:
            raise HbpError(f"has `{key}`, which nothing here reads; {_mend(key)}")
    return [f"passed over: field `{key}`" for key in fields]


def _mend(key: str) -> str:
    return f"take another template (data.chat_template), or name it in data.ignore: [{key}]"


def _fitted(message: Message, text: str, tokens: tuple[tuple[str, str], ...], ignore: tuple[str, ...]) -> Message:
    if any(key in message for key in ignore):
        message = {key: value for key, value in message.items() if key in ("role", "content") or key not in ignore}
    content = message.get("content")
    if content and (form := _content_form(text, tokens)) != "as given":
        if form == "text" and isinstance(content, list):
            message = {**message, "content": text_of(content)}
        if form == "parts" and isinstance(content, str):
            message = {**message, "content": [{"type": "text", "text": content}]}
    if "tool_calls" in message:
        taken = _arguments_form(text, tokens)
        message = {**message, "tool_calls": [_call(call, taken) for call in message["tool_calls"]]}
    return message


def _call(call: Mapping[str, Any], form: Arguments) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _call(call["function"], form)}
    arguments = call.get("arguments")
    if form == "text" and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if form == "object" and isinstance(arguments, str):
        try:
            said = json.loads(arguments)
        except json.JSONDecodeError:
            return dict(call)
        return {**call, "arguments": said} if isinstance(said, Mapping) else dict(call)
    return dict(call)


@lru_cache(maxsize=64)
def _content_form(text: str, tokens: tuple[tuple[str, str], ...]) -> Literal["as given", "text", "parts"]:
    said = "probe"
    as_text = _tried(text, tokens, [{"role": "user", "content": said}])
    as_parts = _tried(text, tokens, [{"role": "user", "content": [{"type": "text", "text": said}]}])
    if as_text is not None and said in as_text:
        return "as given" if as_parts == as_text else "text"
    return "parts" if as_parts is not None and said in as_parts else "as given"


@lru_cache(maxsize=64)
def _arguments_form(text: str, tokens: tuple[tuple[str, str], ...]) -> Arguments:
    def called(arguments: Any) -> str | None:
        function = {"name": "probe", "arguments": arguments}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        return _tried(text, tokens, [{"role": "user", "content": "ask"}, call])

    as_object, as_text = called({"key": "value"}), called('{"key": "value"}')
    if as_text is None or (as_object is not None and '\\"key\\"' in as_text):
        return "as given" if as_object is None else "object"
    return "text" if as_object is None or "{'key'" in as_object else "as given"


def _tried(text: str, tokens: tuple[tuple[str, str], ...], messages: list[Message]) -> str | None:
    try:
        return render(compile_template(text), dict(tokens), messages).text
    except Exception:  # a template raises what its author chose; it does not take this form
        return None


def check_nothing_left_out(chat: Chat, rendering: Rendering) -> list[str]:
    """Notes on reasoning that is not in the text.

    Raises:
        HbpError: a message, a call or a tool is not in the text; names it.
    """
    notes = []
    text = rendering.text
    if any(chat.learnt[number] and _says_nothing(message) for number, message in enumerate(chat.messages)):
        notes.append("an assistant's turn is empty: to end it at once is learnt (`weight: 0` there: it is not)")
    for number, message in enumerate(chat.messages):
        said = text_of(message.get("content")).strip()
        part = text[slice(*rendering.turns[number])] if number in rendering.turns else text
        if not _trace(said.split("</think>")[-1] if message["role"] == "assistant" else said, part):
            raise HbpError(
                f"has message {number} ({message['role']}), which the chat template leaves out; take another template "
                "(data.chat_template) or remove it"
            )
        for call in message.get("tool_calls", ()):
            if call.get("function", call)["name"] not in text:
                raise HbpError(
                    f"has `tool_calls` in message {number}, which the chat template leaves out; take another template "
                    "(data.chat_template)"
                )
        if not _reasoning_in(message, said, text):
            notes.append(
                "the chat template leaves out reasoning (data.chat_template: training keeps it where TRL knows the "
                "template)"
            )
    for tool in chat.tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise HbpError(f"has the tool {name!r}, which the chat template leaves out; take another template")
    return notes


def _says_nothing(message: Message) -> bool:
    return not text_of(message.get("content")).strip() and not any(message.get(k) for k in ("tool_calls", *REASONING))


def _trace(said: str, part: str) -> bool:
    """Whether a text is there, be it trimmed, escaped or changed in places: its longest word is."""
    if said.strip() in part:
        return True
    word = max(said.split(), key=len)
    return word in part or json.dumps(word, ensure_ascii=False)[1:-1] in part


def check_own_words(chat: Chat, rendering: Rendering, spans: Sequence[Span]) -> None:
    """A template may write a tool's answer into the turn of the assistant that called it.

    Raises:
        HbpError: what a tool said would be learnt.
    """
    for number, message in enumerate(chat.messages):
        if number in rendering.written or message["role"] in ("system", "developer", "user", "assistant"):
            continue
        said = text_of(message.get("content")).strip()
        if said and any(said in rendering.text[begin:end] for begin, end in spans):
            raise HbpError(
                f"has message {number} ({message['role']}), which the chat template writes into the assistant's turn; "
                "take a template with {% generation %} marks (data.chat_template)"
            )


def _reasoning_in(message: Message, said: str, text: str) -> bool:
    reasoning = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
    if not reasoning and message["role"] == "assistant" and "</think>" in said:
        reasoning = said.split("</think>")[0].split("<think>")[-1]
    return reasoning.strip() in text
